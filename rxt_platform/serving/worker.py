"""What a replica computes: rewards of episodes, values of states by an exact version of the critic. No Ray, no HTTP."""

import dataclasses
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rxt_platform.config.serving import ServingConfig
from rxt_platform.data.tokenizer import BOS, EOS, PAD, RxtTokenizer
from rxt_platform.errors import ArtifactError
from rxt_platform.model import files
from rxt_platform.model.encoder_model import RxTEncoder
from rxt_platform.rl import versions
from rxt_platform.rl.rewards import (
    EncoderEmbedding,
    HashedEmbedding,
    TextEmbedding,
    TokenEmbedding,
    score_conversations,
)
from rxt_platform.serving.schema import Refusal, ScoreRequest, Turn, ValueRequest
from rxt_platform.storage.directory import MANIFEST, content_hash, file_hash, read_manifest, verify_directory

logger = logging.getLogger(__name__)

OnTime = Callable[[], None]  # raises when the request's deadline has passed

_TURNS_AT_ONCE = 256


class CriticVersions:
    """The critic's weights by version: of a versions folder, or of one model directory, which is version 0."""

    def __init__(self, config: ServingConfig) -> None:
        """Raises ArtifactError for a model directory that holds none."""
        self._root = Path(config.versions) if config.versions is not None else None
        self._kept = config.service.versions_in_memory
        self._held: OrderedDict[int, RxTEncoder] = OrderedDict()
        self._alone = read_critic(Path(config.model)) if config.model and self._root is None else None

    def available(self) -> list[int]:
        """Versions that can be asked for now, ascending."""
        if self._root is not None:
            return versions.available(self._root)
        return [] if self._alone is None else [0]

    def get(self, version: int | None) -> tuple[int, RxTEncoder]:
        """That version, the newest for None. Refuses (409) one that is not there, naming those that are."""
        there = self.available() if version is None or version not in self._held else [version]
        if not there:
            raise Refusal(409, "no_critic", f"no values here: {self._why_none()}", versions=[])
        wanted = there[-1] if version is None else version
        if self._root is None and wanted == 0 and self._alone is not None:
            return 0, self._alone
        if wanted not in self._held:
            self._held[wanted] = self._load(wanted, there)
            while len(self._held) > self._kept:
                self._held.popitem(last=False)
        self._held.move_to_end(wanted)
        return wanted, self._held[wanted]

    def any_held(self) -> RxTEncoder | None:
        """A critic that is in memory already, if one is."""
        held = list(self._held.values())  # another thread may be loading
        return self._alone or (held[-1] if held else None)

    def _load(self, version: int, there: Sequence[int]) -> RxTEncoder:
        if version in there and self._root is not None:
            try:
                return versions.load(self._root, version)
            except ArtifactError as error:  # pruned in this moment, or damaged
                logger.exception("version %d cannot be used", version)
                reason = f": {error}"
        else:
            reason = ""
        listed = [number for number in there if number != version]
        raise Refusal(409, "no_such_version", f"no version {version}, there are {listed}{reason}", versions=listed)

    def _why_none(self) -> str:
        if self._root is not None:
            return f"no version has been published in {self._root}"
        return "the model that is served has no value head; serve a critic, or a folder of its versions"


def read_critic(directory: Path) -> RxTEncoder | None:
    """An encoder with a value head, from its directory or that of a published version; None for any other model.

    Raises ArtifactError for a directory that holds no model.
    """
    if (directory / MANIFEST).is_file() and read_manifest(directory).kind == versions.KIND:
        verify_directory(directory, versions.KIND)
    else:
        directory = files.find_model(directory)
    if "head" not in files.read_config(directory, (*files.REACTIVE, RxTEncoder.__name__)):
        return None
    model = RxTEncoder.from_directory(directory, None).eval()
    return model if model.head_config.kind == "value" else None


class Worker:
    """Computes, one request at a time."""

    def __init__(self, config: ServingConfig) -> None:
        """Raises ArtifactError for a model that can't be loaded."""
        self._limits = config.service
        self._rewards = config.rewards
        self._place = config.versions or config.model
        self.critics = CriticVersions(config)
        self._embedding = _embedding(config)
        self._reward_version = reward_version(config)

    def score(self, request: ScoreRequest, on_time: OnTime) -> dict[str, Any]:
        """Rewards of all follow-ups. Refuses what is too large, and a follow-up without its saved interaction."""
        self._check_episodes(request.episodes)
        rewards = []
        for part in _together(request.episodes, len, _TURNS_AT_ONCE):
            on_time()
            turns = [[turn.scored() for turn in episode] for episode in part]
            rewards += score_conversations(turns, self._rewards, self._embedding)
        answer = [[dataclasses.asdict(one) for one in episode] for episode in rewards]
        return {"version": self._reward_version, "rewards": answer}

    def value(self, request: ValueRequest, on_time: OnTime) -> dict[str, Any]:
        """Values of all rows by one version. Refuses what the critic can't read, naming the row."""
        if (count := len(request.input_ids or request.texts or ())) > self._limits.max_rows:
            raise _too_many(count, self._limits.max_rows, "rows")
        version, model = self.critics.get(request.version)
        if request.texts is not None:
            self._check_lengths(enumerate(request.texts), "texts.{}")
            rows = _text_rows(request.texts, model.own_tokenizer())
        else:
            rows = request.input_ids or []
        check_rows(rows, model.vocab_size, model.window)
        values = values_of(model, rows, self._limits.batch_tokens, on_time)
        if wrong := [row for row, value in enumerate(values) if not math.isfinite(value)]:
            raise Refusal(
                500, "not_finite", f"version {version} gives values that are not finite, first for row {wrong[0]}"
            )
        return {"version": version, "values": values}

    def info(self) -> dict[str, Any]:
        """What the service has and allows."""
        held = self.critics.any_held()
        return {
            "model": self._place,
            "versions": self.critics.available(),
            "rewards": self._reward_version,
            "vocab_size": held and held.vocab_size,
            "window": held and held.window,
            "limits": {
                name: getattr(self._limits, name)
                for name in (
                    *("max_body_bytes", "max_json_depth", "max_rows", "max_text_length", "max_queued_requests"),
                    "request_timeout_s",
                )
            },
        }

    def _check_episodes(self, episodes: Sequence[Sequence[Turn]]) -> None:
        turns = sum(map(len, episodes))
        if turns > self._limits.max_rows:
            raise _too_many(turns, self._limits.max_rows, "turns")
        for number, episode in enumerate(episodes):
            if not episode:
                raise _invalid(f"episodes.{number}", "an episode without a turn")
            for turn_number, turn in enumerate(episode):
                at = f"episodes.{number}.{turn_number}"
                if turn_number and turn.saved is None:
                    raise _invalid(f"{at}.saved", "a follow-up needs the saved interaction, that of the turn before")
                texts = (turn.query, turn.reference, turn.generated, turn.saved or "", *(turn.spans or ()))
                self._check_lengths(((at, text) for text in texts), "{}")

    def _check_lengths(self, texts: Iterator[tuple[Any, str]] | Any, where: str) -> None:
        limit = self._limits.max_text_length
        for place, text in texts:
            if len(text) > limit:
                at = where.format(place)
                raise Refusal(413, "too_long", f"{at}: a text of {len(text)} characters; at most {limit}", at=at)


def reward_version(config: ServingConfig) -> str:
    """Short hash of all that a reward depends on beside its texts."""
    weights = None if config.reward_model is None else file_hash(Path(config.reward_model) / files.WEIGHTS)
    rewards = config.rewards.model_dump(mode="json")
    return content_hash({"config": rewards, "meaning": config.meaning, "weights": weights})[:12]


def _embedding(config: ServingConfig) -> TextEmbedding:
    if config.reward_model is None:
        return HashedEmbedding()
    directory = Path(config.reward_model)
    return TokenEmbedding(directory) if config.meaning == "tokens" else EncoderEmbedding.load(directory)


def check_rows(rows: Sequence[Sequence[int]], vocab_size: int, window: int) -> None:
    """Refuses (422) rows that an encoder can't read, naming the first one."""
    for number, row in enumerate(rows):
        at = f"input_ids.{number}"
        if not row:
            raise _invalid(at, "an empty row")
        if len(row) > window:
            raise _invalid(at, f"{len(row)} tokens; the critic's window holds {window}")
        if min(row) < 0 or max(row) >= vocab_size:
            place, token = next((i, token) for i, token in enumerate(row) if not 0 <= token < vocab_size)
            raise _invalid(f"{at}.{place}", f"token id {token}; the critic knows 0 to {vocab_size - 1}")


@torch.inference_mode()
def values_of(model: RxTEncoder, rows: Sequence[Sequence[int]], batch_tokens: int, on_time: OnTime) -> list[float]:
    """V of each row, in the rows' order; rows of like length are computed together, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    values = [math.nan] * len(rows)
    for batch in _batches(order, rows, batch_tokens):
        on_time()
        width = len(rows[batch[-1]])
        ids = torch.tensor([[*rows[number], *[PAD] * (width - len(rows[number]))] for number in batch])
        mask = torch.arange(width) < torch.tensor([len(rows[number]) for number in batch]).unsqueeze(1)
        for number, value in zip(batch, model(ids, mask)[:, 0].float().tolist(), strict=True):
            values[number] = value
    return values


def _batches(order: Sequence[int], rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `batch_tokens` with padding; `order` goes from short to long."""
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * len(rows[number]) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _together(items: Sequence[Any], size: Callable[[Any], int], most: int) -> Iterator[list[Any]]:
    """Items in groups whose sizes sum to at most `most`, or of one."""
    group: list[Any] = []
    total = 0
    for item in items:
        if group and total + size(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def _text_rows(texts: Sequence[str], tokenizer: RxtTokenizer) -> list[list[int]]:
    return [[BOS, *ids, EOS] for ids in tokenizer.encode_all(texts)]


def _invalid(at: str, message: str) -> Refusal:
    return Refusal(422, "invalid", f"{at}: {message}", at=at)


def _too_many(count: int, limit: int, what: str) -> Refusal:
    return Refusal(413, "too_large", f"{count} {what} in a request; at most {limit}: send several", limit=limit)
