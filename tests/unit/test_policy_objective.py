"""The objective's parts by hand: clipping, divergence, preferences; and answers as means over their tokens."""

import math

import pytest
import torch

from rxt_platform.rl.objective import Tokens, anchor, clipped_objective, divergence, preference_loss


def test_the_clipped_objective_is_ppo_s() -> None:
    old = torch.zeros(4)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    values, clipped = clipped_objective(new, old, torch.tensor([2.0, -2.0, 2.0, -2.0]), 0.2)
    assert values.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6])
    assert clipped.tolist() == [True, False, False, True]


def test_a_clipped_token_gets_no_gradient_and_others_do() -> None:
    new = torch.tensor([1.5, 1.5]).log().requires_grad_()
    clipped_objective(new, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2)[0].sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, 1.5])


def test_divergence_is_never_negative_0_where_both_agree_and_unbiased() -> None:
    new = torch.log_softmax(torch.randn(7, generator=torch.Generator().manual_seed(0)), dim=0)
    reference = torch.log_softmax(torch.randn(7, generator=torch.Generator().manual_seed(1)), dim=0)
    every = divergence(new, reference)
    assert (every >= 0).all()
    exact = float((new.exp() * (new - reference)).sum())
    assert float((new.exp() * every).sum()) == pytest.approx(exact, rel=1e-5)
    assert not divergence(new, new).any()


def test_a_preference_compares_with_the_reference() -> None:
    values, margin = preference_loss(*(torch.tensor([one]) for one in (-1.0, -2.0, -1.5, -1.8)), beta=0.5)
    assert float(margin) == pytest.approx(1.0 - 0.3)
    assert float(values) == pytest.approx(-math.log(1 / (1 + math.exp(-0.5 * 0.7))))
    assert anchor(torch.tensor([-1.0]), torch.tensor([-1.5])).tolist() == [0.5]


def test_an_answer_counts_as_the_mean_over_its_tokens() -> None:
    tokens = Tokens(torch.tensor([0, 0, 0, 2]), 3)
    assert tokens.mean(torch.tensor([1.0, 2.0, 3.0, 5.0])).tolist() == [2.0, 0.0, 5.0]
