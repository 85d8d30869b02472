"""One stage as a job: read corpus, tokenizer and starting model, train, commit the model artifact.

A job is plain data, so it runs the same as a Ray Train worker, under torchrun, or as `python -m rxt_platform.training`.
Everything that another worker or a later run needs is on the storage that all share.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from rxt_platform.config.base import Spec
from rxt_platform.config.model import HeadConfig, ModelConfig
from rxt_platform.config.mrl import EpisodeConfig, MemoryRLConfig, PolicyObjective
from rxt_platform.config.stages import StageConfig
from rxt_platform.config.training import TrainingConfig
from rxt_platform.data.batches import Batch, collate, derive_seed
from rxt_platform.data.examples import Example, ExampleSet, RowEncoder, TooLong, evenly
from rxt_platform.data.shards import TokenShards
from rxt_platform.data.sources import SPLITS
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError, TrainingError
from rxt_platform.model.actor_critic import ActorCritic, load_actor_critic, save_critic, split_critic
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.files import STATELESS, TOKENIZER, load_model, load_weights, save_model
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.critic import RewardService
from rxt_platform.rl.episode_set import EpisodeSet
from rxt_platform.rl.rewards import EncoderEmbedding, HashedEmbedding, TextEmbedding, TokenEmbedding
from rxt_platform.rl.scoring import LocalScorer
from rxt_platform.stages.base import Model
from rxt_platform.stages.build import build_stage, mask_probability, stage_rows, system_prompts
from rxt_platform.stages.memory_rl import Judging
from rxt_platform.storage.directory import Provenance, commit_directory, verify_directory
from rxt_platform.training.distributed import (
    on_rank_zero,
    start_process_group,
    stop_process_group,
    use_cpus,
)
from rxt_platform.training.engine import Engine, EngineSettings, Hooks, TrainResult
from rxt_platform.training.measures import Metrics
from rxt_platform.training.watch import Watch, claim, read_failures, root_cause, wait_for_claim

logger = logging.getLogger(__name__)

MODEL_KIND = "model"
STOP, WORKERS, HISTORY = "stop", "workers", "metrics.jsonl"
"""In a job's work folder: a file that asks it to stop, its workers' whereabouts and failures, metrics of its steps."""
_VALIDATION_ROWS = 256
_VALIDATION_BATCH = 32


class StageJob(Spec):
    """Everything that a worker needs to train one stage."""

    name: str = Field(description="of the stage; part of the seed of its data order")
    stage: StageConfig
    model: ModelConfig
    stateless: bool = Field(False, description="the model is the baseline without memory")
    window: int = Field(description="tokens of one interaction, at most; of the baseline the model's window is larger")
    training: TrainingConfig
    seed: int
    identity: str = Field(description="fingerprint of the step")
    corpus: Path = Field(description="the rows as text: what answers are scored against")
    too_long: TooLong = "truncate"
    tokens: Path = Field(description="the token shards")
    weights: list[float] = Field(default_factory=list, description="of the sources of the stage's rows")
    tokenizer: Path
    start: Path | None = Field(description="model artifact to start from; random weights without")
    output: Path = Field(description="the model artifact to make")
    work: Path = Field(description="resume states and metrics of this step")
    cpus: int = 1
    use_gpu: bool = False
    provenance: dict[str, Any]
    parents: dict[str, str]
    invoked: float = Field(0.0, description="when that command was given, in seconds since the epoch")
    invocation: str = Field("", description="of the command that started it: a restart by Ray belongs to the same one")


def run_stage(
    job: StageJob,
    on_metrics: Callable[[int, Metrics], None] = lambda step, metrics: None,
    stop_requested: Callable[[], bool] = lambda: False,
    checkpoint_requested: Callable[[], bool] = lambda: False,
    service: RewardService | None = None,
) -> Metrics:
    """Train a stage to its end on this process's rank; rank 0 commits the model. Returns the artifact's metrics.

    `service` gives MRL its rewards and values; without one they are computed in this process. Raises StoppedError when
    `stop_requested` says so, on whichever rank, or a file named `stop` is in the work folder.
    """
    use_cpus(job.cpus)
    device = start_process_group(job.use_gpu, job.training.hang_seconds)
    rank, world = dist.get_rank(), dist.get_world_size()
    watch: Watch | None = None
    try:
        attempt = on_rank_zero(lambda: _new_attempt(job))
        wait_for_claim(job.work / WORKERS, attempt)
        watch = Watch(job.work / WORKERS, rank, world, attempt, job.invocation)
        with watch.reporting():

            def stopping() -> bool:
                return stop_requested() or (rank == 0 and (job.work / STOP).exists())

            history = _History(job.work / HISTORY, on_metrics)
            hooks = Hooks(history.add, history.start, stopping, checkpoint_requested)
            return _train(job, device, watch, hooks, service)
    finally:
        if watch is not None:
            watch.close()
        stop_process_group()


def _new_attempt(job: StageJob) -> str:
    """Name this start of the job. Raises the error that ended the attempt before, where it would only happen again."""
    cause = root_cause(read_failures(job.work / WORKERS, job.invocation)) if job.invocation else None
    if cause is not None and cause.final:
        raise TrainingError(str(cause))
    return claim(job.work / WORKERS, job.invocation, job.invoked)


def _train(job: StageJob, device: torch.device, watch: Watch, hooks: Hooks, service: RewardService | None) -> Metrics:
    tokenizer = RxtTokenizer.load(job.tokenizer / TOKENIZER)
    model = _starting_model(job).to(device)
    seed = derive_seed(job.seed, job.name)
    rows, held_out = _rows(job, tokenizer)
    judging = None
    if isinstance(job.stage, EpisodeConfig):
        assert isinstance(held_out, EpisodeSet)
        judging = Judging(held_out, tokenizer, service or _scorer(job, device), _reference(job))
    if isinstance(model, ActorCritic):
        model.critic.set_tokenizer(tokenizer)
    stage = build_stage(job.stage, rows, seed, job.window, job.weights, job.stateless, judging)
    settings = EngineSettings(job.training, job.work, job.identity, job.provenance, device, watch, service)
    engine = Engine(model, stage, settings)
    result = engine.run(validation_batches(held_out, job.stage), hooks)
    metrics = _summary(result)
    architecture = STATELESS if job.stateless else "RxTAlpha"

    def save(folder: Path, state: dict[str, Tensor]) -> None:
        policy, critic = split_critic(state)
        save_model(folder, job.model, policy, tokenizer, architecture)
        if isinstance(model, ActorCritic):
            save_critic(folder, model.critic, critic, tokenizer)

    def commit() -> None:
        with commit_directory(job.output, MODEL_KIND, Provenance(job.provenance, job.parents, metrics)) as folder:
            save(folder, result.state)
            shutil.copyfile(job.work / HISTORY, folder / "history.jsonl")
            for records in ("spans", "profile"):
                if (job.work / records).exists():
                    shutil.copytree(job.work / records, folder / records)
            if result.best is not None:
                found, weights = result.best
                (folder / "best").mkdir()
                save(folder / "best", weights)
                (folder / "best" / "metrics.json").write_text(json.dumps(found, indent=1))
            if result.skipped:
                (folder / "skipped.json").write_text(json.dumps([asdict(one) for one in result.skipped], indent=1))

    watch.part = "commit"
    on_rank_zero(commit)
    dist.barrier()  # no rank leaves the group while another still uses it
    return metrics


def _rows(job: StageJob, tokenizer: RxtTokenizer) -> tuple[ExampleSet, ExampleSet]:
    """The stage's training rows and its held-out ones."""
    stage = job.stage
    if not isinstance(stage, EpisodeConfig):
        train, held_out = (stage_rows(TokenShards(job.tokens, stage.section, split), stage) for split in SPLITS)
        return train, held_out
    encoder = RowEncoder(tokenizer, job.window, job.too_long)
    talks = [EpisodeSet.read(job.corpus, split, encoder, stage.steps, stage.sources) for split in SPLITS]
    return talks[0], talks[1]


def _scorer(job: StageJob, device: torch.device) -> LocalScorer:
    """What gives rewards in this process; what it compares meaning with does not move while the stage trains."""
    stage = job.stage
    assert isinstance(stage, EpisodeConfig)
    assert job.start is not None
    embedding: TextEmbedding = HashedEmbedding()
    if stage.meaning == "tokens":
        embedding = TokenEmbedding(job.start)
    elif stage.meaning == "encoder":
        embedding = EncoderEmbedding.load(job.start).to(device)
    return LocalScorer(stage.reward, embedding)


def _reference(job: StageJob) -> ReactiveTransformer | None:
    """The model that the stage starts from, where the objective compares with it."""
    objective = job.stage.objective if isinstance(job.stage, MemoryRLConfig) else None
    if objective is None or (isinstance(objective, PolicyObjective) and not objective.kl_weight):
        return None
    assert job.start is not None
    return load_model(job.start, torch.float32)[0]


def validation_batches(examples: Sequence[Example], config: StageConfig) -> list[Batch]:
    """The same held-out rows for every run and every worker: 256, of all sources, read as the stage reads rows.

    Stages of episodes hold as many conversations as they say, in one batch.
    """
    if isinstance(config, EpisodeConfig):
        chosen = evenly(len(examples), config.held_out)
        seeds = [derive_seed("validation", index) for index in chosen]
        return [collate([examples[index] for index in chosen], seeds, chosen)]
    chosen = evenly(len(examples), _VALIDATION_ROWS)
    rows = [examples[index] for index in chosen]
    if not system_prompts(config):
        rows = [row.without_opening() for row in rows]
    hidden = mask_probability(config)
    batches = []
    for start in range(0, len(rows), _VALIDATION_BATCH):
        end = start + _VALIDATION_BATCH
        seeds = [derive_seed("validation", index) for index in chosen[start:end]]
        batches.append(collate(rows[start:end], seeds, chosen[start:end], hidden))
    return batches


def _starting_model(job: StageJob) -> Model:
    torch.manual_seed(derive_seed(job.seed, "weights"))
    critic = job.stage.critic if isinstance(job.stage, EpisodeConfig) else None
    if critic is not None and job.start is not None:
        assert isinstance(job.stage, EpisodeConfig)
        verify_directory(job.start, MODEL_KIND)
        window = critic.window or 2 * job.model.max_length
        head = HeadConfig(kind="value", scale=job.stage.value_scale, max_length=window)
        return load_actor_critic(job.model, head, job.start)
    model = StatelessTransformer(job.model) if job.stateless else ReactiveTransformer(job.model)
    if job.start is not None:
        verify_directory(job.start, MODEL_KIND)
        load_weights(model, job.start)
    return model


def _summary(result: TrainResult) -> Metrics:
    return {
        **{f"{name}_before": value for name, value in result.before.items()},
        **{f"{name}_after": value for name, value in result.after.items()},
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "resumed_from_step": result.resumed_from,
        "skipped_batches": len(result.skipped),
    }


class _History:
    """Metrics of logged steps as JSON lines, written by rank 0; a resumed job takes back those after its checkpoint."""

    def __init__(self, path: Path, on_metrics: Callable[[int, Metrics], None]) -> None:
        self.path = path
        self.on_metrics = on_metrics

    def start(self, first: int, steps: int) -> None:
        if dist.get_rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(kept))
        unfinished.rename(self.path)
        logger.info("training from step %d of %d", first, steps)

    def add(self, step: int, steps: int, metrics: Metrics) -> None:
        if dist.get_rank() == 0:
            line = json.dumps({"step": step, "steps": steps, "time": time.time(), **metrics}) + "\n"
            try:
                with self.path.open("a") as file:
                    file.write(line)
            except OSError as error:
                free = shutil.disk_usage(self.path.parent).free
                raise ArtifactError(
                    f"{self.path}: cannot be written: {error}; {len(line)} bytes are needed, {free:,} free"
                ) from error
        self.on_metrics(step, metrics)
