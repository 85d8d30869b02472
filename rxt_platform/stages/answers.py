"""Sampled answers under a model: their tokens' log-probabilities over the memory that the episodes' writes led to.

One forward for whole episodes, with gradient through the writes: a late answer's reward reaches the first write.
A question's answers share a row: its memory and prompt are read once, and each answer goes on from there. The experts'
balance is then that of the row, where the prompt counts once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rxt_platform.data.tokenizer import PAD
from rxt_platform.model.documents import Documents
from rxt_platform.model.loss import log_probabilities
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.episodes import Experience
from rxt_platform.rl.objective import Tokens
from rxt_platform.stages.base import Phase
from rxt_platform.stages.memory_pretraining import relative_change, squared_change
from rxt_platform.stages.unroll import unrolled

_WIDEST = 1024
"""Tokens of a row that several answers share, at most: its attention is dense, that of an answer alone is not."""


@dataclass(frozen=True)
class Answered:
    """The answers of a part of an update under the model. A answers, n sampled tokens in all.

    place      int64 [A, 3]: episode, turn and number of each answer
    targets    bool [A, T]: its sampled tokens, and `tokens` which answer each of the n belongs to
    log_probs  [n] of the sampled tokens, at the temperature that they were sampled at
    entropy    [n] of the distributions that they were drawn from
    states     [n, D] of the decoder, from which they were drawn
    balance    the experts' balance in the answers' rows, summed over the answers
    usage      real tokens sent to each expert [M, E]
    moved      sum over writes of sqrt(write) * MSE(new, old)
    relative   sum over writes of the memory's relative change, without gradient
    """

    place: Tensor
    targets: Tensor
    tokens: Tokens
    log_probs: Tensor
    entropy: Tensor
    states: Tensor
    balance: Tensor
    usage: Tensor
    moved: Tensor
    relative: Tensor

    def of_tokens(self, values: Tensor) -> Tensor:
        """From [B, N, G, T] the values of the sampled tokens, [n]."""
        rows = values[self.place[:, 0], self.place[:, 1], self.place[:, 2], : self.targets.shape[1]]
        return rows[self.targets]

    def of_answers(self, values: Tensor) -> Tensor:
        """From [B, N, G] the values of the answers, [A]."""
        return values[self.place[:, 0], self.place[:, 1], self.place[:, 2]]

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of the sampled tokens [n] at their places in zeros of the shape [B, N, G, T]."""
        made = torch.zeros_like(like)
        rows = torch.zeros(self.targets.shape, dtype=made.dtype, device=made.device)
        rows[self.targets] = values.to(made.dtype)
        made[self.place[:, 0], self.place[:, 1], self.place[:, 2], : self.targets.shape[1]] = rows
        return made


def answered(
    model: ReactiveTransformer,
    part: Experience,
    phase: Phase,
    bptt_window: int | Literal["all"] = "all",
    temperature: float = 1.0,
) -> Answered:
    """Teacher-force the sampled answers over the memories of their episodes."""
    written = part.written
    memories, writes = unrolled(model, written, phase, bptt_window, grouped=False)
    relative = moved = torch.zeros((), device=written.ids.device)
    for turn, (old, new) in enumerate(writes, start=1):
        present = written.turns[:, turn]
        relative = relative + (relative_change(old.detach(), new.detach()) * present).sum()
        moved = moved + (squared_change(old, new, turn) * present).sum()
    place = part.answered.nonzero()
    real_rows = float(len(place) > 0)
    if not len(place):  # a forward all the same: under ZeRO-3 all ranks must call the same modules
        place = torch.zeros(1, 3, dtype=torch.int64, device=written.ids.device)
    ids = part.ids[place[:, 0], place[:, 1], place[:, 2]]
    targets = part.targets[place[:, 0], place[:, 1], place[:, 2]]
    real = (ids != PAD) | targets  # [PAD] may have been sampled
    real[:, 0] = True
    rows = _rows(place, ids, targets, real)
    asked = place[rows.first]
    # rows of one memory lie together: [L, B * N, S, D] at (turn, episode)
    stacked = torch.stack(memories, dim=1).flatten(1, 2)
    memory = stacked[:, asked[:, 1] * len(written.rows) + asked[:, 0]]
    frozen = "embedding" not in phase.trains
    decoded = model.decode_states(rows.ids, rows.real, memory, frozen_embedding=frozen, documents=rows.documents)
    sampled = targets[:, 1:]
    states = decoded.states[rows.row[:, None].expand_as(sampled)[sampled], rows.column[:, :-1][sampled]]
    log_probs, entropy = log_probabilities(model, states, ids[:, 1:][sampled], temperature)
    owner = torch.arange(len(place), device=ids.device)[:, None].expand_as(targets)[targets]
    return Answered(
        place=place,
        targets=targets,
        tokens=Tokens(owner, len(place)),
        log_probs=log_probs,
        entropy=entropy,
        states=states,
        balance=(decoded.balance[rows.texts] * rows.answers).sum() * real_rows,
        usage=decoded.usage * real_rows,
        moved=moved,
        relative=relative,
    )


@dataclass(frozen=True)
class _Rows:
    """Answers of one question in a row: [BOS][Q]query[A], then each answer from there on. R rows, A answers."""

    ids: Tensor  # [R, W]
    real: Tensor  # bool [R, W]
    documents: Documents | None  # each row is one, and each answer a branch of it; none where each has its own row
    texts: Tensor  # [R], where the balance of each row is
    first: Tensor  # [R], the first answer of a row
    answers: Tensor  # [R], how many it has
    row: Tensor  # [A]
    column: Tensor  # [A, T], where each token of an answer's own row is


def _rows(place: Tensor, ids: Tensor, targets: Tensor, real: Tensor) -> _Rows:
    """From answers [A, T] with their prompts, those of one question (`place`, episode and turn) one after the other."""
    prompt = targets.int().argmax(dim=1).clamp(min=1)
    length = real.sum(dim=1) - prompt
    row, answers = _rows_of_answers(place, prompt, length)
    first = answers.cumsum(0) - answers
    before = length.cumsum(0) - length
    offset = before - before[first][row]
    step = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    answer = step >= prompt[:, None]
    column = torch.where(answer, step + offset[:, None], step)
    at = (row[:, None].expand_as(ids)[real], column[real])
    shape = (len(answers), int((prompt + offset + length).max()))

    def spread(values: Tensor, fill: int) -> Tensor:
        made = values.new_full(shape, fill)
        made[at] = values[real]  # the prompt's tokens once for each answer, always the same
        return made

    there, number = spread(real, False), torch.arange(shape[0], device=ids.device)
    if len(answers) == len(ids):
        return _Rows(spread(ids, PAD), there, None, number, first, answers, row, column)
    branch = torch.arange(len(ids), device=ids.device)[:, None] + 1
    documents = Documents(
        2 * number[:, None] + (~there).long(),
        spread(step, 0),
        2 * shape[0],
        spread(torch.where(answer, branch, 0), 0),
    )
    return _Rows(spread(ids, PAD), there, documents, 2 * number, first, answers, row, column)


def _rows_of_answers(place: Tensor, prompt: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each answer [A], and how many each row has [R]: as many of one question as are not too wide."""
    _, question, counts = place[:, :2].unique_consecutive(dim=0, return_inverse=True, return_counts=True)
    number = torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts)[question]
    longest = torch.zeros_like(counts).scatter_reduce(0, question, length, "amax")[question].clamp(min=1)
    fit = ((_WIDEST - prompt) // longest).clamp(min=1)
    rows = torch.stack([question, number // fit], dim=1)
    _, row, answers = rows.unique_consecutive(dim=0, return_inverse=True, return_counts=True)
    return row, answers
