"""How well a model answers held-out conversations, with its memory and with the memory reset (DESIGN 2, 5).

Memory is teacher-forced: after each turn the reference answer is written, so that an early mistake does not hide what
the memory can hold. `reset` means the initial memory in place of what was written. Recall is exact match: the answer,
generated greedily, must contain the row's answer span as whole words; rows without a span must be answered with the
reference answer. Case and punctuation don't count.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, collate, derive_seed
from rxt_platform.data.corpus import encode_conversation
from rxt_platform.data.rows import Conversation
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.evaluation.recall import matches, recall_of
from rxt_platform.model.generation import answer_batch
from rxt_platform.model.loss import target_loss
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.transformer import ReactiveTransformer

_SPARE_TOKENS = 8  # an answer may be this much longer than its reference before it is cut

AnswerTokens = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What `rxt eval` prints. Losses in nats per answer token (`[EOS]` included); recall by distance in turns."""

    answer_tokens: AnswerTokens
    memory_reset: AnswerTokens
    recall: dict[str, dict[str, float]]


@torch.no_grad()
def evaluate_conversations(
    model: ReactiveTransformer,
    tokenizer: RxtTokenizer,
    talks: Sequence[Conversation],
    seed: int = 0,
    batch_size: int = 50,
) -> Evaluation:
    """Measure a model on conversations. Raises DataError when a query fills the model's window."""
    model.eval()
    with_memory, reset = _Sums(), _Sums()
    annotated = any(item.recall for talk in talks for item in talk.interactions)
    window = model.config.max_length
    encoded = [
        encode_conversation(talk, tokenizer, window, f"conversation {number}")
        for number, talk in enumerate(talks, start=1)
    ]
    asked: dict[int, list[tuple[bool, bool]]] = defaultdict(list)
    for start in range(0, len(talks), batch_size):
        group = talks[start : start + batch_size]
        examples = encoded[start : start + batch_size]
        seeds = [derive_seed(seed, "evaluation", start + i) for i in range(len(group))]
        batch = collate(examples, seeds, range(len(group))).to(model.embedding.weight.device)
        initial = memory = model.initial_memory(batch.seeds)
        for turn in range(batch.ids.shape[1]):
            with_memory.add(model, batch, turn, memory)
            reset.add(model, batch, turn, initial)
            for distance, *outcome in _ask(model, tokenizer, group, turn, memory, initial, annotated):
                asked[distance].append((bool(outcome[0]), bool(outcome[1])))
            memory = write_turn(model, batch, turn, memory)
    recall = {str(distance): recall_of(asked[distance]) for distance in sorted(asked)}
    return Evaluation(with_memory.metrics(), reset.metrics(), recall)


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
    turn: int,
    memory: Tensor,
    initial: Tensor,
    annotated: bool,
) -> list[tuple[int, bool, bool]]:
    """(distance, right with memory, right with memory reset) for each question of this turn.

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
    prompts = [tokenizer.encode_query(item.query) for _, item in questions]
    limits = [len(tokenizer.encode(item.answer)) + _SPARE_TOKENS for _, item in questions]
    answers = [
        [
            tokenizer.decode(ids)
            for ids in answer_batch(model, prompts, source[:, rows], SamplingOptions(), limits=limits)
        ]
        for source in (memory, initial)
    ]
    outcomes = []
    for (_, item), remembered, forgotten in zip(questions, *answers, strict=True):
        span, distance = (item.recall.span, item.recall.distance) if item.recall else (None, turn)
        right = [matches(answer, item.answer, span) for answer in (remembered, forgotten)]
        outcomes.append((distance, right[0], right[1]))
    return outcomes
