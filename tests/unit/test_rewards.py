"""Promises of the composite reward: REF 4's formula by hand, 0 to the scale, the same for every model and batch."""

import math
import random
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.data.story_world import StoryWorld
from rxt_platform.rl.rewards import (
    EncoderEmbedding,
    HashedEmbedding,
    Reward,
    ScoredTurn,
    TextEmbedding,
    TokenEmbedding,
    score_conversations,
)
from tests.unit.rewards import (
    DEFAULT,
    OPENING,
    Constant,
    WordCounts,
    config_with,
    follow_up,
    rewards_of,
    write_word_model,
)


def test_bleu_is_half_to_the_reference_and_half_to_the_saved_interaction() -> None:
    (reward,) = rewards_of(("red hat", "red hat", "x y z red hat"))
    assert reward.bleu == pytest.approx(0.5 * 1 + 0.5 * math.exp(1 - 5 / 2))
    (reward,) = rewards_of(
        ("red hat", "red hat", "x y z red hat"), config=config_with(bleu={"reference": 0.9, "saved": 0.1})
    )
    assert reward.bleu == pytest.approx(0.9 * 1 + 0.1 * math.exp(1 - 5 / 2))


def test_bleu_takes_the_configured_grams() -> None:
    (reward,) = rewards_of(("b a", "a b", "x"), config=config_with(bleu_weights=[1.0]))
    assert reward.bleu == pytest.approx(0.5)


def test_cosine_of_the_first_follow_up_is_half_saved_half_reference() -> None:
    (reward,) = rewards_of(("a b", "a c", "b"))
    assert reward.cosine == pytest.approx(0.5 / math.sqrt(2) + 0.5 * 0.5)
    (reward,) = rewards_of(("a b", "a c", "b"), config=config_with(first_cosine={"saved": 0.2, "reference": 0.8}))
    assert reward.cosine == pytest.approx(0.2 / math.sqrt(2) + 0.8 * 0.5)


def test_later_follow_ups_are_also_close_to_the_running_mean_of_what_was_saved() -> None:
    """m is x, then 0.8 y + 0.2 x, then 0.8 z + 0.2 (0.8 y + 0.2 x)."""
    _, second, third = rewards_of(("a", "b", "x"), ("x", "b", "y"), ("x z", "z", "z"))
    assert second.cosine == pytest.approx(0.2 * 0.2 / math.hypot(0.8, 0.2))
    mean = 0.84 / math.sqrt(2) / math.hypot(0.8, 0.16, 0.04)
    assert third.cosine == pytest.approx(0.5 / math.sqrt(2) + 0.3 / math.sqrt(2) + 0.2 * mean)


def test_the_running_mean_and_its_weight_are_configurable() -> None:
    config = config_with(running_mean_decay=0.5, later_cosine={"saved": 0.25, "reference": 0.25, "running_mean": 0.5})
    _, second = rewards_of(("a", "b", "x"), ("x", "x", "y"), config=config)
    assert second.cosine == pytest.approx(0.25 + 0.5 / math.sqrt(2))


def test_opposite_meaning_counts_as_none() -> None:
    (reward,) = rewards_of(("a", "-a", "a"))
    assert reward.cosine == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("generated", "length"), [("a", 0.25), ("a, b!", 0.5), ("a b c x", 1.0), ("a b c x y z", 1.0), ("?", 0.0)]
)
def test_length_is_rewarded_up_to_the_references_words(generated: str, length: float) -> None:
    (reward,) = rewards_of((generated, "x y - z z.", "other"))
    assert reward.length == length


def test_the_total_is_the_scaled_weighted_sum() -> None:
    turn = ("a b", "a b c x", "b")
    weights = {"bleu": 0.2, "cosine": 0.3, "length": 0.5}
    for config, (bleu, cosine, length), scale in (
        (DEFAULT, (0.4, 0.5, 0.1), 10.0),
        (config_with(weights=weights, scale=2.0), (0.2, 0.3, 0.5), 2.0),
    ):
        (reward,) = rewards_of(turn, config=config)
        assert len({reward.bleu, reward.cosine, reward.length}) == 3
        assert reward.total == pytest.approx(
            scale * (bleu * reward.bleu + cosine * reward.cosine + length * reward.length)
        )


def test_full_marks_only_for_an_answer_that_says_both_reference_and_all_that_was_saved() -> None:
    """A perfect answer to a question about something else than what was saved gets the reference's share alone."""
    everything = rewards_of(("red hat", "red hat", "red hat"), ("Red hat!", "red hat", "red hat"))
    assert everything[0].total == pytest.approx(10.0)
    assert everything[1].bleu == 1.0, "case and punctuation don't count"
    first, later = rewards_of(("red hat", "red hat", "other things"), ("red hat", "red hat", "x y"))
    assert astuple(first)[:4] == pytest.approx((10 * (0.4 * 0.5 + 0.5 * 0.5 + 0.1), 0.5, 0.5, 1.0))
    assert astuple(later)[:4] == pytest.approx((10 * (0.4 * 0.5 + 0.5 * 0.3 + 0.1), 0.5, 0.3, 1.0))


@pytest.mark.parametrize("generated", ["", "  \n", "...", "?!"])
def test_an_answer_without_a_word_is_worth_nothing(generated: str) -> None:
    for embedding in (Constant(), HashedEmbedding()):
        for reference, saved in (("a hat", "a red hat"), ("", ""), ("...", "?!")):
            assert rewards_of((generated, reference, saved), embedding=embedding) == [Reward(0.0, 0.0, 0.0, 0.0)]


def test_an_empty_reference_gives_numbers() -> None:
    for embedding in (WordCounts(), HashedEmbedding()):
        assert rewards_of(("a", "", ""), embedding=embedding) == [Reward(1.0, 0.0, 0.0, 1.0)]


def test_only_follow_ups_are_rewarded() -> None:
    talks = [[OPENING], [], [OPENING, follow_up("a", "a", "b"), follow_up("a", "a", "b")]]
    assert [len(rewards) for rewards in score_conversations(talks, DEFAULT, HashedEmbedding())] == [0, 0, 2]
    assert score_conversations(talks[:2], DEFAULT, HashedEmbedding()) == [[], []]
    assert score_conversations([], DEFAULT, HashedEmbedding()) == []


def test_a_follow_up_without_what_was_saved_is_named() -> None:
    with pytest.raises(ValueError, match="'Where\\?' has no saved interaction"):
        score_conversations([[OPENING, ScoredTurn("Where?", "a", "a", None)]], DEFAULT, HashedEmbedding())


def story_talks(rows: int, turns: int = 5) -> list[list[ScoredTurn]]:
    """Story-world conversations, answered as in the reference."""
    talks = []
    for talk in StoryWorld(0).conversations("train", rows, turns):
        texts = [None, *(f"{turn.query} {turn.answer}" for turn in talk.interactions)]
        talks.append(
            [
                ScoredTurn(turn.query, turn.answer, turn.answer, saved)
                for turn, saved in zip(talk.interactions, texts, strict=False)
            ]
        )
    return talks


def answered(talks: list[list[ScoredTurn]], answers: Any) -> list[list[ScoredTurn]]:
    """The same conversations with other answers, `answers(turn)`."""
    return [[ScoredTurn(turn.query, turn.reference, answers(turn), turn.saved) for turn in talk] for talk in talks]


def all_totals(talks: list[list[ScoredTurn]], embedding: TextEmbedding) -> list[float]:
    return [reward.total for rewards in score_conversations(talks, DEFAULT, embedding) for reward in rewards]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_word_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["hashed", "tokens", "encoder"])
def embedding(request: pytest.FixtureRequest, model_directory: Path) -> TextEmbedding:
    """Each real embedding."""
    made = {"tokens": TokenEmbedding, "encoder": EncoderEmbedding.load}
    return made[request.param](model_directory) if request.param in made else HashedEmbedding()


def test_better_answers_are_worth_more(embedding: TextEmbedding) -> None:
    talks = story_talks(20)
    rng = random.Random(0)
    pool = [turn.reference for talk in talks for turn in talk]
    right = all_totals(talks, embedding)
    part = all_totals(answered(talks, lambda turn: " ".join(turn.reference.split()[:3])), embedding)
    wrong = all_totals(answered(talks, lambda _: rng.choice(pool)), embedding)
    silent = all_totals(answered(talks, lambda _: ""), embedding)
    means = [float(np.mean(totals)) for totals in (right, part, wrong, silent)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1.5 * means[2] > 0
    assert means[3] == 0


def test_a_reward_does_not_depend_on_the_order_or_size_of_the_batch(embedding: TextEmbedding) -> None:
    talks = [talk[: 2 + i % 4] for i, talk in enumerate(story_talks(8))]
    talks = answered(talks, lambda turn: turn.query)
    together = score_conversations(talks, DEFAULT, embedding)
    turned = score_conversations(talks[::-1], DEFAULT, embedding)[::-1]
    alone = [score_conversations([talk], DEFAULT, embedding)[0] for talk in talks]
    for rewards in (turned, alone):
        for expected, found in zip(together, rewards, strict=True):
            assert [astuple(reward) for reward in found] == [
                pytest.approx(astuple(reward), abs=1e-6) for reward in expected
            ]


def test_rewards_of_any_texts_stay_within_the_scale(embedding: TextEmbedding) -> None:
    rng = random.Random(0)
    alphabet = "abc  .,!ßİżé漢字🙂\n"

    def text() -> str:
        return "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 20)))

    talks = [[OPENING, *(follow_up(text(), text(), text()) for _ in range(4))] for _ in range(60)]
    for rewards in score_conversations(talks, DEFAULT, embedding):
        for reward in rewards:
            assert 0 <= reward.total <= 10.000001
            assert all(0 <= part <= 1 for part in (reward.bleu, reward.cosine, reward.length))


def test_a_call_embeds_each_distinct_text_once() -> None:
    embedding = WordCounts()
    score_conversations([*story_talks(3), *story_talks(3)], DEFAULT, embedding)
    (texts,) = embedding.calls
    assert len(texts) == len(set(texts)) > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"bleu": 0.5}}, r"bleu \+ cosine \+ length \+ recall = 1\.1,"),
        ({"weights": {"bleu": 0.4 + 1e-8}}, r"= 1\.00000001,"),
        ({"bleu": {"saved": 0.4}}, r"reference \+ saved = 0\.9,"),
        ({"first_cosine": {"saved": 0.6}}, r"saved \+ reference = 1\.1,"),
        ({"later_cosine": {"running_mean": 0.0}}, r"saved \+ reference \+ running_mean = 0\.8,"),
        ({"weights": {"recall": 0.1}}, r"= 1\.1,"),
        ({"topic_change_bleu": {"reference": 0.6}}, r"reference \+ unlike_saved = 1\.1,"),
        ({"topic_change_cosine": {"unlike_saved": 0.4}}, r"reference \+ unlike_saved = 0\.9,"),
        ({"length": {"target": 0}}, "greater than 0"),
        ({"bleu_weights": [0.5, 0.4]}, r"bleu_weights = 0\.9,"),
        ({"bleu_weights": [0.2] * 5}, "at most 4"),
        ({"bleu_weights": []}, "at least 1"),
        ({"weights": {"bleu": -0.1, "cosine": 1.0}}, "greater than or equal to 0"),
        ({"running_mean_decay": 1.0}, "less than 1"),
        ({"scale": 0.0}, "greater than 0"),
        ({"tanh": True}, "Extra inputs"),
    ],
)
def test_factors_that_are_no_parts_of_a_whole_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig.model_validate(changes)


def test_rounding_does_not_refuse_factors() -> None:
    assert config_with(weights={"bleu": 0.4 + 5e-10}, bleu_weights=[0.1] * 3 + [0.7])
