"""A picture (PNG) of how long things are: one panel for each field or section."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rxt_platform.data.sources import SECTIONS, SPLITS
from rxt_platform.inspection.measures import WHOLE, Inspection, Lengths, Unit, unit_of

_BINS = 40
# The report's: Okabe and Ito's blue and orange.
_COLOURS = ("#0072B2", "#E69F00")
_WIDTH, _DPI = 6.4, 180  # inches
_LABELS = {"train": "training", "validation": "held out"}


@dataclass(frozen=True)
class Series:
    """Counts [bins] of lengths, the first bin from 0, each `width` wide."""

    label: str
    counts: Sequence[int]
    width: float


@dataclass(frozen=True)
class Panel:
    """One or two series over the same axis, as shares of all of them."""

    title: str
    axis: str
    series: Sequence[Series]
    window: int | None = None
    """Where the window ends, marked by a line."""


def draw_lengths(panels: Sequence[Panel]) -> bytes:
    """PNG of the panels, two in a row."""
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(_WIDTH if columns > 1 else 4.2, 2.5 * rows), layout="constrained")
    for index, panel in enumerate(panels):
        _draw(figure.add_subplot(rows, columns, index + 1), panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)  # a bare Figure draws with Agg: no window, no pyplot state
    return buffer.getvalue()


def panels_of(found: Sequence[Inspection]) -> list[Panel]:
    """A panel for each field of a source; of several sources one for each section, their lengths added up.

    Lengths are tokens where they were counted, else words.
    """
    if len(found) == 1:
        one = found[0]
        return [_panel(name, unit_of(of), [of], one.window) for name, of in one.lengths.items()]
    panels = []
    for sections in dict.fromkeys(one.part.sections for one in found):
        of_section = [one for one in found if one.part.sections == sections]
        measured = [of for one in of_section for of in [one.lengths.get(WHOLE) or one.lengths.get("text")] if of]
        if measured:
            name = " and ".join(sections)
            panels.append(_panel(name, unit_of(measured[0]), measured, of_section[0].window))
    return panels


def panels_of_tokens(found: Mapping[str, Any]) -> list[Panel]:
    """A panel for each section of token shards (the parts of `tokens.json`): training beside held-out rows."""
    panels = []
    for section in SECTIONS:
        parts = {split: found.get(f"{section}_{split}") for split in SPLITS}
        series = [
            Series(_LABELS[split], part["histogram"], part["max_length"] / len(part["histogram"]))
            for split, part in parts.items()
            if part is not None
        ]
        if series:
            what = "text, or part of one" if section == "texts" else "interaction"
            panels.append(Panel(section, f"tokens of {'a' if section == 'texts' else 'an'} {what}", series))
    return panels


def _panel(name: str, unit: Unit, measured: Sequence[Mapping[Unit, Lengths]], window: int | None) -> Panel:
    lengths = [of[unit] for of in measured]
    limit = max(one.span for one in lengths)
    width = -(-limit // _BINS)
    counts = np.sum([one.histogram(-(-limit // width), width) for one in lengths], axis=0)
    number, longest = sum(one.number for one in lengths), max(one.longest for one in lengths)
    hidden = number - int(counts.sum())
    axis = f"{unit} (of {number:,}{f'; {hidden:,} are longer, up to {longest:,}' if hidden else ''})"
    whole = unit == "tokens" and name not in ("query", "answer")
    return Panel(name, axis, [Series("", counts.tolist(), width)], window if whole else None)


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=11, loc="left")
    for index, one in enumerate(panel.series):
        edges = np.arange(len(one.counts) + 1) * one.width
        shares = np.asarray(one.counts) / max(1, sum(one.counts))
        if index == 0:
            axes.stairs(shares, edges, fill=True, color=_COLOURS[0], label=one.label or None)
        else:
            axes.stairs(shares, edges, color=_COLOURS[index], linewidth=1.6, label=one.label)
    end = max(len(one.counts) * one.width for one in panel.series)
    axes.set_xlim(0, end)
    if panel.window is not None and panel.window < end:
        axes.axvline(panel.window, color="#555555", linewidth=1, linestyle="--", label=f"window of {panel.window:,}")
    axes.set_xlabel(panel.axis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=1, edgecolor="none", fontsize=8)
