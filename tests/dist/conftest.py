"""Runs with resume states that several files of tests begin from."""

import pytest

from tests.dist.checkpoints import changed, finish, steps_in
from tests.support import Jobs, make_jobs


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Stages that start from random weights and also have buffers to keep: the experts' selection biases."""
    jobs = make_jobs(tmp_path_factory.mktemp("jobs"), "model.decoder.experts.balancing=bias")
    for stage, job in jobs.jobs.items():
        jobs.jobs[stage] = job.model_copy(update={"start": None})
    return jobs


@pytest.fixture(scope="session")
def every_step(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The run of one worker with a resume state of each of its steps 1 to 9."""
    done = changed(jobs, tmp_path_factory.mktemp("every"), checkpoints={"every": 1, "keep": 9})
    finish(done)
    assert steps_in(done) == list(range(1, 10))
    return done


@pytest.fixture(scope="session")
def two_workers(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The run of two workers with resume states of its steps 3, 6 and 9."""
    done = changed(jobs, tmp_path_factory.mktemp("two"), checkpoints={"keep": 9})
    finish(done, workers=2)
    return done
