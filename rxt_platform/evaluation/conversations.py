"""How well a model answers held-out conversations, with its memory and with the memory reset (DESIGN 2, 5).

Memory is teacher-forced: after each turn the reference answer is written, so that an early mistake does not hide what
the memory can hold. `reset` means the initial memory in place of what was written. Recall is exact match: the answer,
generated greedily, must contain every answer span of the row as whole words; rows without spans must be answered with
the reference answer. Case and punctuation don't count.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, collate, derive_seed
from rxt_platform.data.examples import Example, RowEncoder, TooLong
from rxt_platform.data.rows import Conversation, RowError
from rxt_platform.data.tokenizer import RxtTokenizer, answer_ids
from rxt_platform.errors import DataError
from rxt_platform.evaluation.recall import matches, recall_of
from rxt_platform.model.generation import answer_batch
from rxt_platform.model.loss import target_loss
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.transformer import ReactiveTransformer

_SPARE_TOKENS = 8  # an answer may be this much longer than its reference before it is cut

AnswerTokens = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What `rxt eval` prints. Losses in nats per answer token (`[EOS]` included); recall by distance in turns, and by
    the task that the answer keys name (empty where no row carries keys).
    """

    answer_tokens: AnswerTokens
    memory_reset: AnswerTokens
    recall: dict[str, dict[str, float]]
    recall_by_task: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _Outcome:
    """One question: what it took, and whether it was answered right."""

    distance: int
    task: str | None
    with_memory: bool
    reset: bool


@torch.no_grad()
def evaluate_conversations(
    model: ReactiveTransformer,
    tokenizer: RxtTokenizer,
    talks: Sequence[Conversation],
    seed: int = 0,
    batch_size: int = 50,
    too_long: TooLong = "truncate",
) -> Evaluation:
    """Measure a model on conversations.

    What does not fit the model's window is cut; with `too_long` "quarantine" such a conversation is left out, with
    "fail" it raises DataError, as does an input of which nothing is left.
    """
    model.eval()
    with_memory, reset = _Sums(), _Sums()
    annotated = any(item.recall for talk in talks for item in talk.interactions)
    window = model.config.max_length
    talks, encoded = _fitting(talks, RowEncoder(tokenizer, window, too_long))
    outcomes: list[_Outcome] = []
    for start in range(0, len(talks), batch_size):
        group = talks[start : start + batch_size]
        examples = encoded[start : start + batch_size]
        seeds = [derive_seed(seed, "evaluation", start + i) for i in range(len(group))]
        batch = collate(examples, seeds, range(len(group))).to(model.embedding.weight.device)
        initial = memory = model.initial_memory(batch.seeds)
        for turn in range(batch.ids.shape[1]):
            with_memory.add(model, batch, turn, memory)
            reset.add(model, batch, turn, initial)
            outcomes += _ask(model, tokenizer, group, examples, turn, memory, initial, annotated)
            memory = write_turn(model, batch, turn, memory)
    by_distance: dict[int, list[tuple[bool, bool]]] = defaultdict(list)
    by_task: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for outcome in outcomes:
        by_distance[outcome.distance].append((outcome.with_memory, outcome.reset))
        if outcome.task is not None:
            by_task[outcome.task].append((outcome.with_memory, outcome.reset))
    return Evaluation(
        with_memory.metrics(),
        reset.metrics(),
        {str(distance): recall_of(by_distance[distance]) for distance in sorted(by_distance)},
        {task: recall_of(by_task[task]) for task in sorted(by_task)},
    )


def _fitting(talks: Sequence[Conversation], encoder: RowEncoder) -> tuple[list[Conversation], list[Example]]:
    """The conversations that can be used, and their token ids."""
    kept: list[tuple[Conversation, Example]] = []
    for number, (talk, made) in enumerate(zip(talks, encoder.encode(talks), strict=True), start=1):
        if isinstance(made, RowError):
            if encoder.too_long == "fail":
                raise DataError(f"conversation {number}: {made}: shorten it, or use a model with a longer window")
            continue
        kept.append((talk, made[0]))
    if not kept:
        raise DataError("no conversation fits the model's window: shorten them, or use a model with a longer window")
    return [talk for talk, _ in kept], [example for _, example in kept]


def write_turn(model: ReactiveTransformer, batch: Batch, turn: int, memory: Tensor) -> Tensor:
    """The memory after a turn's reference interaction was written; meaningless in rows that have ended."""
    length = batch.turn_lengths[turn]
    return model.write(memory, batch.ids[:, turn, :length], batch.mask[:, turn, :length])


class _Sums:
    """Summed loss, hits and count of answer tokens."""

    def __init__(self) -> None:
        self.loss, self.correct, self.count = 0.0, 0, 0

    def add(self, model: ReactiveTransformer, batch: Batch, turn: int, memory: Tensor) -> None:
        length = batch.turn_lengths[turn]
        ids, mask = batch.ids[:, turn, :length], batch.mask[:, turn, :length]
        targets = batch.targets[:, turn, :length]
        states = model.decode_states(ids, mask, memory).states
        loss, correct = target_loss(model, states, ids, targets)
        self.loss += float(loss)
        self.correct += int(correct)
        self.count += int(targets.sum())

    def metrics(self) -> AnswerTokens:
        loss = self.loss / self.count
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": self.correct / self.count,
            "count": self.count,
        }


def _ask(
    model: ReactiveTransformer,
    tokenizer: RxtTokenizer,
    talks: Sequence[Conversation],
    examples: Sequence[Example],
    turn: int,
    memory: Tensor,
    initial: Tensor,
    annotated: bool,
) -> list[_Outcome]:
    """The outcome of each question of this turn.

    Where no row carries answer keys (not `annotated`), every follow-up asks for the first turn's text, so that its
    distance is the turn's index.
    """
    questions = [
        (row, talk.interactions[turn])
        for row, talk in enumerate(talks)
        if turn < len(talk.interactions) and (talk.interactions[turn].recall or (turn and not annotated))
    ]
    if not questions:
        return []
    rows = torch.tensor([row for row, _ in questions], device=memory.device)
    prompts = [list(examples[row].turns[turn][: examples[row].target_starts[turn]]) for row, _ in questions]
    replies = [examples[row].turns[turn][examples[row].target_starts[turn] :] for row, _ in questions]
    limits = [len(reply) + _SPARE_TOKENS for reply in replies]
    answers = [
        [
            tokenizer.decode(answer_ids(ids))
            for ids in answer_batch(model, prompts, source[:, rows], SamplingOptions(), limits=limits)
        ]
        for source in (memory, initial)
    ]
    outcomes = []
    for (_, item), remembered, forgotten in zip(questions, *answers, strict=True):
        key = item.recall
        right = [matches(answer, item.reply, key and key.spans) for answer in (remembered, forgotten)]
        outcomes.append(_Outcome(key.distance if key else turn, key and key.task, *right))
    return outcomes
