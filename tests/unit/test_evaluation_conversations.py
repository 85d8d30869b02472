"""Promises of the loop over turns: what is remembered, asked and counted, by stand-ins whose figures are known."""

from dataclasses import replace
from typing import Any

import pytest

from rxt_platform.config.rewards import RewardConfig
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.story_world import TASKS, StoryWorld
from rxt_platform.data.tokenizer import BOS, EOS, INTERNAL
from rxt_platform.errors import DataError
from rxt_platform.evaluation.conversations import SPARE_TOKENS, encode_talks, hold_conversations
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.outcomes import TurnOutcome
from rxt_platform.evaluation.rewards import reward_entry
from rxt_platform.evaluation.summary import answer_tokens, recall_tables, spread_samples
from rxt_platform.rl.rewards import HashedEmbedding, ScoredTurn, score_conversations
from tests.unit.evaluations import ALONE, HAT, KITE, WINDOW, Listener, Reply, asked, knows, needs_references, talks_of
from tests.unit.helpers import word_tokenizer

STORIES = StoryWorld(0).conversations("validation", 12, 6, TASKS)


def held(reply: Reply, *conversations: Conversation, **options: Any) -> list[TurnOutcome]:
    return hold_conversations(Listener(reply), word_tokenizer(), talks_of(*conversations), 0, **options)


def recall(outcomes: list[TurnOutcome], own: bool = False) -> dict[str, Any]:
    return recall_tables(outcomes, Bootstrap(1 + max(one.conversation for one in outcomes), 0), own)


def shares(entry: dict[str, Any]) -> tuple[float, float, float, int]:
    return entry["with_memory"], entry["reset"], entry["gain"], entry["count"]


# ---- recall


def test_a_model_that_remembers_everything_has_recall_1_and_none_without_its_memory() -> None:
    tables = recall(held(knows(*STORIES), *STORIES))
    keys = [turn.recall for talk in STORIES for turn in talk.interactions if turn.recall]
    assert shares(tables["recall_overall"]) == (1.0, 0.0, 1.0, len(keys))
    for name in ("with_memory", "gain"):
        low, high = tables["recall_overall"]["intervals"][name]
        assert 0.6 < low < high == 1.0, "12 conversations are no proof"
    for table, value in (("recall", lambda key: str(key.distance)), ("recall_by_task", lambda key: key.task)):
        labels = [value(key) for key in keys]
        assert {label: entry["count"] for label, entry in tables[table].items()} == {
            label: labels.count(label) for label in set(labels)
        }
        assert all(shares(entry)[:3] == (1.0, 0.0, 1.0) for entry in tables[table].values())
    assert set(tables["recall_by_task"]) == set(TASKS)


def test_recall_says_which_questions_were_right() -> None:
    """One that knows the answers of updates only, whatever it was told."""
    known = knows(KITE)
    tables = recall(held(lambda prompt, _: known(prompt, ((0,),)) if "Lily" in asked(prompt) else "No.", KITE, HAT))
    assert shares(tables["recall_by_task"]["update"]) == (1.0, 1.0, 0.0, 1)
    assert shares(tables["recall_by_task"]["recall"]) == (0.0, 0.0, 0.0, 2)
    assert shares(tables["recall_long_range"]["true"]) == (0.0, 0.0, 0.0, 1)
    assert shares(tables["recall_long_range"]["false"]) == (0.5, 0.5, 0.0, 2)
    assert shares(tables["recall"]["2"]) == (0.5, 0.5, 0.0, 2)
    assert tables["recall"]["1"]["intervals"]["gain"] is None, "few conversations ask from there"


def test_a_fact_that_only_a_reference_answer_tells_is_told_by_the_model() -> None:
    tables = recall(held(knows(KITE, HAT), KITE, HAT))
    assert tables["recall_by_teller"]["user"]["count"] == 2
    assert tables["recall_by_teller"]["model"]["count"] == 1


def test_without_answer_keys_every_follow_up_must_be_answered_with_its_reference() -> None:
    long = Conversation(tuple(Interaction(f"Say {number}.", f"It is {number}.") for number in range(20)))
    tables = recall(held(knows(long, HAT), long))
    assert {label: entry["count"] for label, entry in tables["recall"].items()} == {
        **{str(distance): 1 for distance in range(1, 17)},
        "17+": 3,
    }
    assert shares(tables["recall_overall"]) == (1.0, 0.0, 1.0, 19)
    assert tables["recall_by_task"] == tables["recall_long_range"] == tables["recall_by_teller"] == {}


def test_only_questions_are_asked_without_memory() -> None:
    listener = Listener(knows(KITE, ALONE))
    hold_conversations(listener, word_tokenizer(), talks_of(KITE, ALONE), 0, free_running=False)
    assert listener.answered == [2, 1, 1, 1, 1, 1]  # both; then turn 2; turns 3 and 4, each with memory and without


def test_nothing_asked_is_no_number() -> None:
    tables = recall(held(knows(ALONE), ALONE))
    nothing = dict.fromkeys(("with_memory", "reset", "gain"))
    assert tables["recall_overall"] == {**nothing, "count": 0, "intervals": nothing}
    assert tables["recall"] == {}


# ---- free-running


def test_free_running_remembers_what_the_model_said_and_teacher_forcing_the_references() -> None:
    remembered: dict[tuple[str, bool], list[tuple[tuple[int, ...], ...]]] = {}
    references = needs_references(KITE)

    def reply(prompt: Any, told: Any) -> str:
        remembered.setdefault((asked(prompt), bool(told)), []).append(told)
        return references(prompt, told)

    outcomes = held(reply, KITE)
    assert shares(recall(outcomes)["recall_overall"])[:2] == (1.0, 0.0)
    assert shares(recall(outcomes, own=True)["recall_overall"])[:2] == (0.0, 0.0)
    tokenizer = word_tokenizer()
    first, second = KITE.interactions[:2]
    forced, own = remembered["What has Tom?", True]
    assert forced == tuple(tokenizer.encode_interaction(one.query, one.reply, WINDOW).ids for one in (first, second))
    said = [
        (first.query, "No."),
        (second.query, "No."),
    ]  # nothing was told before; then not a reference
    assert own == tuple(tokenizer.encode_interaction(query, answer, WINDOW).ids for query, answer in said)
    assert [one.own_answer for one in outcomes] == ["No."] * 4
    assert [one.answer for one in outcomes] == ["No.", "Nice.", "Tom has a kite.", "Lily likes cake."]


def test_right_answers_make_free_running_the_same() -> None:
    known = knows(KITE, HAT)
    outcomes = held(lambda prompt, _: known(prompt, ((0,),)), KITE, HAT)
    assert recall(outcomes) == recall(outcomes, own=True)


def test_free_running_can_be_left_out() -> None:
    outcomes = held(knows(KITE), KITE, free_running=False)
    assert {one.own_answer for one in outcomes} == {None}
    assert {one.question.own for one in outcomes if one.question} == {None}
    assert len(held(knows(KITE), KITE)) == len(outcomes)


# ---- answer tokens


def test_answer_tokens_are_counted_by_turn_and_add_up() -> None:
    outcomes = held(knows(KITE, HAT, ALONE), KITE, HAT, ALONE)
    measured = answer_tokens(outcomes, Bootstrap(3, 0))
    tokenizer = word_tokenizer()
    sizes = [[len(tokenizer.encode(turn.reply)) + 1 for turn in talk.interactions] for talk in (KITE, HAT, ALONE)]
    by_turn = [sum(row[turn] for row in sizes if turn < len(row)) for turn in range(4)]
    assert [row["turn"] for row in measured["by_turn"]] == [1, 2, 3, 4]
    assert [row["count"] for row in measured["by_turn"]] == by_turn
    assert measured["answer_tokens"]["count"] == measured["memory_reset"]["count"] == sum(by_turn)
    told, whole = sum(by_turn[1:]), sum(by_turn)
    entry = measured["answer_tokens"]
    assert entry["loss"] == pytest.approx((told + 2 * by_turn[0]) / whole)
    assert entry["accuracy"] == pytest.approx(told / whole)
    assert measured["memory_reset"]["perplexity"] == pytest.approx(7.389056)
    assert measured["by_turn"][1]["with_memory"]["loss"] == 1.0
    assert measured["by_turn"][1]["memory_reset"]["accuracy"] == 0.0
    assert set(entry["intervals"].values()) == {None}, "of two conversations nothing is known"
    many = answer_tokens(held(knows(KITE, HAT), *[KITE, HAT] * 8), Bootstrap(16, 0))
    for name in ("loss", "accuracy"):
        low, high = many["answer_tokens"]["intervals"][name]
        assert low < many["answer_tokens"][name] < high
    assert many["memory_reset"]["intervals"]["perplexity"] == pytest.approx([7.389056, 7.389056])
    assert many["by_turn"][1]["with_memory"]["intervals"]["accuracy"] == pytest.approx([0.789, 1.0], abs=1e-3)
    assert many["by_turn"][3]["with_memory"]["intervals"]["loss"] is None


def test_what_memory_saves_on_follow_ups_is_a_mean_over_their_tokens() -> None:
    """A nat each, if it is told: in the first turn nothing can be saved."""
    outcomes = held(knows(KITE, HAT), *[KITE, HAT] * 6)
    found = answer_tokens(outcomes, Bootstrap(12, 0))["follow_up_gain"]
    assert found["count"] == sum(one.tokens.count for one in outcomes if one.turn > 1)
    assert (found["nats"], found["interval"]) == (1.0, pytest.approx([1.0, 1.0]))
    alone = answer_tokens(held(knows(ALONE), ALONE), Bootstrap(1, 0))["follow_up_gain"]
    assert alone == {"nats": None, "interval": None, "count": 0}


# ---- system prompts, order, limits


def test_a_system_prompt_is_remembered_first_and_neither_asked_nor_scored() -> None:
    seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def reply(prompt: Any, told: Any) -> str:
        seen.append((asked(prompt), told))
        return "Good."

    outcomes = held(reply, replace(HAT, system="Lily plays."), KITE, free_running=False)
    assert [(one.conversation, one.turn) for one in outcomes] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (1, 4)]
    system = (BOS, INTERNAL, *word_tokenizer().encode("Lily plays."), EOS)
    with_system = [told for query, told in seen if query == "Tell me of Tom."]
    assert with_system == [(system,)]
    first = outcomes[0]
    assert first.tokens == first.tokens_reset
    asked_again = [told for query, told in seen if query == "Which hat?"]
    assert {len(told) for told in asked_again} == {2, 1}, "the system prompt and turn 1; a reset forgets turn 1"
    plain = held(reply, HAT, KITE, free_running=False)
    assert [one.tokens.count for one in plain] == [one.tokens.count for one in outcomes]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_conversations_are_held_as_if_each_were_alone(batch_size: int) -> None:
    talks = (KITE, ALONE, HAT, replace(HAT, system="Lily plays."), KITE)
    expected = [
        replace(one, conversation=number)
        for number, talk in enumerate(talks)
        for one in held(needs_references(KITE, HAT, ALONE), talk)
    ]
    outcomes = held(needs_references(KITE, HAT, ALONE), *talks, batch_size=batch_size)
    assert outcomes == expected


def test_every_conversation_starts_from_a_seed_of_its_own() -> None:
    class Seeded(Listener):
        def start(self, seeds: Any) -> Any:
            drawn.append(list(seeds))
            return super().start(seeds)

    drawn: list[list[int]] = []
    talks = talks_of(KITE, HAT, ALONE)
    for seed, batch_size in ((5, 3), (5, 1), (6, 3)):
        hold_conversations(Seeded(knows(KITE, HAT)), word_tokenizer(), talks, seed, batch_size=batch_size)
    first, *alone, other = drawn
    assert [[seed] for seed in first] == alone
    assert len({*first, *other}) == 6


def test_an_answer_is_cut_a_little_after_its_reference_s_length() -> None:
    endless = " ".join(["cake"] * 40)
    (outcome,) = held(lambda prompt, told: endless, ALONE)
    reference = len(word_tokenizer().encode("Good.")) + 1
    assert len(word_tokenizer().encode(outcome.answer)) == reference + SPARE_TOKENS


def test_progress_counts_conversations() -> None:
    told: list[int] = []
    held(knows(KITE, HAT), KITE, HAT, replace(HAT, system="Lily."), batch_size=1, progress=told.append)
    assert told == [1, 2, 3]


def test_what_does_not_fit_is_left_out_or_named() -> None:
    long = Conversation((Interaction("Tom " * 200, "Good."),))
    kept = encode_talks([long, KITE], RowEncoder(word_tokenizer(), WINDOW, "quarantine"))
    assert [(talk.number, talk.conversation) for talk in kept] == [(0, KITE)]
    with pytest.raises(DataError, match="conversation 2: column 'query': too long"):
        encode_talks([KITE, long], RowEncoder(word_tokenizer(), WINDOW, "fail"))
    with pytest.raises(DataError, match="no conversation fits"):
        encode_talks([long], RowEncoder(word_tokenizer(), WINDOW, "quarantine"))


# ---- reward and samples


@pytest.mark.parametrize("own", [False, True])
def test_reward_is_the_mean_over_conversations_of_their_follow_ups(own: bool) -> None:
    outcomes = held(needs_references(KITE, HAT), KITE, HAT, ALONE)
    config, embedding = RewardConfig(), HashedEmbedding()
    talks = []
    for talk in (KITE, HAT):
        turns: list[ScoredTurn] = []
        for number, turn in enumerate(talk.interactions):
            said = "No." if own or number == 0 else turn.reply
            before = talk.interactions[number - 1]
            saved = f"{before.query} {before.reply}" if number else None
            turns.append(ScoredTurn(turn.query, turn.reply, said, saved))
        talks.append(turns)
    scored = score_conversations(talks, config, embedding)
    means = [sum(one.total for one in rewards) / len(rewards) for rewards in scored]
    entry = reward_entry(outcomes, config, embedding, Bootstrap(3, 0), own)
    assert entry["scores"] == pytest.approx(means)
    assert entry["mean"] == pytest.approx(sum(means) / 2)
    assert (entry["min"], entry["max"]) == pytest.approx((min(means), max(means)))
    assert entry["interval"] is None, "of two conversations nothing is known"
    many = reward_entry(held(needs_references(KITE, HAT), *[KITE, HAT] * 6), config, embedding, Bootstrap(12, 0), own)
    low, high = many["interval"]
    assert many["mean"] == pytest.approx(entry["mean"])
    assert min(means) < low < many["mean"] < high < max(means)
    assert entry["conversations"] == 2
    lengths = [sum(one.length for one in rewards) / len(rewards) for rewards in scored]
    assert entry["components"]["length"] == pytest.approx(sum(lengths) / 2)


def test_empty_answers_are_worth_nothing_and_single_turns_have_no_reward() -> None:
    silent = held(lambda prompt, told: "", *[KITE, HAT] * 5)
    entry = reward_entry(silent, RewardConfig(), HashedEmbedding(), Bootstrap(10, 0))
    assert (entry["mean"], entry["interval"]) == (0.0, [0.0, 0.0])
    alone = reward_entry(held(knows(ALONE), ALONE), RewardConfig(), HashedEmbedding(), Bootstrap(1, 0))
    assert (alone["mean"], alone["conversations"], alone["scores"]) == (None, 0, [])


def test_samples_are_spread_over_the_conversations_and_free_running_if_that_was_tried() -> None:
    outcomes = held(needs_references(KITE, HAT), KITE, HAT, KITE, HAT)
    sampled = spread_samples(outcomes, 4, 2)
    assert [[turn["query"] for turn in talk] for talk in sampled] == [[turn.query for turn in KITE.interactions]] * 2
    assert sampled[0][3] == {"query": "What likes Lily?", "reference": "Lily likes cake.", "answer": "No."}
    forced = spread_samples(held(needs_references(KITE), KITE, free_running=False), 1, 3)
    assert [turn["answer"] for turn in forced[0]] == ["No.", "Nice.", "Tom has a kite.", "Lily likes cake."]
    assert spread_samples(outcomes, 4, 0) == []
