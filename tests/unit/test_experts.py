"""Promises of the feed-forward parts: SwiGLU, experts as a plain loop says it, and their even use."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform.config.model import ExpertsConfig
from rxt_platform.model.feedforward import MixtureOfExperts, RealTokens, SwiGLU, balance_loss
from rxt_platform.model.layers import mixtures, rebalance
from tests.unit.helpers import padded, rows_of, tiny_config, tiny_model

SEEDS = torch.tensor([5, 6, 7])
RAGGED = torch.arange(7) < torch.tensor([[7], [2], [5]])  # a mask [3, 7]
SETTINGS: dict[str, dict[str, Any]] = {
    "one of four": {"number": 4, "per_token": 1},
    "two of five": {"number": 5, "per_token": 2},
    "all of three": {"number": 3, "per_token": 3},
    "one bias for all": {"number": 5, "per_token": 2, "bias": "global"},
    "no bias": {"number": 5, "per_token": 2, "bias": "off"},
    "one shared": {"number": 4, "per_token": 2, "shared": 1},
    "two shared of another size": {"number": 4, "per_token": 2, "shared": 2, "shared_size": 24},
    "as in Beta": {"number": 6, "per_token": 3, "bias": "global", "shared": 2},
    "balanced by a bias": {"number": 5, "per_token": 2, "balancing": "bias", "bias_update_rate": 0.01},
}


def mixture(number: int, per_token: int, seed: int = 1, **settings: Any) -> MixtureOfExperts:
    """A mixture of 16 channels with experts 8 wide, in which nothing that counts is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = MixtureOfExperts(16, ExpertsConfig(number=number, per_token=per_token, size=8, **settings))
        layer.router.weight.data *= 4  # more decided than a fresh router
        if layer.bias is not None:
            layer.bias.data.normal_()
        if layer.config.balancing == "bias":
            layer.selection_steps.random_(-20, 20)
    return layer


def plain_mixture(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """One token [D] through its best experts and the shared ones, as REF 1.5 says it."""
    config = layer.config
    probabilities = (layer.router.weight @ x).softmax(dim=0)
    preferred = probabilities.detach().clone()
    if config.balancing == "bias":
        preferred += layer.selection_steps * config.bias_update_rate
    best = sorted(range(config.number), key=lambda e: -float(preferred[e]))[: config.per_token]
    total = sum(probabilities[e] for e in best)
    result = torch.zeros_like(x)
    for e in best:
        hidden = x @ layer.input_weight[e]
        linear, gate = (hidden if layer.input_bias is None else hidden + layer.input_bias[e]).chunk(2)
        out = (linear * F.silu(gate)) @ layer.output_weight[e]
        result = result + probabilities[e] / total * (out if layer.output_bias is None else out + layer.output_bias[e])
    if layer.bias is not None:
        result = result + layer.bias
    if layer.shared_gate is None:
        return result + sum(shared(x) for shared in layer.shared)
    shares = (layer.shared_gate.weight @ x).softmax(dim=0)
    return result + sum(share * shared(x) for share, shared in zip(shares, layer.shared, strict=True))


def sigmoid(x: float) -> float:
    return float(torch.tensor(x).sigmoid())


def test_swiglu_gates_the_first_half_by_the_second() -> None:
    layer = SwiGLU(1, 2)
    layer.input.weight.data = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
    layer.input.bias.data = torch.tensor([0.5, 0.0, 0.0, 0.0])
    layer.output.weight.data = torch.tensor([[1.0, 10.0]])
    layer.output.bias.data = torch.tensor([0.25])
    # x = 2: linear part (2.5, 4), gates (6, -2)
    expected = 2.5 * 6 * sigmoid(6.0) + 10 * 4 * -2 * sigmoid(-2.0) + 0.25
    assert float(layer(torch.tensor([2.0])).detach()) == pytest.approx(expected, abs=1e-5)


# ---- what a mixture computes


@pytest.mark.parametrize("name", SETTINGS)
def test_experts_give_what_a_plain_loop_over_tokens_gives(name: str) -> None:
    layer = mixture(**SETTINGS[name])
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output, *_ = layer(x, RealTokens.of(RAGGED))
        expected = torch.stack([plain_mixture(layer, token) for token in x[RAGGED]])
    torch.testing.assert_close(output[RAGGED], expected, atol=1e-6, rtol=1e-5)
    assert (output[~RAGGED] == 0).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_mixes_experts_as_training_does(name: str) -> None:
    layer = mixture(**SETTINGS[name])
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(layer.mix(x), layer(x, None).output, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_those_of_a_plain_loop_over_tokens(name: str) -> None:
    layer = mixture(**SETTINGS[name])
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 7, 16, generator=generator, requires_grad=True)
    pull = torch.randn(3, 7, 16, generator=generator)
    wanted = {"x": x, **dict(layer.named_parameters())}

    def gradients_of(output: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad((output * pull[RAGGED]).sum(), list(wanted.values()), allow_unused=True)
        return dict(zip(wanted, (g if g is None else g.clone() for g in found), strict=True))

    grouped = gradients_of(layer(x, RealTokens.of(RAGGED)).output[RAGGED])
    plain = gradients_of(torch.stack([plain_mixture(layer, token) for token in x[RAGGED]]))
    for part, gradient in plain.items():
        torch.testing.assert_close(grouped[part], gradient, atol=2e-6, rtol=1e-4, msg=lambda m, p=part: f"{p}: {m}")
        assert gradient.abs().max() > 0 or part == "router.weight", f"{part} got no gradient"
    one_chosen = layer.config.per_token == 1  # its weight is 1, whatever the router says
    assert (grouped["router.weight"].abs().max() > 1e-4) is not one_chosen


def test_experts_without_a_token_are_no_problem() -> None:
    layer = mixture(4, 1)
    layer.router.weight.data.zero_()
    layer.router.weight.data[2] = 5.0
    x = torch.rand(1, 3, 16, generator=torch.Generator().manual_seed(2))  # all positive: everything goes to expert 2
    output, balance, usage = layer(x, None)
    assert usage.tolist() == [0, 0, 3, 0]
    torch.testing.assert_close(output[0, 1], plain_mixture(layer, x[0, 1]), atol=1e-6, rtol=1e-5)
    assert float(balance.detach()) == pytest.approx(4.0, abs=1e-3), "all on one expert is as unbalanced as can be"
    output.sum().backward()
    assert layer.input_weight.grad is not None
    assert layer.input_weight.grad[0].abs().max() == 0


def test_usage_counts_real_tokens_only() -> None:
    layer = mixture(5, 2)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        usage = layer(x, RealTokens.of(RAGGED)).usage
        alone = sum(layer(x[i : i + 1, :n], None).usage for i, n in enumerate((7, 2, 5)))
    assert float(usage.sum()) == 2 * RAGGED.sum()
    assert usage.tolist() == alone.tolist()


def test_the_model_s_usage_is_that_of_its_mixtures_in_their_order() -> None:
    decoder = {**tiny_config().decoder.model_dump(), "feed_forward_size": 24}
    decoder |= {"stateless_layers": ["dense", "moe"], "final_stateless_layers": ["moe", "dense"]}
    model = tiny_model(tiny_config(decoder=decoder))
    seen: list[Tensor] = []
    for layer in mixtures(model):
        layer.register_forward_hook(lambda *call: seen.append(call[-1].usage))
    ids, mask = padded(rows_of(9, 4, 6))
    usage = model.decode_states(ids, mask, model.initial_memory(SEEDS)).usage
    assert usage.tolist() == torch.stack(seen).tolist()
    assert usage.sum(dim=1).tolist() == [2 * 19] * 4
    assert len({tuple(row) for row in usage.tolist()}) > 1, "mixtures must differ to show their order"


# ---- even use by the balance loss


def test_balance_loss_is_one_when_balanced_and_more_when_not() -> None:
    balanced = torch.full((4, 4), 0.25)
    each_once = torch.arange(4)[:, None]
    rows = torch.zeros(4, dtype=torch.int64)
    assert float(balance_loss(balanced, each_once, rows, 1)) == pytest.approx(1.0)
    pairs = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]])
    assert float(balance_loss(balanced, pairs, rows, 1)) == pytest.approx(1.0), "however many experts a token has"
    skewed = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(4, 4)
    assert float(balance_loss(skewed, torch.zeros(4, 1, dtype=torch.int64), rows, 1)) == pytest.approx(4 * 0.7)
    # Probabilities of experts that were not chosen count too, else it would reward nothing but low confidence.
    mixed = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.1, 0.5, 0.2, 0.2]])
    expected = 4 * (0.5 * 0.35 + 0.5 * 0.35)
    assert float(balance_loss(mixed, torch.tensor([[0], [1]]), rows[:2], 1)) == pytest.approx(expected)


def test_balance_loss_punishes_uneven_use_and_not_confidence() -> None:
    sure_and_even = torch.full((4, 4), 0.01) + 0.96 * torch.eye(4)
    unsure_and_uneven = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).expand(4, 4)
    rows = torch.zeros(4, dtype=torch.int64)

    def loss(probabilities: Tensor) -> float:
        return float(balance_loss(probabilities, probabilities.topk(1).indices, rows, 1))

    def reference_s(probabilities: Tensor) -> float:  # E * mean(top-k probability), see REF 1.5
        return float(4 * probabilities.topk(1).values.mean())

    assert loss(sure_and_even) == pytest.approx(1.0)
    assert loss(unsure_and_uneven) == pytest.approx(1.6)
    assert reference_s(sure_and_even) > reference_s(unsure_and_uneven), "the formula that this one is not"


def test_balance_loss_of_a_row_ignores_other_rows_and_padding() -> None:
    layer = mixture(4, 2)
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = layer(x, RealTokens.of(RAGGED)).balance
        alone = torch.cat([layer(x[i : i + 1, :n], None).balance for i, n in enumerate((7, 2, 5))])
    assert together.shape == (3,)
    torch.testing.assert_close(together, alone)


def test_the_model_s_balance_is_the_mean_over_its_layers() -> None:
    model = tiny_model()
    for layer in mixtures(model):
        layer.router.weight.data.zero_()  # all experts equally likely
    ids, mask = padded(rows_of(9, 4, 6))
    balance = model.decode_states(ids, mask, model.initial_memory(SEEDS)).balance
    torch.testing.assert_close(balance.detach(), torch.ones(3))


def skewed_mixture(**settings: Any) -> tuple[MixtureOfExperts, Tensor]:
    """A mixture whose router prefers the first two of 8 experts for most of 512 tokens [1, 512, 16]."""
    layer = mixture(8, 2, **settings)
    if layer.config.balancing == "bias":
        layer.selection_steps.zero_()
    x = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 1.0
    layer.router.weight.data /= 4
    layer.router.weight.data[:, 0] = torch.tensor([1.5, 1.0, 0, 0, 0, 0, 0, -0.5])
    return layer, x


def unevenness(usage: Tensor) -> float:
    """The most used expert's load, 1 when even."""
    return float(usage.max() / usage.mean())


def test_training_with_the_balance_loss_evens_the_use() -> None:
    layer, x = skewed_mixture()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = unevenness(layer(x, None).usage)
    for _ in range(60):
        optimizer.zero_grad()
        layer(x, None).balance.sum().backward()
        optimizer.step()
    assert before > 2
    assert unevenness(layer(x, None).usage) < 1.3


# ---- even use by a selection bias


def routed_by_bias(probabilities: list[float], steps: list[int], rate: float) -> tuple[list[int], list[float]]:
    """The two experts that a token with these router probabilities is sent to, and their weights."""
    layer = mixture(len(probabilities), 2, bias="off", balancing="bias", bias_update_rate=rate)
    layer.selection_steps.copy_(torch.tensor(steps))
    layer.router.weight.data.zero_()
    layer.router.weight.data[:, 0] = torch.tensor(probabilities).log()
    layer.input_weight.data.fill_(1.0)  # all experts compute the same number, times 1, 10, 100, ...
    layer.output_weight.data = (10.0 ** torch.arange(len(probabilities)))[:, None, None].expand(-1, 8, 16).contiguous()
    x = torch.zeros(1, 1, 16)
    x[..., 0] = 1.0
    output, _, usage = layer(x, None)
    unit = 8 * F.silu(torch.tensor(1.0))
    chosen = usage.nonzero().flatten().tolist()
    digits = float((output[0, 0, 0] / unit).detach())
    low, high = 10.0 ** chosen[0], 10.0 ** chosen[1]
    weight = (digits - low) / (high - low)
    return chosen, [1 - weight, weight]


def test_a_bias_decides_who_is_chosen_but_not_how_much_it_weighs() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    chosen, weights = routed_by_bias(probabilities, [0, 0, 0, 0], 1e-3)
    assert chosen == [0, 1]
    assert weights == pytest.approx([0.5 / 0.8, 0.3 / 0.8], abs=1e-4)
    chosen, weights = routed_by_bias(probabilities, [0, 0, 0, 300], 1e-3)  # 0.05 + 0.3 > 0.3
    assert chosen == [0, 3]
    assert weights == pytest.approx([0.5 / 0.55, 0.05 / 0.55], abs=1e-4)
    assert routed_by_bias(probabilities, [0, 0, 0, 200], 1e-3)[0] == [0, 1], "0.05 + 0.2 < 0.3"


def test_rebalancing_moves_each_bias_one_step_towards_even_use() -> None:
    layer = mixture(4, 2, balancing="bias")
    layer.selection_steps.zero_()
    layer.rebalance(torch.tensor([12.0, 2.0, 6.0, 4.0]))  # 6 each would be even
    assert layer.selection_steps.tolist() == [-1, 1, 0, 1]
    layer.rebalance(torch.tensor([12.0, 7.0, 0.0, 5.0]))
    assert layer.selection_steps.tolist() == [-2, 0, 1, 2]


def test_a_bias_is_exact_in_a_model_cast_to_bf16() -> None:
    layer = mixture(4, 2, balancing="bias", bias_update_rate=1e-3).to(torch.bfloat16)
    layer.selection_steps.copy_(torch.tensor([500, 0, 0, 0]))
    for _ in range(301):  # around 0.5, bf16 cannot tell 0.501 from 0.5
        layer.rebalance(torch.tensor([0.0, 9.0, 3.0, 0.0]))
    assert layer.selection_steps.tolist() == [801, -301, 0, 301]
    assert "selection_steps" in layer.state_dict(), "saved with the model, or resuming would route differently"
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    assert layer(x, None).usage.tolist()[0] == 64, "a bias of 0.801 takes expert 0 in front of everyone"


def test_rebalancing_step_by_step_makes_the_use_even() -> None:
    layer, x = skewed_mixture(balancing="bias", bias_update_rate=0.002)
    with torch.no_grad():
        before = unevenness(layer(x, None).usage)
        for _ in range(150):
            layer.rebalance(layer(x, None).usage)
        after = unevenness(layer(x, None).usage)
    assert before > 2
    assert after < 1.3


def test_the_balance_loss_pulls_on_the_router_only_where_nothing_else_balances() -> None:
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    by_loss, by_bias = mixture(4, 2).train(), mixture(4, 2, balancing="bias").train()
    (pull,) = torch.autograd.grad(by_loss(x, None).balance.sum(), [by_loss.router.weight])
    assert pull.abs().max() > 1e-4
    reported = by_bias(x, None).balance
    assert not reported.requires_grad
    assert (reported >= 1 - 1e-3).any(), "it is still reported"


def test_only_mixtures_balanced_by_a_bias_are_rebalanced() -> None:
    experts = {"number": 3, "per_token": 2, "size": 32}
    base = tiny_config().decoder.model_dump()
    by_bias = tiny_model(tiny_config(decoder={**base, "experts": {**experts, "balancing": "bias"}}))
    by_loss = tiny_model(tiny_config(decoder={**base, "experts": experts}))
    usage = torch.tensor([[9.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    rebalance(by_bias, usage)
    rebalance(by_loss, usage)
    assert [layer.selection_steps.tolist() for layer in mixtures(by_bias)] == [[-1, 1, 1], [1, 0, -1]]
    assert dict(by_loss.named_buffers()) == {}
