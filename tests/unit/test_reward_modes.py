"""Promises of the reward beyond the standard one: recall, the target length, long-range and topic-change turns."""

import math
from dataclasses import astuple, replace

import pytest

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.rl.rewards import HashedEmbedding, Mode, Reward, ScoredTurn, score_conversations
from tests.unit.rewards import DEFAULT, OPENING, Constant, WordCounts, config_with, follow_up, rewards_of

WITH_RECALL = config_with(weights={"bleu": 0.1, "cosine": 0.25, "length": 0.15, "recall": 0.5})
ONLY_RECALL = config_with(weights={"bleu": 0, "cosine": 0, "length": 0, "recall": 1})


def rewarded(*turns: ScoredTurn, config: RewardConfig = DEFAULT) -> list[Reward]:
    """Rewards of one conversation's follow-ups."""
    return score_conversations([[OPENING, *turns]], config, WordCounts())[0]


def of_mode(mode: Mode, generated: str, reference: str, saved: str) -> ScoredTurn:
    return replace(follow_up(generated, reference, saved), mode=mode)


def keyed(generated: str, *spans: str) -> ScoredTurn:
    return replace(follow_up(generated, "a red hat", "x"), spans=spans)


@pytest.mark.parametrize(
    ("generated", "spans", "recall"),
    [
        ("It's a RED hat!", ("red hat",), 1.0),
        ("a red, big hat", ("red hat",), 0.0),
        ("a red, big hat", ("hat", "red"), 1.0),
        ("a red thing", ("hat", "red"), 0.0),
        ("a redhat", ("red",), 0.0),
        ("", ("hat",), 0.0),
        (" ", ("",), 0.0),
        ("hat", (), None),
    ],
)
def test_recall_is_1_for_an_answer_with_all_that_the_key_asks_for(
    generated: str, spans: tuple[str, ...], recall: float | None
) -> None:
    (reward,) = rewarded(keyed(generated, *spans))
    assert reward.recall == recall


def test_a_question_without_a_key_has_no_recall_and_its_other_parts_make_the_whole() -> None:
    right, wrong = rewarded(keyed("a red hat", "red"), config=WITH_RECALL) + rewarded(
        keyed("a big hat", "red"), config=WITH_RECALL
    )
    for reward, recall in ((right, 1.0), (wrong, 0.0)):
        parts = 0.1 * reward.bleu + 0.25 * reward.cosine + 0.15 * reward.length
        assert reward.recall == recall
        assert reward.total == pytest.approx(10 * (parts + 0.5 * recall))
    (unkeyed,) = rewarded(follow_up("a big hat", "a red hat", "x"), config=WITH_RECALL)
    assert unkeyed.recall is None
    assert astuple(unkeyed)[1:4] == astuple(wrong)[1:4]
    assert unkeyed.total == pytest.approx(2 * (wrong.total or 0)) != 0
    (everything,) = rewards_of(("red hat", "red hat", "red hat"), config=WITH_RECALL)
    assert everything.total == pytest.approx(10)


def test_where_only_recall_counts_a_question_without_a_key_has_no_reward() -> None:
    turns = (keyed("a red hat", "red"), keyed("a hat", "red"), keyed("", "red"), follow_up("a red hat", "a", "a"))
    assert [reward.total for reward in rewarded(*turns, config=ONLY_RECALL)] == [10.0, 0.0, 0.0, None]


def test_a_key_changes_nothing_while_recall_has_no_weight() -> None:
    (one,), (other,) = rewarded(keyed("a hat", "red")), rewarded(follow_up("a hat", "a red hat", "x"))
    assert replace(one, recall=None) == other


@pytest.mark.parametrize(
    ("generated", "target", "penalise_longer", "length"),
    [
        ("a b", None, True, 0.5),
        ("a b c x", None, True, 1.0),
        ("a b c x y z a b", None, True, 0.5),
        ("a b c x y z a b", None, False, 1.0),
        ("a b c", 6, True, 0.5),
        ("a b c x y z", 2, True, 1 / 3),
        ("a b c x y z", 2, False, 1.0),
        ("", 2, True, 0.0),
    ],
)
def test_length_counts_to_the_target_and_beyond_it_against_the_answer_if_asked_to(
    generated: str, target: int | None, penalise_longer: bool, length: float
) -> None:
    config = config_with(length={"target": target, "penalise_longer": penalise_longer})
    (reward,) = rewards_of((generated, "x y z z", "other"), config=config)
    assert reward.length == pytest.approx(length)


def test_an_answer_to_a_change_of_topic_is_to_be_unlike_what_was_saved() -> None:
    turn = of_mode("topic_change", "red hat", "red hat b", "x y z red hat")
    to_reference, to_saved = math.exp(1 - 3 / 2), math.exp(1 - 5 / 2)
    near_reference, near_saved = 2 / math.sqrt(2 * 3), 2 / math.sqrt(2 * 5)
    (reward,) = rewarded(turn)
    assert reward.bleu == pytest.approx(0.5 * to_reference + 0.5 * (1 - to_saved))
    assert reward.cosine == pytest.approx(0.5 * near_reference + 0.5 * (1 - near_saved))
    assert reward.total == pytest.approx(10 * (0.4 * reward.bleu + 0.5 * reward.cosine + 0.1 * 2 / 3))
    own = config_with(
        topic_change_bleu={"reference": 0.3, "unlike_saved": 0.7},
        topic_change_cosine={"reference": 0.9, "unlike_saved": 0.1},
    )
    (reward,) = rewarded(turn, config=own)
    assert reward.bleu == pytest.approx(0.3 * to_reference + 0.7 * (1 - to_saved))
    assert reward.cosine == pytest.approx(0.9 * near_reference + 0.1 * (1 - near_saved))
    assert rewarded(follow_up("b", "c", "x"), turn)[1].cosine == pytest.approx(
        0.5 * near_reference + 0.5 - near_saved / 2
    )


def test_a_long_range_answer_is_near_the_first_interaction_and_far_from_all_since() -> None:
    """m is x, then 0.8 y + 0.2 x; the turn before the last is about b: 0.8 b + 0.2 (0.8 y + 0.2 x)."""
    before = (follow_up("a", "c", "x"), follow_up("a", "b", "y"))
    *_, last = rewarded(*before, of_mode("long_range", "x b", "b", "x"))
    mean = (0.8 + 0.04) / math.sqrt(2) / math.hypot(0.8, 0.16, 0.04)
    assert last.cosine == pytest.approx(0.5 / math.sqrt(2) + 0.3 / math.sqrt(2) + 0.2 * (1 - mean))
    assert last.bleu == rewarded(*before, follow_up("x b", "b", "x"))[-1].bleu
    config = config_with(running_mean_decay=0, later_cosine={"saved": 0.1, "reference": 0.2, "running_mean": 0.7})
    *_, last = rewarded(*before, of_mode("long_range", "x b", "b", "x"), config=config)
    assert last.cosine == pytest.approx(0.3 / math.sqrt(2) + 0.7 * (1 - 1 / math.sqrt(2)))


def test_after_a_long_range_turn_the_running_mean_goes_on_over_what_was_said() -> None:
    turns = (follow_up("a", "b", "x"), of_mode("long_range", "a", "c", "x"), follow_up("b", "red", "c"))
    last = rewarded(*turns)[-1]
    assert last.cosine == pytest.approx(0.2 * (0.2 * 0.8) / math.hypot(0.8, 0.2 * 0.8, 0.2 * 0.2))


def test_the_first_follow_up_has_no_running_mean_to_be_far_from() -> None:
    first = ("a b", "a c", "b")
    assert rewarded(of_mode("long_range", *first)) == rewards_of(first)


@pytest.mark.parametrize("mode", ["standard", "long_range", "topic_change"])
@pytest.mark.parametrize("generated", ["", " \n", "?!"])
def test_an_answer_without_a_word_is_worth_nothing_in_any_mode(mode: Mode, generated: str) -> None:
    turns = [OPENING, *(of_mode(mode, generated, "a hat", "x y") for _ in range(3))]
    for embedding in (Constant(), HashedEmbedding()):
        rewards = score_conversations([turns], DEFAULT, embedding)[0]
        assert rewards == [Reward(0.0, 0.0, 0.0, 0.0)] * 3
