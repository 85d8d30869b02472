"""Promises of the engine's measurements: what a step's time, rates and traces are made of."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rxt_platform.config.training import ProfileConfig
from rxt_platform.training import measures
from rxt_platform.training.measures import PARTS, Meter, Parts, Profiler, Spans, StepClock, peak_flops
from rxt_platform.training.watch import Watch

CPU = torch.device("cpu")


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    watch = Watch(tmp_path / "watch", 0, 1)
    yield watch
    watch.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of `measures`, which stands still unless `now.seconds` is changed."""
    clock = SimpleNamespace(seconds=100.0)
    stopped = {name: lambda: clock.seconds for name in ("monotonic", "perf_counter")}
    monkeypatch.setattr(measures, "time", SimpleNamespace(**stopped))
    return clock


def timed(**seconds: float) -> Parts:
    """A step whose parts took so long."""
    parts = Parts()
    for name, value in seconds.items():
        parts.add(name, 0.0, value)
    return parts


# ---- where a step's time goes


def test_a_part_takes_as_long_as_its_blocks_together(watch: Watch, now: SimpleNamespace) -> None:
    clock = StepClock(CPU, watch)
    for name, seconds in (("data", 1.0), ("forward", 2.0), ("backward", 4.0), ("forward", 8.0)):
        with clock.part(name):
            now.seconds += seconds
        now.seconds += 0.5  # belongs to no part
    assert clock.take().seconds() == {**dict.fromkeys(PARTS, 0.0), "data": 1.0, "forward": 10.0, "backward": 4.0}


def test_a_step_begins_with_no_time_spent(watch: Watch) -> None:
    clock = StepClock(CPU, watch)
    with clock.part("evaluation"):
        time.sleep(0.01)
    assert clock.take().seconds()["evaluation"] >= 0.01
    assert clock.take().seconds() == dict.fromkeys(PARTS, 0.0), "an evaluation is no part of most steps"


def test_a_failure_leaves_the_name_of_its_part_behind(watch: Watch) -> None:
    clock = StepClock(CPU, watch)
    with clock.part("data"):
        pass
    with pytest.raises(ValueError, match="broken"), clock.part("backward"):
        raise ValueError("broken")
    assert watch.part == "backward"


# ---- spans


def test_spans_are_a_json_line_a_step_and_a_resumed_job_adds_to_them(tmp_path: Path) -> None:
    path = tmp_path / "spans" / "rank-00003.jsonl"
    first = Spans(path, 3, "first")
    first.add(1, 1000.25, timed(data=0.1234567, forward=2.0), 640)
    first.add(2, 1003.0, timed(), 0, rows=[7, 4])
    assert not path.exists(), "written in blocks"
    first.flush()
    first.flush()
    again = Spans(path, 3, "second")
    again.add(2, 2000.0, timed(), 64, rows=())
    again.flush()
    one, two, three = (json.loads(line) for line in path.read_text().splitlines())
    assert one == {
        "rank": 3,
        "attempt": "first",
        "step": 1,
        "start": 1000.25,
        "tokens": 640,
        "seconds": {**dict.fromkeys(PARTS, 0.0), "data": 0.123457, "forward": 2.0},
    }
    assert (two["attempt"], two["step"], two["rows"]) == ("first", 2, [7, 4])
    assert (three["attempt"], three["step"], three["rows"]) == ("second", 2, [])


# ---- means and rates


def test_metrics_are_means_over_the_steps_that_updated_and_rates_are_over_all_time(now: SimpleNamespace) -> None:
    meter = Meter(1e3, CPU)
    for loss, seconds in ((2.0, 1.0), (4.0, 3.0)):
        meter.add({"loss": loss}, tokens=100, flops=900)
        meter.add_time(timed(data=0.5, forward=seconds))
        now.seconds += seconds
    meter.add_skipped()
    meter.add_time(timed(data=0.5, forward=2.0, evaluation=10.0))
    now.seconds += 12.0  # an evaluation does not count
    found = meter.take()
    assert found.pop("peak_memory_bytes") > 1e7
    assert found == pytest.approx(
        {
            "loss": 3.0,
            "data_seconds": 0.5,
            "forward_seconds": 2.0,
            "backward_seconds": 0.0,
            "optimizer_seconds": 0.0,
            "checkpoint_seconds": 0.0,
            "evaluation_seconds": 10 / 3,
            "step_seconds": 2.0,
            "tokens_per_second": 200 / 6,
            "utilisation": 1800 / 6 / 1e3,
        }
    )


def test_a_meter_begins_anew_after_each_log(now: SimpleNamespace) -> None:
    meter = Meter(1e3, CPU)
    meter.add({"loss": 9.0}, tokens=1000, flops=1000)
    meter.add_time(timed(forward=9.0))
    now.seconds += 1000
    meter.take()
    meter.add({"loss": 1.0}, tokens=10, flops=500)
    now.seconds += 1
    found = meter.take()
    assert (found["loss"], found["tokens_per_second"], found["utilisation"]) == (1.0, 10.0, 0.5)
    assert "forward_seconds" not in found


def test_steps_without_an_update_have_no_means(now: SimpleNamespace) -> None:
    meter = Meter(1e3, CPU)
    meter.add_skipped()
    now.seconds += 4
    found = meter.take()
    assert (found["step_seconds"], found["tokens_per_second"], found["utilisation"]) == (4.0, 0.0, 0.0)
    assert "loss" not in found


def test_the_peak_is_the_given_one_or_measured() -> None:
    assert peak_flops(CPU, "bf16", 2.5) == 2.5e12
    assert 1e8 < peak_flops(CPU, "fp32", None) < 1e14


# ---- traces


def steps_in_trace(path: Path) -> list[str]:
    """The names that `train` gave to its steps."""
    events = json.loads(path.read_text())["traceEvents"]
    names: set[str] = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(name for name in names if name.startswith("step "))


def train(profiler: Profiler, steps: int) -> None:
    for step in range(steps):
        profiler.before_step()
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3).sum()
        profiler.after_step()


@pytest.mark.parametrize(
    ("settings", "steps", "traced"),
    [
        ({"first": 0, "steps": 1}, 3, [0]),
        ({"first": 2, "steps": 2}, 6, [2, 3]),
        ({"first": 2, "steps": 9}, 4, [2, 3]),  # the job ends first
    ],
)
def test_a_trace_holds_the_steps_that_were_asked_for(
    tmp_path: Path, settings: dict[str, Any], steps: int, traced: list[int]
) -> None:
    path = tmp_path / "profile" / "rank-00000.json"
    profiler = Profiler(ProfileConfig(**settings), path, CPU)
    train(profiler, steps)
    profiler.close()
    profiler.close()
    assert steps_in_trace(path) == [f"step {step}" for step in traced]


@pytest.mark.parametrize("config", [None, ProfileConfig(first=5)])
def test_without_a_traced_step_there_is_no_file(tmp_path: Path, config: ProfileConfig | None) -> None:
    profiler = Profiler(config, tmp_path / "trace.json", CPU)
    train(profiler, 4)
    profiler.close()
    assert list(tmp_path.iterdir()) == []
