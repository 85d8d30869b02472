"""What was measured of a model, kept with it: only as long as it has the weights that were measured."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from rxt_platform.errors import ArtifactError

REPORT, FIGURES = "report.json", "figures.json"  # of a run's folder, of a model's directory


class AnswerTokens(BaseModel):
    """Losses in nats, over answer tokens."""

    loss: float
    perplexity: float
    accuracy: float
    count: int


class Recall(BaseModel):
    """Shares of questions answered right."""

    with_memory: float
    reset: float
    gain: float
    count: int


class TrainedStage(BaseModel):
    """A stage's held-out loss; of stages of episodes None, but `held_out` what they measure, before and after."""

    name: str
    steps: int
    loss_before: float | None
    loss_after: float | None
    held_out: dict[str, tuple[float, float]] | None = None


class Figures(BaseModel):
    """The part of a run's report that a model's card shows; `recall` by distance in turns."""

    name: str
    answer_tokens: AnswerTokens
    memory_reset: AnswerTokens
    recall: dict[str, Recall]
    stages: list[TrainedStage]
    weights: str | None = None  # hash of the weights that were measured; a run's report has none, its artifact has


def read_figures(path: Path) -> Figures | None:
    """From the report of the run whose folder `path` is, or from a model's directory; ArtifactError if damaged."""
    for file in (path / REPORT, path / FIGURES):
        if file.is_file():
            try:
                return Figures.model_validate(json.loads(file.read_text()))
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise ArtifactError(f"{file}: not figures of a model: {place}: {first['msg']}") from None
            except (OSError, ValueError, RecursionError) as error:
                raise ArtifactError(f"{file}: not figures of a model: {error}") from None
    return None


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Of all tensors with their names, shapes and precisions."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
