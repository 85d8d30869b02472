"""Promises of the Reactive Transformer: sizes, padding, causality, memory as a value, gates, positions."""

import pytest
import torch
from torch import Tensor

from rxt_platform.model.attention import RotaryEmbedding, rotate
from rxt_platform.model.memory import ResidualGate
from rxt_platform.model.parameters import component_of, measure_size
from tests.unit.helpers import FIRST_WORD, gradients, padded, rows_of, tiny_config, tiny_model

SEEDS = torch.tensor([5, 6, 7])


def test_counted_parameters_are_those_of_a_real_model() -> None:
    config = tiny_config()
    model, size = tiny_model(config), measure_size(config)
    total = sum(p.numel() for p in model.parameters())
    assert total == size.total.parameters + size.components["mlm_head"].parameters
    written = sum(p.numel() for p in model.memory_attention.parameters())
    assert size.components["memory_attention"].parameters == written


def test_every_component_of_the_model_is_known_by_its_parameter_names() -> None:
    model = tiny_model()
    found: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(component_of(name), set()).add(id(parameter))
    cross = {
        id(p)
        for layer in model.decoder.layers
        for part in (layer.cross_norm, layer.memory_norm)
        for p in part.parameters()
    } | {id(p) for layer in model.decoder.layers for p in layer.cross_attention.parameters()}
    assert found["embedding"] == {id(model.embedding.weight)}
    assert found["encoder"] == {id(p) for p in model.encoder.parameters()}
    assert found["memory_attention"] == {id(p) for p in model.memory_attention.parameters()}
    assert found["mlm_head"] == {id(p) for p in model.mlm_head.parameters()}
    assert found["head"] == {id(p) for p in model.decoder.head.parameters()}
    assert found["memory_cross_attention"] == cross
    assert found["decoder"] == {id(p) for p in model.decoder.layers.parameters()} - cross


def test_more_padding_changes_no_logit_and_no_written_memory() -> None:
    model, rows = tiny_model(), rows_of(9, 4, 6)
    memory = model.initial_memory(SEEDS)
    ids, mask = padded(rows)
    wide_ids, wide_mask = padded(rows, 20)
    with torch.no_grad():
        logits, wide_logits = model.decode(ids, mask, memory), model.decode(wide_ids, wide_mask, memory)
        written, wide_written = model.write(memory, ids, mask), model.write(memory, wide_ids, wide_mask)
    torch.testing.assert_close(wide_logits[:, :9][mask], logits[mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(wide_written, written, atol=1e-6, rtol=0)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model, rows = tiny_model(), rows_of(9, 4, 6)
    memory = model.initial_memory(SEEDS)
    ids, mask = padded(rows)
    other = ids.masked_fill(~mask, FIRST_WORD + 3)
    with torch.no_grad():
        torch.testing.assert_close(
            model.decode(other, mask, memory)[mask], model.decode(ids, mask, memory)[mask], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(model.write(memory, other, mask), model.write(memory, ids, mask), atol=1e-6, rtol=0)


def test_a_token_sees_nothing_that_comes_later() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(12))
    changed = ids.clone()
    changed[0, 7] = FIRST_WORD if ids[0, 7] != FIRST_WORD else FIRST_WORD + 1
    memory = model.initial_memory(SEEDS[:1])
    with torch.no_grad():
        before, after = model.decode(ids, mask, memory), model.decode(changed, mask, memory)
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-6, rtol=0)
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(dim=-1) > 1e-4).all(), "every later token reads the changed one"


def test_the_encoder_reads_in_both_directions() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(12))
    changed = ids.clone()
    changed[0, 11] = FIRST_WORD if ids[0, 11] != FIRST_WORD else FIRST_WORD + 1
    with torch.no_grad():
        moved = (model.encode(changed, mask) - model.encode(ids, mask)).abs().amax(dim=(0, 1, 3))
    assert (moved > 1e-5).all()


def test_every_layer_reads_its_own_memory_through_cross_attention_only() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(6))
    one, other = (model.initial_memory(torch.tensor([seed])) for seed in (1, 2))
    with torch.no_grad():
        for layer in range(2):
            mixed = one.clone()
            mixed[layer] = other[layer]
            difference = model.decode(ids, mask, mixed) - model.decode(ids, mask, one)
            assert difference.abs().amax(dim=-1).min() > 1e-5, f"memory of layer {layer} is not read"
        for layer in model.decoder.layers:
            layer.cross_attention.output.weight.zero_()
        torch.testing.assert_close(model.decode(ids, mask, other), model.decode(ids, mask, one), atol=0, rtol=0)


def test_memory_slots_have_no_order_for_the_reader() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(6))
    memory = model.initial_memory(torch.tensor([1]))
    with torch.no_grad():
        forward, backward = model.decode(ids, mask, memory), model.decode(ids, mask, memory.flip(2))
    torch.testing.assert_close(backward, forward, atol=1e-5, rtol=0)


def test_a_masked_memory_position_is_not_read() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(6))
    memory = model.initial_memory(torch.tensor([1]))
    readable = torch.arange(8)[None] < 5
    with torch.no_grad():
        expected = model.decode(ids, mask, memory[:, :, :5])
        torch.testing.assert_close(model.decode(ids, mask, memory, readable), expected, atol=1e-6, rtol=0)


def test_a_row_alone_gives_what_it_gives_in_a_batch() -> None:
    model, rows = tiny_model(), rows_of(9, 4, 6)
    ids, mask = padded(rows)
    memory = model.initial_memory(SEEDS)
    with torch.no_grad():
        logits, written = model.decode(ids, mask, memory), model.write(memory, ids, mask)
        for row, tokens in enumerate(rows):
            alone, real = padded([tokens])
            mine = memory[:, row : row + 1]
            torch.testing.assert_close(
                model.decode(alone, real, mine)[0], logits[row, : len(tokens)], atol=2e-6, rtol=0
            )
            torch.testing.assert_close(model.write(mine, alone, real)[:, 0], written[:, row], atol=2e-6, rtol=0)


def test_writing_gives_a_new_memory_and_leaves_everything_else_as_it_was() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(9, 4, 6))
    memory = model.initial_memory(SEEDS)
    before = [memory.clone(), ids.clone(), mask.clone()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        first, again = model.write(memory, ids, mask), model.write(memory, ids, mask)
    for was, now in zip(before, (memory, ids, mask), strict=True):
        assert torch.equal(was, now)
    assert torch.equal(first, again)
    assert (first - memory).abs().max() > 0.1
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_no_module_keeps_conversation_state() -> None:
    model = tiny_model()
    assert dict(model.named_buffers()) == {}
    ids, mask = padded(rows_of(9))
    model.decode(ids, mask, model.write(model.initial_memory(SEEDS[:1]), ids, mask))
    held = [
        name
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not key.startswith("_")
    ]
    assert dict(model.named_buffers()) == {}
    assert held == []


def test_what_is_written_depends_on_the_interaction_and_on_the_memory_before() -> None:
    model = tiny_model()
    (ids, mask), (others, _) = padded(rows_of(9, seed=1)), padded(rows_of(9, seed=2))
    one, other = (model.initial_memory(torch.tensor([seed])) for seed in (1, 2))
    with torch.no_grad():
        written = model.write(one, ids, mask)
        by_layer = (2, 3)
        assert ((model.write(one, others, mask) - written).abs().amax(dim=by_layer) > 1e-3).all()
        assert ((model.write(other, ids, mask) - written).abs().amax(dim=by_layer) > 1e-3).all()


def test_memory_layers_read_the_mean_of_all_layers_before_the_write() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(9))
    memory = model.initial_memory(torch.tensor([1]))
    changed = memory.clone()
    changed[1] += 1.0
    with torch.no_grad():
        moved = model.write(changed, ids, mask)[0] - model.write(memory, ids, mask)[0]
    assert moved.abs().max() > 1e-3, "layer 0 does not see layer 1"


def test_initial_memory_of_a_row_depends_on_its_own_seed_only() -> None:
    model = tiny_model()
    together = model.initial_memory(torch.tensor([5, 6, 7]))
    assert together.shape == (2, 3, 8, 32)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(model.initial_memory(torch.tensor([7, 5]))[:, 0], together[:, 2])
    assert torch.equal(model.initial_memory(torch.tensor([6])), together[:, 1:2])
    assert not torch.equal(together[:, 0], together[:, 1])
    many = model.initial_memory(torch.arange(40))
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.std()) - 1) < 0.03


def test_fixed_initial_memory_is_the_same_for_all_conversations_but_not_for_all_slots() -> None:
    model = tiny_model(tiny_config(memory={"initialization": "fixed"}))
    memory = model.initial_memory(torch.tensor([5, 6]))
    assert torch.equal(memory[:, 0], memory[:, 1])
    assert torch.equal(memory, model.initial_memory(torch.tensor([9, 10])))
    slots = memory[:, 0].flatten(0, 1)
    assert len(torch.unique(slots, dim=0)) == len(slots)


def sigmoid(x: float) -> float:
    return float(torch.tensor(x).sigmoid())


def test_static_gate_blends_each_slot_by_its_own_weight() -> None:
    gate = ResidualGate(2, "static")
    assert gate.weight.tolist() == [3.0, 3.0]
    gate.weight.data = torch.tensor([0.0, 2.0])
    old, new = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0, 8.0], [0.0, 1.0]]])
    g = sigmoid(2.0)
    expected = torch.tensor([[[3.0, 5.0], [3 * (1 - g), g + 4 * (1 - g)]]])
    torch.testing.assert_close(gate(old, new), expected)


def test_elementwise_gate_is_the_sigmoid_of_a_weighted_slot_mean() -> None:
    gate = ResidualGate(2, "elementwise")
    gate.weight.data = torch.tensor([0.5, -1.0])
    old, new = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0, 8.0], [0.0, 1.0]]])
    first, second = sigmoid(0.5 * 8.0), sigmoid(-1.0 * 4.0)  # means of old + new: (6 + 10) / 2 and (3 + 5) / 2
    expected = torch.tensor(
        [[[5 * first + (1 - first), 8 * first + 2 * (1 - first)], [3 * (1 - second), second + 4 * (1 - second)]]]
    )
    torch.testing.assert_close(gate(old, new), expected)


def test_linear_gate_mixes_the_means_of_all_slots() -> None:
    gate = ResidualGate(2, "linear")
    gate.linear.weight.data = torch.tensor([[0.0, 0.25], [1.0, -1.0]])
    gate.linear.bias.data = torch.tensor([0.0, -3.0])
    old, new = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[5.0, 8.0], [0.0, 1.0]]])
    first, second = sigmoid(0.25 * 4.0), sigmoid(8.0 - 4.0 - 3.0)
    expected = torch.tensor(
        [[[5 * first + (1 - first), 8 * first + 2 * (1 - first)], [3 * (1 - second), second + 4 * (1 - second)]]]
    )
    torch.testing.assert_close(gate(old, new), expected)


@pytest.mark.parametrize("kind", ["linear", "elementwise", "static"])
def test_repeated_writes_do_not_make_the_memory_grow(kind: str) -> None:
    model = tiny_model(tiny_config(memory={"gate": kind}))
    ids, mask = padded(rows_of(9))
    memory = first = model.initial_memory(torch.tensor([1]))
    with torch.no_grad():
        for _ in range(30):
            memory = model.write(memory, ids, mask)
    assert float(memory.norm()) < 2 * float(first.norm())


def test_rotation_turns_interleaved_channel_pairs_and_keeps_their_norms() -> None:
    rotary = RotaryEmbedding(8, 10_000.0)(torch.tensor([0, 3]))
    x = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rotary)
    torch.testing.assert_close(turned[0, 0, 0], x[0, 0, 0])
    pairs, turned_pairs = x[0, 0, 1].unflatten(0, (4, 2)), turned[0, 0, 1].unflatten(0, (4, 2))
    torch.testing.assert_close(turned_pairs.norm(dim=-1), pairs.norm(dim=-1))
    for i in range(4):  # the pair (2i, 2i+1) turns by position * base^(-2i/8)
        angle = torch.tensor(3 * 10_000.0 ** (-2 * i / 8))
        matrix = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        torch.testing.assert_close(turned_pairs[i], matrix @ pairs[i])


def test_rotated_products_depend_only_on_the_distance() -> None:
    embedding = RotaryEmbedding(8, 10_000.0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(q: int, k: int) -> float:
        turned = (rotate(x, embedding(torch.tensor([at]))) for x, at in ((query, q), (key, k)))
        left, right = turned
        return float((left * right).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) == pytest.approx(product(5, 0), abs=1e-5)
    assert abs(product(9, 4) - product(9, 6)) > 1e-2


def test_an_answer_s_loss_reaches_encoder_and_memory_attention_through_the_write() -> None:
    model = tiny_model()
    ids, mask = padded(rows_of(9, 5))
    memory = model.write(model.initial_memory(torch.tensor([1, 2])), ids, mask)
    model.decode(ids, mask, memory).float().logsumexp(dim=-1).sum().backward()
    reached = gradients(model)
    for part in (
        "encoder.layers.0.feed_forward.input.weight",
        "encoder.layers.1.attention.value.weight",
        "memory_attention.layers.0.write_attention.value.weight",
        "memory_attention.mean_norm.weight",
        "memory_attention.layers.1.write_gate.linear.weight",
        "embedding.weight",
    ):
        assert reached.get(part, 0) > 0, f"{part} got no gradient"
