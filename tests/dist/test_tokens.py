"""Token shards made by Ray tasks: the same bytes as in one process, also when a worker dies."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rxt_platform.config.run import ResourcesConfig, RunConfig
from rxt_platform.data import corpus, shards
from rxt_platform.errors import ArtifactError
from rxt_platform.model.files import TOKENIZER
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.plan import Step, build_plan
from rxt_platform.orchestration.prepare import make_corpus, make_tokenizer
from rxt_platform.orchestration.tokens import make_one, make_tokens, needs_workers
from rxt_platform.storage.directory import read_manifest
from tests.support import small_run

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray of two CPUs on this machine."""
    ray_jobs.connect(ResourcesConfig(workers=2))
    yield
    ray_jobs.disconnect()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, list[Step]]:
    """Corpus and tokenizer of a small run whose corpus makes many shards."""
    monkeypatch.setattr(corpus, "_GROUP_BYTES", 2_000)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 6_000)
    config = small_run(tmp_path)
    plan = build_plan(config)
    plan[0].artifact.parent.mkdir(parents=True)
    make_corpus(config, plan[0])
    make_tokenizer(config, plan[1], plan[0].artifact)
    return config, plan


def make(config: RunConfig, plan: list[Step], on_workers: Any = None) -> dict[str, str]:
    """The hash of each shard."""
    corpus_step, tokenizer, tokens = plan[:3]
    make_tokens(config, tokens, corpus_step.artifact, tokenizer.artifact, on_workers)
    files = read_manifest(tokens.artifact).files
    return {name: entry.sha256 for name, entry in files.items()}


def test_ray_tasks_make_the_same_shards_as_one_process(ray: None, prepared: tuple[RunConfig, list[Step]]) -> None:
    assert needs_workers(prepared[1][0].artifact)
    alone = make(*prepared)
    assert sum(name.endswith(".arrow") for name in alone) > 10
    assert make(*prepared, ray_jobs.each) == alone


def killed_once(plan: shards.ShardPlan, *shared: Any) -> dict[str, Any]:
    """`make_one` on a worker that is killed the first time, half-way through its file."""
    folder: Path = shared[-1]
    marker = folder.parent / f"killed-{plan.name}"
    if plan.number == 1 and not marker.exists():
        marker.touch()
        (folder / plan.name).write_bytes(b"half of a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    return make_one(plan, *shared)


def test_a_killed_worker_s_shard_is_made_again(ray: None, prepared: tuple[RunConfig, list[Step]]) -> None:
    alone = make(*prepared)

    def on_workers(_: Any, plans: list[shards.ShardPlan], shared: tuple[Any, ...]) -> list[dict[str, Any]]:
        return ray_jobs.each(killed_once, plans, shared)

    assert make(*prepared, on_workers) == alone
    assert list(prepared[1][2].artifact.parent.glob("killed-*"))


def test_what_goes_wrong_in_a_task_is_the_user_s_error_and_leaves_nothing(
    ray: None, prepared: tuple[RunConfig, list[Step]]
) -> None:
    tokens, tokenizer = prepared[1][2], prepared[1][1]
    (tokenizer.artifact / TOKENIZER).write_text("{}")
    with pytest.raises(ArtifactError, match="not a readable tokenizer"):
        make(*prepared, ray_jobs.each)
    assert not tokens.artifact.exists()
    assert not [path for path in tokens.artifact.parent.iterdir() if path.name.startswith(".tokens")]
