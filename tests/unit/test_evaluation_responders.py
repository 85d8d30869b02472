"""Promises of the one interface to models: answer tokens only, the memory or the whole history, checked by hand."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform.data.examples import Example
from rxt_platform.data.tokenizer import EOS
from rxt_platform.evaluation.outcomes import TokenSums
from rxt_platform.evaluation.responders import ReactiveResponder, StatelessResponder, answer_all
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.generation import answer_batch
from rxt_platform.model.sampling import GREEDY
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import conversation, tiny_config, tiny_model

TALKS = (conversation((3, 4), (2, 6), (4, 2), seed=1), conversation((6, 2), (3, 3), (2, 5), seed=2))
WINDOW = 34
SEEDS = [5, 6]


def turn(number: int) -> list[Example]:
    """The turn of both conversations."""
    return [Example((talk.turns[number],), (talk.target_starts[number],)) for talk in TALKS]


def ids_of(number: int) -> list[tuple[int, ...]]:
    return [tuple(one.turns[0]) for one in turn(number)]


@cache
def reactive() -> ReactiveTransformer:
    model = tiny_model()
    model.decoder.head.bias.data[EOS] += 0.5
    return model


@cache
def stateless() -> StatelessTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return StatelessTransformer(matched_baseline(tiny_config(), WINDOW)).eval()


@torch.no_grad()
def by_hand(logits: Tensor, ids: list[int], start: int) -> TokenSums:
    """The tokens from `start` on, predicted from the position before."""
    predicted, wanted = logits[start - 1 : -1], torch.tensor(ids[start:])
    loss = F.cross_entropy(predicted, wanted, reduction="sum")
    return TokenSums(float(loss), int((predicted.argmax(-1) == wanted).sum()), len(wanted))


def assert_same(found: TokenSums, expected: TokenSums) -> None:
    assert (found.correct, found.count) == (expected.correct, expected.count)
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)


@torch.no_grad()
def test_a_reactive_turn_is_measured_over_its_memory_on_answer_tokens_only() -> None:
    model, responder = reactive(), ReactiveResponder(reactive())
    state = responder.remember(responder.start(SEEDS), ids_of(0))
    for row, (one, sums) in enumerate(zip(turn(1), responder.turn_loss(turn(1), state), strict=True)):
        memory = model.initial_memory(torch.tensor(SEEDS[row : row + 1]))
        memory = model.write(memory, torch.tensor([TALKS[row].turns[0]]))
        ids = list(one.turns[0])
        assert_same(sums, by_hand(model.decode(torch.tensor([ids]), None, memory)[0], ids, one.target_starts[0]))
        assert sums.count == len(ids) - one.target_starts[0]
        assert ids[-1] == EOS


@torch.no_grad()
def test_a_reactive_answer_is_that_of_the_conversation_alone() -> None:
    model, responder = reactive(), ReactiveResponder(reactive())
    state = responder.remember(responder.start(SEEDS), ids_of(0))
    prompts = [list(one.turns[0][: one.target_starts[0]]) for one in turn(1)]
    answers = answer_all(responder, prompts, state, [6, 3])
    assert [len(answer) <= limit for answer, limit in zip(answers, [6, 3], strict=True)] == [True, True]
    for row, answer in enumerate(answers):
        alone = responder.rows(state, [row])
        assert answer_batch(model, [prompts[row]], alone, GREEDY, limits=[[6, 3][row]]) == [answer]


def test_reactive_rows_and_reset_are_memories() -> None:
    responder = ReactiveResponder(reactive())
    state = responder.start(SEEDS)
    assert torch.equal(state, reactive().initial_memory(torch.tensor(SEEDS)))
    assert torch.equal(responder.rows(state, [1]), reactive().initial_memory(torch.tensor(SEEDS[1:])))


@torch.no_grad()
def test_the_whole_history_is_all_earlier_turns_before_the_next() -> None:
    model, responder = stateless(), StatelessResponder(stateless())
    state = responder.remember(responder.start(SEEDS), ids_of(0))
    for row, (one, sums) in enumerate(zip(turn(1), responder.turn_loss(turn(1), state), strict=True)):
        before = list(TALKS[row].turns[0])
        ids = [*before, *one.turns[0]]
        expected = by_hand(model.decode(torch.tensor([ids]))[0], ids, len(before) + one.target_starts[0])
        assert_same(sums, expected)
        alone = by_hand(model.decode(torch.tensor([one.turns[0]]))[0], list(one.turns[0]), one.target_starts[0])
        assert abs(sums.loss - alone.loss) > 1e-3


@torch.no_grad()
def test_without_history_only_the_turn_is_read() -> None:
    model, responder = stateless(), StatelessResponder(stateless(), "none")
    state = responder.remember(responder.start(SEEDS), ids_of(0))
    for one, sums in zip(turn(1), responder.turn_loss(turn(1), state), strict=True):
        ids = list(one.turns[0])
        assert_same(sums, by_hand(model.decode(torch.tensor([ids]))[0], ids, one.target_starts[0]))


@torch.no_grad()
@pytest.mark.parametrize("history", ["full", "none"])
def test_a_stateless_answer_goes_on_from_history_and_query(history: str) -> None:
    model, responder = stateless(), StatelessResponder(stateless(), history)  # type: ignore[arg-type]
    state = responder.remember(responder.start(SEEDS), ids_of(0))
    prompts = [list(one.turns[0][: one.target_starts[0]]) for one in turn(1)]
    answers = answer_all(responder, prompts, state, [5, 5])
    for row, answer in enumerate(answers):
        ids = [*(TALKS[row].turns[0] if history == "full" else ()), *prompts[row]]
        for token in answer:
            assert int(model.decode(torch.tensor([ids]))[0, -1].argmax()) == token
            ids.append(token)
        assert len(answer) == 5 or answer[-1] == EOS


@torch.no_grad()
def test_of_a_history_too_long_the_oldest_whole_turns_are_left_out() -> None:
    model, responder = stateless(), StatelessResponder(stateless())
    state = responder.start(SEEDS)
    for number in range(3):
        state = responder.remember(state, ids_of(number))
    lengths = [[len(one) for one in talk.turns] for talk in TALKS]
    assert lengths == [[11, 12, 10], [12, 10, 11]]
    for row, (one, sums) in enumerate(zip(turn(0), responder.turn_loss(turn(0), state), strict=True)):
        kept = [token for told in TALKS[row].turns[1:] for token in told]
        assert len(kept) + len(one.turns[0]) <= WINDOW < sum(lengths[row]) + len(one.turns[0])
        ids = [*kept, *one.turns[0]]
        assert_same(sums, by_hand(model.decode(torch.tensor([ids]))[0], ids, len(kept) + one.target_starts[0]))
    prompt = list(TALKS[0].turns[1][:5])
    (answer,) = answer_all(responder, [prompt], responder.rows(state, [0]), [20])
    # Beside the prompt and 20 tokens, not even the last turn fits.
    assert answer[0] == int(model.decode(torch.tensor([prompt]))[0, -1].argmax())
    (shorter,) = answer_all(responder, [prompt], responder.rows(state, [0]), [19])
    assert shorter[0] == int(model.decode(torch.tensor([[*TALKS[0].turns[2], *prompt]]))[0, -1].argmax())


@torch.no_grad()
@pytest.mark.parametrize(("answer", "kept"), [(4, (1, 2)), (5, (2,))])
def test_a_history_fits_to_the_last_token(answer: int, kept: tuple[int, ...]) -> None:
    model, responder = stateless(), StatelessResponder(stateless())
    state = responder.start([1])
    for ids in TALKS[0].turns:
        state = responder.remember(state, [ids])
    one = conversation((4, answer), seed=5)
    ids = [*(token for number in kept for token in TALKS[0].turns[number]), *one.turns[0]]
    assert (len(ids) == WINDOW) == (answer == 4)
    (sums,) = responder.turn_loss([one], state)
    start = len(ids) - len(one.turns[0]) + one.target_starts[0]
    assert_same(sums, by_hand(model.decode(torch.tensor([ids]))[0], ids, start))


def test_a_turn_longer_than_the_window_leaves_no_history() -> None:
    responder = StatelessResponder(stateless())
    state = responder.remember(responder.start([1]), [ids_of(0)[0]])
    long = conversation((20, WINDOW - 24), seed=4)
    alone = responder.turn_loss([long], responder.start([1]))
    assert responder.turn_loss([long], state) == alone
