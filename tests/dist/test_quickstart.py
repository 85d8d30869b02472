"""The quickstart itself, as shipped: it must stay within its ten minutes and end with a memory that works. (Minutes.)"""

from pathlib import Path

import pytest

from rxt_platform.config.loading import load_run
from rxt_platform.orchestration.runner import run_pipeline
from tests.support import ROOT

pytestmark = pytest.mark.dist


@pytest.mark.timeout(1500)
def test_quickstart_ends_with_a_memory_that_works(tmp_path: Path) -> None:
    report = run_pipeline(load_run(ROOT / "pipelines/configs/quickstart.yaml", [f"storage={tmp_path}"]))
    assert report["recall"]["1"]["gain"] >= 0.5
    assert report["recall_overall"]["gain"] >= 0.4
    assert {"1", "2", "3"} == set(report["recall"])
    assert report["answer_tokens"]["loss"] < report["memory_reset"]["loss"]
