"""Reinforcement learning as users run it, on Ray: with its critic on Ray Serve, and by the scripts."""

import json
from pathlib import Path

import pytest

from tests.dist.small_mrl import CRITIC, STAGE, mrl_jobs
from tests.support import run_driver

pytestmark = pytest.mark.dist


def test_rewards_and_values_from_ray_serve_are_those_of_the_workers(finished_pipeline: Path, tmp_path: Path) -> None:
    """A whole run on Ray, with the critic's versions published after every update; slow: Ray and Serve start."""
    start = json.loads((finished_pipeline / "quickstart/report.json").read_text())
    (base,) = (Path(step["artifact"]) for step in start["steps"] if step["name"] == "memory_aware")
    local = mrl_jobs(tmp_path / "local", base, *CRITIC)
    done = local.run(STAGE)
    assert done.returncode == 0, done.stderr[-2000:]
    service = ["critic_service={cpus_per_replica: 0.5}", "resources.workers=1", "name=served"]
    done = run_driver(finished_pipeline, *CRITIC, *service)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((finished_pipeline / "served/report.json").read_text())
    (made,) = (Path(step["artifact"]) for step in report["steps"] if step["name"] == "mrl")
    history = [json.loads(line) for line in (made / "history.jsonl").open()]
    rows = list(zip(history, local.history(STAGE), strict=True))
    for name in ("reward", "objective", "critic_correlation"):
        assert rows[0][0][name] == pytest.approx(rows[0][1][name], abs=1e-5), name
    # Values are summed up in another order: later, a token here and there is drawn differently.
    assert all(row["reward"] == pytest.approx(other["reward"], abs=0.5) for row, other in rows)
    assert all(-1 <= row["critic_correlation"] <= 1 for row in history)


def test_the_scripts_run_everything_and_the_curriculum_alone(finished_pipeline: Path) -> None:
    """What is finished is reused; the curriculum on a model that is there makes the very model of the whole run."""
    whole = run_driver(finished_pipeline, "name=full", script="full.py")
    assert whole.returncode == 0, whole.stderr[-2000:]
    report = json.loads((finished_pipeline / "full/report.json").read_text())
    assert {step["status"] for step in report["steps"]} == {"reused"}
    steps = {step["name"]: Path(step["artifact"]) for step in report["steps"]}
    model = ["--model", str(steps["memory_aware"])]
    alone = run_driver(finished_pipeline, *model, "name=alone", "resources.workers=1", script="mrl.py")
    assert alone.returncode == 0, alone.stderr[-2000:]
    made = json.loads((finished_pipeline / "alone_alone/report.json").read_text())
    assert [step["name"] for step in made["steps"]] == ["corpus", "tokenizer", "tokens", "mrl", "evaluation"]
    assert "Reinforcement" not in alone.stdout  # a heading of the page
    assert "before → after" in alone.stdout
    refused = run_driver(finished_pipeline, "--model", str(finished_pipeline / "nothing"), script="mrl.py")
    assert refused.returncode == 2
    assert "no such model directory" in refused.stderr
