"""Holding conversations: reproducible from seeds, alone or in a batch, and replayed by the update bit for bit."""

from dataclasses import replace

import pytest
import torch

from rxt_platform.data.tokenizer import EOS
from rxt_platform.errors import DataError, ModelError
from rxt_platform.rl.rollouts import RolloutOptions, hold_episodes, write
from rxt_platform.rl.rollouts import RolloutOptions as Options
from rxt_platform.stages.answers import answered
from rxt_platform.stages.unroll import unrolled
from tests.unit.episodes import ALL, episode_set, episodes, experience_of, world_model


def test_the_same_seed_holds_the_same_conversation_alone_and_in_a_batch() -> None:
    model, talks = world_model(), episodes()
    together = hold_episodes(model, talks, RolloutOptions(answers=3))
    assert together == hold_episodes(model, talks, RolloutOptions(answers=3))
    for number, one in enumerate(talks):
        assert hold_episodes(model, [one], RolloutOptions(answers=3)) == [together[number]]
    other = hold_episodes(model, [replace(one, seed=one.seed + 1) for one in talks], RolloutOptions(answers=3))
    assert all(mine.answers != theirs.answers for mine, theirs in zip(together, other, strict=True))


def test_the_first_interaction_is_given_and_what_the_model_said_first_is_written() -> None:
    (talk,) = episodes(count=1)
    (held,) = hold_episodes(world_model(), [talk], RolloutOptions(answers=2))
    assert held.answers[0] == []
    assert held.written[0] == list(talk.example.turns[0])
    for turn in range(1, talk.turns):
        assert len(held.answers[turn]) == 2
        assert held.written[turn] == [*talk.prompt(turn), *held.answers[turn][0]]


def test_teacher_forced_memory_takes_the_references() -> None:
    (talk,) = episodes(count=1)
    (held,) = hold_episodes(world_model(), [talk], RolloutOptions(teacher_forced=True))
    assert held.written == [list(turn) for turn in talk.example.turns]


def test_questions_without_a_key_get_one_answer_where_only_keys_count() -> None:
    (talk, *_) = episodes(turns=9)
    (held,) = hold_episodes(world_model(), [talk], RolloutOptions(answers=4, keyed_only=True))
    keyed = [talk.asked(turn).recall is not None for turn in range(1, talk.turns)]
    assert [len(answers) for answers in held.answers[1:]] == [4 if key else 1 for key in keyed]
    assert 0 < sum(keyed) < len(keyed)


@pytest.mark.parametrize(("rows", "micro"), [(1, 1), (2, 2), (6, 6), (6, 3), (6, 2)])
def test_memory_after_replay_is_the_memory_at_collection_bit_for_bit(rows: int, micro: int) -> None:
    """The update writes all turns at once; what it reads must be what was answered from. Where fewer rows are written
    together than were held together, sums may be rounded in another order.
    """
    model, talks = world_model(), episodes(count=rows)
    rollouts = hold_episodes(model, talks, RolloutOptions(answers=2))
    memory = model.initial_memory(torch.tensor([one.seed for one in talks]))
    seen = [memory]
    with torch.no_grad():
        for turn in range(talks[0].turns - 1):
            memory = write(model, memory, [one.written[turn] for one in rollouts])
            seen.append(memory)
        parts = experience_of(rollouts).shares(0, 1, micro)
        replayed = [unrolled(model, part.written, ALL, "all", grouped=False)[0] for part in parts]
    for turn, theirs in enumerate(seen):
        mine = torch.cat([part[turn] for part in replayed], dim=1)
        assert torch.equal(mine, theirs) if micro == rows else torch.allclose(mine, theirs, rtol=0, atol=1e-6), turn


def test_memory_that_carries_another_conversation_is_written_before_and_gets_no_answers() -> None:
    talk, other = episodes(count=2)
    carried = talk.after(other.example)
    assert carried.given == len(other.example.turns) + 1
    assert [carried.asked(turn) for turn in range(carried.given, carried.turns)] == list(talk.interactions[1:])
    (held,) = hold_episodes(world_model(), [carried], RolloutOptions())
    assert [bool(answers) for answers in held.answers] == [False] * carried.given + [True] * 3
    assert held.written[:4] == [list(turn) for turn in other.example.turns]


def test_some_episodes_carry_over_by_their_seed_alone() -> None:
    from tests.unit.episodes import rl_stage

    rows = episode_set(count=64)
    stage = rl_stage(rows, carry_over=0.5, global_batch_size=64, minibatches=1)
    held = stage.episodes(stage.sampler.global_batch(0), 0)
    shares = [one.given > 1 for one in held]
    assert 15 < sum(shares) < 50
    assert held == stage.episodes(stage.sampler.global_batch(0), 0)
    assert not any(
        one.given > 1 for one in rl_stage(rows, global_batch_size=64).episodes(stage.sampler.global_batch(0), 0)
    )


def test_an_answer_without_a_word_is_an_answer() -> None:
    """[EOS] at once: it is written, trained on and worth nothing."""
    model, talks = world_model(), episodes(count=2)
    with torch.no_grad():
        model.decoder.head.bias[EOS] = 1e4
    rollouts = hold_episodes(model, talks, Options(answers=2))
    assert {tuple(answer) for one in rollouts for turn in one.answers for answer in turn} == {(EOS,)}
    found = answered(model, experience_of(rollouts), ALL)
    assert found.log_probs.isfinite().all()
    assert len(found.log_probs) == 2 * 3 * 2


def test_a_query_that_fills_the_window_is_named() -> None:
    (talk,) = episodes(count=1)
    query = tuple(range(20, 84))
    turns = (talk.example.turns[0], query, *talk.example.turns[2:])
    example = replace(
        talk.example, turns=turns, target_starts=(talk.example.target_starts[0], 64, *talk.example.target_starts[2:])
    )
    with pytest.raises(DataError, match="64 tokens: no room to answer in a window of 64"):
        hold_episodes(world_model(), [replace(talk, example=example)], RolloutOptions())


def test_weights_that_are_not_finite_are_an_error_not_an_answer() -> None:
    model = world_model()
    with torch.no_grad():
        model.memory_attention.layers[0].write_attention.output.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        hold_episodes(model, episodes(count=1), RolloutOptions())
