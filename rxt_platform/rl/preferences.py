"""Pairs of answers for direct preference optimisation (REF 3.5), from sampled answers and their rewards."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rxt_platform.rl.episodes import Rollout


def paired(
    rollouts: Sequence[Rollout], rewards: Tensor, scored: Tensor, neutral: bool, teacher_forced: bool = False
) -> tuple[list[Rollout], Tensor]:
    """Of each question the best answer, the worst and, with `neutral`, the one in the middle: and which pairs differ.

    The accepted (best) answer is what the memory takes, unless it is `teacher_forced`. Rewards and `scored` are
    [B, N, G]; the result is [B, N, 2 or 3], all of a question or none: answers that are worth the same give no
    preference. Of equal ones the first is taken.
    """
    number = 3 if neutral else 2
    known = torch.zeros(*scored.shape[:2], number, dtype=torch.bool)
    made = []
    for b, one in enumerate(rollouts):
        written, answers = list(one.written), list[list[list[int]]]()
        for turn, sampled in enumerate(one.answers):
            if not sampled:
                answers.append([])
                continue
            worth = rewards[b, turn].tolist()
            order = sorted(range(len(sampled)), key=lambda at: -worth[at])
            best, worst = order[0], worth.index(min(worth[: len(sampled)]))
            chosen = [best, worst, order[len(order) // 2]][:number]
            answers.append([sampled[at] for at in chosen])
            known[b, turn] = bool(scored[b, turn].all()) and worth[best] > worth[worst]
            if not teacher_forced:
                written[turn] = [*one.episode.prompt(turn), *sampled[best]]
        made.append(Rollout(one.episode, written, answers))
    return made, known


def better_and_worse(
    states: Sequence[Sequence[Sequence[list[int]]]], rewards: Tensor, scored: Tensor
) -> list[list[list[list[int]]]]:
    """Of what is read of each answer, by episode and turn, that of the best and that of the worst, or nothing where all
    are worth the same. Rewards and `scored` are [B, N, G]."""
    made = []
    for b, row in enumerate(states):
        pairs: list[list[list[int]]] = []
        for n, group in enumerate(row):
            worth = rewards[b, n, : len(group)].tolist()
            known = bool(group) and bool(scored[b, n, : len(group)].all())
            best, worst = (worth.index(max(worth)), worth.index(min(worth))) if known else (0, 0)
            pairs.append([group[best], group[worst]] if known and worth[best] > worth[worst] else [])
        made.append(pairs)
    return made
