"""What MRL asks about answers: their rewards, and the values of the states before them. In this process or a service.

A *state* is what the critic reads before an answer is given: the interaction before and the next query (REF 4).
"""

from collections.abc import Sequence
from typing import Protocol

from rxt_platform.model.encoder_model import RxTEncoder
from rxt_platform.rl.rewards import Reward, ScoredTurn


class Scorer(Protocol):
    """Gives rewards."""

    def score(self, conversations: Sequence[Sequence[ScoredTurn]]) -> list[list[Reward]]:
        """The reward of every follow-up (all turns but the first) of each conversation.

        Raises RewardError when they can't be had: no reward is ever made up.
        """
        ...


class Critic(Protocol):
    """Gives values."""

    def values(self, states: Sequence[Sequence[int]], version: int) -> list[float]:
        """V of each state's token ids, by exactly that version of the critic's weights.

        Raises RewardError when they can't be had.
        """
        ...


class RewardService(Scorer, Critic, Protocol):
    """Rewards and values from elsewhere, such as Ray Serve; the trainer publishes its critic's weights to it."""

    def publish(self, version: int, critic: RxTEncoder) -> None:
        """Make a version's weights known before they are asked for. Called by rank 0 only."""
        ...


def state_ids(previous: Sequence[int], prompt: Sequence[int], window: int) -> list[int]:
    """`[BOS][Q]q[A]a[EOS]` of the interaction before, then `[Q]q[A]` of the next query, at most `window` ids.

    What does not fit is cut from the start: the query is what the value is most about.
    """
    return [*previous, *prompt[1:]][-window:]
