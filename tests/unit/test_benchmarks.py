"""The benchmarks run, at the smallest sizes, and each notices when its arms do not compute the same."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from rxt_platform.model.files import save_model
from tests.unit.episodes import world_model, world_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {
    "moe": ["--tokens", "64", "--experts", "3", "--hidden", "16", "--inner", "16", "--repeats", "2"],
    "generation": ["--preset", "tiny", "--batch", "3", "--new", "6", "--rows", "2", "--repeats", "1"],
    "latency_by_turn": ["--preset", "tiny", "--turns", "3", "--query-tokens", "6", "--answer-tokens", "5"],
    "bleu": ["--shape", "4x12", "--repeats", "2"],
    "joint_step": ["--preset", "tiny", "--batch", "2", "--repeats", "2"],
}


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other as `python benchmarks/x.py` does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(name: str, *options: str) -> tuple[ModuleType, Result]:
    module = importlib.import_module(name)
    return module, CliRunner().invoke(module.main, [*SMALL[name], *options])


def numbers(found: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in a JSON value, by where they stand."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from numbers(value, f"{path}.{key}")
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield path, found


@pytest.mark.parametrize("name", list(SMALL))
def test_writes_finite_positive_figures_and_where_they_come_from(name: str, tmp_path: Path) -> None:
    _, result = run(name, "--json", str(tmp_path / "found.json"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"].keys() >= {"device", "dtype", "threads", "commit", "date"}
    figures = dict(numbers(found["results"]))
    differences = [figures.pop(path) for path in list(figures) if path.endswith("difference")]
    assert len(figures) >= 5
    assert all(value >= 0 for value in differences)
    assert all(math.isfinite(value) and value > 0 for value in figures.values()), figures


def test_generation_with_other_tokens_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("generation")
    right = module.without_cache

    def wrong(*arguments: Any) -> list[list[int]]:
        answers = right(*arguments)
        answers[-1][-1] += 1
        return answers

    monkeypatch.setattr(module, "without_cache", wrong)
    _, result = run("generation")
    assert result.exit_code == 1
    assert "no cache: OTHER TOKENS" in result.output


def test_a_loop_over_experts_that_differs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("moe")
    right = module.loop_over_experts
    monkeypatch.setattr(module, "loop_over_experts", lambda mixture, x: 1.001 * right(mixture, x))
    _, result = run("moe")
    assert result.exit_code == 1
    assert "ours/arm" not in result.output  # nothing was timed


def test_a_kept_cache_that_gives_other_tokens_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = importlib.import_module("turn_arms")
    right = arms.Keeping.turn

    def forgetful(self: Any, queries: list[list[int]]) -> Any:
        for keys in self.cache.keys:
            keys.zero_()
        return right(self, queries)

    monkeypatch.setattr(arms.Keeping, "turn", forgetful)
    _, result = run("latency_by_turn")
    assert result.exit_code == 1, result.output


def test_conversation_is_drawn(tmp_path: Path) -> None:
    _, result = run("latency_by_turn", "--repeats", "1", "--batch", "2", "--plot", str(tmp_path / "turns.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "turns.png").read_bytes()[1:4] == b"PNG"


def test_run_without_ray_deepspeed_and_mlflow() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import {', '.join(SMALL.keys() - {'bleu'})}, turn_plot\n"
        "heavy = {'ray', 'deepspeed', 'mlflow', 'datasets', 'pyarrow', 'matplotlib', 'huggingface_hub'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stderr


def test_gpu_script_goes_on_after_a_failure_and_names_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$1"\n[ "$1" != benchmarks/moe.py ]\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", BENCHMARKS / "gpu.sh"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["FAILED: moe-nano (exit 1)", "FAILED: moe-synthetic (exit 1)"]
    assert done.stdout.count("benchmarks/generation.py") == 4


def test_rollouts_are_held_alone_as_together(tmp_path: Path) -> None:
    model = world_model()
    save_model(tmp_path, model.config, dict(model.state_dict()), world_tokenizer())
    history = tmp_path / "history.jsonl"
    parts = {"generation": 2.0, "reward": 0.1, "forward": 1.0, "backward": 0.5, "optimizer": 0.1, "data": 0.1}
    history.write_text(json.dumps({"step_seconds": 4.0, **{f"{k}_seconds": v for k, v in parts.items()}}) + "\n")
    module = importlib.import_module("rollouts")
    options = ["--conversations", "3", "--follow-ups", "2", "--alone", "2", "--repeats", "1"]
    command = ["--model", str(tmp_path), "--history", str(history), "--json", str(tmp_path / "x.json"), *options]
    done = CliRunner().invoke(module.main, command)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "x.json").read_text())["results"]
    assert found["speed_up"] > 0
    assert found["shares"] == pytest.approx(
        {"generation": 0.5, "reward": 0.025, "update": 0.4, "everything else": 0.075}
    )
