"""The parts of an evaluation's report, in order: the same on a terminal and on a page. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rxt_platform.evaluation.report.tables import (
    answer_table,
    follow_up_gain,
    latency_table,
    masked_table,
    memory_tables,
    recall_tables,
    recall_title,
    reward_table,
    turn_table,
)
from rxt_platform.tables import Table

_FORCED = (
    "References: the dataset's answers are remembered, so that a mistake counts once; its own: the model's answers "
    "are, as in a chat, and what only a reference answer told is never told."
)
_RECALL = "Asked again with the memory put back to its start; gain is the difference."
_MASKED = "The MLM head is the last joint stage's; memory-aware training moves the encoder away from it."
_MEMORY = (
    "RMS of the slots, how much a write changed them, how many directions they span (100 %: all), and how alike two "
    "are. A norm that keeps growing, a rank that falls or slots that all become alike are bad signs."
)
_REWARD = "BLEU, closeness in meaning and length of the answers to follow-ups: what MRL would pay a conversation."
_LATENCY = "Medians of single conversations; each answer is made 16 tokens long."


@dataclass(frozen=True)
class Section:
    """One part: the name of its picture, what it is called, how to read it, and its tables."""

    picture: str
    title: str
    note: str
    tables: Sequence[Table]


def sections(result: Mapping[str, Any]) -> list[Section]:
    """Recall first, then what else was measured."""
    how = _RECALL if result["free_running"] is None else f"{_RECALL} {_FORCED}"
    found = [
        Section("recall", recall_title(result), how, recall_tables(result)),
        Section(
            "turns",
            "Answer tokens, the references remembered",
            follow_up_gain(result),
            [answer_table(result), turn_table(result)],
        ),
    ]
    if result["reward"]["scores"]:
        found.append(Section("rewards", "Composite reward", _REWARD, [reward_table(result)]))
    if result["memory"] is not None:
        found.append(Section("memory", "Memory from write to write", _MEMORY, memory_tables(result)))
    if result["masked"] is not None:
        found.append(Section("masked", "Hidden tokens of whole interactions", _MASKED, [masked_table(result)]))
    if result["latency"]:
        found.append(Section("latency", "Time of a turn", _LATENCY, [latency_table(result)]))
    return found
