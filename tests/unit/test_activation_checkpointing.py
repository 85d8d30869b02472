"""Promises of activation checkpointing: the same numbers to the last bit, from far less memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rxt_platform.data.batches import Batch
from rxt_platform.model.layers import checkpoint_layers
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.stages.base import Phase, Stage
from rxt_platform.training.optimizer import build_optimizer
from tests.unit.helpers import batch_of, conversation, tiny_config, tiny_model
from tests.unit.stages import stage_of

TALKS = [conversation(*[(7, 8)] * 6, seed=seed) for seed in range(4)]
LAYERS = 4


def model_for(stage: Stage, checkpointed: bool) -> ReactiveTransformer:
    model = tiny_model(tiny_config(layers=LAYERS, max_length=24))
    build_optimizer(model, stage.config.optimizer, stage.phases())  # says what requires a gradient, as in the engine
    if checkpointed:
        checkpoint_layers(model)
    return model


def memory_aware() -> tuple[Stage, Batch]:
    schedule = {"unfreeze_memory_attention": 1, "unfreeze_encoder": 1}
    return stage_of("memory_aware", TALKS, **schedule), batch_of(TALKS)


def loss_and_gradients(stage: Stage, batch: Batch, phase: Phase, checkpointed: bool) -> dict[str, Tensor | None]:
    model = model_for(stage, checkpointed)
    report = stage.loss(model, batch, phase)
    report.loss.backward()
    assert report.usage is not None
    values = {"loss": report.loss.detach(), "usage": report.usage, **report.metrics}
    return {**values, **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.parametrize("number", range(3), ids=["decoder", "decoder + memory attention", "all"])
def test_loss_metrics_and_gradients_are_bit_identical(number: int) -> None:
    stage, batch = memory_aware()
    phase = stage.phases()[number]
    plain, recomputed = (loss_and_gradients(stage, batch, phase, checkpointed) for checkpointed in (False, True))
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        other = recomputed[name]
        assert (value is None) == (other is None), name
        assert value is None or other is None or torch.equal(value, other), name
    assert sum(value is not None for value in plain.values()) > 30


def saved_bytes(model: ReactiveTransformer, loss: Callable[[], Tensor]) -> int:
    """Bytes of what a forward keeps for its backward, each storage once, without the weights."""
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for storage in kept.values())


def test_less_than_a_tenth_is_kept_for_the_backward_pass() -> None:
    """Of six turns through four layers with experts: a layer's inputs instead of everything inside it."""
    stage, batch = memory_aware()
    phase = stage.phases()[-1]
    plain, recomputed = (
        saved_bytes(model, lambda model=model: stage.loss(model, batch, phase).loss)
        for model in (model_for(stage, False), model_for(stage, True))
    )
    assert recomputed < plain / 10


def test_layers_that_are_not_trained_are_not_computed_twice() -> None:
    stage, batch = memory_aware()
    model, calls = model_for(stage, True), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for layer in model.encoder.layers:
        layer.attention_norm.register_forward_hook(count)
    stage.loss(model, batch, stage.phases()[0]).loss.backward()  # the encoder is frozen
    assert calls == LAYERS
    stage.loss(model, batch, stage.phases()[-1]).loss.backward()
    assert calls == 3 * LAYERS
