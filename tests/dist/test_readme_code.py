"""The README's Python runs as it stands there, on a model that was trained by the pipeline."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

pytestmark = pytest.mark.dist


def blocks() -> list[str]:
    """Those of the critic service are run by test_critic_service.py."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [block for block in found if "HttpClient" not in block]


@pytest.mark.parametrize("number", range(len(blocks())))
def test_python_of_the_readme_runs(finished_pipeline: Path, tmp_path: Path, number: int) -> None:
    code = blocks()[number]
    assert "runs/quickstart" in code
    code = code.replace("runs/quickstart", str(finished_pipeline / "quickstart"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    if "my-model" in code:
        assert done.stdout.count("[memory update, done]") == 3
        assert "Memory gain" in (tmp_path / "my-model/README.md").read_text()
