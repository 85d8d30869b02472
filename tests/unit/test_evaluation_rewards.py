"""Promises of the evaluation's reward where recall counts."""

import pytest

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.outcomes import TokenSums, TurnOutcome
from rxt_platform.evaluation.rewards import reward_entry
from rxt_platform.rl.rewards import HashedEmbedding
from tests.unit.rewards import config_with

RECALL = config_with(weights={"bleu": 0, "cosine": 0, "length": 0, "recall": 1})
HALF = config_with(weights={"bleu": 0, "cosine": 0, "length": 0.5, "recall": 0.5})


def talk(number: int, *answers: tuple[str, str | None]) -> list[TurnOutcome]:
    """A conversation about a hat; each answer with what its key asks for."""
    nothing = TokenSums(0.0, 0, 0)
    turns = [("Good.", None), *answers]
    return [
        TurnOutcome(number, n + 1, "What?", "a red hat", nothing, nothing, said, None, None, span and (span,))
        for n, (said, span) in enumerate(turns)
    ]


TALKS = [
    *talk(0, ("a red hat", "red"), ("a blue hat", "red"), ("no", None)),
    *talk(1, ("red", "red")),
    *talk(2, ("a red hat", None)),
]


def entry(config: RewardConfig) -> dict:
    return reward_entry(TALKS, config, HashedEmbedding(), Bootstrap(3, 0))


def test_recall_alone_is_the_share_of_right_answers_in_the_conversations_that_ask() -> None:
    found = entry(RECALL)
    assert found["scores"] == [5.0, 10.0]
    assert (found["mean"], found["min"], found["max"], found["conversations"]) == (7.5, 5.0, 10.0, 2)
    assert found["components"]["recall"] == 0.75


def test_recall_is_a_component_where_it_has_a_weight() -> None:
    found = entry(HALF)
    first = (10 * (0.5 + 0.5) + 10 * 0.5 + 10 / 3) / 3
    assert found["scores"] == pytest.approx([first, 10 * (0.5 / 3 + 0.5), 10.0])
    assert found["components"]["recall"] == 0.75
    assert list(entry(RewardConfig())["components"]) == ["bleu", "cosine", "length"]


def test_without_any_key_recall_alone_has_no_reward() -> None:
    found = reward_entry(talk(0, ("a", None)), RECALL, HashedEmbedding(), Bootstrap(1, 0))
    assert (found["mean"], found["interval"], found["conversations"], found["scores"]) == (None, None, 0, [])
    assert found["components"] == dict.fromkeys(("bleu", "cosine", "length", "recall"))
