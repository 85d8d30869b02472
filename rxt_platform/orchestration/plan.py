"""The steps of a run and what identifies each of them: planned before anything is spent (DESIGN 7, 10).

corpus → tokenizer → tokens → one training step for each stage (and each of the stateless baseline's, if there is one) →
evaluation. A fingerprint covers a step's settings, its inputs' fingerprints, the seed and the code of the rooms it
uses, never paths, hosts or worker counts; a finished artifact with the same fingerprint is reused.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rxt_platform.config.model import ModelConfig
from rxt_platform.config.mrl import EpisodeConfig
from rxt_platform.config.run import BASELINE, RunConfig, trains_without_memory
from rxt_platform.config.stages import StageConfig
from rxt_platform.data.sources import source_identity
from rxt_platform.errors import ArtifactError, ConfigError
from rxt_platform.model.baseline import matched_baseline
from rxt_platform.model.files import REACTIVE, TOKENIZER, WEIGHTS, find_model, read_config
from rxt_platform.storage.directory import (
    Manifest,
    content_hash,
    differences,
    file_hash,
    read_manifest,
    verify_directory,
)

StepKind = Literal["corpus", "tokenizer", "tokens", "training", "evaluation"]

_ROOMS: dict[StepKind, tuple[str, ...]] = {
    "corpus": ("data",),
    "tokenizer": ("data",),
    "tokens": ("data",),
    "training": ("data", "model", "stages", "training"),
    "evaluation": ("data", "model", "rl", "evaluation"),
}
_SHOWN = Path("evaluation/report")
PREPARED: tuple[StepKind, ...] = ("corpus", "tokenizer", "tokens")
"""The steps before the first training step."""
ARTIFACT_KIND: dict[StepKind, str] = {
    "corpus": "corpus",
    "tokenizer": "tokenizer",
    "tokens": "tokens",
    "training": "model",
    "evaluation": "evaluation",
}
_NOT_IDENTITY = {"micro_batch_size", "start_from"}  # how or from where, not what
_STATELESS_IDENTITY = {
    *("kind", "epochs", "global_batch_size", "optimizer"),
    *("packing", "curriculum", "system_prompts", "sources"),
}


@dataclass(frozen=True)
class Step:
    """One unit of work with one artifact."""

    name: str
    kind: StepKind
    spec: dict[str, Any]
    inputs: dict[str, str]  # name of the input -> its fingerprint or content hash
    storage: Path
    stage: StageConfig | None = None
    start: Path | None = None  # the model directory that a step starts from, or takes the tokenizer of
    stateless: bool = False  # a training step of the baseline
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        rooms = _ROOMS[self.kind] + (("rl",) if isinstance(self.stage, EpisodeConfig) else ())
        identity = {"kind": self.kind, "spec": self.spec, "inputs": self.inputs, "code": _code(rooms)}
        object.__setattr__(self, "fingerprint", content_hash(identity))

    @property
    def label(self) -> str:
        """Readable and unique: what its folders are called."""
        return f"{self.name}-{self.fingerprint[:12]}"

    @property
    def artifact(self) -> Path:
        """Where its result is, or will be."""
        return self.storage / "artifacts" / self.label

    @property
    def work(self) -> Path:
        """Resume states and metrics while it runs."""
        return self.storage / "work" / self.label

    @property
    def provenance(self) -> dict[str, Any]:
        """What the artifact's manifest says of the step."""
        return {"step": self.name, "fingerprint": self.fingerprint, "spec": self.spec}

    def finished(self) -> Manifest | None:
        """The manifest of this step's artifact, None when it was not made yet."""
        if not self.artifact.exists():
            return None
        manifest = read_manifest(self.artifact)
        if manifest.config.get("fingerprint") != self.fingerprint:
            raise ArtifactError(f"{self.artifact}: holds another step's result; delete it")
        return manifest


def build_plan(config: RunConfig) -> list[Step]:
    """All steps of a run, in order. Raises an RxtError when an input file or a starting model is not usable."""
    storage = storage_root(config)
    corpus = Step("corpus", "corpus", source_identity(config.data), {}, storage)
    start = _starting_model(config)
    tokenizer = _tokenizer_step(config, corpus, start)
    tokens = _tokens_step(config, corpus, tokenizer)
    origin = start and (start[0], start[1].content_sha256)
    trained = list[Step]()
    for name, stage in config.stages.items():
        trained.append(_training_step(config, name, stage, tokens, origin))
        origin = (trained[-1].artifact, trained[-1].fingerprint)
    baseline = _baseline_steps(config, tokens)
    inputs = {"corpus": corpus.fingerprint, "tokens": tokens.fingerprint, "model": trained[-1].fingerprint}
    inputs |= {f"stages.{step.name}": step.fingerprint for step in trained[:-1]}
    inputs |= {"baseline": baseline[-1].fingerprint} if baseline else {}
    too_long = config.data.validation.too_long
    spec = {**config.evaluation.model_dump(mode="json"), "seed": config.seed, "too_long": too_long}
    if config.evaluation.reward_model is not None:
        spec["reward_model"] = _reward_model_hash(config.evaluation.reward_model)
    evaluation = Step("evaluation", "evaluation", spec, inputs, storage)
    return [corpus, tokenizer, tokens, *trained, *baseline, evaluation]


def used_artifacts(plan: list[Step]) -> list[Path]:
    """What a run makes, and the model that it starts from: until its first stage is made, nothing else names that."""
    starts = [step.start for step in plan if step.start is not None]
    return list(dict.fromkeys([*starts, *(step.artifact for step in plan)]))


def last_trained(plan: list[Step], stateless: bool = False) -> Step:
    """The last training step of the model, or of the stateless baseline of a run that has one."""
    return [step for step in plan if step.kind == "training" and step.stateless == stateless][-1]


def storage_root(config: RunConfig) -> Path:
    """The run's storage as an absolute path.

    A job of `ray job submit --working-dir` runs in an unpacked copy that Ray deletes: there, a relative storage is
    taken from the home folder (the runner says so), so that results stay.
    """
    path = Path(config.storage).expanduser()
    if not path.is_absolute() and in_temporary_copy():
        return Path.home() / "rxt_platform" / path
    return path.resolve()


def in_temporary_copy() -> bool:
    """Whether the current folder is a Ray job's own copy of its working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "working_dir_files" in Path.cwd().parts


def explain(step: Step) -> str:
    """Why a step will run: no result yet, or what differs from the newest result of a step of that name."""
    others = sorted(
        (path for path in step.artifact.parent.glob(f"{step.name}-*") if path.name[len(step.name) + 1 :].isalnum()),
        key=lambda path: path.stat().st_mtime,
    )
    if not others:
        return "no result yet"
    try:
        manifest = read_manifest(others[-1])
    except ArtifactError as error:
        return f"the last result is unusable: {error}"
    changes = differences(manifest.config.get("spec", {}), step.spec)
    changes += [f"input {name} changed" for name, value in step.inputs.items() if manifest.parents.get(name) != value]
    return "; ".join(changes) or "the code of the rooms it uses changed"


def unfinished_others(step: Step) -> list[str]:
    """Runs of this step under other settings that were not finished and have checkpoints: where, and what differs."""
    found: list[str] = []
    for path in sorted(step.work.parent.glob(f"{step.name}-*/checkpoints/step-*/state.json")):
        folder = path.parents[2]
        if folder == step.work or any(line.startswith(f"{folder}:") for line in found):
            continue
        try:
            spec = json.loads(path.read_text())["spec"]["spec"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        changes = "; ".join(differences(spec, step.spec)) or "the code or the inputs changed"
        found.append(f"{folder}: unfinished, under other settings ({changes})")
    return found


def _tokenizer_step(config: RunConfig, corpus: Step, start: tuple[Path, Manifest] | None) -> Step:
    """Trained on the corpus, or taken over from the model that the run starts from: ids must mean the same tokens."""
    if start is None:
        spec: dict[str, Any] = {"vocab_size": config.model.vocab_size, **config.data.tokenizer.model_dump(mode="json")}
        return Step("tokenizer", "tokenizer", spec, {"corpus": corpus.fingerprint}, corpus.storage)
    path, manifest = start
    spec = {"sha256": manifest.files["tokenizer.json"].sha256}
    inputs = {"corpus": corpus.fingerprint, "model": manifest.content_sha256}
    return Step("tokenizer", "tokenizer", spec, inputs, corpus.storage, start=path)


def _tokens_step(config: RunConfig, corpus: Step, tokenizer: Step) -> Step:
    """The corpus as token ids, for the model's window."""
    validation = config.data.validation
    spec = {
        "max_length": config.model.max_length,
        "too_long": validation.too_long,
        "max_bad_share": validation.max_bad_share,
    }
    inputs = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    return Step("tokens", "tokens", spec, inputs, corpus.storage)


def _baseline_steps(config: RunConfig, tokens: Step) -> list[Step]:
    """The stages that can be trained without memory, for a model of the same size."""
    if config.baseline is None:
        return []
    model = matched_baseline(config.model, config.baseline.window)
    steps, origin = list[Step](), None
    for name, stage in config.stages.items():
        if trains_without_memory(stage):
            steps.append(_training_step(config, BASELINE + name, stage, tokens, origin, model))
            origin = (steps[-1].artifact, steps[-1].fingerprint)
    return steps


def _training_step(
    config: RunConfig,
    name: str,
    stage: StageConfig,
    tokens: Step,
    origin: tuple[Path, str] | None,
    stateless: ModelConfig | None = None,
) -> Step:
    """A stage on top of the model at `origin` (its directory, and what identifies it), or of random weights.

    With `stateless`, the baseline's shape, that is what trains; its rows have the name, so the order, of the model's.
    """
    inputs = {"tokens": tokens.fingerprint}
    if origin is not None:
        inputs["model"] = origin[1]
    guard = config.training.spike_guard
    spec = {
        "name": name.removeprefix(BASELINE),
        "stage": _stage_identity(stage, stateless is not None),
        "model": (stateless or config.model).model_dump(mode="json"),
        "precision": config.training.precision,
        "spike_guard": guard and guard.model_dump(mode="json"),
        "seed": config.seed,
        "weights": [source.weight for source in getattr(config.data, stage.section)],
    }
    if stateless is not None:
        spec |= {"stateless": True, "window": config.model.max_length}
    return Step(name, "training", spec, inputs, tokens.storage, stage, origin and origin[0], stateless is not None)


def _stage_identity(stage: StageConfig, stateless: bool) -> dict[str, Any]:
    """What of a stage's settings decides its result; of the baseline's only what a model without memory uses."""
    dumped = stage.model_dump(mode="json")
    if stateless:
        loss = dumped.get("loss", dumped)
        kept = {key: value for key, value in dumped.items() if key in _STATELESS_IDENTITY}
        return {**kept, "balance_weight": loss["balance_weight"]}
    return {key: value for key, value in dumped.items() if key not in _NOT_IDENTITY}


def _starting_model(config: RunConfig) -> tuple[Path, Manifest] | None:
    """The model that the first stage is asked to start from, after every file of it was checked."""
    name, stage = next(iter(config.stages.items()))
    if stage.start_from is None:
        return None
    key, sha256 = f"stages.{name}.start_from", stage.start_from.sha256
    path = Path(stage.start_from.artifact).resolve()
    try:
        manifest = verify_directory(path, "model")
    except ArtifactError as error:
        raise ArtifactError(f"{key}: {error}") from None
    if sha256 not in (None, manifest.content_sha256):
        raise ArtifactError(f"{key}: {path} has content sha256 {manifest.content_sha256}, the config asks for {sha256}")
    made_of = manifest.config.get("spec", {}).get("model", {})
    changes = differences(made_of, config.model.model_dump(mode="json"))
    if changes:
        raise ConfigError(f"{key}: {path} is another model: {'; '.join(changes)}")
    return path, manifest


def _reward_model_hash(path: str) -> str:
    """What identifies the model whose embedding the reward uses: its weights and its tokenizer."""
    try:
        directory = find_model(path)
        read_config(directory, REACTIVE)
        found = "".join(file_hash(directory / name) for name in (WEIGHTS, TOKENIZER))
    except (ArtifactError, OSError) as error:
        raise ArtifactError(f"evaluation.reward_model: {error}") from None
    return hashlib.sha256(found.encode()).hexdigest()


@cache
def _code(rooms: tuple[str, ...]) -> str:
    """Hash of the source of some rooms, but for what only shows results."""
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for room in rooms:
        for file in sorted((package / room).rglob("*.py")):
            place = file.relative_to(package)
            if _SHOWN not in place.parents:
                digest.update(place.as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
