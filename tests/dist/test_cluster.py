"""The way in that the README shows beside the quickstart: a job on a Ray cluster."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.dist.services import ray_head
from tests.support import BIN, ROOT, environment, read_report

pytestmark = pytest.mark.dist

SHORTER = [
    "stages.sft.epochs=0.8",
    "stages.memory_aware.epochs=0.5",
    "stages.memory_aware.curriculum=[{turns: 2, epochs: 0.2}]",
    "stages.mrl.epochs=0.4",
    "evaluation.conversations=150",
]
"""About half of the quickstart's steps: enough for a memory that one can tell from none."""


def test_quickstart_as_a_ray_job_ends_with_a_memory_that_works(tmp_path: Path) -> None:
    """The quickstart, through `ray start --head` and `ray job submit`: as shipped, but for the number of steps."""
    with ray_head() as head:
        submit = [
            *(str(BIN / "ray"), "job", "submit", "--address", head.dashboard),
            *("--working-dir", ".", "--", str(BIN / "python"), "pipelines/full_smst.py"),
            *("--config", "pipelines/configs/quickstart.yaml", *SHORTER, f"storage={tmp_path}"),
        ]
        done = subprocess.run(
            submit, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=1400, check=False
        )
        (tmp_path / "job.log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"Job '.*' succeeded", done.stdout + done.stderr)
    report = read_report(tmp_path)
    assert {"1", "2", "3", "7"} <= set(report["recall"])
    mrl = next(stage["held_out"] for stage in report["stages"] if stage["name"] == "mrl")
    assert mrl["reward"][1] > mrl["reward"][0] - 0.3, "12 updates: no collapse"
    assert report["recall"]["1"]["gain"] >= 0.35
    assert report["recall_overall"]["gain"] >= 0.2
    assert report["answer_tokens"]["loss"] < report["memory_reset"]["loss"]
