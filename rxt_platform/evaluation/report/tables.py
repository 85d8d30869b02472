"""What was measured as tables of cells, the same for the terminal and for a page. No torch.

The layout of an evaluation is in `evaluation/evaluate.py`, that of a run's report in `report.py`. A number that was not
measured is None and shows as a dash.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from rxt_platform.evaluation.intervals import FEWEST
from rxt_platform.tables import Table

COSINE_KIND = "memory_pretraining"
"""The stage kind whose loss is a negative cosine; the others' are nats per token."""

LOSS_NOTE = "Loss is in nats per token; that of memory pre-training is a negative cosine, -1 at best."

_DASH = "–"
_TOKEN_COLUMNS = ("loss", "95 % CI", "perplexity", "accuracy", "95 % CI", "tokens")
_MASKED_COLUMNS = ("loss", "95 % CI", "accuracy", "95 % CI", "tokens")
_WHOLE = 16  # rows of a long table before some are left out

Result = Mapping[str, Any]


def stage_table(report: Result) -> Table:
    """One row per stage; the counting baselines only where some stage has them."""
    stages = report["stages"]
    counted = any(stage["baselines"] for stage in stages)
    header = ["stage", "status", "steps", "time", "loss before", "loss after"]
    rows = []
    for stage in stages:
        if stage["held_out"] is not None:
            continue  # in a table of its own
        row = [stage["name"], stage["status"], f"{stage['steps']:,}", duration(stage["seconds"])]
        row += [number(stage["loss_before"]), number(stage["loss_after"])]
        if counted:
            row += [number((stage["baselines"] or {}).get(name)) for name in ("unigram", "bigram")]
        rows.append(row)
    return Table(header + (["unigram", "bigram"] if counted else []), rows, labels=2)


def arms(result: Result) -> tuple[str, str]:
    """What the two sides of every comparison are called: with the state of the conversation, and without."""
    if result["responder"]["kind"] == "reactive":
        return "with memory", "memory reset"
    return "with history" if result["responder"]["history"] == "full" else "history off", "no history"


def recall_title(result: Result) -> str:
    """What the questions are."""
    if result["questions"]["kind"] == "keyed":
        return "Recall of facts told in an earlier turn"
    return "Follow-ups answered word for word (no row says what they ask for)"


UNKNOWN_NOTE = f"95 % CI: over conversations; {_DASH} where fewer than {FEWEST} have something to say."
LEFT_OUT_NOTE = "Not all turns are shown; --json has them."


def scope(result: Result) -> str:
    """How much was measured, and what was lost of it."""
    cut, asked = result["cut"], result["questions"]
    said = [f"{result['conversations']:,} conversations, {result['turns']:,} turns"]
    if cut["conversations"]:
        said.append(
            f"cut to {result['responder']['interaction_window']:,} tokens an interaction: the ends of "
            f"{cut['answers']:,} answers and {cut['queries']:,} queries, in {cut['conversations']:,} conversations"
        )
    if cut["left_out"]:
        said.append(f"{cut['left_out']:,} conversations left out, as they are too long")
    if asked["kind"] == "keyed" and asked["conversations"] < result["conversations"]:
        said.append(f"only {asked['conversations']:,} conversations carry answer keys: the others ask nothing")
    return "; ".join(said)


def recall_tables(result: Result) -> list[Table]:
    """Recall by distance; by task and by range where there are several; with the model's own answers, if tried."""
    keyed = result["questions"]["kind"] == "keyed"
    named = [(turns(far) if keyed else f"turn {_next(far)}", entry) for far, entry in by_distance(result)]
    tables = [_shares(result, "distance" if keyed else "asked in", [*named, ("overall", result["recall_overall"])])]
    by_task, by_range = result["recall_by_task"], result["recall_long_range"]
    if len(by_task) > 1:
        tables.append(_shares(result, "task", list(by_task.items())))
    if len(by_range) > 1:
        names = {"true": "only unrelated", "false": "others"}
        tables.append(_shares(result, "turns between", [(names[key], entry) for key, entry in by_range.items()]))
    if result["free_running"] is not None:
        ways = [(name, one["recall_overall"]) for name, one in _ways(result)]
        if len(result["recall_by_teller"]) > 1:  # what a reference answer told, a model's own may not have
            for teller in ("user", "model"):
                ways += [(f"{name}, by {teller}", one["recall_by_teller"][teller]) for name, one in _ways(result)]
        tables.append(_shares(result, "memory, told by" if len(ways) > 2 else "memory", ways))
    return tables


def _shares(result: Result, kind: str, named: Sequence[tuple[str, Result]]) -> Table:
    rows = [
        [
            label,
            percent(entry["with_memory"]),
            spread(entry["intervals"]["with_memory"], percent),
            percent(entry["reset"]),
            points(entry["gain"]),
            spread(entry["intervals"]["gain"], points),
            f"{entry['count']:,}",
        ]
        for label, entry in named
    ]
    told, reset = arms(result)
    return Table([kind, told, "95 % CI", reset, "gain", "95 % CI", "questions"], rows)


def _ways(result: Result) -> list[tuple[str, Result]]:
    """What the memory held: the reference answers, and the model's own, if tried."""
    own = result["free_running"]
    return [("teacher-forced", result), *([("free-running", own)] if own is not None else [])]


def answer_table(result: Result) -> Table:
    """Answer tokens, teacher-forced."""
    named = zip(arms(result), ("answer_tokens", "memory_reset"), strict=True)
    return Table(["tokens of answers", *_TOKEN_COLUMNS], [_tokens(label, result[key]) for label, key in named])


def follow_up_gain(result: Result) -> str:
    """What the memory or the history is worth to the answers, in words; empty where there is none, or no follow-up."""
    gain, responder = result["follow_up_gain"], result["responder"]
    if not gain["count"] or responder["history"] == "none":
        return ""
    what = "its memory" if responder["kind"] == "reactive" else "its history"
    known = f" (95 % CI of what is saved: {spread(gain['interval'], number)})" if gain["interval"] else ""
    change = f"{number(abs(gain['nats']))} nats {'less' if gain['nats'] >= 0 else 'more'}"
    return f"With {what}, a token of a follow-up's answer costs {change} on average{known}."


def masked_table(result: Result) -> Table:
    """Hidden tokens of whole interactions, as encoder and MLM head guess them."""
    label, loss, loss_ci, _, accuracy, accuracy_ci, count = _tokens("encoder, MLM head", result["masked"])
    return Table(["hidden tokens", *_MASKED_COLUMNS], [[label, loss, loss_ci, accuracy, accuracy_ci, count]])


def _tokens(label: str, entry: Result) -> list[str]:
    return [
        label,
        number(entry["loss"]),
        spread(entry["intervals"]["loss"], number),
        number(entry.get("perplexity")),
        percent(entry["accuracy"]),
        spread(entry["intervals"]["accuracy"], percent),
        f"{entry['count']:,}",
    ]


def turn_table(result: Result) -> Table:
    """Answer tokens by turn."""
    rows = []
    for row in thinned(result["by_turn"]):
        cells = [str(row["turn"])]
        for name, shown in (("loss", number), ("perplexity", number), ("accuracy", percent)):
            cells += [shown(row[arm][name]) for arm in ("with_memory", "memory_reset")]
        rows.append([*cells, f"{row['count']:,}"])
    lost = arms(result)[1].removeprefix("memory ")
    header = [cell for name in ("loss", "perplexity", "accuracy") for cell in (name, lost)]
    return Table(["turn", *header, "tokens"], rows)


_REWARD_PARTS = {"bleu": "BLEU"}


def reward_table(result: Result) -> Table:
    """Composite reward of the follow-ups."""
    rows, parts = [], list[str]()
    for label, way in _ways(result):
        reward = way["reward"]
        parts = [_REWARD_PARTS.get(name, name) for name in reward["components"]]
        cells = [number(reward["mean"]), spread(reward["interval"], number)]
        cells += [number(reward[name]) for name in ("min", "max")]
        cells += [number(value) for value in reward["components"].values()]
        rows.append([label, *cells, f"{reward['conversations']:,}"])
    header = ["memory", "reward", "95 % CI", "min", "max", *parts, "conversations"]
    return Table(header, rows)


def memory_tables(result: Result) -> list[Table]:
    """The memory from write to write, and how open its gates were."""
    rows = [
        [
            str(row["write"]) if row["write"] else "before",
            number(row["norm"]),
            percent(row["change"]),
            percent(row["effective_rank"]),
            number(row["slot_similarity"]),
            f"{row['conversations']:,}",
        ]
        for row in thinned(result["memory"]["by_write"])
    ]
    header = ["write", "norm (RMS)", "changed by", "effective rank", "slots' |cosine|", "conversations"]
    gates = [
        [str(row["layer"]), *(number(row[name]) for name in ("mean", "min", "max"))]
        for row in result["memory"]["gates"]
    ]
    return [Table(header, rows), *([Table(["gate of layer", "mean", "min", "max"], gates)] if gates else [])]


def latency_table(result: Result) -> Table:
    """Seconds of a turn."""
    rows = [
        [
            str(row["turn"]),
            f"{row['prompt_ms']:.1f} ms",
            rate(row["tokens_per_second"]),
            f"{row['write_ms']:.1f} ms",
            f"{row['conversations']:,}",
        ]
        for row in thinned(result["latency"])
    ]
    return Table(["turn", "first token", "tokens per second", "memory write", "conversations"], rows)


def by_distance(result: Result) -> list[tuple[str, Result]]:
    """Recall entries, nearest first."""
    return sorted(result["recall"].items(), key=lambda item: int(item[0].rstrip("+")))


def _next(distance: str) -> str:
    """The turn (from 1) of a follow-up that is so far from the first: "17+" becomes "18+"."""
    return str(int(distance.rstrip("+")) + 1) + "+" * distance.endswith("+")


def thinned(rows: Sequence[Result]) -> Sequence[Result]:
    """The first 16 rows of a table by turn, of the others every k-th, and the last: at most 32."""
    later = rows[_WHOLE:]
    step = -(-len(later) // _WHOLE) or 1
    return [*rows[:_WHOLE], *later[step - 1 : -1 : step], *later[-1:]]


def is_thinned(rows: Sequence[Result]) -> bool:
    """Whether a table of these rows leaves some out."""
    return len(thinned(rows)) < len(rows)


def turns(distance: str) -> str:
    """A distance in words."""
    return f"{distance} turn" if distance == "1" else f"{distance} turns"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would say."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float | None) -> str:
    """A share of 0..1 as a percentage."""
    return f"{100 * share:.1f} %" if _known(share) else _DASH


def points(gain: float | None) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * gain:+.1f} pt" if _known(gain) else _DASH


def number(value: float | None) -> str:
    """Three decimals, or a power of ten."""
    if not _known(value):
        return _DASH
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"


def rate(value: float | None) -> str:
    """A number of things per second."""
    return f"{value:,.0f}" if _known(value) else _DASH


def spread(interval: Sequence[float] | None, shown: Any) -> str:
    """An interval, its ends as `shown` writes them, the unit once."""
    if interval is None:
        return _DASH
    low, high = (shown(end) for end in interval)
    return f"{low.rsplit(' ', 1)[0]} to {high}"


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
