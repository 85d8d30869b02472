"""Advantages by hand: of groups, by a critic, over an episode; nothing where nothing was scored or all are equal."""

import pytest
import torch
from torch import Tensor

from rxt_platform.rl.advantages import generalised_advantages, group_advantages, normalised, value_advantages


def grid(*rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows)


ALL = torch.ones(1, 1, 4, dtype=torch.bool)


def test_a_group_s_baseline_is_the_mean_of_the_other_answers() -> None:
    rewards = grid([[1.0, 2.0, 3.0, 10.0]])
    expected = [1 - 15 / 3, 2 - 14 / 3, 3 - 13 / 3, 10 - 6 / 3]
    assert group_advantages(rewards, ALL)[0, 0].tolist() == pytest.approx(expected)


def test_a_group_may_be_divided_by_its_deviation() -> None:
    rewards = grid([[0.0, 0.0, 10.0, 10.0]])
    assert group_advantages(rewards, ALL, by_deviation=True)[0, 0].tolist() == pytest.approx([-1, -1, 1, 1])


@pytest.mark.parametrize("by_deviation", [False, True])
def test_equal_rewards_teach_nothing(by_deviation: bool) -> None:
    """Exactly nothing, whatever rounding makes of their mean."""
    for answers in range(2, 17):
        same, scored = torch.full((2, 3, answers), 7.3), torch.ones(2, 3, answers, dtype=torch.bool)
        assert not group_advantages(same, scored, by_deviation).any()
    for how in ("batch", "step"):
        assert not normalised(torch.full((2, 3, 4), 0.7), torch.ones(2, 3, 4, dtype=torch.bool), how).any()  # type: ignore[arg-type]


def test_answers_without_a_reward_are_left_out() -> None:
    scored = torch.tensor([[[True, True, False, False]]])
    assert group_advantages(grid([[1.0, 3.0, 99.0, 99.0]]), scored)[0, 0].tolist() == pytest.approx([-2, 2, 0, 0])
    advantages, returns = value_advantages(grid([[1.0, 3.0, 99.0, 99.0]]), scored, torch.tensor([[1.5]]))
    assert advantages[0, 0].tolist() == pytest.approx([-0.5, 1.5, 0, 0])
    assert returns.tolist() == [[2.0]]


def test_a_single_answer_has_no_group_and_no_advantage() -> None:
    scored = torch.tensor([[[True, False, False, False]]])
    assert not group_advantages(grid([[5.0, 0.0, 0.0, 0.0]]), scored).any()


def test_gae_over_the_turns_of_an_episode_is_the_formula_by_hand() -> None:
    """Turn 0 is given; turn 2 of the second episode has no reward and is passed over."""
    rewards = torch.tensor([[0.0, 1.0, 2.0, 4.0], [0.0, 1.0, 0.0, 4.0]])[..., None]
    scored = torch.tensor([[False, True, True, True], [False, True, False, True]])[..., None]
    values = torch.tensor([[0.0, 0.5, 1.0, 1.5], [0.0, 0.5, 9.0, 1.5]])
    advantages, returns = generalised_advantages(rewards, scored, values, 0.9, 0.5)
    last = 4 - 1.5
    middle = 2 + 0.9 * 1.5 - 1 + 0.45 * last
    first = 1 + 0.9 * 1.0 - 0.5 + 0.45 * middle
    assert advantages[0, :, 0].tolist() == pytest.approx([0, first, middle, last])
    assert returns[0].tolist() == pytest.approx([0, first + 0.5, middle + 1, last + 1.5])
    skipped = 1 + 0.9 * 1.5 - 0.5 + 0.45 * last
    assert advantages[1, :, 0].tolist() == pytest.approx([0, skipped, 0, last])


def test_normalised_advantages_have_mean_0_and_deviation_1() -> None:
    advantages, scored = torch.randn(6, 3, 4), torch.rand(6, 3, 4) > 0.3
    made = normalised(advantages * scored, scored, "batch")
    assert float(made[scored].mean()) == pytest.approx(0, abs=1e-6)
    assert float(made[scored].std(correction=0)) == pytest.approx(1, rel=1e-5)
    assert not made[~scored].any()
    by_turn = normalised(advantages * scored, scored, "step")
    for turn in range(3):
        here = by_turn[:, turn][scored[:, turn]]
        assert float(here.mean()) == pytest.approx(0, abs=1e-6)
    assert torch.equal(normalised(advantages, scored, "none"), advantages)


def test_one_outlier_of_a_turn_is_limited() -> None:
    advantages = torch.zeros(1000, 1, 1)
    advantages[0] = 1.0
    made = normalised(advantages, torch.ones_like(advantages, dtype=torch.bool), "step")
    assert float(made.max()) == 10.0
