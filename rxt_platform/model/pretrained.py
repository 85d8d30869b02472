"""Models to hold: load from a directory, a run or the Hugging Face Hub; save; share, with a model card."""

import logging
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import safetensors
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HTTPError
from torch import Tensor, nn

from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from rxt_platform.model import files
from rxt_platform.model.card import GENERATED, card_metadata, card_text
from rxt_platform.model.figures import FIGURES, REPORT, Figures, read_figures, weights_hash
from rxt_platform.storage.directory import MANIFEST

logger = logging.getLogger(__name__)

_PATTERNS = [files.CONFIG, files.WEIGHTS, files.TOKENIZER, FIGURES]
_CARD = "README.md"


class PretrainedModel(nn.Module, ModelHubMixin, ABC):
    """What all faces of a model share: `from_pretrained`, `save_pretrained`, `push_to_hub`, a tokenizer, figures."""

    has_figures: ClassVar[bool] = True
    tokenizer: RxtTokenizer | None
    figures: Figures | None

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
        model.figures = None
        measured = (read_figures(Path(place)) or read_figures(directory)) if cls.has_figures else None
        if measured is not None and options.get("dtype") is None:
            found = weights_hash(model.weights())
            if measured.weights in (None, found):
                model.figures = measured.model_copy(update={"weights": found})
            else:
                logger.warning("%s: the figures beside the weights are of other weights: left out", directory)
        return model.eval()

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The tensors that are saved, by their names in the file."""

    @classmethod
    @abstractmethod
    def from_directory(cls, directory: Path, tokenizer: RxtTokenizer | None, dtype: torch.dtype | None = None) -> Self:
        """The model in a local directory."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `config.json` holds."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors`, `tokenizer.json`, the figures and a card.

        All are written before the first is put in its place, so that a save that fails leaves an earlier model whole.
        `push_to_hub` shares the model too, with Hugging Face's options (`config` and `model_card_kwargs`, which their
        interface has, change nothing). In the directory, a card that was written by hand stays as it is. Raises
        RxtError without a tokenizer and for a run's folder or artifact.
        """
        directory = Path(save_directory)
        if (directory / MANIFEST).exists() or (directory / REPORT).exists():
            raise ArtifactError(f"{directory}: made by a run, and must stay as it is; save somewhere else")
        if push_to_hub_kwargs and not push_to_hub:
            raise DataError(f"unknown options {sorted(push_to_hub_kwargs)}: they are for push_to_hub=True")
        self.own_tokenizer()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
                self._write_files(Path(temporary))
                for name in (files.WEIGHTS, files.TOKENIZER, FIGURES, _CARD, files.CONFIG):
                    self._put(Path(temporary) / name, directory / name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ArtifactError(f"{directory}: cannot be written: {error}") from error
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or directory.resolve().name, **push_to_hub_kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Share the model on the Hugging Face Hub, with the Hub's own options; DataError without a tokenizer."""
        self.own_tokenizer()
        return str(super().push_to_hub(repo_id, **options))

    def _write_files(self, directory: Path) -> None:
        """All files of the model; figures only of the very weights that were measured."""
        state = self.weights()
        if self.figures is not None and self.figures.weights != weights_hash(state):
            logger.warning("the weights have changed since they were measured: the figures are left out")
            self.figures = None
        files.write_config(directory, self.settings(), type(self).__name__)
        files.write_weights(directory, state)
        self.own_tokenizer().save(directory / files.TOKENIZER)
        if self.figures is not None:
            (directory / FIGURES).write_text(self.figures.model_dump_json(indent=2))
        self.generate_model_card().save(directory / _CARD)

    @staticmethod
    def _put(new: Path, place: Path) -> None:
        """Put a written file in its place; take away an earlier model's, but nothing that somebody else wrote."""
        if place.name == _CARD and place.is_file() and GENERATED not in place.read_text(errors="replace"):
            return
        if new.exists():
            new.replace(place)
        elif place.is_file():
            try:
                read_figures(place.parent)
            except ArtifactError:
                return
            place.unlink()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A card that says what the model is, how to use it and what was measured."""
        name = type(self).__name__
        head = card_metadata(name, self.figures).to_yaml()
        return ModelCard(f"---\n{head}\n---\n\n{card_text(name, self.facts(), self.figures)}")

    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What the card's table says of the model."""

    def own_tokenizer(self) -> RxtTokenizer:
        """The tokenizer; DataError without one."""
        if self.tokenizer is None:
            raise DataError("this model has no tokenizer: use set_tokenizer")
        return self.tokenizer

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids that the model knows."""

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
    except (OSError, ValueError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{name}: no such directory, and not to be had from the Hub: {reason}") from error


def checked_ids(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and their boolean mask. Raises DataError for what the model can't take."""
    ids = input_ids
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(ids.device).bool()
    if ids.dim() != 2 or ids.shape != mask.shape or ids.is_floating_point() or not ids.numel():
        raise DataError(
            f"input_ids {list(ids.shape)} of {ids.dtype} with attention_mask {list(mask.shape)}: both must be [B, T], "
            "and ids whole numbers"
        )
    if not mask.any(dim=1).all():
        raise DataError("a row of the attention mask has no real token")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(f"input_ids hold {int(ids.min())} to {int(ids.max())}: the model knows 0 to {vocab_size - 1}")
    return ids, mask
