"""What held-out conversations come to under a policy and its critic."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeldOut:
    """Of some of the conversations, or of all of them.

    sampled  rewards of sampled answers, of those that have one
    greedy   the same of greedy answers; none where only a critic is trained
    right    how many of the `asked` facts are in the greedy answers
    values   what the critic said of the sampled answers, and `worth` which rewards they had; none without one
    """

    sampled: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    right: int = 0
    asked: int = 0
    values: list[float] = field(default_factory=list)
    worth: list[float] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """All of several parts."""
        return cls(
            sampled=list(chain.from_iterable(part.sampled for part in parts)),
            greedy=list(chain.from_iterable(part.greedy for part in parts)),
            right=sum(part.right for part in parts),
            asked=sum(part.asked for part in parts),
            values=list(chain.from_iterable(part.values for part in parts)),
            worth=list(chain.from_iterable(part.worth for part in parts)),
        )

    def metrics(self) -> dict[str, float]:
        """Mean `reward` and `greedy_reward`; `recall`, the share of asked facts that greedy answers hold; with a critic
        `critic_correlation` of its values and the rewards, and `critic_error`, the root of the mean squared one. What
        there was nothing to measure of is left out."""
        found: dict[str, float] = {}
        if self.sampled:
            found["reward"] = float(torch.tensor(self.sampled).mean())
        if self.greedy:
            found["greedy_reward"] = float(torch.tensor(self.greedy).mean())
        if self.asked:
            found["recall"] = self.right / self.asked
        if self.values:
            values, worth = torch.tensor(self.values), torch.tensor(self.worth)
            found["critic_correlation"] = float(correlation(values, worth))
            found["critic_error"] = float((values - worth).pow(2).mean().sqrt())
        return found


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, 0 where one of both does not vary."""
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    norm = one.norm() * other.norm()
    return (one @ other / norm if norm > 0 else torch.zeros(())).float()
