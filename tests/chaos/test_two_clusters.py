"""A run on a machine where another Ray cluster runs too."""

import pytest
import ray
from ray.util.state import get_actor
from ray.util.state.exception import RayStateApiException

from rxt_platform.config.run import ResourcesConfig
from rxt_platform.orchestration import ray_jobs
from tests.dist.services import ray_head

pytestmark = pytest.mark.chaos


@ray.remote(num_cpus=0)
class Asking:
    def ask(self) -> str:
        """What Ray's state says of this actor, asked as Ray Train's cleaner of placement groups does."""
        try:
            state = get_actor(ray.get_runtime_context().get_actor_id(), timeout=10)
        except RayStateApiException:
            return "nobody to ask"
        return "another cluster was asked" if state is None else str(state.state)


@pytest.mark.parametrize(("joined", "answer"), [(False, "nobody to ask"), (True, "ALIVE")])
def test_nothing_is_asked_of_another_cluster(joined: bool, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of another cluster, Ray Train takes its controller for dead and removes the workers."""
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    with ray_head() as own, ray_head():
        if joined:
            monkeypatch.setenv("RAY_ADDRESS", own.address)
        assert ray_jobs.connect(ResourcesConfig())
        try:
            assert ray.get(Asking.remote().ask.remote(), timeout=120) == answer
        finally:
            ray_jobs.disconnect()
