"""The pages of one evaluation (`rxt eval --report`) and of a whole run, which holds one: tables, pictures, samples."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rxt_platform.evaluation.report.comparison import comparison_tables
from rxt_platform.evaluation.report.data_tables import data_tables
from rxt_platform.evaluation.report.page import html_page, image, note
from rxt_platform.evaluation.report.reinforcement import REINFORCEMENT_NOTE, reinforcement_table
from rxt_platform.evaluation.report.sections import sections
from rxt_platform.evaluation.report.tables import (
    COSINE_KIND,
    LOSS_NOTE,
    UNKNOWN_NOTE,
    arms,
    by_distance,
    duration,
    number,
    percent,
    points,
    recall_title,
    scope,
    stage_table,
    turns,
)
from rxt_platform.tables import Table, html_table

Result = Mapping[str, Any]
Pictures = Mapping[str, bytes]
"""PNGs by the names that `draw_evaluation` gives; a run's also has `losses`, and `comparison` with a baseline."""


def render_evaluation_html(title: str, result: Result, pictures: Pictures) -> str:
    """The page of one evaluation; everything is inline and all text escaped."""
    origin = " · ".join([*([f"data {result['data']}"] if "data" in result else []), f"seed {result['seed']}"])
    parts = {**_measured(result, pictures), "Sampled conversations": _samples(result)}
    return html_page(title, origin, _headline(result), parts)


def render_html(report: Result, pictures: Pictures) -> str:
    """The page of a run."""
    measured = _measured(report, pictures)
    training = (
        image(pictures["losses"], "Training loss by step, one panel per stage.")
        + "<p>Held-out loss before and after each stage:</p>"
        + html_table(stage_table(report))
        + _reinforcement(report)
        + note(_stage_note(report))
    )
    recall = recall_title(report)
    parts = {
        recall: measured.pop(recall),
        **({"Beside the stateless baseline": _comparison(report, pictures)} if report["baseline"] else {}),
        "Training": training,
        **measured,
        "Sampled conversations": _samples(report),
        "Data": _tables(data_tables(report["data"])),
        "Steps and versions": _provenance(report),
    }
    origin = f"seed {report['seed']} · made {report['created']} · {duration(report['run_seconds'])}"
    return html_page(f"{report['name']}: training report", origin, _headline(report), parts)


def _comparison(report: Result, pictures: Pictures) -> str:
    said = "Recall by distance and time to the first token by turn, beside a stateless model of the same size."
    return (
        image(pictures["comparison"], said)
        + note("The baseline trained on the same rows in the same order, and reads the whole conversation each turn.")
        + _tables(comparison_tables(report))
    )


def _measured(result: Result, pictures: Pictures) -> dict[str, str]:
    """The parts of a page that show an evaluation."""
    parts = {}
    for section in sections(result):
        shown = note(section.note) if section.note else ""
        if section.picture is not None:
            shown += image(pictures[section.picture], _in_words(section.picture, result))
        parts[section.title] = shown + _tables(section.tables)
    return parts


def _in_words(picture: str, result: Result) -> str:
    """What a picture shows, for those who don't see it."""
    told, reset = arms(result)
    if picture == "recall":
        said = [
            f"{turns(distance)}: {percent(entry['with_memory'])} {told}, {percent(entry['reset'])} with {reset}"
            for distance, entry in by_distance(result)
        ]
        return "By distance. " + ("; ".join(said) or "No questions were asked") + "."
    return {
        "turns": f"Perplexity of the reference answers by turn, {told} and {reset}.",
        "rewards": "How many conversations got which reward.",
        "memory": "What the memory looks like after each write.",
        "latency": "Times of a turn, by turn.",
    }[picture]


def _tables(tables: Sequence[Table]) -> str:
    return "".join(map(html_table, tables))


def _headline(result: Result) -> str:
    """The figures to look at first."""
    overall, own = result["recall_overall"], result["free_running"]
    how = note(f"{scope(result)}. {UNKNOWN_NOTE}")
    if not overall["count"]:
        said = "The conversations ask for nothing that was told, so recall was not measured."
        return f"<section><p>{said}</p>{how}</section>"
    told, reset = arms(result)
    tiles = [
        ("memory gain" if told == "with memory" else "gain from history", points(overall["gain"]), "gain"),
        (f"right {told}, teacher-forced", percent(overall["with_memory"]), "memory"),
        (f"right with {reset}", percent(overall["reset"]), "reset"),
    ]
    if own is not None:
        right = percent(own["recall_overall"]["with_memory"])
        tiles.insert(2, (f"right {told}, free-running", right, "own"))
    cells = "".join(f'<div class="{kind}"><b>{value}</b>{label}</div>' for label, value, kind in tiles)
    asked = "questions about facts told in an earlier turn"
    if result["questions"]["kind"] != "keyed":
        asked = "follow-ups, to be answered word for word"
    return (
        f'<section><div class="tiles">{cells}</div><p>Of {overall["count"]:,} {asked}, how many the model answers '
        "right with what it keeps of the conversation, and with that put back to its start before the question.</p>"
        f"{how}</section>"
    )


def _samples(result: Result) -> str:
    if not result["samples"]:
        return "<p>None were sampled.</p>"
    if result["free_running"] is None:
        said = "The model goes on from the references here, not from its own answers."
    else:
        said = "The model goes on from its own answers here, not from the references."
    shown = (("query", "Query"), ("answer", "Model"), ("reference", "Reference"))
    parts = [note(said)]
    for conversation, sampled in enumerate(result["samples"], 1):
        parts.append(f"<h3>Conversation {conversation}</h3><ol>")
        for turn in sampled:
            lines = "".join(f'<dt>{label}</dt><dd class="{key}">{escape(turn[key])}</dd>' for key, label in shown)
            parts.append(f"<li><dl>{lines}</dl></li>")
        parts.append("</ol>")
    return "".join(parts)


def _provenance(report: Result) -> str:
    names = ("name", "kind", "status", "artifact")  # the artifact's name holds the start of its fingerprint
    rows = [[*(step[name] for name in names), duration(step["seconds"])] for step in report["steps"]]
    steps = Table(["step", "kind", "status", "artifact", "time"], rows, labels=4)
    return (
        f'<p>The model is in <code>{escape(report["model"])}</code>.</p><div class="pair">'
        f"{html_table(_facts('parameters', report['parameters']))}"
        f"{html_table(_facts('versions', report['versions']))}</div>{html_table(steps)}"
    )


def _reinforcement(report: Result) -> str:
    """What stages of episodes gained; nothing without one."""
    table = reinforcement_table(report)
    return f"<h3>Reinforcement learning</h3>{html_table(table)}<p>{REINFORCEMENT_NOTE}</p>" if table.rows else ""


def _stage_note(report: Result) -> str:
    said = LOSS_NOTE if any(stage["kind"] == COSINE_KIND for stage in report["stages"]) else "Loss: nats per token."
    if any(stage["baselines"] for stage in report["stages"]):
        said += " Unigram and bigram are what counting the training tokens predicts on the same held-out tokens."
    return said


def _facts(title: str, values: Result) -> Table:
    rows = [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else number(value)]
        if not isinstance(value, str)
        else [name, value]
        for name, value in values.items()
    ]
    return Table([title, ""], rows)
