"""Promises of the pictures: they show the numbers that were measured, under the names that these have."""

import copy
from typing import Any

import numpy as np
import pytest
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure

from rxt_platform.evaluation.report import pictures
from tests.unit.reports import KITES, REPORT, recalled, rewarded

OWN = "free-running"


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures stay figures, whose parts can be read."""
    monkeypatch.setattr(pictures, "_png", lambda figure: figure)


def drawn(draw: Any, result: dict[str, Any]) -> Figure:
    figure = draw(result)
    assert isinstance(figure, Figure)
    return figure


def curves(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of the lines that have a name, and of all lines with an interval."""
    found = {
        container.get_label(): container.lines[0]
        for container in axes.containers
        if isinstance(container, ErrorbarContainer)
    }
    found |= {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in found.items()}


def test_recall_is_bars_by_distance_with_their_intervals_and_pale_where_little_was_asked() -> None:
    (axes,) = drawn(pictures.draw_recall, KITES).axes
    bars = {found.get_label(): found for found in axes.containers if isinstance(found, BarContainer)}
    heights = {name: [bar.get_height() for bar in found] for name, found in bars.items()}
    assert heights == {"with memory": [0.9, 0.5, 0.25], OWN: [0.75, 0.25, 0.0], "memory reset": [0.1, 0.6, 0.0]}
    for found in bars.values():
        assert [bar.get_alpha() for bar in found] == [1.0, 1.0, 1.0]
        assert found.errorbar is not None
        ends = [[y for _, y in segment] for segment in found.errorbar.lines[2][0].get_segments()]
        for (low, high), bar in zip(ends, found, strict=True):
            assert (low, high) == pytest.approx((bar.get_height() - 0.05, bar.get_height() + 0.05), abs=1e-6)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2\n(30)", "10\n(10)", "17+\n(4)"]
    assert axes.get_xlabel() == "turns from telling to asking (number of questions)"
    places = [bar.get_x() for found in bars.values() for bar in found]
    assert len({*places}) == 9, "no bar hides another"


def test_what_too_few_conversations_stand_for_is_pale() -> None:
    few = {**recalled(0.9, 0.1, 3), "intervals": dict.fromkeys(("with_memory", "reset", "gain"))}
    (axes,) = drawn(pictures.draw_recall, {**KITES, "recall": {"2": few, "3": recalled(0.5, 0.1, 30)}, **NO_OWN}).axes
    assert axes.get_xlabel().endswith("(number of questions; pale: few)")
    for bars in (found for found in axes.containers if isinstance(found, BarContainer)):
        assert [bar.get_alpha() for bar in bars] == [0.4, 1.0]
    assert [handle.get_alpha() for handle in axes.get_legend().legend_handles] == [1.0, 1.0]
    plain = {**KITES, "questions": {"kind": "follow-ups", "conversations": 2}}
    assert "since the first" in drawn(pictures.draw_recall, plain).axes[0].get_xlabel()


NO_OWN: dict[str, Any] = {"free_running": None}


def test_perplexity_is_drawn_by_turn() -> None:
    (axes,) = drawn(pictures.draw_turns, KITES).axes
    assert curves(axes) == {"with memory": ([1, 2], [1.649, 2.014]), "memory reset": ([1, 2], [1.822, 8.166])}
    assert axes.get_yscale() == "linear"
    far = copy.deepcopy(KITES)
    far["by_turn"][0]["memory_reset"]["perplexity"] = 500.0
    assert drawn(pictures.draw_turns, far).axes[0].get_yscale() == "log"


def test_each_measure_of_the_memory_has_a_panel() -> None:
    panels = drawn(pictures.draw_memory, KITES).axes
    shown = {axes.get_title("left"): list(axes.get_lines()[0].get_ydata()) for axes in panels}
    assert shown["norm (RMS)"] == [1.0, 1.125]
    assert shown["changed by the write"][1] == 0.42
    assert shown["effective rank of the slots"] == [0.99, 0.875]
    assert shown["|cosine| between slots"] == [0.0625, 0.125]


def test_times_are_drawn_by_turn() -> None:
    times, rates = drawn(pictures.draw_latency, KITES).axes
    assert curves(times) == {"to the first token": ([1, 2], [12.34, 13.0]), "memory write": ([1, 2], [5.67, 5.0])}
    assert rates.get_lines()[0].get_ydata()[0] == 1234.5
    assert times.get_ylim()[0] == rates.get_ylim()[0] == 0.0


def test_rewards_are_drawn_over_their_whole_scale() -> None:
    result = {**KITES, "reward": rewarded(5.5, 3.5, 3.5), **NO_OWN}
    (axes,) = drawn(pictures.draw_rewards, result).axes
    assert axes.get_xlim() == (0.0, 10.0)
    tall = {round(bar.get_x(), 3): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert tall == {3.5: 2.0, 5.5: 1.0}
    assert list(axes.get_lines()[0].get_xdata()) == pytest.approx([12.5 / 3] * 2)
    assert len(drawn(pictures.draw_rewards, KITES).axes[0].get_lines()) == 2


def test_the_baseline_is_drawn_beside_the_model() -> None:
    baseline = {**copy.deepcopy(KITES), "recall": {"2": recalled(0.6, 0.3, 30)}}
    baseline["latency"] = [{**row, "prompt_ms": 50.0} for row in KITES["latency"]]
    recall, times = drawn(pictures.draw_comparison, {**REPORT, "baseline": baseline}).axes
    assert curves(recall) == {
        "with memory": ([2, 10, 17], [0.9, 0.5, 0.25]),
        "stateless, whole history": ([2], [0.6]),
        "stateless, no history": ([2], [0.3]),
    }
    assert curves(times) == {"with memory": ([1, 2], [12.34, 13.0]), "stateless": ([1, 2], [50.0, 50.0])}
    untimed = {**REPORT, "baseline": {**baseline, "latency": []}}
    assert len(drawn(pictures.draw_comparison, untimed).axes) == 1


def test_a_curve_ends_without_the_jump_of_a_single_batch() -> None:
    def curve(*means: tuple[int, float]) -> list[list[float]]:
        history = [{"step": step, "loss": loss} for step, loss in means]
        (line,) = drawn(pictures.draw_losses, {"sft": history}).axes[0].lines
        return np.asarray(line.get_xydata()).tolist()

    before = [(10, 3.0), (20, 2.0)]
    assert curve(*before, (22, 8.0)) == [[10, 3.0], [22, 3.0]], "the mean of twelve steps"
    assert curve(*before, (26, 8.0)) == [[10, 3.0], [20, 2.0], [26, 8.0]]
    assert curve(*before) == [[10, 3.0], [20, 2.0]]
    assert curve(before[0]) == [[10, 3.0]]
