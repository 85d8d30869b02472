"""Promises of the heads: loss, hits and gradients are the same, computed at once or in parts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rxt_platform.model.heads import MaskedLanguageHead, VocabularyHead

HIDDEN, VOCAB = 16, 50
Head = VocabularyHead | MaskedLanguageHead


def head_of(kind: type[Head], dtype: torch.dtype = torch.float32) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(HIDDEN, VOCAB).to(dtype)


def states_and_labels(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """States [N, D] and labels [N]."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(rows, HIDDEN, generator=generator)
    return states.to(dtype).requires_grad_(), torch.randint(0, VOCAB, (rows,), generator=generator)


def hit_half(head: Head, states: Tensor, labels: Tensor) -> Tensor:
    """Labels of which every other one is what the head guesses, so that there is something to count."""
    with torch.no_grad():
        guesses = head(states).argmax(dim=-1)
    return torch.where(torch.arange(len(labels)) % 2 == 0, guesses, (guesses + 1 + labels % 40) % VOCAB)


def loss_hits_gradients(head: Head, states: Tensor, labels: Tensor) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Of the loss times 0.3: training scales it before going backwards."""
    loss, hits = head(states, labels)
    wanted = {"states": states, **dict(head.named_parameters())}
    found = torch.autograd.grad(0.3 * loss, list(wanted.values()))
    return loss.detach(), int(hits), dict(zip(wanted, found, strict=True))


def in_parts_of(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let heads hold the logits of so many rows at once."""
    monkeypatch.setattr("rxt_platform.model.heads._LOGITS_AT_ONCE", max(1, rows * VOCAB))


@pytest.mark.parametrize("kind", [VocabularyHead, MaskedLanguageHead])
def test_the_loss_is_the_summed_cross_entropy_of_the_logits(kind: type[Head]) -> None:
    head, (states, labels) = head_of(kind), states_and_labels(23)
    labels = hit_half(head, states, labels)
    loss, hits = head(states, labels)
    logits = head(states)
    by_hand = -logits.log_softmax(dim=-1)[torch.arange(23), labels].sum()
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=0)
    assert int(hits) == int((logits.argmax(dim=-1) == labels).sum()) == 12


@pytest.mark.parametrize("kind", [VocabularyHead, MaskedLanguageHead])
@pytest.mark.parametrize("part", [0, 1, 5, 8, 12, 23])
def test_parts_give_what_the_whole_gives(kind: type[Head], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, (states, labels) = head_of(kind), states_and_labels(24)
    labels = hit_half(head, states, labels)
    loss, hits, gradients = loss_hits_gradients(head, states, labels)
    assert hits == 12
    in_parts_of(monkeypatch, part)  # 0: less room than one row takes
    loss_in_parts, hits_in_parts, gradients_in_parts = loss_hits_gradients(head, states, labels)
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-5, atol=0)
    assert hits_in_parts == hits
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-3, f"{name}: nothing to compare"
        torch.testing.assert_close(
            gradients_in_parts[name], gradient, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", [VocabularyHead, MaskedLanguageHead])
@pytest.mark.parametrize("part", [5, 23])
def test_parts_give_what_the_whole_gives_in_bf16(kind: type[Head], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head, (states, labels) = head_of(kind, torch.bfloat16), states_and_labels(24, torch.bfloat16)
    labels = hit_half(head, states, labels)
    loss, hits, gradients = loss_hits_gradients(head, states, labels)
    in_parts_of(monkeypatch, part)
    loss_in_parts, hits_in_parts, gradients_in_parts = loss_hits_gradients(head, states, labels)
    assert loss_in_parts.dtype == loss.dtype == torch.float32, "a sum over many tokens does not fit bf16"
    torch.testing.assert_close(loss_in_parts, loss, rtol=5e-3, atol=0)
    assert abs(hits_in_parts - hits) <= 1
    for name, gradient in gradients.items():
        error = (gradients_in_parts[name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < 0.02, f"{name}: {float(error):.3f}"


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


@pytest.mark.parametrize("kind", [VocabularyHead, MaskedLanguageHead])
def test_no_tensor_ever_holds_more_logits_than_allowed(kind: type[Head], monkeypatch: pytest.MonkeyPatch) -> None:
    head, (states, labels) = head_of(kind), states_and_labels(240)
    with LargestTensor() as whole:
        head(states, labels)[0].backward()
    assert whole.numbers == 240 * VOCAB
    in_parts_of(monkeypatch, 5)
    with LargestTensor() as parts:
        head(states, labels)[0].backward()
    assert parts.numbers <= states.numel(), "larger than what goes in"


@pytest.mark.parametrize("kind", [VocabularyHead, MaskedLanguageHead])
@pytest.mark.parametrize("part", [0, 100])
def test_no_targets_are_no_loss_and_no_gradient(kind: type[Head], part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts_of(monkeypatch, part)
    head, (states, labels) = head_of(kind), states_and_labels(0)
    loss, hits, gradients = loss_hits_gradients(head, states, labels)
    assert (float(loss), hits) == (0.0, 0)
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_parts_train_no_frozen_weight_and_need_no_trained_state(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts_of(monkeypatch, 5)
    head, (states, labels) = head_of(VocabularyHead), states_and_labels(24)
    assert isinstance(head, VocabularyHead)
    _, _, gradients = loss_hits_gradients(head, states, labels)
    (alone,) = torch.autograd.grad(0.3 * head(states.detach(), labels)[0], [head.weight])
    torch.testing.assert_close(alone, gradients["weight"], rtol=1e-5, atol=1e-6)
    head.requires_grad_(False)
    (through,) = torch.autograd.grad(0.3 * head(states, labels)[0], [states])
    torch.testing.assert_close(through, gradients["states"], rtol=1e-5, atol=1e-6)
    assert not head(states.detach(), labels)[0].requires_grad
    with torch.no_grad():
        torch.testing.assert_close(head(states, labels)[0], head_of(VocabularyHead)(states, labels)[0])
