"""The pages of one evaluation (`rxt eval --report`) and of a whole run, which holds one: tables, pictures, samples."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rxt_platform.evaluation.comparison import comparison_tables
from rxt_platform.evaluation.data_tables import data_tables
from rxt_platform.evaluation.page import html_page, image, note
from rxt_platform.evaluation.report_tables import (
    COSINE_KIND,
    LOSS_NOTE,
    MASKED_NOTE,
    answer_table,
    arms,
    by_distance,
    duration,
    latency_table,
    masked_tables,
    memory_tables,
    number,
    percent,
    points,
    recall_tables,
    recall_title,
    reward_table,
    scope,
    stage_table,
    turn_table,
    turns,
)
from rxt_platform.tables import Table, html_table

Result = Mapping[str, Any]
Pictures = Mapping[str, bytes]
"""PNGs by the names that `draw_evaluation` gives; a run's also has `losses`, and `comparison` with a baseline."""


def render_evaluation_html(title: str, result: Result, pictures: Pictures) -> str:
    """The page of one evaluation; everything is inline and all text escaped."""
    origin = f"{scope(result)} · seed {result['seed']}"
    sections = {**_measured(result, pictures), "Sampled conversations": _samples(result)}
    return html_page(title, origin, _headline(result), sections)


def render_html(report: Result, pictures: Pictures) -> str:
    """The page of a run."""
    measured = _measured(report, pictures)
    training = (
        image(pictures["losses"], "Training loss by step, one panel per stage.")
        + "<p>Held-out loss before and after each stage:</p>"
        + html_table(stage_table(report))
        + note(_stage_note(report))
    )
    sections = {
        "Recall by distance": measured.pop("Recall by distance"),
        **({"Beside the stateless baseline": _comparison(report, pictures)} if report["baseline"] else {}),
        "Training": training,
        **measured,
        "Sampled conversations": _samples(report),
        "Data": _tables(data_tables(report["data"])),
        "Steps and versions": _provenance(report),
    }
    origin = f"seed {report['seed']} · made {report['created']} · {duration(report['run_seconds'])}"
    return html_page(f"{report['name']}: training report", origin, _headline(report), sections)


def _comparison(report: Result, pictures: Pictures) -> str:
    said = "Recall by distance and time to the first token by turn, beside a stateless model of the same size."
    return (
        image(pictures["comparison"], said)
        + note("The baseline trained on the same rows in the same order, and reads the whole conversation each turn.")
        + _tables(comparison_tables(report))
    )


def _measured(result: Result, pictures: Pictures) -> dict[str, str]:
    """The parts of a page that show an evaluation."""
    told, reset = arms(result)
    parts = {
        "Recall by distance": image(pictures["recall"], _recall_in_words(result))
        + note(f"{recall_title(result)}. Of {scope(result)}. Bars: 95 % intervals, by bootstrap over conversations.")
        + _tables(recall_tables(result)),
        "Answer tokens": image(pictures["turns"], f"Perplexity of the reference answers by turn, {told} and {reset}.")
        + _tables([answer_table(result), turn_table(result)]),
    }
    if result["masked"] is not None:
        parts["Masked interactions"] = note(MASKED_NOTE) + _tables(masked_tables(result))
    if result["memory"] is not None:
        parts["Memory health"] = image(pictures["memory"], "What the memory looks like after each write.") + _tables(
            memory_tables(result)
        )
    if result["reward"]["scores"]:
        parts["Reward"] = (
            image(pictures["rewards"], "How many conversations got which reward.")
            + _tables([reward_table(result)])
            + note(
                "Composite reward of the follow-ups: BLEU, closeness in meaning, length; the mean of each conversation."
            )
        )
    if result["latency"]:
        parts["Latency"] = image(pictures["latency"], "Times of a turn, by turn.") + _tables([latency_table(result)])
    return parts


def _tables(tables: Sequence[Table]) -> str:
    return "".join(map(html_table, tables))


def _headline(result: Result) -> str:
    overall = result["recall_overall"]
    if not overall["count"]:
        return "<section><p>The held-out conversations ask for no told facts, so recall was not measured.</p></section>"
    told, reset = arms(result)
    tiles = (
        ("memory gain" if told == "with memory" else "gain from history", points(overall["gain"]), "gain"),
        (f"recall {told}", percent(overall["with_memory"]), "memory"),
        (f"recall with {reset}", percent(overall["reset"]), "reset"),
    )
    cells = "".join(f'<div class="{kind}"><b>{value}</b>{label}</div>' for label, value, kind in tiles)
    return (
        f'<section><div class="tiles">{cells}</div><p>Of {overall["count"]:,} questions on held-out conversations '
        "about facts told in an earlier turn, how many the model answers right with what it keeps of the "
        "conversation, and with that put back to its initial state before the question.</p></section>"
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


def _stage_note(report: Result) -> str:
    said = LOSS_NOTE if any(stage["kind"] == COSINE_KIND for stage in report["stages"]) else "Loss: nats per token."
    if any(stage["baselines"] for stage in report["stages"]):
        said += " Unigram and bigram are what counting the training tokens predicts on the same held-out tokens."
    return said


def _recall_in_words(result: Result) -> str:
    told, reset = arms(result)
    said = [
        f"{turns(distance)}: {percent(entry['with_memory'])} {told}, {percent(entry['reset'])} with {reset}"
        for distance, entry in by_distance(result)
    ]
    return "Recall by distance. " + ("; ".join(said) or "No questions were asked") + "."


def _facts(title: str, values: Result) -> Table:
    rows = [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else number(value)]
        if not isinstance(value, str)
        else [name, value]
        for name, value in values.items()
    ]
    return Table([title, ""], rows)
