"""The stateless baseline trains by the same engine, on the same rows, and comes out as a model of its own kind."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rxt_platform.data.batches import collate, derive_seed
from rxt_platform.data.shards import TokenShards
from rxt_platform.errors import ArtifactError
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.files import load_any, load_model
from rxt_platform.model.parameters import count, measure_size
from rxt_platform.stages.build import build_stage, stage_rows
from rxt_platform.stages.stateless import whole_rows
from rxt_platform.storage.directory import read_manifest
from tests.support import make_jobs

pytestmark = pytest.mark.dist

BASELINE = ("baseline.pretraining", "baseline.sft", "baseline.memory_aware")


def test_the_baseline_trains_on_any_strategy_as_on_one_worker(tmp_path: Path) -> None:
    one, three = (
        make_jobs(tmp_path / f"zero{zero}", "baseline={window: 512}", f"training.zero_stage={zero}") for zero in (0, 3)
    )
    assert [name for name in one.jobs if name.startswith("baseline.")] == list(BASELINE)
    for stage in BASELINE:
        for jobs, workers in ((one, 1), (three, 2)):
            done = jobs.run(stage, workers)
            assert done.returncode == 0, done.stderr[-2000:]
        alone, shared = one.history(stage), three.history(stage)
        assert len(alone) == len(shared) >= 10
        for first, second in zip(alone, shared, strict=True):
            assert first["objective"] == pytest.approx(second["objective"], abs=1e-5), (stage, first["step"])
        assert alone[-1]["loss"] < alone[0]["loss"]
        reactive = stage.removeprefix("baseline.")
        job = one.jobs[reactive]
        rows = stage_rows(TokenShards(job.tokens, job.stage.section, "train"), job.stage)
        sampler = build_stage(job.stage, rows, derive_seed(job.seed, reactive), job.window, job.weights).sampler
        tokens = sum(sampler.global_batch(step).tokens for step in range(sampler.total_steps))
        assert read_manifest(one.jobs[stage].output).metrics["tokens"] == tokens, "those of the model's own stage"
    for before, after in pairwise(BASELINE):
        assert one.jobs[after].start == one.jobs[before].output
    model, tokenizer = load_any(one.jobs[BASELINE[-1]].output)
    assert isinstance(model, StatelessTransformer)
    size = measure_size(one.config.model).total.parameters
    assert count(model).parameters == pytest.approx(size, rel=0.05)
    with pytest.raises(ArtifactError, match="StatelessTransformer"):
        load_model(one.jobs[BASELINE[-1]].output)
    rows = TokenShards(one.jobs[BASELINE[-1]].tokens, "conversations", "validation")
    ids, mask, targets = whole_rows(collate(rows[:4], range(4), range(4)))
    with torch.no_grad():
        logits = model.decode(ids, mask)
    wanted = targets[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted])
    assert 0 < float(loss) < torch.log(torch.tensor(tokenizer.vocab_size))
