"""MLflow: one parent run for each invocation, a child run for each step, with metrics, artifacts and lineage.

Only the driver talks to MLflow: workers write their metrics to the run's storage, and the driver passes them on in
batches. So no training step ever waits for the tracking server, and nobody writes to one SQLite file from two
processes. A server that fails costs records, never the run: the first failure is logged, and `problems` counts them.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rxt_platform.config.run import TrackingConfig
from rxt_platform.storage.directory import Manifest

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

logger = logging.getLogger(__name__)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

_LARGEST_UPLOAD = 100_000_000  # bytes; larger artifacts are recorded by their path
_BATCH = 900  # MLflow takes at most 1,000 metrics at once


class Tracker:
    """The MLflow records of one invocation."""

    def __init__(self, config: TrackingConfig, storage: Path) -> None:
        self.uri = config.uri or f"sqlite:///{storage / 'mlflow.db'}"
        self.problems = 0
        self.parent: str | None = None
        self._children: list[str] = []
        self._unsent: list[dict[str, float]] = []
        self._config = config
        self._storage = storage
        self._client: MlflowClient | None = None
        self._experiment = ""

    def start(self, name: str, params: Mapping[str, Any], state: Path) -> None:
        """Open the parent run. `state` remembers it, so that a killed invocation's runs can be closed later."""
        with self._tolerant("start a run"):
            self._client = MlflowClient(self.uri)
            found = self._client.get_experiment_by_name(self._config.experiment)
            location = None if self._config.uri else (self._storage / "mlartifacts").as_uri()
            self._experiment = (
                found.experiment_id
                if found
                else self._client.create_experiment(self._config.experiment, artifact_location=location)
            )
            self._close_abandoned(state)
            run = self._client.create_run(self._experiment, tags={MLFLOW_RUN_NAME: name, "rxt.kind": "pipeline"})
            self.parent = run.info.run_id
            self._log_params(self.parent, params)
            self._remember(state)

    def step(self, name: str, tags: Mapping[str, str], params: Mapping[str, Any], state: Path) -> str | None:
        """Open a child run for a step; None when tracking does not work."""
        child: str | None = None
        with self._tolerant(f"start the record of {name}"):
            if self._client is None or self.parent is None:
                return None
            self._unsent.clear()
            all_tags = {MLFLOW_RUN_NAME: name, MLFLOW_PARENT_RUN_ID: self.parent, **tags}
            child = str(self._client.create_run(self._experiment, tags=all_tags).info.run_id)
            self._children.append(child)
            self._remember(state)
            self._log_params(child, params)
        return child

    def history(self, run: str | None, rows: list[dict[str, float]]) -> None:
        """Log metrics over time, in batches; rows that could not be sent go first the next time."""
        if self._client is None or run is None:
            return
        self._unsent.extend(rows)
        with self._tolerant("log metrics"):
            metrics = [
                Metric(name, value, int(row["time"] * 1000), int(row["step"]))
                for row in self._unsent
                for name, value in row.items()
                if name not in ("step", "steps", "time")
            ]
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(run, metrics=metrics[start : start + _BATCH])
            self._unsent.clear()

    def finish_step(self, run: str | None, manifest: Manifest, artifact: Path, upload: bool) -> None:
        """Log a step's final metrics, its inputs and its artifact (a large or reused one by its path), and close it."""
        self.history(run, [])
        with self._tolerant("record an artifact"):
            if self._client is None or run is None:
                return
            numbers = {name: value for name, value in manifest.metrics.items() if value == value}
            now = int(manifest.created * 1000)
            self._client.log_batch(run, metrics=[Metric(f"final.{k}", v, now, 0) for k, v in numbers.items()])
            self._client.set_tag(run, "rxt.artifact", str(artifact))
            self._client.set_tag(run, "rxt.content_sha256", manifest.content_sha256)
            self._client.log_inputs(
                run,
                [
                    DatasetInput(Dataset(name=name, digest=value[:32], source_type="rxt", source=value))
                    for name, value in manifest.parents.items()
                ],
            )
            if upload and sum(entry.size for entry in manifest.files.values()) <= _LARGEST_UPLOAD:
                self._client.log_artifacts(run, str(artifact), "artifact")
            else:
                self._client.log_artifact(run, str(artifact / "manifest.json"), "artifact")
            self._client.set_terminated(run, "FINISHED")

    def finish(self, status: str, report: list[Path], metrics: Mapping[str, float], state: Path) -> None:
        """Close the parent run, and every child that is still open, with FINISHED, FAILED or KILLED."""
        with self._tolerant("close the run"):
            if self._client is None or self.parent is None:
                return
            for path in report:
                self._client.log_artifact(self.parent, str(path), "report")
            for name, value in metrics.items():
                if value == value:
                    self._client.log_metric(self.parent, name, value)
            self._terminate([*self._children, self.parent], status)
            state.unlink(missing_ok=True)

    def _log_params(self, run: str, params: Mapping[str, Any]) -> None:
        assert self._client is not None
        entries = [Param(key, str(value)[:6000]) for key, value in flatten(params).items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(run, params=entries[start : start + 100], tags=[RunTag("rxt.tracked", "true")])

    def _remember(self, state: Path) -> None:
        temporary = state.with_suffix(".tmp")
        temporary.write_text(json.dumps({"uri": self.uri, "runs": [*self._children, self.parent]}))
        temporary.replace(state)

    def _close_abandoned(self, state: Path) -> None:
        """A killed driver leaves its runs open: they are closed as KILLED by the next one."""
        if not state.exists():
            return
        with self._tolerant("close the runs of a killed driver"):
            left = json.loads(state.read_text())
            if left["uri"] == self.uri:
                self._terminate(left["runs"], "KILLED")
        state.unlink()

    def _terminate(self, runs: list[str], status: str) -> None:
        assert self._client is not None
        for run in runs:
            if self._client.get_run(run).info.status == "RUNNING":
                self._client.set_terminated(run, status)

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception:  # whatever a tracking server does, training goes on
            if not self.problems:
                logger.warning("MLflow at %s could not %s; training goes on", self.uri, what, exc_info=True)
            self.problems += 1


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
