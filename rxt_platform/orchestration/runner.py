"""Runs a plan: reuses what is finished, makes the rest in order, tracks it, and ends with the report."""

import importlib.metadata
import json
import logging
import platform
import shutil
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.config.run import BASELINE, RunConfig
from rxt_platform.data.corpus import VALIDATION
from rxt_platform.data.shards import read_summary
from rxt_platform.errors import ArtifactError, StoppedError
from rxt_platform.evaluation.report.report import REPORT_FILES, Report, render_table, write_report
from rxt_platform.model.baseline import count_parameters, matched_baseline
from rxt_platform.model.parameters import measure_size
from rxt_platform.orchestration import ray_jobs
from rxt_platform.orchestration.critic import reward_service
from rxt_platform.orchestration.evaluate import RESULT, evaluate_run
from rxt_platform.orchestration.plan import (
    PREPARED,
    Step,
    build_plan,
    in_temporary_copy,
    last_trained,
    unfinished_others,
    used_artifacts,
)
from rxt_platform.orchestration.prepare import FERTILITY, prepare
from rxt_platform.orchestration.progress import Console, HistoryFollower
from rxt_platform.orchestration.steps import remove_leftovers, stage_job
from rxt_platform.orchestration.stopping import Stopper
from rxt_platform.orchestration.store import record_plan
from rxt_platform.orchestration.tracking import Tracker
from rxt_platform.storage.directory import Manifest, verify_directory
from rxt_platform.storage.locks import only_holder, using
from rxt_platform.training.job import HISTORY

logger = logging.getLogger(__name__)

_LIBRARIES = ("torch", "ray", "deepspeed", "mlflow", "tokenizers")


@dataclass
class Outcome:
    """What became of a step."""

    step: Step
    status: str  # made, resumed, reused
    seconds: float
    manifest: Manifest


@dataclass
class _Run:
    """An invocation under way."""

    config: RunConfig
    folder: Path
    console: Console
    tracker: Tracker
    stopper: Stopper = field(default_factory=Stopper)
    outcomes: list[Outcome] = field(default_factory=list)
    connected: bool | None = None  # None until Ray is needed; True when this run must disconnect

    @property
    def open_runs(self) -> Path:
        """File that names the MLflow runs which are still open."""
        return self.folder / "open_mlflow_runs.json"

    def connect(self) -> None:
        """Join or start Ray, once."""
        if self.connected is None:
            self.connected = ray_jobs.connect(self.config.resources, self.config.critic_service)
            self.stopper.listen_again()


def run_pipeline(config: RunConfig, console: Console | None = None) -> Report:
    """Run everything that is not finished yet and write the report. Raises an RxtError when a step fails.

    Input files, configuration and starting models are checked, and corpus, tokenizer and tokens made, before any job
    starts.
    """
    started = time.monotonic()
    plan = build_plan(config)
    storage = plan[0].storage
    folder = storage / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot be made: {error}: set 'storage' to a folder that can be written"
        ) from None
    run = _Run(config, folder, console or Console(), Tracker(config.tracking, storage))
    mine = storage / "work" / f"run.{config.name}.lock"
    with only_holder(mine), using(storage), run.stopper.listening():
        record_plan(folder, used_artifacts(plan))
        if in_temporary_copy():
            run.console.line(f"storage  {storage} (the job's working directory is a temporary copy)")
        for step in plan:
            step.artifact.parent.mkdir(parents=True, exist_ok=True)
        try:
            prepared = prepare(config, plan, run.connect)
            run.tracker.start(config.name, config.model_dump(mode="json"), run.open_runs)
            for one in prepared:
                status = "made" if one.made else "reused"
                outcome = Outcome(one.step, status, one.manifest.metrics["seconds"], one.manifest)
                _record(run, one.step, outcome, None)
            for step in plan[len(PREPARED) :]:
                _run_step(run, step, plan)
            report = _report(run, plan, time.monotonic() - started)
        except BaseException as error:
            stopped = isinstance(error, StoppedError) or not isinstance(error, Exception)
            run.tracker.finish("KILLED" if stopped else "FAILED", [], {}, run.open_runs)
            raise
        finally:
            if run.connected:
                ray_jobs.disconnect()
        files = [folder / name for name in REPORT_FILES]
        run.tracker.finish("FINISHED", files, _headline(report), run.open_runs)
        run.console.line(render_table(report))
        run.console.line(f"report   {folder / 'report.html'}")
        run.console.line(f"MLflow   mlflow ui --backend-store-uri {run.tracker.uri}")
    return report


def _run_step(run: _Run, step: Step, plan: list[Step]) -> None:
    """Reuse a step's artifact or make it on Ray, with its MLflow record."""
    if step.finished() is None:
        # Runs of other names share steps: only one makes it, and whoever comes later finds it finished or is told.
        with only_holder(step.work.with_name(step.work.name + ".lock")):
            if step.finished() is None:
                _make_step(run, step, plan)
                return
    manifest = verify_directory(step.artifact)
    _record(run, step, Outcome(step, "reused", manifest.metrics["seconds"], manifest), None)


def _make_step(run: _Run, step: Step, plan: list[Step]) -> None:
    run.connect()
    remove_leftovers(step)
    for other in unfinished_others(step):
        run.console.line(f"not used {other}")
    child = run.tracker.step(step.name, _tags(step, "made"), step.spec, run.open_runs)
    started = time.monotonic()
    status = _train(run, step, plan, child) if step.kind == "training" else _evaluate(run, step, plan)
    seconds = time.monotonic() - started
    _record(run, step, Outcome(step, status, seconds, verify_directory(step.artifact)), child)
    shutil.rmtree(step.work, ignore_errors=True)  # its resume states are of no more use


def _evaluate(run: _Run, step: Step, plan: list[Step]) -> str:
    config, path = run.config, run.config.evaluation.reward_model
    if path is not None:  # a task may have another working directory
        settings = config.evaluation.model_copy(update={"reward_model": str(Path(path).resolve())})
        config = config.model_copy(update={"evaluation": settings})
    ray_jobs.call(evaluate_run, config, plan, step, cpus=config.resources.cpus_per_worker)
    return "made"


def _train(run: _Run, step: Step, plan: list[Step], child: str | None) -> str:
    """One training step on Ray Train, followed live; 'resumed' when it went on from a checkpoint."""

    def on_rows(rows: list[dict[str, float]]) -> None:
        run.tracker.history(child, rows)
        run.console.progress(step.name, rows[-1])

    job = stage_job(run.config, plan, step)
    with HistoryFollower(step.work / HISTORY, on_rows), reward_service(run.config, job) as service:
        metrics = ray_jobs.train(job, run.config.resources, run.stopper, service)
    return "resumed" if metrics["resumed_from_step"] else "made"


def _record(run: _Run, step: Step, outcome: Outcome, child: str | None) -> None:
    """Note a step's outcome in the console, the report and MLflow."""
    run.outcomes.append(outcome)
    resumed = int(outcome.manifest.metrics.get("resumed_from_step", 0))
    at = f" at step {resumed}" if outcome.status == "resumed" else ""
    if skipped := int(outcome.manifest.metrics.get("skipped_batches", 0)):
        at += f", {skipped} batches left out"
    run.console.line(f"{outcome.status + at:<18} {step.name:<20} {outcome.seconds:6.1f} s  {step.artifact}")
    if child is None:
        child = run.tracker.step(step.name, _tags(step, outcome.status), step.spec, run.open_runs)
    run.tracker.finish_step(child, outcome.manifest, step.artifact, upload=outcome.status != "reused")


def _tags(step: Step, status: str) -> dict[str, str]:
    return {
        "rxt.kind": step.kind,
        "rxt.step": step.name,
        "rxt.status": status,
        "rxt.fingerprint": step.fingerprint,
        "rxt.parents": json.dumps(step.inputs),
    }


def _report(run: _Run, plan: list[Step], seconds: float) -> Report:
    """The run's report, from its artifacts."""
    evaluation = json.loads((plan[-1].artifact / RESULT).read_text())
    trained = [outcome for outcome in run.outcomes if outcome.step.kind == "training"]
    report: Report = {
        "name": run.config.name,
        "seed": run.config.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_seconds": seconds,
        "model": str(last_trained(plan).artifact),
        "versions": {"python": platform.python_version()}
        | {lib: importlib.metadata.version(lib) for lib in _LIBRARIES},
        "parameters": _parameters(run.config),
        "steps": [
            {
                "name": outcome.step.name,
                "kind": outcome.step.kind,
                "status": outcome.status,
                "seconds": outcome.seconds,
                "fingerprint": outcome.step.fingerprint,
                "artifact": str(outcome.step.artifact),
            }
            for outcome in run.outcomes
        ],
        "stages": [_stage_row(outcome, evaluation["baselines"]) for outcome in trained],
        "data": data_report(plan),
        **{name: value for name, value in evaluation.items() if name not in ("seed", "baselines")},
    }
    histories = {
        outcome.step.name: [json.loads(line) for line in (outcome.step.artifact / "history.jsonl").open()]
        for outcome in trained
    }
    write_report(run.folder, report, histories)
    return report


def _parameters(config: RunConfig) -> dict[str, int]:
    size = measure_size(config.model)
    counts = {name: count.parameters for name, count in size.components.items()} | {"total": size.total.parameters}
    if config.baseline is not None:
        counts["baseline"] = count_parameters(matched_baseline(config.model, config.baseline.window))
    return counts


def data_report(plan: list[Step]) -> dict[str, Any]:
    """What the rows were like: validation by source, tokens of each part, the tokenizer's fit."""
    corpus, tokenizer, tokens = (step.artifact for step in plan[: len(PREPARED)])
    return {
        "validation": json.loads((corpus / VALIDATION).read_text()),
        "fertility": json.loads((tokenizer / FERTILITY).read_text()),
        "tokens": read_summary(tokens)["parts"],
    }


def _stage_row(outcome: Outcome, baselines: dict[str, Any]) -> dict[str, Any]:
    stage, metrics = outcome.step.stage, outcome.manifest.metrics
    assert stage is not None
    return {
        "name": outcome.step.name,
        "kind": stage.kind,
        "stateless": outcome.step.stateless,
        "status": outcome.status,
        "seconds": outcome.seconds,
        "steps": int(metrics["steps"]),
        "tokens": int(metrics["tokens"]),
        "loss_before": metrics.get("loss_before"),
        "loss_after": metrics.get("loss_after"),
        "held_out": {
            name: [metrics[f"{name}_before"], metrics[f"{name}_after"]]
            for name in stage.metrics
            if f"{name}_after" in metrics
        }
        if isinstance(stage, EpisodeConfig)
        else None,
        "baselines": baselines.get(outcome.step.name.removeprefix(BASELINE)),
        "expert_load": {end: metrics[f"expert_load_{end}_after"] for end in ("max", "min")}
        if "expert_load_max_after" in metrics
        else None,
    }


def _headline(report: Report) -> dict[str, float]:
    tokens = report["answer_tokens"]
    values = {
        **{f"recall.{key.replace('+', '_or_more')}.gain": entry["gain"] for key, entry in report["recall"].items()},
        **{f"answer_tokens.{key}": tokens[key] for key in ("loss", "perplexity", "accuracy", "count")},
        "reward": report["reward"]["mean"],
    }
    return {name: float(value) for name, value in values.items() if value is not None}
