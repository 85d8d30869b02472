"""What tells the variants from one another: heads, gates and memory attention against plain formulas (REF 1)."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rxt_platform.config.model import AttentionConfig
from rxt_platform.model.attention import Attention, RotaryEmbedding
from rxt_platform.model.encoder import near_zero_memory
from rxt_platform.model.layers import rebalance
from rxt_platform.model.memory import ResidualGate
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import gradients, padded, rows_of, tiny_model
from tests.unit.variants import (
    ATTENTIONS,
    CONFIGS,
    heads,
    recomputed,
    variant,
)

# ---- heads


def turn(x: Tensor, base: float) -> Tensor:
    """Rotary positions 0, 1, ... of `x` [T, head size], as complex numbers (arXiv:2104.09864)."""
    size = x.shape[-1]
    angles = torch.arange(len(x))[:, None] * base ** (-torch.arange(0, size, 2) / size)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.exp(1j * angles)).flatten(-2)


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return x * (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * norm.weight


def plain_attention(
    layer: Attention, x: Tensor, source: Tensor, turn_query: bool, turn_key: bool, causal: bool = False
) -> Tensor:
    """`x` [T, D] reads `source` [S, D], head by head, as REF 1.4 says it."""
    queries, keys, size = layer.query_heads, layer.key_value_heads, layer.head_size
    reads = []
    for head in range(max(queries, keys)):
        mine, theirs = (head, head // (queries // keys)) if queries >= keys else (head % queries, head)
        query = x @ layer.query.weight[mine * size : (mine + 1) * size].T
        key = source @ layer.key.weight[theirs * size : (theirs + 1) * size].T
        value = source @ layer.value.weight[theirs * size : (theirs + 1) * size].T
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = normed(query, layer.query_norm), normed(key, layer.key_norm)
        query, key = turn(query, 100.0) if turn_query else query, turn(key, 100.0) if turn_key else key
        scores = query @ key.T / size**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) == 1, -torch.inf)
        reads.append(scores.softmax(dim=-1) @ value)
    read = torch.cat(reads, dim=-1)
    if layer.gate is not None:
        read = read * (x @ layer.gate.weight.T).sigmoid()
    read = read @ layer.output.weight.T
    return read if layer.output.bias is None else read + layer.output.bias


def attention_of(settings: dict[str, Any]) -> Attention:
    """An attention of 4 nominal heads of 8 channels, with norms that are not all ones."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = Attention(32, 8, AttentionConfig.model_validate(settings), 1e-6)
        for norm in (layer.query_norm, layer.key_norm):
            if norm is not None:
                norm.weight.data.uniform_(0.5, 2.0)
    return layer


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_a_plain_loop_over_heads(name: str) -> None:
    layer = attention_of(ATTENTIONS[name])
    x, source = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2)) * 2
    rotary = RotaryEmbedding(8, 100.0)(torch.arange(7))
    with torch.no_grad():
        own = layer.attend(x[None], layer.keys_values(x[None], rotary), rotary, causal=True)[0]
        torch.testing.assert_close(own, plain_attention(layer, x, x, True, True, causal=True), atol=2e-6, rtol=1e-5)
        read = layer.attend(x[None], layer.keys_values(source[None]), rotary)[0]
        torch.testing.assert_close(read, plain_attention(layer, x, source, True, False), atol=2e-6, rtol=1e-5)
        write = layer.attend(x[None], layer.keys_values(source[None], rotary))[0]
        torch.testing.assert_close(write, plain_attention(layer, x, source, False, True), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [heads(2, 2, query_key_norm=True), heads(4, 2, query_key_norm=True)])
def test_normed_keys_have_unit_size_before_the_rotation_and_queries_no_size_that_counts(settings: Any) -> None:
    layer = Attention(32, 8, AttentionConfig.model_validate(settings), 1e-6)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        key, _ = layer.keys_values(x)
        torch.testing.assert_close(key.pow(2).mean(dim=-1), torch.ones(2, 2, 7), atol=1e-3, rtol=0)
        before = layer.attend(x, layer.keys_values(x))
        layer.query.weight *= 3
        torch.testing.assert_close(layer.attend(x, layer.keys_values(x)), before, atol=1e-4, rtol=0)


# ---- gates

OLD, NEW = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0, 8.0], [0.0, 1.0]]])  # means of sum: 8, 4


def blended(gates: list[float], tanh: bool) -> Tensor:
    """Old and new slots with a gate's value each, worked out by hand (REF 1.8)."""
    value = torch.tensor(gates)[:, None]
    return (1 + value.tanh()) * NEW + (1 - value.tanh()) * OLD if tanh else NEW.lerp(OLD, (-value).sigmoid())


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize(
    ("kind", "per_slot", "parameters", "gates"),
    [
        ("static", True, {"weight": [0.5, -0.25]}, [0.5, -0.25]),
        ("static", False, {"weight": [0.5]}, [0.5, 0.5]),
        ("elementwise", True, {"weight": [0.125, -0.5]}, [1.0, -2.0]),
        ("elementwise", False, {"weight": [0.125]}, [1.0, 0.5]),
        ("linear", True, {"linear.weight": [[0.0, 0.25], [0.25, -0.5]], "linear.bias": [0, 1.5]}, [1.0, 1.5]),
        ("linear", False, {"linear.weight": [[0.25, -0.5]], "linear.bias": [0.5]}, [0.5, 0.5]),
    ],
)
def test_gates_blend_by_their_formula(
    activation: Any, kind: Any, per_slot: bool, parameters: dict[str, Any], gates: list[float]
) -> None:
    gate = ResidualGate(2, kind, activation, per_slot)
    gate.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in parameters.items()})
    torch.testing.assert_close(gate(OLD, NEW), blended(gates, activation == "tanh"))


@pytest.mark.parametrize("kind", ["static", "elementwise", "linear"])
def test_no_gate_adds_and_has_no_parameters(kind: Any) -> None:
    gate = ResidualGate(2, kind, "none")
    assert list(gate.parameters()) == []
    assert torch.equal(gate(OLD, NEW), OLD + NEW)


# ---- memory attention


def plain_write(model: ReactiveTransformer, memory: Tensor, encoded: Tensor) -> Tensor:
    """The memory [L, S, D] after `encoded` [L, T, D] was written, as REF 1.8 says it; gates are tested above."""
    attention, kind = model.memory_attention, model.config.memory.variant
    size = model.config.layers // model.config.memory.groups
    written = []
    for i, layer in enumerate(attention.layers):
        slots = memory[i]
        if kind != "simple":
            own = normed(slots, layer.self_norm)
            source = own
            if kind != "self":
                assert attention.mean_norm is not None
                group = [memory[j] for j in range(len(memory)) if j // size == i // size]
                source = normed(sum(group, torch.zeros_like(slots)) / len(group), attention.mean_norm)
            if kind in ("self-interlayer", "grouped-self-interlayer"):
                source = layer.inner_gate(own[None], source[None])[0]
            read = plain_attention(layer.self_attention, own, source, False, False)
            slots = layer.self_gate(slots[None], read[None])[0]
        query, tokens = normed(slots, layer.memory_norm), normed(encoded[i], layer.encoded_norm)
        update = plain_attention(layer.write_attention, query, tokens, False, True)
        written.append(layer.write_gate(slots[None], update[None])[0])
    return torch.stack(written)


@pytest.mark.parametrize("gate_self_attention", [True, False])
@pytest.mark.parametrize(
    ("kind", "groups"),
    [("simple", 1), ("self", 1), ("interlayer", 1), ("self-interlayer", 1), ("grouped-self-interlayer", 2)],
)
def test_writing_is_the_plain_formula(kind: str, groups: int, gate_self_attention: bool) -> None:
    settings = {"variant": kind, "groups": groups, "gate_self_attention": gate_self_attention}
    model = tiny_model(variant(memory=settings, layers=4, rope_base=100.0))
    for name, parameter in model.memory_attention.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(len(name)))
    memory, encoded = model.initial_memory(torch.tensor([1])), torch.tensor(rows_of(9))
    with torch.no_grad():
        states = model.encode(encoded)
        written = model.write_states(memory, states)[:, 0]
        torch.testing.assert_close(written, plain_write(model, memory[:, 0], states[:, 0]), atol=2e-6, rtol=1e-5)
    gates = {"self_gate", "inner_gate", "write_gate"} & {
        key.split(".")[2] for key, _ in model.memory_attention.named_parameters() if "layers.0" in key
    }
    expected = {"write_gate"}
    expected |= {"inner_gate"} if kind.endswith("self-interlayer") else set()
    expected |= {"self_gate"} if gate_self_attention and kind != "simple" else set()
    assert gates == expected


@pytest.mark.parametrize(
    ("kind", "groups", "seen"),
    [
        ("simple", 1, ["1000", "0100", "0010", "0001"]),
        ("self", 1, ["1000", "0100", "0010", "0001"]),
        ("interlayer", 1, ["1111"] * 4),
        ("self-interlayer", 1, ["1111"] * 4),
        ("grouped-self-interlayer", 1, ["1111"] * 4),
        ("grouped-self-interlayer", 2, ["1100", "1100", "0011", "0011"]),
        ("grouped-self-interlayer", 4, ["1000", "0100", "0010", "0001"]),
    ],
)
def test_a_write_sees_the_layers_of_its_variant_only(kind: str, groups: int, seen: list[str]) -> None:
    model = tiny_model(variant(memory={"variant": kind, "groups": groups}, layers=4))
    memory, ids = model.initial_memory(torch.tensor([1])), torch.tensor(rows_of(9))
    found = []
    with torch.no_grad():
        before = model.write(memory, ids)
        for layer in range(4):
            changed = memory.clone()
            changed[layer] = model.initial_memory(torch.tensor([2]))[layer]
            moved = (model.write(changed, ids) - before).abs().amax(dim=(1, 2, 3))
            found.append("".join("1" if m > 1e-4 else "0" if m == 0 else "?" for m in moved.tolist()))
    assert found == seen  # row: the layer that was changed, column: the layer whose write moved


@pytest.mark.parametrize(("kind", "sees_others"), [("simple", False), ("self", True), ("interlayer", True)])
@pytest.mark.parametrize("gate", ["static", "elementwise"])
def test_slots_see_one_another_except_in_the_simple_variant(kind: str, sees_others: bool, gate: str) -> None:
    model = tiny_model(variant(memory={"variant": kind, "gate": gate}))
    memory, ids = model.initial_memory(torch.tensor([1])), torch.tensor(rows_of(9))
    changed = memory.clone()
    changed[:, :, 3] = model.initial_memory(torch.tensor([2]))[:, :, 3]
    with torch.no_grad():
        moved = (model.write(changed, ids) - model.write(memory, ids)).abs().amax(dim=(1, 3))
    assert (moved[:, 3] > 1e-3).all()
    others = moved[:, [0, 1, 2, 4, 5, 6, 7]]
    assert (others > 1e-5).all() if sees_others else (others == 0).all()


@pytest.mark.parametrize(("opened", "like"), [(50.0, "interlayer"), (-50.0, "self")])
def test_the_inner_gate_goes_from_own_layer_to_mean(opened: float, like: str) -> None:
    model = tiny_model(variant(memory={"variant": "self-interlayer", "gate": "static"}))
    other = tiny_model(variant(memory={"variant": like, "gate": "static"}))
    for layer in model.memory_attention.layers:
        layer.inner_gate.weight.data.fill_(opened)
    other.load_state_dict(model.state_dict(), strict=False)
    memory, ids = model.initial_memory(torch.tensor([1])), torch.tensor(rows_of(9))
    with torch.no_grad():
        torch.testing.assert_close(model.write(memory, ids), other.write(memory, ids), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "mean", "deviation", "own"),
    [
        ("standard", 0.0, 1.0, True),
        ("normal", 0.0, 0.02, True),
        ("uniform", 0.5, 12**-0.5, True),
        ("ones", 1.0, 0.0, False),
        ("zeros", 0.0, 0.0, False),
        ("fixed", 0.0, 1.0, False),
    ],
)
def test_conversations_start_from_the_chosen_memory(kind: str, mean: float, deviation: float, own: bool) -> None:
    model = tiny_model(variant(hidden_size=64, memory={"initialization": kind, "slots": 32}))
    memory = model.initial_memory(torch.tensor([5, 6]))
    assert memory.shape == (2, 2, 32, 64)
    assert float(memory.mean()) == pytest.approx(mean, abs=0.06)
    assert float(memory.std()) == pytest.approx(deviation, rel=0.05)
    assert torch.equal(memory[:, 0], memory[:, 1]) is not own
    assert torch.equal(model.initial_memory(torch.tensor([9, 6]))[:, 1], memory[:, 1])
    if kind == "uniform":
        assert 0 <= float(memory.min()) < 0.01
        assert 0.99 < float(memory.max()) < 1


# ---- the rest


def test_a_final_norm_gives_the_head_states_of_unit_size() -> None:
    for model in (recomputed("final norm").model, recomputed("as Beta").model):
        ids, mask = padded(rows_of(9))
        states = model.decode_states(ids, mask, model.initial_memory(torch.tensor([1]))).states
        torch.testing.assert_close(states.pow(2).mean(dim=-1), torch.ones(1, 9), atol=1e-3, rtol=0)


def test_stateless_layers_stand_before_and_after_the_stateful_ones() -> None:
    layers = recomputed("dense with moe around").model.decoder.layers
    kinds = [(type(layer.feed_forward).__name__, layer.stateful) for layer in layers]
    experts = "MixtureOfExperts"
    assert kinds == [("SwiGLU", False), (experts, False), *[(experts, True)] * 2, *[(experts, False)] * 2]


def test_a_dense_decoder_has_nothing_to_balance() -> None:
    model = recomputed("dense").model
    ids, mask = padded(rows_of(9, 4))
    decoded = model.decode_states(ids, mask, model.initial_memory(torch.arange(2)))
    assert decoded.balance.tolist() == [0.0, 0.0]
    assert decoded.usage.shape[0] == 0
    rebalance(model, decoded.usage)


def test_encoder_decoder_and_memory_attention_turn_by_the_rope_base() -> None:
    one, other = tiny_model(variant(rope_base=10_000.0)), tiny_model(variant(rope_base=500.0))
    other.load_state_dict(one.state_dict())
    memory, (ids, mask) = one.initial_memory(torch.tensor([1])), padded(rows_of(12))
    with torch.no_grad():
        states = one.encode(ids, mask)
        assert (other.encode(ids, mask) - states).abs().max() > 1e-4
        assert (other.decode(ids, mask, memory) - one.decode(ids, mask, memory)).abs().max() > 1e-4
        assert (other.write_states(memory, states) - one.write_states(memory, states)).abs().max() > 1e-5


def test_the_encoders_frozen_attention_runs_but_is_not_trained() -> None:
    model = tiny_model(CONFIGS["frozen encoder cross-attention"])
    ids, mask = padded(rows_of(9, 4))
    states = model.encode(ids, mask)
    states.pow(2).sum().backward()
    reached = gradients(model)
    assert not any("frozen_memory" in name for name in reached)
    assert reached["embedding.weight"] > 0
    with torch.no_grad():
        for layer in model.encoder.layers:
            assert layer.frozen_memory is not None
            layer.frozen_memory.attention.value.weight.zero_()
        assert (model.encode(ids, mask) - states).abs().max() > 1e-4


def test_each_frozen_attention_adds_what_it_reads_from_its_own_layer_of_a_small_constant_memory() -> None:
    model = tiny_model(CONFIGS["frozen encoder cross-attention"])
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    memory = near_zero_memory((2, 8, 32), x.device, x.dtype)
    assert float(memory.std()) == pytest.approx(0.02, rel=0.1)
    rotary = RotaryEmbedding(8, 100.0)(torch.arange(7))
    for number, layer in enumerate(model.encoder.layers):
        frozen = layer.frozen_memory
        assert frozen is not None
        slots = normed(memory[number], frozen.memory_norm)
        read = plain_attention(frozen.attention, normed(x[0], frozen.norm), slots, True, False)
        with torch.no_grad():
            torch.testing.assert_close(frozen(x, rotary, number)[0], x[0] + read, atol=2e-6, rtol=1e-5)
