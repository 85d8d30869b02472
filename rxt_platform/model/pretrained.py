"""Models to hold: load from a directory, a run or the Hugging Face Hub; save; share, with a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import nn

from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from rxt_platform.model import files
from rxt_platform.model.card import GENERATED, card_metadata, card_text
from rxt_platform.storage.directory import MANIFEST

_PATTERNS = [files.CONFIG, files.WEIGHTS, files.TOKENIZER, files.FIGURES, "README.md"]


class PretrainedModel(nn.Module, ModelHubMixin, library_name="rxt-platform", tags=["reactive-transformer", "memory"]):
    """What all faces of a model share: `from_pretrained`, `save_pretrained`, `push_to_hub`, a tokenizer, figures."""

    has_figures: ClassVar[bool] = True
    tokenizer: RxtTokenizer | None
    figures: dict[str, Any] | None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        tokenizer: RxtTokenizer | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """A model from its directory, from the folder of the run that made it, or by its name on the Hub.

        The tokenizer is the model's own unless one is given. `dtype` loads the weights in another precision than the
        file's; `head` is an encoder's; the rest are Hugging Face's. Raises ArtifactError that names the file and what
        is wrong with it.
        """
        place = pretrained_model_name_or_path
        directory = find_or_download(
            place,
            _PATTERNS,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        model = cls.from_directory(directory, tokenizer, **options)
        model.figures = (files.read_figures(place) or files.read_figures(directory)) if cls.has_figures else None
        return model.eval()

    @classmethod
    def from_directory(cls, directory: Path, tokenizer: RxtTokenizer | None, dtype: torch.dtype | None = None) -> Self:
        """The model in a local directory."""
        raise NotImplementedError

    def save_into(self, directory: Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        raise NotImplementedError

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write `config.json`, `model.safetensors`, `tokenizer.json`, the figures and a card.

        `push_to_hub` shares them too, with Hugging Face's options. A card that was written by hand stays as it is.
        Raises RxtError, and writes nothing, without a tokenizer and for a run's artifact.
        """
        directory = Path(save_directory)
        if (directory / MANIFEST).exists():
            raise ArtifactError(f"{directory}: a run's artifact, which must stay as it is; save somewhere else")
        self.own_tokenizer()
        card = directory / "README.md"
        try:
            if card.is_file() and GENERATED in card.read_text(errors="replace"):
                card.unlink()
            super().save_pretrained(directory)
        except OSError as error:
            raise ArtifactError(f"{directory}: cannot be written: {error}") from error
        return self.push_to_hub(repo_id or directory.name, **options) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save_into(save_directory)
        self.own_tokenizer().save(save_directory / files.TOKENIZER)
        files.write_figures(save_directory, self.figures)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A card that says what the model is, how to use it and what was measured."""
        data: ModelCardData = card_metadata(self.figures)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(type(self).__name__, self.facts(), self.figures)}")

    def facts(self) -> Mapping[str, str]:
        """What the card's table says of the model."""
        raise NotImplementedError

    def own_tokenizer(self) -> RxtTokenizer:
        """The tokenizer; DataError without one."""
        if self.tokenizer is None:
            raise DataError("this model has no tokenizer: use set_tokenizer")
        return self.tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        raise NotImplementedError

    def set_tokenizer(self, tokenizer: RxtTokenizer) -> None:
        """Use this tokenizer from now on; DataError if it has more tokens than the model."""
        if tokenizer.vocab_size > self.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model {self.vocab_size}: not its own"
            )
        self.tokenizer = tokenizer


def load_tokenizer_from_hf_hub(name: str | Path, **options: Any) -> RxtTokenizer:
    """The tokenizer of a model directory, of a run's folder, or of a model on the Hub.

    `revision`, `token`, `cache_dir`, `force_download` and `local_files_only` are those of Hugging Face.
    """
    return RxtTokenizer.load(find_or_download(name, [files.TOKENIZER], **options) / files.TOKENIZER)


def find_or_download(name: str | Path, patterns: list[str], **options: Any) -> Path:
    """A local model directory: `name` itself, its run's last model, or a copy of what the Hub has under that name."""
    place = Path(name)
    if place.exists() or place.is_absolute() or (len(place.parts) > 1 and place.parent.is_dir()):
        return files.find_model(place)  # in a folder that is here, a name that is not is a mistyped one
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:  # the Hub's own errors are kinds of these
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{name}: no such directory, and not to be had from the Hub: {reason}") from error
