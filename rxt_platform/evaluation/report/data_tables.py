"""What a run's report says of its data: rows read, set aside and kept, tokens, and how the tokenizer fits."""

from collections.abc import Mapping
from typing import Any

from rxt_platform.tables import Table


def data_tables(data: Mapping[str, Any]) -> list[Table]:
    """Rows and tokens of each part, the reasons why rows were set aside (if any were), and fertility."""
    tables = [_parts(data), _fertility(data["fertility"])]
    reasons = _reasons(data["validation"])
    return [tables[0], reasons, tables[1]] if reasons.rows else tables


def data_note(data: Mapping[str, Any]) -> str:
    """What was not used as it is, in one line for the terminal; empty when everything was."""
    rows = [one for splits in data["validation"].values() for sources in splits.values() for one in sources]
    parts = list(data["tokens"].values())
    counts = {
        "bad rows set aside": sum(sum(one["bad"].values()) for one in rows),
        "training rows that repeat held-out ones": sum(one["duplicates"] + one["near_duplicates"] for one in rows),
        "rows too long for the window set aside": sum(part["too_long"] for part in parts),
        "answers cut at the window": sum(part["truncated"] for part in parts),
        "queries cut": sum(part["queries_cut"] for part in parts),
    }
    said = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"Data: {', '.join(said)}." if said else ""


def _parts(data: Mapping[str, Any]) -> Table:
    rows = []
    for section, splits in data["validation"].items():
        for split, sources in splits.items():
            part = data["tokens"][f"{section}_{split}"]
            repeated = sum(one["duplicates"] + one["near_duplicates"] for one in sources)
            numbers = [
                sum(one["rows"] for one in sources),
                sum(sum(one["bad"].values()) for one in sources) + part["too_long"],
                repeated,
                part["examples"],
                part["tokens"],
                part["longest"],
                part["truncated"],
                part["queries_cut"],
            ]
            rows.append([section, split, *(f"{number:,}" for number in numbers)])
    header = ["section", "split", "rows", "bad", "repeated", "examples", "tokens", "longest", "cut", "queries cut"]
    return Table(header, rows, labels=2)


def _reasons(validation: Mapping[str, Any]) -> Table:
    rows = [
        [section, split, reason, f"{count:,}"]
        for section, splits in validation.items()
        for split, sources in splits.items()
        for one in sources
        for reason, count in one["bad"].items()
    ]
    return Table(["section", "split", "set aside because", "rows"], rows, labels=3)


def _fertility(fertility: Mapping[str, Any]) -> Table:
    rows = [
        [
            section,
            f"{one['tokens_per_word']:.3f}",
            f"{one['bytes_per_token']:.3f}",
            f"{one['unknown']:,}",
            f"{one['changed_by_round_trip']:,}",
            f"{one['words']:,}",
        ]
        for section, one in fertility.items()
    ]
    return Table(["tokenizer", "tokens a word", "bytes a token", "unknown", "texts changed", "of words"], rows)
