"""From rewards to advantages: which answers were better than expected, and by how much (REF 4)."""

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["group", "impo", "gae"]
Normalisation = Literal["none", "batch", "step"]
_SMALLEST = 1e-6
_STEP_LIMIT = 10.0  # of per-step normalised advantages (REF 4)


def group_advantages(rewards: Tensor, scored: Tensor, by_deviation: bool = False) -> Tensor:
    """R less the mean over the other answers to the same question, [B, N, G], 0 where nothing was `scored`.

    The baseline leaves the answer itself out (RLOO, arXiv:2402.14740), which is unbiased: with G answers it is
    G / (G - 1) times R less the mean of all. `by_deviation` divides by the group's standard deviation (GRPO,
    arXiv:2402.03300); equal rewards give 0 either way.
    """
    known = scored.float()
    count = known.sum(dim=-1, keepdim=True)
    mean = (rewards * known).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    least, most = (rewards.masked_fill(~scored, end).aminmax(dim=-1, keepdim=True) for end in (torch.inf, -torch.inf))
    centred = (rewards - mean) * known * (most.max > least.min)  # of equal ones the mean is rounded
    if by_deviation:
        variance = centred.pow(2).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        return centred * (variance > _SMALLEST**2) / (variance.sqrt() + _SMALLEST)
    return centred * count / (count - 1).clamp(min=1)


def value_advantages(rewards: Tensor, scored: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """IMPO: A = R - V of each answer [B, N, G], V [B, N] that of its question; and the critic's targets [B, N].

    The target is the immediate reward, the mean over the answers; nothing is bootstrapped.
    """
    known = scored.float()
    returns = (rewards * known).sum(dim=-1) / known.sum(dim=-1).clamp(min=1)
    return (rewards - values[..., None]) * known, returns


def generalised_advantages(
    rewards: Tensor, scored: Tensor, values: Tensor, discount: float, decay: float
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv:1506.02438) over the asked turns of an episode, and the critic's targets A + V, [B, N] each.

    delta_t = R_t + discount * V_next - V_t, with the next asked turn's value and none after the last;
    A_t = delta_t + discount * decay * A_next. `rewards` [B, N, 1]: of the trajectory.
    """
    rewards, known = rewards[..., 0], scored[..., 0]
    advantages = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards), 2, dtype=rewards.dtype)  # value and advantage of the next asked turn
    for turn in reversed(range(rewards.shape[1])):
        delta = rewards[:, turn] + discount * following[:, 0] - values[:, turn]
        found = delta + discount * decay * following[:, 1]
        here = torch.stack([values[:, turn], found], dim=1)
        following = torch.where(known[:, turn, None], here, following)
        advantages[:, turn] = torch.where(known[:, turn], found, 0.0)
    return advantages[..., None], (advantages + values) * known


def normalised(advantages: Tensor, scored: Tensor, how: Normalisation) -> Tensor:
    """Advantages [B, N, G] less their mean over their standard deviation: of the whole `batch`, of each `step` (turn,
    limited to +-10), or as they are. Equal ones become 0."""
    if how == "none":
        return advantages
    dims = (0, 1, 2) if how == "batch" else (0, 2)
    known = scored.to(advantages.dtype)
    count = known.sum(dim=dims, keepdim=True).clamp(min=1)
    mean = (advantages * known).sum(dim=dims, keepdim=True) / count
    centred = (advantages - mean) * known
    deviation = (centred.pow(2).sum(dim=dims, keepdim=True) / count).sqrt()
    made = torch.where(deviation > _SMALLEST, centred / deviation.clamp(min=_SMALLEST), 0.0)
    return made.clamp(-_STEP_LIMIT, _STEP_LIMIT) if how == "step" else made
