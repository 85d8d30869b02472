"""Holding conversations: answers are sampled turn by turn over a memory that takes what is said (REF 4).

An episode's memory starts from its stored seed and each answer is drawn from a seed of its own (episode, turn, number),
so the same weights hold the same conversation again, alone or in any batch. Nothing here looks at rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_platform.data.batches import derive_seed
from rxt_platform.data.examples import Ids
from rxt_platform.model.generation import answer_batch, check_written, right_padded
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.episodes import Episode, Rollout


@dataclass(frozen=True)
class RolloutOptions:
    """How answers are drawn: `answers` to each question over the same memory, at `temperature` (0 is greedy) from the
    whole vocabulary. The first of them is written, or with `teacher_forced` the reference. With `keyed_only`, questions
    without an answer key get one answer, for the memory."""

    answers: int = 1
    temperature: float = 1.0
    max_answer_tokens: int | None = None
    teacher_forced: bool = False
    keyed_only: bool = False


@torch.no_grad()
def hold_episodes(model: ReactiveTransformer, episodes: Sequence[Episode], options: RolloutOptions) -> list[Rollout]:
    """Hold all episodes at once, each as it would be alone.

    Raises ModelError for logits or memories that are not finite.
    """
    sampling = SamplingOptions(options.temperature, max_new_tokens=options.max_answer_tokens)
    rollouts = [Rollout(one, [], []) for one in episodes]
    memory = model.initial_memory(torch.tensor([one.seed for one in episodes]))
    live = list(range(len(episodes)))
    for turn in range(max(one.turns for one in episodes)):
        asked = [at for at, row in enumerate(live) if turn >= episodes[row].given]
        answers: dict[int, list[list[int]]] = {}
        if asked:
            answers = dict(
                zip(
                    asked,
                    _answer(model, [episodes[live[at]] for at in asked], turn, _rows(memory, asked), options, sampling),
                    strict=True,
                )
            )
        for at, row in enumerate(live):
            given = answers.get(at, [])
            said = [*episodes[row].prompt(turn), *given[0]] if given and not options.teacher_forced else None
            rollouts[row].answers.append(given)
            rollouts[row].written.append(list(episodes[row].example.turns[turn]) if said is None else said)
        kept = [at for at, row in enumerate(live) if turn + 1 < episodes[row].turns]
        if kept:
            memory = write(model, _rows(memory, kept), [rollouts[live[at]].written[turn] for at in kept])
        live = [live[at] for at in kept]
    return rollouts


def write(model: ReactiveTransformer, memory: Tensor, interactions: Sequence[Sequence[int]]) -> Tensor:
    """The memories [L, B, S, D] after one interaction each. Raises ModelError if they are not finite any more."""
    lengths = torch.tensor([len(one) for one in interactions], device=memory.device)
    ids, mask = right_padded(interactions, lengths)
    written = model.write(memory, ids, mask)
    check_written(written)
    return written


def _answer(
    model: ReactiveTransformer,
    episodes: Sequence[Episode],
    turn: int,
    memory: Tensor,
    options: RolloutOptions,
    sampling: SamplingOptions,
) -> list[list[list[int]]]:
    """The sampled answers to a turn of each episode."""
    numbers = [1 if options.keyed_only and one.asked(turn).recall is None else options.answers for one in episodes]
    prompts = [one.prompt(turn) for one in episodes]
    seeds = [
        derive_seed(one.seed, "answer", turn, which)
        for one, number in zip(episodes, numbers, strict=True)
        for which in range(number)
    ]
    answers = iter(answer_batch(model, prompts, memory, sampling, seeds, copies=numbers))
    return [[next(answers) for _ in range(number)] for number in numbers]


def _rows(memory: Tensor, rows: Ids) -> Tensor:
    return memory[:, torch.tensor(list(rows), dtype=torch.int64, device=memory.device)]
