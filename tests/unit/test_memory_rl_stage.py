"""MRL's promises: the first update has ratio 1 and KL 0, a late reward reaches the first write, parts add up."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rxt_platform.config.model import HeadConfig
from rxt_platform.config.mrl import CriticPretrainingConfig
from rxt_platform.data.sampler import EpisodeSampler
from rxt_platform.model.actor_critic import ActorCritic
from rxt_platform.model.transformer import Decoded, ReactiveTransformer
from rxt_platform.rl.critic import state_ids
from rxt_platform.rl.episodes import Experience, padded_states
from rxt_platform.rl.preferences import better_and_worse, paired
from rxt_platform.rl.rollouts import RolloutOptions, hold_episodes
from rxt_platform.stages import answers
from rxt_platform.stages.answers import answered
from rxt_platform.stages.base import LossReport, Phase
from rxt_platform.stages.build import sampling
from rxt_platform.stages.memory_rl import CriticStage
from tests.unit.episodes import ALL, episode_set, episodes, experience_of, rl_config, rl_stage, world_model
from tests.unit.helpers import gradients, tiny_config

SPARSE = {"query_heads": 2, "key_value_heads": 2}
DENSE = {"self_attention": SPARSE, "cross_attention": SPARSE, "feed_forward_size": 48}


def held(model: ReactiveTransformer, answers: int = 3, turns: int = 4, count: int = 4) -> Experience:
    """Experience of a model's own answers, its advantages drawn at random."""
    talks = episodes(turns, count)
    experience = experience_of(hold_episodes(model, talks, RolloutOptions(answers)))
    generator = torch.Generator().manual_seed(0)
    return replace(experience, advantages=torch.randn(experience.advantages.shape, generator=generator))


def with_old(model: ReactiveTransformer, experience: Experience, reference: bool = False) -> Experience:
    with torch.no_grad():
        found = answered(model, experience, ALL)
        old = found.spread(found.log_probs, experience.old)
    return replace(experience, old=old, reference=old.clone() if reference else experience.reference)


def taken_gradients(model: ReactiveTransformer) -> dict[str, Tensor]:
    """What a backward pass has left, which the next one begins without."""
    taken = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def test_the_first_update_has_ratio_1_for_every_token_and_kl_0() -> None:
    """Old log-probabilities come from the update's own path (DESIGN 12), here with other rows beside each other."""
    model = world_model()
    experience = held(model)
    with torch.no_grad():
        parts = [(part, answered(model, part, ALL)) for part in experience.shares(0, 1, 1)]
    for row, (part, one) in enumerate(parts):
        spread = one.spread(one.log_probs, part.old)
        experience.old[row : row + 1, :, :, : spread.shape[-1]] = spread
    experience = replace(experience, reference=experience.old.clone())
    found = answered(model, experience, ALL)
    ratio = (found.log_probs - found.of_tokens(experience.old)).exp()
    assert len(ratio) > 50
    assert float((ratio.detach() - 1).abs().max()) < 1e-5
    stage = rl_stage(reference=copy.deepcopy(model), objective={"kind": "policy", "kl_weight": 0.1})
    report = stage.loss(model, experience, ALL)
    assert float(report.metrics["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(report.metrics["log_ratio"]) == pytest.approx(0, abs=1e-5)
    assert float(report.metrics["clipped"]) == 0


@pytest.mark.parametrize("widest", [1024, 120, 1], ids=["all", "some", "none"])
@pytest.mark.parametrize("model", [world_model(), world_model(decoder=DENSE)], ids=["experts", "dense"])
def test_answers_that_share_a_row_are_decoded_as_each_in_its_own(
    model: ReactiveTransformer, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities, the balance of lone answers, and the gradient; some questions have fewer answers, or none."""
    monkeypatch.setattr(answers, "_WIDEST", widest)
    decode, widths = model.decode_states, list[tuple[int, int]]()

    def noted(ids: Tensor, *rest: Tensor, **options: Any) -> Decoded:
        widths.append((ids.shape[0], ids.shape[1]))
        return decode(ids, *rest, **options)

    monkeypatch.setattr(model, "decode_states", noted)
    experience = held(model, answers=4, count=3)
    targets = experience.targets.clone()
    targets[0, 1, 1:] = targets[1, 2] = targets[2, 1, 0] = targets[2, 3, 2] = False
    experience = replace(experience, targets=targets)
    found = answered(model, experience, ALL)
    ((rows, width),) = widths
    assert width <= max(widest, experience.ids.shape[-1])
    number = int(targets.any(dim=-1).sum())
    assert rows == {1024: int(targets.any(dim=-1).any(dim=-1).sum()), 1: number}.get(widest, rows)
    assert widest != 120 or number / 4 < rows < number
    expected, balance = list[Tensor](), list[Tensor]()
    for row in range(3):
        written = experience.written
        memory = model.initial_memory(written.seeds[row : row + 1])
        for turn in range(4):
            for number in range(4):
                if not targets[row, turn, number].any():
                    continue
                end = int(targets[row, turn, number].nonzero()[-1]) + 1
                ids = experience.ids[row : row + 1, turn, number, :end]
                decoded = model.decode_states(ids, None, memory)
                logs = model.head(decoded.states).log_softmax(dim=-1)
                balance.append(decoded.balance.sum())
                start = int(targets[row, turn, number].nonzero()[0])
                expected.append(logs[0, start - 1 : end - 1].gather(1, ids[0, start:end, None])[:, 0])
            length = int(written.mask[row, turn].sum())
            memory = model.write(memory, written.ids[row : row + 1, turn, :length], None)
    alone = torch.cat(expected)
    torch.testing.assert_close(found.log_probs, alone, atol=1e-5, rtol=1e-5)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1))
    trained = [each for each in model.parameters() if each.requires_grad]
    shared, each = (
        torch.autograd.grad((logs * weights).sum(), trained, allow_unused=True) for logs in (found.log_probs, alone)
    )
    for mine, theirs in zip(shared, each, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    if widest == 1:
        assert found.balance.item() == pytest.approx(sum(one.item() for one in balance), abs=1e-4)
    targets[:, :, 1:] = False
    lone = answered(model, replace(experience, targets=targets), ALL)
    firsts = [at for at, (_, _, number) in enumerate(found.place.tolist()) if number == 0]
    assert lone.balance.item() == pytest.approx(sum(balance[at].item() for at in firsts), abs=1e-4)


def test_log_probabilities_are_those_that_the_sampler_drew_from() -> None:
    """At temperature 1, token by token, with a cache: within rounding."""
    model = world_model()
    (talk,) = episodes(count=1)
    experience = experience_of(hold_episodes(model, [talk], RolloutOptions(2)))
    found = answered(model, experience, ALL)
    memory = model.initial_memory(torch.tensor([talk.seed]))
    with torch.no_grad():
        memory = model.write(memory, torch.tensor([talk.example.turns[0]]))
        row = experience.ids[0, 1, 0]
        end = int(experience.targets[0, 1, 0].nonzero()[-1]) + 1
        logits = model.decode(row[None, :end], None, memory)[0].log_softmax(dim=-1)
    start = int(experience.targets[0, 1, 0].nonzero()[0])
    expected = logits[start - 1 : end - 1].gather(1, row[start:end, None])[:, 0]
    assert torch.allclose(found.log_probs[: end - start].detach(), expected, atol=1e-5)


def test_a_reward_at_turn_6_reaches_the_write_at_turn_1_as_finite_differences_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In double precision, so without experts: their kernel has none."""
    model = world_model(decoder=DENSE).double()
    experience = experience_of(hold_episodes(model, episodes(turns=7, count=1), RolloutOptions(2)))
    late = torch.zeros_like(experience.advantages)
    late[0, 6] = torch.tensor([1.5, -0.5])
    experience = replace(experience, advantages=late, on_policy=True)
    stage, write = rl_stage(episode_set(7)), model.write_states

    def change_first_write(change: Tensor) -> None:
        count = itertools.count()

        def moved(memory: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
            written = write(memory, states, mask)
            return written + change if next(count) == 0 else written

        monkeypatch.setattr(model, "write_states", moved)

    @torch.no_grad()
    def objective(change: Tensor) -> float:
        """What the gradient is one of: advantages times mean log-probabilities."""
        change_first_write(change)
        found = answered(model, experience, ALL)
        worth = found.of_answers(experience.advantages).double()
        return float(-(found.tokens.mean(found.log_probs.double()) * worth).sum() / experience.total_answers)

    change = torch.zeros(2, 1, 8, 32, dtype=torch.float64, requires_grad=True)
    change_first_write(change)
    stage.loss(model, experience, ALL).loss.backward()
    assert change.grad is not None
    assert float(change.grad.norm()) > 1e-6
    direction = torch.randn(change.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-2  # log-probabilities are in single precision
    difference = (objective(step * direction) - objective(-step * direction)) / (2 * step)
    assert float((change.grad * direction).sum()) == pytest.approx(difference, rel=3e-3)


def test_with_a_window_of_one_write_the_first_gets_no_gradient_from_turn_6() -> None:
    model = world_model()
    experience = held(model, turns=7, count=1)
    late = torch.zeros_like(experience.advantages)
    late[0, 6] = 1.0
    experience = replace(experience, advantages=late, on_policy=True)
    first: list[Tensor] = []
    write = model.write_states

    def recording(memory: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        written = write(memory, states, mask)
        if not first:
            written.retain_grad()
            first.append(written)
        return written

    for window, reached in (("all", True), (1, False)):
        first.clear()
        model.write_states = recording  # type: ignore[method-assign]
        rl_stage(episode_set(7), bptt_window=window).loss(model, experience, ALL).loss.backward()
        assert (first[0].grad is not None and bool(first[0].grad.any())) == reached, window


def total(reports: list[LossReport]) -> LossReport:
    whole = reports[0].detached()
    for one in reports[1:]:
        whole = whole.plus(one)
    return whole


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (2, 2)])
def test_the_loss_and_its_gradient_are_the_same_over_any_split(world: int, micro: int) -> None:
    model = world_model()
    experience = with_old(world_model(1), held(model))
    stage = rl_stage(objective={"kind": "policy", "entropy_weight": 0.1}, balance_weight=0.1, memory_change_weight=0.1)
    whole = stage.loss(model, experience, ALL)
    whole.loss.backward()
    expected = taken_gradients(model)
    reports = []
    for rank in range(world):
        for part in experience.shares(rank, world, micro):
            report = stage.loss(model, part, ALL)
            report.loss.backward()
            reports.append(report)
    assert float(total(reports).loss) == pytest.approx(float(whole.loss), abs=1e-6)
    for name, value in total(reports).metrics.items():
        assert float(value) == pytest.approx(float(whole.metrics[name]), abs=1e-5), name
    torch.testing.assert_close(taken_gradients(model), expected, atol=1e-6, rtol=1e-5)


def test_answers_without_an_advantage_can_be_left_out() -> None:
    """What the collector does: they get no gradient, so they need no forward."""
    model = world_model()
    experience = replace(held(model), on_policy=True)
    experience.advantages[:, :, 1] = 0.0
    stage = rl_stage()
    stage.loss(model, experience, ALL).loss.backward()
    expected = taken_gradients(model)
    targets = experience.targets & (experience.advantages != 0)[..., None]
    assert targets.sum() < experience.targets.sum()
    stage.loss(model, replace(experience, targets=targets), ALL).loss.backward()
    torch.testing.assert_close(taken_gradients(model), expected, atol=1e-7, rtol=1e-5)


def test_equal_rewards_move_nothing() -> None:
    model = world_model()
    experience = replace(held(model), on_policy=True)
    experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
    rl_stage().loss(model, experience, ALL).loss.backward()
    assert set(gradients(model).values()) == {0.0}
    nothing = replace(experience, targets=torch.zeros_like(experience.targets))
    model.zero_grad(set_to_none=True)
    report = rl_stage(balance_weight=0.1).loss(model, nothing, ALL)
    report.loss.backward()
    assert set(gradients(model).values()) == {0.0}
    assert report.usage is not None
    assert not report.usage.any()


def test_a_better_answer_becomes_likelier_and_a_worse_one_less_likely() -> None:
    model = world_model()
    experience = replace(held(model, answers=2, count=2), on_policy=True)
    experience.advantages[:, :, 0], experience.advantages[:, :, 1] = 1.0, -1.0
    stage, optimizer = rl_stage(), torch.optim.SGD(model.parameters(), lr=0.1)

    def likelihoods() -> Tensor:
        with torch.no_grad():
            found = answered(model, experience, ALL)
        return found.tokens.mean(found.log_probs)

    before = likelihoods()
    stage.loss(model, experience, ALL).loss.backward()
    optimizer.step()
    change = (likelihoods() - before).view(-1, 2)
    assert float(change[:, 0].mean()) > 0 > float(change[:, 1].mean())


def test_phases_unfreeze_the_memory_then_the_encoder_then_everything() -> None:
    rows = episode_set(count=40)
    stage = rl_stage(rows, epochs=4, unfreeze_encoder=1, unfreeze_all=1, critic={}, critic_warmup=1)
    assert [(phase.name, phase.start) for phase in stage.phases()] == [
        ("critic", 0),
        ("memory", 20),
        ("memory + encoder", 40),
        ("all", 60),
    ]
    model = world_model()
    experience = replace(held(model), on_policy=True)
    stage = rl_stage()
    stage.loss(
        model, experience, Phase("memory", 0, frozenset({"memory_attention", "memory_cross_attention"}))
    ).loss.backward()
    moved = {name.split(".")[0] for name in gradients(model)}
    assert "memory_attention" in moved
    assert not {"encoder", "embedding"} & moved


def test_updates_see_every_episode_once_in_each_pass() -> None:
    config = rl_config(minibatches=2, update_epochs=3)
    sampler = EpisodeSampler(episode_set(count=8), sampling(config, 3, 64), config.updates)
    assert sampler.resumable_every == 6
    assert sampler.total_steps == 2 * 6
    for step in range(6):
        assert torch.equal(sampler.global_batch(step).rows, sampler.global_batch(0).rows)
    assert not torch.equal(sampler.global_batch(6).rows, sampler.global_batch(5).rows)
    assert len(sampler.global_batch(0).rows) == 4


def test_dmpo_prefers_the_accepted_answer_over_the_memory_of_accepted_ones() -> None:
    model = world_model()
    rollouts = hold_episodes(model, episodes(count=2), RolloutOptions(3))
    rewards = torch.zeros(2, 4, 3)
    rewards[:, 1:] = torch.tensor([5.0, 1.0, 9.0])
    rewards[1, 3] = 4.0  # equal ones: no preference
    scored = torch.ones(2, 4, 3, dtype=torch.bool)
    scored[:, 0] = False
    pairs, known = paired(rollouts, rewards, scored, neutral=True)
    first = pairs[0]
    assert first.answers[1] == [rollouts[0].answers[1][at] for at in (2, 1, 0)]
    assert first.written[1] == [*first.episode.prompt(1), *rollouts[0].answers[1][2]]
    assert known[:, :, 0].tolist() == [[False, True, True, True], [False, True, True, False]]
    experience = replace(experience_of(pairs), scored=known, total_answers=int(known.sum()))
    stage = rl_stage(reference=copy.deepcopy(model), objective={"kind": "dmpo", "beta": 0.5, "anchor_weight": 0.1})
    experience = with_old(model, experience, reference=True)
    report = stage.loss(model, experience, ALL)
    assert float(report.loss) == pytest.approx(0.6931, abs=1e-3)  # log 2: nothing preferred yet
    report.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.2).step()
    assert float(stage.loss(model, experience, ALL).metrics["margin"]) > 0


def critic_model() -> ActorCritic:
    config = tiny_config(vocab_size=400, max_length=64)
    torch.manual_seed(0)
    return ActorCritic(config, HeadConfig(kind="value", max_length=128)).start_critic()


def critic_stage(**changes: object) -> CriticStage:
    base = {"kind": "critic_pretraining", "steps": 3, "epochs": 1, "global_batch_size": 2}
    config = CriticPretrainingConfig.model_validate({**base, "optimizer": {"learning_rate": 1}, **changes})
    return CriticStage(config, EpisodeSampler(episode_set(), sampling(config, 3, 64), 1))


def test_the_critic_learns_the_rewards_and_leaves_the_policy_alone() -> None:
    model = critic_model()
    rollouts = hold_episodes(model, episodes(count=4), RolloutOptions(1))
    stage = critic_stage()
    states = padded_states(stage.states(rollouts, model.critic.window), 4)
    returns = torch.rand(4, 4, 1, generator=torch.Generator().manual_seed(0)) * 10
    experience = replace(experience_of(rollouts), states=states, returns=returns).minibatch(range(4))
    assert experience.total_states == 12
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        report = stage.loss(model, experience, stage.phases()[0])
        optimizer.zero_grad()
        report.loss.backward()
        optimizer.step()
        losses.append(float(report.loss))
    assert losses[-1] < 0.3 * losses[0]
    model.zero_grad(set_to_none=True)
    stage.loss(model, experience, stage.phases()[0]).loss.backward()
    assert all(name.startswith("critic.") for name in gradients(model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": 1}, "advantage group compares answers"),
        ({"objective": {"kind": "policy", "advantage": "impo"}}, "asks a critic"),
        ({"objective": {"kind": "policy", "advantage": "gae"}, "critic": {}}, "use answers 1"),
        ({"objective": {"kind": "dmpo"}, "answers": 1}, "dmpo compares answers"),
        ({"objective": {"kind": "dmpo", "anchor_weight": 0.1}, "answers": 2}, "sample 3 or more"),
        ({"unfreeze_encoder": 0.5, "unfreeze_all": 0.5}, "it would never end"),
        ({"critic_warmup": 0.1}, "has no effect without a critic"),
        ({"early_stopping": {"every": 10, "metric": "reward"}}, "the best is the highest: set highest: true"),
        ({"objective": {"kind": "policy", "decay": 0.9}}, "decay has no effect with advantage: group"),
    ],
)
def test_settings_that_can_t_work_are_refused_by_name(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        rl_config(**changes)


def test_a_critic_of_answers_gives_the_better_of_two_the_higher_value() -> None:
    model = critic_model()
    rollouts = hold_episodes(model, episodes(count=4), RolloutOptions(3))
    stage = critic_stage(learns="preferences", answers=3)
    rewards = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(0))
    rewards[0, 1] = 0.5  # equal ones: no preference
    scored = torch.ones(4, 4, 3, dtype=torch.bool)
    pairs = better_and_worse(stage.states(rollouts, model.critic.window), rewards, scored)
    assert [len(group) for group in pairs[0]] == [0, 0, 2, 2]
    best = int(rewards[1, 2].argmax())
    prompt = rollouts[1].episode.prompt(2)
    assert pairs[1][2][0] == state_ids(rollouts[1].written[1], [*prompt, *rollouts[1].answers[2][best]], 128)
    states = padded_states(pairs, 4)
    experience = replace(experience_of(rollouts), states=states, returns=torch.zeros(4, 4, 2)).minibatch(range(4))
    assert experience.total_states == 22
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        report = stage.loss(model, experience, stage.phases()[0])
        optimizer.zero_grad()
        report.loss.backward()
        optimizer.step()
        losses.append(float(report.loss))
    assert losses[-1] < 0.3 * losses[0]


def test_the_step_between_answers_is_held_small_position_by_position() -> None:
    """REF 4's inter-step KL: by hand for one episode."""
    model = world_model()
    experience = replace(held(model, answers=2, count=1).minibatch([0]), on_policy=True)
    assert experience.total_pairs == 2
    plain = rl_stage().loss(model, experience, ALL).loss
    weight = 0.3
    stage = rl_stage(objective={"kind": "policy", "inter_step_weight": weight})
    with torch.no_grad():
        found = answered(model, experience, ALL)
        logs = model.head(found.states).log_softmax(dim=-1)
        first = [logs[found.tokens.answer == at] for at, place in enumerate(found.place.tolist()) if place[2] == 0]
        expected = 0.0
        for before, now in itertools.pairwise(first):
            both = min(len(before), len(now))
            expected += float((before[:both].exp() * (before[:both] - now[:both])).sum(dim=-1).mean())
    found_loss = stage.loss(model, experience, ALL).loss
    assert len(first) == 3
    assert float(found_loss - plain) == pytest.approx(weight * expected / 2, rel=1e-3)
    found_loss.backward()
