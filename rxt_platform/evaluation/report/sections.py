"""The parts of an evaluation's report, in order: the same on a terminal and on a page. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rxt_platform.evaluation.report.tables import (
    LEFT_OUT_NOTE,
    answer_table,
    arms,
    follow_up_gain,
    is_thinned,
    latency_table,
    masked_table,
    memory_tables,
    recall_tables,
    recall_title,
    reward_table,
    turn_table,
)
from rxt_platform.tables import Table

_WAYS = (
    "Teacher-forced: the reference answers are remembered, so that a mistake counts once. Free-running: the model's "
    "own answers are, as in a chat: a fact that only a reference answer tells is then never told."
)
_RECALL = "Each question is asked again with {reset}; gain is the difference."
_MASKED = "Guessed with the last joint stage's MLM head: memory-aware training moves the encoder away from it."
_MEMORY = (
    "RMS of the slots, how much a write changed them, how many directions they span (100 %: all), and how alike two "
    "are. A norm that keeps growing, a rank that falls or slots that all become alike are bad signs."
)
_REWARD = "BLEU, closeness in meaning and length of the answers to follow-ups: what MRL would pay a conversation."
_LATENCY = "Medians over single conversations of up to 32 turns; each answer is made 16 tokens long."


@dataclass(frozen=True)
class Section:
    """One part: the name of its picture if it has one, what it is called, how to read it, and its tables."""

    picture: str | None
    title: str
    note: str
    tables: Sequence[Table]


def sections(result: Mapping[str, Any]) -> list[Section]:
    """Recall first, then what else was measured."""
    how = [_RECALL.format(reset=arms(result)[1]), *([] if result["free_running"] is None else [_WAYS])]
    worth = [follow_up_gain(result), LEFT_OUT_NOTE if is_thinned(result["by_turn"]) else ""]
    found = [
        Section("recall", recall_title(result), " ".join(how), recall_tables(result)),
        Section(
            "turns",
            "Answer tokens, teacher-forced",
            " ".join(part for part in worth if part),
            [answer_table(result), turn_table(result)],
        ),
    ]
    if result["reward"]["scores"]:
        found.append(Section("rewards", "Composite reward", _REWARD, [reward_table(result)]))
    if result["memory"] is not None:
        found.append(Section("memory", "Memory from write to write", _MEMORY, memory_tables(result)))
    if result["masked"] is not None:
        found.append(Section(None, "Hidden tokens of whole interactions", _MASKED, [masked_table(result)]))
    if result["latency"]:
        found.append(Section("latency", "Time of a turn", _LATENCY, [latency_table(result)]))
    return found
