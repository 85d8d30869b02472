"""What is minimised: the clipped policy objective of sampled answers, its regularisers, and preferences (REF 3.5, 4).

All of it is made of log-probabilities of answer tokens, flat [tokens], with the number of the answer that each token
belongs to. An answer counts as the mean over its tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The sampled tokens of some answers: what each had as log-probability, and `answer` int64 [tokens] in order."""

    answer: Tensor
    answers: int

    def mean(self, values: Tensor) -> Tensor:
        """Of each answer, over its tokens: [tokens] -> [answers]."""
        counts = torch.bincount(self.answer, minlength=self.answers).clamp(min=1)
        sums = values.new_zeros(self.answers).index_add(0, self.answer, values)
        return sums / counts

    def sum(self, values: Tensor) -> Tensor:
        """Of each answer, over its tokens."""
        return values.new_zeros(self.answers).index_add(0, self.answer, values)


def clipped_objective(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The loss of each token and whether it was clipped: -min(r A, clip(r, 1 - clip, 1 + clip) A), r = p_new / p_old.

    PPO, arXiv:1707.06347, eq. 7; all arguments [tokens], the advantage that of the token's answer.
    """
    ratio = (new - old).exp()
    plain, limited = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, limited), limited < plain


def divergence(new: Tensor, reference: Tensor) -> Tensor:
    """An unbiased, never negative estimate of KL(new || reference) from tokens sampled from `new`, [tokens].

    r - 1 - log r, r = p_reference / p_new (Schulman, "Approximating KL divergence", k3); 0 where both agree.
    """
    log_ratio = reference - new
    return log_ratio.exp() - 1 - log_ratio


def preference_loss(
    accepted: Tensor, rejected: Tensor, accepted_reference: Tensor, rejected_reference: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """DMPO of pairs of answers [pairs]: -log sigmoid(beta ((u_w - u_l) - (u_w^ref - u_l^ref))), and that margin.

    u is an answer's mean log-probability over its own memory, the reference's over the reference's (REF 3.5).
    """
    margin = (accepted - rejected) - (accepted_reference - rejected_reference)
    return -F.logsigmoid(beta * margin), margin


def anchor(neutral: Tensor, neutral_reference: Tensor) -> Tensor:
    """Anchored DMPO: |u_n - u_n^ref| of neutral answers: they shall stay as likely as they were."""
    return (neutral - neutral_reference).abs()
