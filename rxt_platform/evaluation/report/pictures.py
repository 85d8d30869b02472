"""What was measured as pictures (PNG), small enough that their type is still readable on a phone. No torch."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from rxt_platform.evaluation.report.tables import arms, by_distance

# Okabe and Ito's: told apart with every common colour blindness, and by lightness in grey print.
_MEMORY_COLOUR, _RESET_COLOUR, _OWN_COLOUR = "#0072B2", "#E69F00", "#56B4E9"
_WIDTH, _DPI = 6.4, 180  # inches: small, so that the type is still readable when a phone shrinks the picture
_MAX_BAR_LABELS = 8  # distances; with more, numbers above the bars would run into each other
_LOGARITHMIC = 20.0  # largest over smallest from which an axis is logarithmic
_FREE_RUNNING = "free-running"
_PALE = 0.4  # opacity of a bar that too few conversations stand for

Result = Mapping[str, Any]
Measured = tuple[float, Sequence[float] | None]
"""A value and its interval."""
Series = tuple[str, Sequence[float | None], str]
"""Label, values and colour of a line."""


def draw_evaluation(result: Result) -> dict[str, bytes]:
    """All pictures of an evaluation, by name; without those for which nothing was measured."""
    drawn: dict[str, tuple[Callable[[Result], bytes], bool]] = {
        "recall": (draw_recall, True),
        "turns": (draw_turns, True),
        "memory": (draw_memory, result["memory"] is not None),
        "latency": (draw_latency, bool(result["latency"])),
        "rewards": (draw_rewards, bool(result["reward"]["scores"])),
    }
    return {name: draw(result) for name, (draw, measured) in drawn.items() if measured}


def draw_losses(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """PNG of training loss (of MRL the reward) by step, one panel per stage in order."""
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
        what = next(name for name in ("loss", "reward", "critic_loss") if name in history[0])
        steps, losses = _curve(history, what)
        axes.plot(steps, losses, color=_MEMORY_COLOUR, linewidth=1.2, marker="o" if len(steps) == 1 else None)
        axes.set_xlim(0, max(1, steps[-1]) * 1.03)
        axes.set_xlabel("step")
        axes.set_ylabel("reward" if what == "reward" else "training loss")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _tidy(axes)
    return _png(figure)


def _curve(history: Sequence[Mapping[str, float]], what: str) -> tuple[list[float], list[float]]:
    """Steps and means of the steps up to each. A few last ones are pooled with those before: one batch's mean at the
    end would look like a jump."""
    steps, means = [row["step"] for row in history], [row[what] for row in history]
    spans = [later - earlier for earlier, later in pairwise([0, *steps])]
    if len(steps) > 1 and spans[-1] < spans[-2] / 2:
        last = (means[-2] * spans[-2] + means[-1] * spans[-1]) / (spans[-2] + spans[-1])
        steps, means = [*steps[:-2], steps[-1]], [*means[:-2], last]
    return steps, means


def draw_recall(result: Result) -> bytes:
    """PNG of recall by distance with 95 % intervals: with the memory, with own answers in it, with the memory reset."""
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.add_subplot()
    keyed = result["questions"]["kind"] == "keyed"
    title = "Recall of told facts" if keyed else "Follow-ups answered word for word"
    axes.set_title(title, fontsize=11, loc="left", pad=26)
    entries = by_distance(result)
    if not entries:
        _say(axes, "no questions were asked")
        return _png(figure)
    told, reset = arms(result)
    series = [(told, "with_memory", _MEMORY_COLOUR, entries), (reset, "reset", _RESET_COLOUR, entries)]
    if result["free_running"] is not None:
        series.insert(1, (_FREE_RUNNING, "with_memory", _OWN_COLOUR, by_distance(result["free_running"])))
    width = 0.8 / len(series)
    for index, (label, key, colour, rows) in enumerate(series):
        heights = [entry[key] for _, entry in rows]
        places = [place + (index - (len(series) - 1) / 2) * width for place in range(len(rows))]
        errors = _errors([(entry[key], entry["intervals"][key]) for _, entry in rows])
        style = {"elinewidth": 0.9, "capsize": 2, "ecolor": "#444444"}
        bars = axes.bar(places, heights, width * 0.94, color=colour, label=label, yerr=errors, error_kw=style)
        for bar, (_, entry) in zip(bars, rows, strict=True):
            bar.set_alpha(1.0 if entry["intervals"][key] else _PALE)
        if len(rows) <= _MAX_BAR_LABELS:
            for place, height, error in zip(places, heights, errors[1], strict=True):
                axes.text(place, height + error + 0.015, f"{100 * height:.0f}", ha="center", fontsize=8)
    ticks = [f"{distance}\n({entry['count']})" for distance, entry in entries]
    axes.set_xticks(range(len(entries)), ticks, fontsize=10 if len(entries) <= _MAX_BAR_LABELS else 8)
    axes.set_xlim(-0.6, max(len(entries), 3) - 0.4)  # a lone group of bars should not fill the picture
    axes.set_ylim(0, 1.08)  # room for the number above a full bar
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    few = "; pale: few" if any(entry["intervals"]["reset"] is None for _, entry in entries) else ""
    axes.set_xlabel(f"{_distance_label(result)} (number of questions{few})")
    axes.set_ylabel("answered right")
    _tidy(axes)
    legend = axes.legend(
        frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.99), fontsize=9, columnspacing=1.2
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)  # it stands for all bars, also where the first is pale
    return _png(figure)


def draw_turns(result: Result) -> bytes:
    """PNG of the answers' perplexity by turn with 95 % intervals."""
    figure = Figure(figsize=(_WIDTH, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Perplexity of the reference answers by turn", fontsize=11, loc="left")
    rows = result["by_turn"]
    turns = [row["turn"] for row in rows]
    seen: list[float] = []
    for label, arm, colour in zip(
        arms(result), ("with_memory", "memory_reset"), (_MEMORY_COLOUR, _RESET_COLOUR), strict=True
    ):
        measured = [(row[arm]["perplexity"], row[arm]["intervals"]["perplexity"]) for row in rows]
        _points(axes, turns, measured, label, colour)
        seen += [value for value, _ in measured]
    if max(seen) > _LOGARITHMIC * min(seen):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # no powers in another font
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("turn")
    axes.set_ylabel("perplexity")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    return _png(figure)


def draw_memory(result: Result) -> bytes:
    """PNG of the memory's health by write."""
    rows = result["memory"]["by_write"]
    writes = [row["write"] for row in rows]
    panels = (
        ("norm", "norm (RMS)", None),
        ("change", "changed by the write", 1.0),
        ("effective_rank", "effective rank of the slots", 1.0),
        ("slot_similarity", "|cosine| between slots", None),
    )
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    for place, (key, title, whole) in enumerate(panels, start=1):
        axes = figure.add_subplot(2, 2, place)
        axes.set_title(title, fontsize=10, loc="left")
        _lines(axes, writes, [("", [row[key] for row in rows], _MEMORY_COLOUR)], "memory writes")
        if whole is not None:
            axes.yaxis.set_major_formatter(PercentFormatter(whole))
    return _png(figure)


def draw_latency(result: Result) -> bytes:
    """PNG of a turn's times."""
    rows = result["latency"]
    turns = [row["turn"] for row in rows]
    figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    axes.set_title("milliseconds", fontsize=10, loc="left")
    series: list[Series] = [
        ("to the first token", [row["prompt_ms"] for row in rows], _MEMORY_COLOUR),
        ("memory write", [row["write_ms"] for row in rows], _RESET_COLOUR),
    ]
    _lines(axes, turns, series, "turn")
    axes.legend(frameon=False, fontsize=8)
    axes = figure.add_subplot(1, 2, 2)
    axes.set_title("tokens per second", fontsize=10, loc="left")
    _lines(axes, turns, [("", [row["tokens_per_second"] for row in rows], _MEMORY_COLOUR)], "turn")
    return _png(figure)


def draw_rewards(result: Result) -> bytes:
    """PNG of how many conversations got which reward."""
    figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("Reward of the answers", fontsize=11, loc="left")
    named = [("teacher-forced", result, _MEMORY_COLOUR)]
    if result["free_running"] is not None:
        named.append((_FREE_RUNNING, result["free_running"], _RESET_COLOUR))
    scores = [way["reward"]["scores"] for _, way, _ in named]
    top = result["settings"]["reward"]["scale"]  # always the whole scale, so that pictures compare
    edges = [top * edge / 40 for edge in range(41)]
    for (label, way, colour), one in zip(named, scores, strict=True):
        if way is result:
            axes.hist(one, edges, color=colour, alpha=0.45, label=label)
        else:  # an outline, so that neither hides the other
            axes.hist(one, edges, color=colour, histtype="step", linewidth=1.6, label=label)
        axes.axvline(way["reward"]["mean"], color=colour, linewidth=1.4, linestyle="--")
    axes.set_xlim(0, top)
    axes.set_xlabel("mean reward of a conversation (dashed: mean of all)")
    axes.set_ylabel("conversations")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    return _png(figure)


def draw_comparison(report: Result) -> bytes:
    """PNG of a run's model beside its stateless baseline: recall by distance, time to the first token by turn."""
    baseline = report["baseline"]
    timed = report["latency"] and baseline["latency"]
    figure = Figure(figsize=(_WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot(1, 2 if timed else 1, 1)
    axes.set_title("recall", fontsize=10, loc="left")
    series = [
        ("with memory", report, "with_memory", _MEMORY_COLOUR),
        ("stateless, whole history", baseline, "with_memory", _RESET_COLOUR),
        ("stateless, no history", baseline, "reset", _OWN_COLOUR),
    ]
    for label, result, arm, colour in series:
        entries = [(int(distance.rstrip("+")), entry) for distance, entry in by_distance(result)]
        measured = [(entry[arm], entry["intervals"][arm]) for _, entry in entries]
        _points(axes, [distance for distance, _ in entries], measured, label, colour)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(_distance_label(report))
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    if not timed:
        return _png(figure)
    axes = figure.add_subplot(1, 2, 2)
    axes.set_title("milliseconds to the first token", fontsize=10, loc="left")
    for label, result, colour in (("with memory", report, _MEMORY_COLOUR), ("stateless", baseline, _RESET_COLOUR)):
        rows = result["latency"]
        places = [row["turn"] for row in rows]
        axes.plot(places, [row["prompt_ms"] for row in rows], color=colour, label=label, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("turn")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    return _png(figure)


def _distance_label(result: Result) -> str:
    return f"turns {'from telling to asking' if result['questions']['kind'] == 'keyed' else 'since the first'}"


def _lines(axes: Axes, places: Sequence[int], series: Sequence[Series], label: str) -> None:
    """Lines over whole numbers, from 0 up; gaps where a value is None."""
    for name, values, colour in series:
        heights = [math.nan if value is None else value for value in values]
        axes.plot(places, heights, color=colour, label=name, marker="o", markersize=3, linewidth=1.4)
    top = max((value for _, values, _ in series for value in values if value is not None), default=0.0)
    axes.set_ylim(0, 1.1 * top or 1.0)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _tidy(axes)


def _points(axes: Axes, places: Sequence[int], measured: Sequence[Measured], label: str, colour: str) -> None:
    """A line through values, each with its interval."""
    values = [value for value, _ in measured]
    errors = _errors(measured)
    axes.errorbar(places, values, errors, color=colour, label=label, marker="o", markersize=3, capsize=2, lw=1.4)


def _errors(measured: Sequence[Measured]) -> list[list[float]]:
    """How far each interval reaches below and above its value; nowhere without one."""
    ends = [(value, interval or (value, value)) for value, interval in measured]
    below = [max(0.0, value - low) for value, (low, _) in ends]
    return [below, [max(0.0, high - value) for value, (_, high) in ends]]


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
