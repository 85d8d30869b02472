"""Promises of what is measured of the model itself: memory health, guesses of hidden tokens, latency."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rxt_platform.data.batches import collate, derive_seed
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.tokenizer import MASK, SPECIAL_TOKENS
from rxt_platform.evaluation.conversations import Talk
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.latency import latency_by_turn
from rxt_platform.evaluation.masked import masked_tokens
from rxt_platform.evaluation.memory_health import effective_rank, memory_health, slot_similarity
from rxt_platform.evaluation.responders import ReactiveResponder, StatelessResponder
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.evaluations import ALONE, HAT, KITE, WINDOW, Listener, talks_of
from tests.unit.helpers import tiny_config, tiny_model, word_tokenizer

TALKS = talks_of(HAT, KITE, ALONE, replace(HAT, system="Lily plays."))


def model(memory: dict[str, Any] | None = None) -> ReactiveTransformer:
    return tiny_model(tiny_config(memory, vocab_size=word_tokenizer().vocab_size, max_length=WINDOW))


# ---- memory health


def test_equal_slots_have_the_least_rank_and_orthogonal_ones_the_full() -> None:
    row = torch.randn(1, 16, dtype=torch.float64)
    equal, orthogonal = row.expand(8, 16), torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64)).Q.T
    assert float(effective_rank(equal)) == pytest.approx(1 / 8, rel=1e-4)
    assert float(slot_similarity(equal)) == pytest.approx(1.0)
    assert float(effective_rank(orthogonal)) == pytest.approx(1.0)
    assert float(slot_similarity(orthogonal)) == pytest.approx(0.0, abs=1e-12)
    halves = torch.cat([orthogonal[:4], -orthogonal[:4]])  # each direction twice, once the other way round
    assert float(effective_rank(halves)) == pytest.approx(4 / 8, rel=1e-4)
    assert float(slot_similarity(halves)) == pytest.approx(1 / 7)
    wide = torch.eye(4, dtype=torch.float64).repeat(3, 1)  # more slots than channels
    assert float(effective_rank(wide)) == pytest.approx(4 / 12)


def test_effective_rank_is_that_of_the_singular_values() -> None:
    slots = torch.randn(3, 8, 16, dtype=torch.float64)
    shares = torch.linalg.svdvals(slots)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    expected = (-(shares * shares.log()).sum(dim=-1)).exp() / 8
    torch.testing.assert_close(effective_rank(slots), expected)


def test_what_has_no_rank_or_no_second_slot_is_no_number() -> None:
    assert math.isnan(effective_rank(torch.zeros(4, 8, dtype=torch.float64)))
    assert math.isnan(slot_similarity(torch.randn(1, 8)))


@torch.no_grad()
def test_health_follows_the_memory_from_write_to_write() -> None:
    tested = model()
    rows = memory_health(tested, TALKS, 3)["by_write"]
    assert [(row["write"], row["conversations"]) for row in rows] == [(0, 4), (1, 4), (2, 3), (3, 2), (4, 1)]
    memory = tested.initial_memory(torch.tensor([TALKS[1].seed(3)]))
    for turn in TALKS[1].example.turns:
        before, memory = memory, tested.write(memory, torch.tensor([turn]))
    last = rows[-1]  # of the longest conversation alone
    assert last["norm"] == pytest.approx(float(memory.square().mean().sqrt()), rel=1e-5)
    assert last["change"] == pytest.approx(float((memory - before).norm() / before.norm()), rel=1e-5)
    ranks = [float(effective_rank(layer[0].double())) for layer in memory]
    assert last["effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)
    assert rows[0]["change"] is None
    norms = [float(tested.initial_memory(torch.tensor([talk.seed(3)])).square().mean().sqrt()) for talk in TALKS]
    assert rows[0]["norm"] == pytest.approx(sum(norms) / 4, rel=1e-5)


def test_a_memory_that_starts_empty_has_no_rank_before_the_first_write() -> None:
    rows = memory_health(model({"initialization": "zeros"}), TALKS, 0)["by_write"]
    assert rows[0] == {
        "write": 0,
        "conversations": 4,
        "norm": 0.0,
        "change": None,
        "effective_rank": None,
        "slot_similarity": 0.0,
    }
    assert rows[1]["change"] is None
    assert rows[1]["effective_rank"] > 0


def test_gates_are_those_of_each_layer_s_writes() -> None:
    tested = model({"gate": "static", "gate_activation": "sigmoid"})
    tested.memory_attention.layers[1].write_gate.weight.data[:] = torch.linspace(-1, 1, 8)
    gates = memory_health(tested, TALKS, 0)["gates"]
    opened = 1 / (1 + math.exp(-3.0))
    assert gates[0] == pytest.approx({"layer": 1, "mean": opened, "min": opened, "max": opened})
    low, high = (1 / (1 + math.exp(-end)) for end in (-1.0, 1.0))
    assert gates[1] == pytest.approx({"layer": 2, "mean": 0.5, "min": low, "max": high})
    assert not any(layer.write_gate._forward_hooks for layer in tested.memory_attention.layers)
    assert memory_health(model({"gate_activation": "none"}), TALKS, 0)["gates"] == []


# ---- hidden tokens


@torch.no_grad()
def test_hidden_tokens_are_guessed_from_the_rest_of_their_interaction() -> None:
    tested = model()
    loss, correct, count = 0.0, 0, 0
    for talk in TALKS:
        for turn in range(len(talk.conversation.interactions)):
            batch = collate([talk.turn(turn)], [derive_seed(7, "masked", talk.number, turn)], [0], 0.15)
            ids, hidden = batch.ids[0, 0], batch.hidden[0, 0]
            assert (ids[hidden] >= len(SPECIAL_TOKENS)).all()
            logits = tested.mlm_head(tested.encode(ids.masked_fill(hidden, MASK)[None])[-1][0])
            loss += float(F.cross_entropy(logits[hidden], ids[hidden], reduction="sum")) if hidden.any() else 0.0
            correct += int((logits.argmax(-1) == ids)[hidden].sum())
            count += int(hidden.sum())
    for batch_size in (1, 3, 64):
        entry = masked_tokens(tested, TALKS, 7, Bootstrap(len(TALKS), 0), batch_size)
        assert entry["count"] == count
        assert entry["loss"] == pytest.approx(loss / count, rel=1e-5)
        assert entry["accuracy"] == correct / count
    assert set(entry) == {"loss", "accuracy", "count", "intervals"}
    assert set(entry["intervals"]) == {"loss", "accuracy"}


def test_about_fifteen_of_a_hundred_tokens_are_hidden() -> None:
    talk = Conversation(tuple(Interaction("Tom has a red hat. Lily likes cake.", "Nice.") for _ in range(200)))
    (held,) = talks_of(talk)
    ordinary = sum(token >= len(SPECIAL_TOKENS) for turn in held.example.turns for token in turn)
    assert masked_tokens(model(), [held], 0, Bootstrap(1, 0))["count"] == pytest.approx(0.15 * ordinary, rel=0.2)


# ---- latency


def test_latency_has_a_row_for_each_turn_of_the_longest_conversations() -> None:
    rows = latency_by_turn(ReactiveResponder(model()), TALKS, 0, 2)
    assert [(row["turn"], row["conversations"]) for row in rows] == [(1, 2), (2, 2), (3, 1), (4, 1)]
    assert all(row[name] > 0 for row in rows for name in ("prompt_ms", "tokens_per_second", "write_ms"))
    assert latency_by_turn(ReactiveResponder(model()), TALKS, 0, 0) == []


class Clockwork(Listener):
    """Takes 0.5 s to the first token and 1 s more for each interaction that it remembers, 0.1 s to each other token,
    0.25 s to remember; 100 s more for its very first token."""

    model = SimpleNamespace(embedding=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self) -> None:
        super().__init__(lambda prompt, told: "")
        self.now = 100.0
        self.cold = 100.0

    def stream(self, prompts: Any, state: Any, limits: Any, options: Any = None) -> Iterator[list[int | None]]:
        assert (limits, options.stop) == ([16], ())
        self.now += self.cold + 0.5 + len(state[0])
        self.cold = 0.0
        yield [20]
        for _ in range(15):
            self.now += 0.1
            yield [20]

    def remember(self, state: Any, interactions: Any) -> Any:
        self.now += 0.25
        return super().remember(state, interactions)


def test_times_are_medians_of_what_a_user_would_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork = Clockwork()
    monkeypatch.setattr("time.perf_counter", lambda: clockwork.now)
    rows = latency_by_turn(clockwork, [*TALKS[:2], TALKS[3]], 0, 3)  # the last has one more in memory
    assert [row["prompt_ms"] for row in rows] == pytest.approx([500, 1500, 2500, 3500])
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([10.0] * 4)
    assert [row["write_ms"] for row in rows] == pytest.approx([250.0] * 4)
    assert [row["conversations"] for row in rows] == [3, 3, 1, 1]


def test_a_stateless_model_is_timed_the_same_way() -> None:
    baseline = StatelessTransformer(matched_baseline(model().config, 128)).eval()
    rows = latency_by_turn(StatelessResponder(baseline), TALKS, 0, 1)
    assert [row["turn"] for row in rows] == [1, 2, 3, 4]


def test_a_prompt_that_fills_the_window_leaves_one_token_and_no_rate() -> None:
    short = tiny_model(tiny_config(vocab_size=word_tokenizer().vocab_size, max_length=12))
    talk: Talk = replace(
        TALKS[2], example=replace(TALKS[2].example, turns=((2, 5, *[20] * 8, 6, 3),), target_starts=(11,))
    )
    (row,) = latency_by_turn(ReactiveResponder(short), [talk], 0, 1)
    assert row["tokens_per_second"] is None
