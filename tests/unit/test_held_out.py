"""What held-out conversations come to: the same however they are shared, and only what there is something to say of."""

import pytest
import torch

from rxt_platform.config.model import HeadConfig
from rxt_platform.model.actor_critic import ActorCritic
from rxt_platform.rl.held_out import HeldOut
from rxt_platform.training.job import validation_batches
from tests.unit.episodes import rl_stage
from tests.unit.helpers import tiny_config


def test_shares_of_the_conversations_come_to_what_all_do() -> None:
    torch.manual_seed(0)
    model = ActorCritic(
        tiny_config(vocab_size=400, max_length=64), HeadConfig(kind="value", max_length=128)
    ).start_critic()
    stage = rl_stage(critic={"window": 128}, objective={"kind": "policy", "advantage": "impo"})
    (batch,) = validation_batches(stage.judging.held_out, stage.config)
    whole = stage.hold_out(model, batch)
    rows = torch.arange(8)
    shares = [stage.hold_out(model, batch.rows_at(part)) for part in (rows[0::3], rows[1::3], rows[2::3], rows[8:])]
    assert shares[-1] == HeldOut()
    joined = HeldOut.joined(shares)
    assert sorted(joined.sampled) == pytest.approx(sorted(whole.sampled))
    assert (joined.asked, joined.right) == (whole.asked, whole.right)
    assert len(whole.sampled) == len(whole.greedy) == len(whole.values) == 8 * 3
    for name, value in whole.metrics().items():
        assert joined.metrics()[name] == pytest.approx(value, abs=1e-5), name
    assert set(whole.metrics()) == {"reward", "greedy_reward", "recall", "critic_correlation", "critic_error"}


def test_metrics_are_means_and_what_is_not_there_is_left_out() -> None:
    assert HeldOut().metrics() == {}
    found = HeldOut(sampled=[1.0, 3.0], right=1, asked=4, values=[1.0, 2.0, 3.0], worth=[3.0, 4.0, 5.0]).metrics()
    assert found == pytest.approx({"reward": 2.0, "recall": 0.25, "critic_correlation": 1.0, "critic_error": 2.0})
    assert HeldOut(values=[1.0, 1.0], worth=[3.0, 4.0]).metrics()["critic_correlation"] == 0
