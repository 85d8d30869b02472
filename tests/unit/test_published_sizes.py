"""Promises of the presets: the sizes that were published (REF 2.2), what `rxt models` says, and FLOPs."""

import json
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rxt_platform.cli import guarded, rxt
from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.config.model import ModelConfig
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.parameters import ModelSize, component_of, measure_size
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import rows_of, tiny_config, tiny_model

PRESETS = {"alpha-micro", "alpha-micro-v1", "alpha-mini", "alpha-nano", "alpha-synthetic", "beta", "tiny"}


@cache
def size_of(preset: str) -> ModelSize:
    return measure_size(load_preset(preset))


def without_frozen_attention(config: ModelConfig) -> ModelConfig:
    """The same model as it was built later: no cross-attention in its encoder."""
    encoder = config.encoder.model_copy(update={"cross_attention": None})
    return config.model_copy(update={"encoder": encoder})


@pytest.mark.parametrize(
    ("preset", "component", "parameters"),
    [
        ("alpha-micro-v1", "decoder", 8_766_856),
        ("alpha-micro-v1", "encoder", 1_878_784),
        ("alpha-nano", "decoder", 9_458_508),
        ("alpha-nano", "encoder", 2_049_024),
        ("alpha-nano", "memory_attention", 1_186_688),
        ("alpha-nano", "mlm_head", 984_268),
        ("alpha-micro", "decoder", 22_404_940),
        ("alpha-micro", "encoder", 3_106_560),
        ("alpha-mini", "mlm_head", 2_636_304),
        ("alpha-synthetic", "memory_attention", 5_529_856),
        ("beta", "encoder", 96_958_976),
        ("beta", "mlm_head", 33_883_648),
    ],
)
def test_a_component_has_exactly_the_published_parameters(preset: str, component: str, parameters: int) -> None:
    assert size_of(preset).components[component].parameters == parameters


@pytest.mark.parametrize(("preset", "active"), [("alpha-nano", 3_521_868), ("alpha-micro", 6_573_900)])
def test_a_token_uses_exactly_the_published_parameters_of_the_decoder(preset: str, active: int) -> None:
    assert size_of(preset).components["decoder"].active == active


def test_totals_are_the_published_ones() -> None:
    assert size_of("alpha-nano").total.parameters == 11_734_220
    assert round(size_of("alpha-mini").total.parameters / 1e4) == 9856
    assert round(size_of("alpha-synthetic").total.parameters / 1e4) == 16027


def test_beta_is_as_large_as_its_published_configuration_says() -> None:
    size = size_of("beta")
    decoder = size.components["decoder"]
    assert round(decoder.parameters / 1e6) == 2842
    input_embedding = 65_536 * 512
    assert round((decoder.active - input_embedding) / 1e5) == 1613
    assert round(size.components["memory_attention"].parameters / 1e4) == 2233
    assert round(size.total.parameters / 1e7) == 293


def test_the_early_encoders_cross_attention_accounts_for_their_size() -> None:
    micro = measure_size(without_frozen_attention(load_preset("alpha-micro")))
    assert micro.components["encoder"].parameters == 2_775_040
    assert round(micro.total.parameters / 1e4) == 2686
    with torch.device("meta"):
        model = ReactiveTransformer(load_preset("alpha-micro"))
    frozen = {name: p for name, p in model.named_parameters() if component_of(name) == "frozen"}
    assert sum(p.numel() for p in frozen.values()) == 3_106_560 - 2_775_040
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(frozen)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_bytes_and_memory_follow_from_the_numbers(preset: str) -> None:
    config, size = load_preset(preset), size_of(preset)
    assert size.weight_bytes == {"fp32": 4 * size.total.parameters, "bf16": 2 * size.total.parameters}
    numbers = config.layers * config.memory.slots * config.hidden_size
    assert size.memory == {"numbers": numbers, "fp32": 4 * numbers, "bf16": 2 * numbers}


def test_a_conversation_s_memory_is_as_large_as_published() -> None:
    slots = {name: load_preset(name).memory.slots * load_preset(name).layers for name in PRESETS}
    assert slots == {
        "alpha-micro-v1": 6 * 256,
        "alpha-nano": 6 * 256,
        "alpha-micro": 10 * 256,
        "alpha-mini": 10 * 256,
        "alpha-synthetic": 12 * 256,
        "beta": 21 * 4096,
        "tiny": 2 * 32,
    }


def test_models_prints_every_preset_with_its_sizes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: rxt(["models", "--json"], standalone_mode=False)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == PRESETS == set(preset_names())
    for row in rows:
        size = size_of(row["name"])
        assert row["total"] == size.total.parameters
        assert row["components"] == {
            part: {"parameters": size.components[part].parameters, "active": size.components[part].active}
            for part in ("decoder", "encoder", "memory_attention", "mlm_head")
        }


def test_models_prints_a_line_for_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: rxt(["models"], standalone_mode=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    (nano,) = (line for line in lines if line.startswith("alpha-nano"))
    assert all(number in nano for number in ("9,458,508", "3,521,868", "2,049,024", "1,186,688", "11,734,220"))
    assert {name for name in PRESETS if any(line.startswith(f"{name} ") for line in lines)} == PRESETS


# ---- FLOPs, against torch's own count of what really ran


def dense_config(variant: str) -> ModelConfig:
    """No experts (torch does not count grouped products), and the encoder's frozen cross-attention."""
    decoder = {
        "self_attention": {"query_heads": 4, "key_value_heads": 2, "gated": True},
        "cross_attention": {"query_heads": 2, "key_value_heads": 4},
        "feed_forward_size": 40,
        "stateless_layers": ["dense"],
        "final_stateless_layers": ["dense"],
    }
    encoder = {
        "attention": {"query_heads": 4, "key_value_heads": 1},
        "feed_forward_size": 48,
        "cross_attention": {"query_heads": 2, "key_value_heads": 1},
    }
    return tiny_config(memory={"variant": variant, "gate": "linear"}, decoder=decoder, encoder=encoder)


def test_flops_of_a_generated_token_are_those_of_a_step_at_the_end_of_the_window() -> None:
    model = tiny_model(dense_config("interlayer"))
    window = model.config.max_length
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        cache = model.decoder.start_cache(model.initial_memory(torch.tensor([1])), 1, window)
        with FlopCounterMode(display=False) as counter:
            states = model.decoder.step(model.embedding(torch.tensor([[20]])), torch.tensor([[window - 1]]), cache)
            model.decoder.head(states)
    assert ForwardFlops.of(model).generated_token == counter.get_total_flops()


@pytest.mark.parametrize("variant", ["simple", "self", "interlayer", "self-interlayer"])
def test_flops_of_a_written_token_are_those_of_writing_a_full_window(variant: str) -> None:
    model = tiny_model(dense_config(variant))
    window = model.config.max_length
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        memory = model.write(model.initial_memory(torch.tensor([1])), torch.tensor(rows_of(window)))
        model.decoder.start_cache(memory, 1, window)
    assert ForwardFlops.of(model).written_token == counter.get_total_flops() // window


def test_a_token_costs_the_products_of_its_own_experts_only() -> None:
    def flops(number: int, per_token: int) -> int:
        experts = {"number": number, "per_token": per_token, "size": 32}
        return measure_size(
            tiny_config(decoder={**tiny_config().decoder.model_dump(), "experts": experts})
        ).flops_per_token["decode"]

    layers, hidden, size = 2, 32, 32
    assert flops(6, 3) - flops(6, 2) == 2 * layers * 3 * hidden * size
    assert flops(8, 2) - flops(6, 2) == 2 * layers * 2 * hidden, "more experts cost a wider router only"
