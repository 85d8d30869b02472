"""What stages of episodes gained: the table of a report's MRL stages."""

from collections.abc import Mapping
from typing import Any

from rxt_platform.evaluation.report.tables import duration, number, percent
from rxt_platform.tables import Table

_SHOWN = {
    "reward": ("reward", number),
    "greedy_reward": ("greedy", number),
    "recall": ("recall", percent),
    "critic_correlation": ("critic's correlation", number),
}

REINFORCEMENT_NOTE = (
    "On held-out conversations, before → after. Reward of sampled and of greedy answers, free-running, on the\n"
    "stage's own scale; recall: asked facts that greedy answers hold."
)


def reinforcement_table(report: Mapping[str, Any]) -> Table:
    """One row per stage that held conversations: what its answers were worth on held-out ones, before and after."""
    held = [stage for stage in report["stages"] if stage["held_out"] is not None]
    shown = {name: how for name, how in _SHOWN.items() if any(name in stage["held_out"] for stage in held)}
    rows = []
    for stage in held:
        row = [stage["name"], stage["status"], f"{stage['steps']:,}", duration(stage["seconds"])]
        for name, (_, show) in shown.items():
            before, after = stage["held_out"].get(name, (None, None))
            row.append(f"{show(before)} → {show(after)}")
        rows.append(row)
    return Table(["stage", "status", "updates", "time", *(title for title, _ in shown.values())], rows, labels=2)
