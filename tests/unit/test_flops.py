"""Promise of `Stage.flops`: it is what torch counts while the loss and its backward pass are computed.

Equal, without a tolerance, once what is not counted alike on purpose is taken off: the half of causal attention that
is masked out, and the means over segments in memory pre-training. The experts here have no local biases, which are
computed as products with one-hot rows but are no work of the model's.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.batches import Batch
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.stages.base import Phase, Stage
from rxt_platform.stages.unroll import turn_groups
from rxt_platform.training.optimizer import build_optimizer
from tests.unit.helpers import batch_of, conversation, tiny_model
from tests.unit.stages import ROWS, SINGLES, TEXTS, stage_of
from tests.unit.variants import EXPERTS, heads, variant

DENSE: dict[str, Any] = {"experts": None, "feed_forward_size": 48}
MODELS: dict[str, ModelConfig] = {
    "dense": variant(decoder=DENSE),
    "experts": variant(decoder={"experts": {**EXPERTS, "bias": "off"}}),
    "shared experts, gates, stateless layers": variant(
        heads(2, 4, gated=True),
        {
            "experts": {**EXPERTS, "bias": "global", "shared": 2, "shared_size": 24},
            "feed_forward_size": 48,
            "stateless_layers": ["dense"],
            "final_stateless_layers": ["moe"],
        },
        memory={"variant": "self-interlayer"},
    ),
    "frozen attention in the encoder": variant(decoder=DENSE, encoder={"cross_attention": heads(2, 1, gated=True)}),
}
TALKS = [conversation((1, 1), (6, 7), (8, 8), (2, 2), seed=1), conversation((2, 1), (3, 2), seed=2)]
every_model = pytest.mark.parametrize("name", MODELS)


def counted(stage: Stage, config: ModelConfig, batch: Batch, phase: Phase) -> int:
    """What torch counts in a loss and its backward, without the half of causal attention that is masked out."""
    model = tiny_model(config)
    build_optimizer(model, stage.config.optimizer, stage.phases())  # says what requires a gradient, as in the engine
    masked_out = 0

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal masked_out
        rows, length, _ = inputs[0].shape
        attention: Any = layer.self_attention
        width = max(attention.query_heads, attention.key_value_heads) * attention.head_size
        masked_out += 3 * 4 * width * rows * (length**2 - length**2 // 2)

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(note)
    # Torch has no count for grouped products: [N, D] times [E, D, H], or for the weights' gradient [D, N] times [N, H].
    grouped = {torch.ops.aten._grouped_mm: lambda a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, sdpa_kernel(SDPBackend.MATH):
        stage.loss(model, batch, phase).loss.backward()
    return counter.get_total_flops() - masked_out


def claimed(stage: Stage, config: ModelConfig, batch: Batch, phase: Phase) -> int:
    return stage.flops(ForwardFlops.of(tiny_model(config)), batch, phase)


@every_model
@pytest.mark.parametrize("kind", ["joint_pretraining", "interaction_sft"])
@pytest.mark.parametrize("decoder_only", [0.0, 0.5])
def test_flops_of_joint_training_are_those_that_torch_counts(name: str, kind: str, decoder_only: float) -> None:
    """With 32 slots, a decoder that may read an empty memory reads more positions than any text has."""
    config = MODELS[name].model_copy(update={"memory": MODELS[name].memory.model_copy(update={"slots": 32})})
    stage = stage_of(kind, ROWS[kind], loss={"decoder_only": decoder_only, "mask_probability": 0.4})
    batch, (phase,) = stage.sampler.global_batch(0), stage.phases()
    assert claimed(stage, config, batch, phase) == counted(stage, config, batch, phase)


@every_model
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_flops_of_separate_training_are_those_that_torch_counts(name: str, half: str) -> None:
    stage = stage_of("joint_pretraining", TEXTS, trains=half)
    batch, (phase,) = stage.sampler.global_batch(0), stage.phases()
    assert claimed(stage, MODELS[name], batch, phase) == counted(stage, MODELS[name], batch, phase)


def test_flops_of_packed_rows_are_those_that_torch_counts() -> None:
    """Positions of other documents are counted too: they are computed, and masked."""
    stage = stage_of("joint_pretraining", TEXTS, global_batch_size=2, packing=1)
    batch, (phase,) = stage.sampler.global_batch(0), stage.phases()
    assert batch.most_documents > 1
    assert claimed(stage, MODELS["experts"], batch, phase) == counted(stage, MODELS["experts"], batch, phase)


@every_model
def test_flops_of_memory_pretraining_are_those_that_torch_counts_but_for_its_targets(name: str) -> None:
    config, stage, batch = MODELS[name], stage_of("memory_pretraining"), batch_of(TALKS)
    (phase,) = stage.phases()
    positions = len(batch.rows) * sum(batch.turn_lengths)
    targets = 2 * config.layers * config.memory.slots * positions * config.hidden_size  # see by_slot
    assert claimed(stage, config, batch, phase) == counted(stage, config, batch, phase) - targets


@pytest.mark.parametrize(("name", "window"), [*((name, "all") for name in MODELS), ("experts", 1), ("experts", 2)])
def test_flops_of_memory_aware_training_are_those_that_torch_counts_in_every_phase(
    name: str, window: int | str
) -> None:
    schedule = {"unfreeze_memory_attention": 1, "unfreeze_encoder": 1}
    stage, batch = stage_of("memory_aware", bptt_window=window, **schedule), batch_of(TALKS)
    assert len(turn_groups(batch)) == 3
    claims = [claimed(stage, MODELS[name], batch, phase) for phase in stage.phases()]
    assert claims == [counted(stage, MODELS[name], batch, phase) for phase in stage.phases()]
    assert sorted(set(claims)) == claims, "each phase trains more"


def test_flops_of_conversations_of_one_turn_hold_the_write_that_is_not_read() -> None:
    stage, batch = stage_of("memory_aware", SINGLES), batch_of(SINGLES)
    phase = stage.phases()[-1]
    assert claimed(stage, MODELS["experts"], batch, phase) == counted(stage, MODELS["experts"], batch, phase)
