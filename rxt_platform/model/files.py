"""A model as files in Hugging Face layout: `config.json`, `model.safetensors`, `tokenizer.json`. No pickle."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.figures import REPORT
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.storage.directory import MANIFEST, verify_directory

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
REACTIVE = ("RxTAlpha", "RxTAlphaDecoder")  # architectures with the weights of a whole Reactive Transformer
STATELESS = "StatelessTransformer"
MODEL_TYPE = "reactive-transformer"
_PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
_HEADER = ("model_type", "architectures")


def save_model(
    directory: Path,
    config: ModelConfig,
    state: dict[str, Tensor],
    tokenizer: RxtTokenizer,
    architecture: str = REACTIVE[0],
) -> None:
    """Write config, weights (as they are, contiguous) and tokenizer into an existing directory."""
    write_config(directory, config.model_dump(mode="json"), architecture)
    write_weights(directory, state)
    tokenizer.save(directory / TOKENIZER)


def write_config(directory: Path, config: dict[str, Any], architecture: str) -> None:
    """`config.json` with the keys by which the Hub knows what it holds."""
    header = {"model_type": MODEL_TYPE, "architectures": [architecture]}
    (directory / CONFIG).write_text(json.dumps({**header, **config}, indent=2))


def write_weights(directory: Path, state: dict[str, Tensor]) -> None:
    """`model.safetensors`, the same bytes however the tensors lie in memory."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def find_model(path: str | Path) -> Path:
    """The model directory that `path` means: itself, or the last model of the run whose folder it is.

    An artifact's files are checked against its manifest. Raises ArtifactError that names what is wrong.
    """
    directory = Path(path)
    report = directory / REPORT
    if report.is_file():
        try:
            directory = Path(json.loads(report.read_text())["model"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ArtifactError(f"{report}: not a run's report; give the model's directory instead") from None
        if not directory.is_dir():  # the run's storage was moved
            directory = report.parent.parent / "artifacts" / directory.name
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such model directory")
    if (directory / MANIFEST).exists():
        verify_directory(directory, "model")
    return directory


def load_model(directory: Path, dtype: torch.dtype | None = None) -> tuple[ReactiveTransformer, RxtTokenizer]:
    """Read a model directory, ready for use. Raises ArtifactError that names the file and what is wrong with it."""
    config = model_config(read_config(directory, REACTIVE), directory)
    model = empty_model(config)
    load_weights(model, directory, dtype)
    return model.eval(), load_tokenizer(directory, config)


def load_any(
    directory: Path, dtype: torch.dtype | None = None
) -> tuple[ReactiveTransformer | StatelessTransformer, RxtTokenizer]:
    """As `load_model`, for a Reactive Transformer or a stateless baseline."""
    config = model_config(read_config(directory, (*REACTIVE, STATELESS)), directory)
    if STATELESS not in (json.loads((directory / CONFIG).read_text()).get("architectures") or []):
        return load_model(directory, dtype)
    with torch.device("meta"):
        model = StatelessTransformer(config)
    load_weights(model, directory, dtype)
    return model.eval(), load_tokenizer(directory, config)


def read_config(directory: Path, architectures: Sequence[str]) -> dict[str, Any]:
    """The mapping in `config.json`, without the Hub's keys, by which it must be one of `architectures` if it says."""
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no {CONFIG}: not a model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a model configuration: {error}") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: not a model configuration: it holds {type(config).__name__}")
    found = config.get("architectures") or list(architectures)
    if not isinstance(found, list) or not set(map(str, found)) & set(architectures):
        raise ArtifactError(f"{path}: holds {found}, not {' or '.join(architectures)}: load it with that class")
    return {key: value for key, value in config.items() if key not in _HEADER}


def model_config(raw: Any, directory: Path) -> ModelConfig:
    """A validated `ModelConfig`; ArtifactError names the file."""
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{directory / CONFIG}: not a model configuration: {error}") from error


def empty_model(config: ModelConfig) -> ReactiveTransformer:
    """A model without memory for its weights, to be filled by `load_weights`."""
    with torch.device("meta"):
        return ReactiveTransformer(config)


def load_tokenizer(directory: Path, config: ModelConfig) -> RxtTokenizer:
    """The model's tokenizer; ArtifactError if it has more tokens than the model."""
    path = directory / TOKENIZER
    tokenizer = RxtTokenizer.load(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ArtifactError(f"{path}: {tokenizer.vocab_size} tokens, the model has {config.vocab_size}: not its own")
    return tokenizer


def load_weights(model: nn.Module, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Fill `model` from `directory`; tensors that don't fit are named.

    Into an empty model they go in the file's precision, otherwise in the model's; `dtype` asks for another.
    """
    fill(model, read_weights(directory), directory, dtype)


def fill(model: nn.Module, state: dict[str, Tensor], directory: Path, dtype: torch.dtype | None = None) -> None:
    """Put tensors read from `directory` into `model`; ArtifactError names those that are missing, extra, mis-shaped."""
    path = directory / WEIGHTS
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise ArtifactError(f"{path}: missing tensors {_some(missing)}, unknown tensors {_some(extra)}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ArtifactError(f"{path}: {name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}")
        wanted = _PRECISIONS if tensor.is_floating_point() else (tensor.dtype,)
        if state[name].dtype not in wanted:
            raise ArtifactError(f"{path}: {name} is {state[name].dtype}, the model has {tensor.dtype}")
    found = {tensor.dtype: name for name, tensor in state.items() if tensor.is_floating_point()}
    if len(found) > 1:
        raise ArtifactError(f"{path}: tensors of several precisions, such as {found}")
    if dtype is not None and dtype not in _PRECISIONS:
        raise ArtifactError(f"dtype {dtype!r}: one of {', '.join(map(str, _PRECISIONS))}")
    if dtype is not None and not next(iter(expected.values())).is_meta:
        model.to(dtype)
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    empty = next(iter(expected.values())).is_meta
    if empty:  # in memory of their own: where tensors lie in a file, they are not aligned for vector instructions
        state = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(state, assign=empty)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of `model.safetensors`; ArtifactError for anything else under that name, such as a pickle."""
    path = directory / WEIGHTS
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path}: not a safetensors file: {error}") from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{names[:5]}{more}"
