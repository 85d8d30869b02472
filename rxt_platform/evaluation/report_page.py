"""What a run's report shows: its tables as cells, its two pictures (PNG), and one HTML page that needs no other file.

The cells serve the terminal and the page alike, so that both say the same. The layout of a report is in `report.py`.
A number that was not measured is NaN in a fresh report and None in one read back from JSON; both show as a dash.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeGuard

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rxt_platform.evaluation.data_tables import data_tables
from rxt_platform.tables import Table, html_table

COSINE_KIND = "memory_pretraining"
"""The stage kind whose loss is a negative cosine; the others' are nats per token."""

LOSS_NOTE = "Loss is in nats per token; that of memory pre-training is a negative cosine, -1 at best."

# Okabe and Ito's blue and orange: told apart with every common colour blindness, and by lightness in grey print.
_MEMORY_COLOUR, _RESET_COLOUR = "#0072B2", "#E69F00"
_WIDTH, _DPI = 6.4, 180  # inches: small, so that the type is still readable when a phone shrinks the picture
_MAX_BAR_LABELS = 8  # distances; with more, numbers above the bars would run into each other
_DASH = "–"


def stage_table(report: Mapping[str, Any]) -> Table:
    """One row per stage; the counting baselines only where some stage has them."""
    stages = report["stages"]
    counted = any(stage["baselines"] for stage in stages)
    header = ["stage", "status", "steps", "time", "loss before", "loss after"]
    rows = []
    for stage in stages:
        row = [stage["name"], stage["status"], f"{stage['steps']:,}", duration(stage["seconds"])]
        row += [_number(stage["loss_before"]), _number(stage["loss_after"])]
        if counted:
            row += [_number((stage["baselines"] or {}).get(name)) for name in ("unigram", "bigram")]
        rows.append(row)
    return Table(header + (["unigram", "bigram"] if counted else []), rows, labels=2)


def recall_table(report: Mapping[str, Any]) -> Table:
    """One row per distance, nearest first, and one over all questions."""
    named = [(_turns(distance), entry) for distance, entry in _by_distance(report)]
    return _shares("distance", [*named, ("overall", report["recall_overall"])])


def task_tables(report: Mapping[str, Any]) -> list[Table]:
    """A table with one row per task; none where there are not several, because recall by distance then says it all."""
    by_task = report["recall_by_task"]
    return [_shares("task", list(by_task.items()))] if len(by_task) > 1 else []


def _shares(kind: str, named: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = [
        [label, percent(entry["with_memory"]), percent(entry["reset"]), points(entry["gain"]), f"{entry['count']:,}"]
        for label, entry in named
    ]
    return Table([kind, "with memory", "memory reset", "gain", "questions"], rows)


def answer_table(report: Mapping[str, Any]) -> Table:
    """Held-out answer tokens, teacher-forced, with the memory and with the memory reset."""
    rows = []
    for label, key in (("with memory", "answer_tokens"), ("memory reset", "memory_reset")):
        entry = report[key]
        cells = [_number(entry["loss"]), _number(entry["perplexity"]), percent(entry["accuracy"])]
        rows.append([label, *cells, f"{entry['count']:,}"])
    return Table(["answer tokens", "loss", "perplexity", "accuracy", "tokens"], rows)


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


def draw_losses(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """PNG of training loss by step, one panel per stage in order."""
    columns = min(2, len(histories)) or 1
    rows = math.ceil(len(histories) / columns) or 1
    figure = Figure(figsize=(_WIDTH, 2.4 * rows), layout="constrained")
    if not histories:
        _say(figure.add_subplot(), "no stage was trained")
    for index, (name, history) in enumerate(histories.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(name, fontsize=11, loc="left")
        if not history:
            _say(axes, "no steps recorded")
            continue
        steps, losses = [row["step"] for row in history], [row["loss"] for row in history]
        axes.plot(steps, losses, color=_MEMORY_COLOUR, linewidth=1.2, marker="o" if len(steps) == 1 else None)
        axes.set_xlim(0, max(1, steps[-1]) * 1.03)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _tidy(axes)
    return _png(figure)


def draw_recall(report: Mapping[str, Any]) -> bytes:
    """PNG of recall by distance, with the memory beside the memory reset."""
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Recall of told facts on held-out conversations", fontsize=11, loc="left", pad=26)
    entries = _by_distance(report)
    if not entries:
        _say(axes, "no questions were asked")
        return _png(figure)
    width = 0.38
    series = (("with memory", "with_memory", _MEMORY_COLOUR, -1), ("memory reset", "reset", _RESET_COLOUR, 1))
    for label, key, colour, side in series:
        heights = [entry[key] for _, entry in entries]
        places = [index + side * width / 2 for index in range(len(entries))]
        bars = axes.bar(places, heights, width * 0.94, color=colour, label=label)
        if len(entries) <= _MAX_BAR_LABELS:
            axes.bar_label(bars, [f"{100 * height:.0f}" for height in heights], padding=2, fontsize=9)
    ticks = [f"{distance}\n({entry['count']})" for distance, entry in entries]
    axes.set_xticks(range(len(entries)), ticks, fontsize=10 if len(entries) <= _MAX_BAR_LABELS else 8)
    axes.set_xlim(-0.6, max(len(entries), 3) - 0.4)  # a lone pair of bars should not fill the picture
    axes.set_ylim(0, 1.08)  # room for the number above a full bar
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("turns from telling to asking (number of questions)")
    axes.set_ylabel("answered right")
    _tidy(axes)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 0.99), fontsize=10)
    return _png(figure)


def render_html(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page. `pictures` holds the PNGs `recall` and `losses`; everything is inline and all text escaped."""
    title = escape(f"{report['name']}: training report")
    shown = {
        "Recall by distance": _image(pictures["recall"], _recall_in_words(report))
        + html_table(recall_table(report))
        + "".join(map(html_table, task_tables(report)))
        + html_table(answer_table(report)),
        "Training": _image(pictures["losses"], "Training loss by step, one panel per stage.")
        + "<p>Held-out loss before and after each stage:</p>"
        + html_table(stage_table(report))
        + f'<p class="note">{escape(_stage_note(report))}</p>',
        "Sampled conversations": _samples(report["samples"]),
        "Data": "".join(map(html_table, data_tables(report["data"]))),
        "Steps and versions": _provenance(report),
    }
    sections = "\n".join(f"<section><h2>{name}</h2>{body}</section>" for name, body in shown.items())
    origin = f"seed {report['seed']} · made {report['created']} · {duration(report['run_seconds'])}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head>\n<body><main>\n"
        f'<h1>{title}</h1><p class="note">{escape(origin)}</p>\n{_headline(report)}\n{sections}\n'
        "</main></body></html>\n"
    )


def _headline(report: Mapping[str, Any]) -> str:
    overall = report["recall_overall"]
    if not overall["count"]:
        return "<section><p>The held-out conversations ask for no told facts, so recall was not measured.</p></section>"
    tiles = (
        ("memory gain", points(overall["gain"]), "gain"),
        ("recall with memory", percent(overall["with_memory"]), "memory"),
        ("recall with memory reset", percent(overall["reset"]), "reset"),
    )
    cells = "".join(f'<div class="{kind}"><b>{value}</b>{label}</div>' for label, value, kind in tiles)
    return (
        f'<section><div class="tiles">{cells}</div><p>Of {overall["count"]:,} questions on held-out conversations '
        "about facts told in an earlier turn, how many the model answers right with what its memory holds, and "
        "with the memory put back to its initial state before the question.</p></section>"
    )


def _samples(samples: Sequence[Sequence[Mapping[str, str]]]) -> str:
    if not samples:
        return "<p>None were sampled.</p>"
    shown = (("query", "Query"), ("answer", "Model"), ("reference", "Reference"))
    parts = ['<p class="note">The model goes on from its own answers here, not from the references.</p>']
    for number, turns in enumerate(samples, 1):
        parts.append(f"<h3>Conversation {number}</h3><ol>")
        for turn in turns:
            lines = "".join(f'<dt>{label}</dt><dd class="{key}">{escape(turn[key])}</dd>' for key, label in shown)
            parts.append(f"<li><dl>{lines}</dl></li>")
        parts.append("</ol>")
    return "".join(parts)


def _provenance(report: Mapping[str, Any]) -> str:
    names = ("name", "kind", "status", "artifact")  # the artifact's name holds the start of its fingerprint
    rows = [[*(step[name] for name in names), duration(step["seconds"])] for step in report["steps"]]
    steps = Table(["step", "kind", "status", "artifact", "time"], rows, labels=4)
    return (
        f'<p>The model is in <code>{escape(report["model"])}</code>.</p><div class="pair">'
        f"{html_table(_facts('parameters', report['parameters']))}"
        f"{html_table(_facts('versions', report['versions']))}</div>{html_table(steps)}"
    )


def _stage_note(report: Mapping[str, Any]) -> str:
    note = LOSS_NOTE if any(stage["kind"] == COSINE_KIND for stage in report["stages"]) else "Loss: nats per token."
    if any(stage["baselines"] for stage in report["stages"]):
        note += " Unigram and bigram are what counting the training tokens predicts on the same held-out tokens."
    return note


def _recall_in_words(report: Mapping[str, Any]) -> str:
    said = [
        f"{_turns(distance)}: {percent(entry['with_memory'])} with memory, {percent(entry['reset'])} reset"
        for distance, entry in _by_distance(report)
    ]
    return "Recall by distance. " + ("; ".join(said) or "No questions were asked") + "."


def _facts(title: str, values: Mapping[str, Any]) -> Table:
    rows = [
        [name.replace("_", " "), f"{value:,}" if isinstance(value, int) else _number(value)]
        if not isinstance(value, str)
        else [name, value]
        for name, value in values.items()
    ]
    return Table([title, ""], rows)


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _by_distance(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(report["recall"].items(), key=lambda item: int(item[0]))


def _turns(distance: str) -> str:
    return f"{distance} turn" if distance == "1" else f"{distance} turns"


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    if not _known(value):
        return _DASH
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.2e}"


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#555555")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)  # a bare Figure draws with Agg: no window, no pyplot state
    return buffer.getvalue()


_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5f6672; --line: #d9dde3; --page: #f6f7f9; --card: #fff;
  --blue: #0067a3; --orange: #9a6200; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a3abb8; --line: #3a404a; --page: #14171b;
  --card: #1e2228; --blue: #5db7ef; --orange: #f0b13c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 960px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 0; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 1rem 0; }
section > :first-child { margin-top: 0; }
section > :last-child { margin-bottom: 0; }
.note { color: var(--soft); font-size: .9rem; margin: .25rem 0 .75rem; }
.tiles { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; }
.tiles div { border-left: 4px solid var(--soft); padding-left: .75rem; color: var(--soft); font-size: .9rem; }
.tiles b { display: block; font-size: 1.7rem; line-height: 1.2; color: var(--text); white-space: nowrap; }
.tiles .memory { border-color: var(--blue); } .tiles .reset { border-color: var(--orange); }
img { display: block; width: 100%; max-width: 680px; height: auto; margin: 0 auto 1rem; padding: .25rem;
  background: #fff; border-radius: 6px; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem;
  align-items: start; }
ol { padding-left: 1.5rem; margin: 0; } li { margin-bottom: .75rem; }
dl { display: grid; grid-template-columns: 5.5rem 1fr; gap: .1rem .5rem; margin: 0; }
dt { color: var(--soft); font-size: .85rem; line-height: 1.75; } dd { margin: 0; white-space: pre-wrap; }
dd.answer { color: var(--blue); font-weight: 600; }
code { font-size: .9em; }
@media (max-width: 560px) { main { padding: .5rem; } section { padding: .75rem; }
  table { font-size: .8rem; } th, td { padding: .35rem .25rem; } th { white-space: normal; vertical-align: bottom; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles .gain { grid-column: 1 / -1; } .tiles .gain b { font-size: 2.2rem; }
  dl { grid-template-columns: 4.75rem 1fr; } ol { padding-left: 1.25rem; } }
"""
