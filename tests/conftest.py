"""What all tests share: one torch thread, so that a test takes as long on a busy machine as on an idle one."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.support import STAGES, Jobs, make_jobs, run_driver

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two pytest processes, one runs all of a file; and one all that share the small pipeline or watch a Ray."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


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
