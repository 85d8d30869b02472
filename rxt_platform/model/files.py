"""A model as files: `config.json`, `model.safetensors`, `tokenizer.json`. No pickle."""

import json
from pathlib import Path

import safetensors
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError
from rxt_platform.model.transformer import ReactiveTransformer

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def save_model(directory: Path, config: ModelConfig, state: dict[str, Tensor], tokenizer: RxtTokenizer) -> None:
    """Write config, weights (as they are, contiguous) and tokenizer into an existing directory."""
    (directory / CONFIG).write_text(config.model_dump_json(indent=2))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(state.items())}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save(directory / TOKENIZER)


def load_model(directory: Path) -> tuple[ReactiveTransformer, RxtTokenizer]:
    """Read a model directory. Raises ArtifactError that names the file and what is wrong with it."""
    path = directory / CONFIG
    try:
        config = ModelConfig.model_validate(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ArtifactError(f"{directory}: no {CONFIG}: not a model directory") from None
    except (ValueError, ValidationError) as error:
        raise ArtifactError(f"{path}: not a model configuration: {error}") from error
    model = ReactiveTransformer(config)
    load_weights(model, directory)
    path = directory / TOKENIZER
    tokenizer = RxtTokenizer.load(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ArtifactError(f"{path}: {tokenizer.vocab_size} tokens, the model has {config.vocab_size}: not its own")
    return model.eval(), tokenizer


def load_weights(model: ReactiveTransformer, directory: Path) -> None:
    """Fill `model` from `directory`; missing, unknown and mis-shaped tensors are named."""
    path = directory / WEIGHTS
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing") from None
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{path}: not a safetensors file: {error}") from error
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise ArtifactError(f"{path}: missing tensors {missing[:5]}, unknown tensors {unknown[:5]}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ArtifactError(f"{path}: {name} is {tuple(state[name].shape)}, the model has {tuple(tensor.shape)}")
    model.load_state_dict(state)
