"""What all tests share: one torch thread, so that a test takes as long on a busy machine as on an idle one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from tests.support import STAGES, Jobs, make_jobs, run_driver

torch.set_num_threads(1)

_TOGETHER = {
    *("test_critic_faults", "test_critic_service", "test_killed", "test_mlflow_page"),
    *("test_mrl_on_ray", "test_pipeline", "test_ray_workers", "test_readme_code"),
}
"""Files that share the finished pipeline, or whose tests watch a Ray."""


class _ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests run in one process; those of the files above in the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::")[0])
        return "together" if file.stem in _TOGETHER else file.as_posix()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Which tests share a process, where `make test` starts several."""
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """All four stages run to their end by one worker without Ray, uninterrupted."""
    jobs = make_jobs(tmp_path_factory.mktemp("straight"))
    for stage in STAGES:
        done = jobs.run(stage)
        assert done.returncode == 0, done.stderr[-2000:]
    return jobs


@pytest.fixture
def new_jobs(tmp_path: Path) -> Callable[..., Jobs]:
    """Makes jobs in the test's own folder."""
    return lambda *overrides: make_jobs(tmp_path, *overrides)


@pytest.fixture(scope="session")
def finished_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a small run of the whole pipeline, done as a user does it, on a Ray of its own."""
    storage = tmp_path_factory.mktemp("pipeline")
    done = run_driver(storage)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return storage
