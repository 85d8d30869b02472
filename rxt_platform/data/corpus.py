"""The corpus of a run: validated rows as files, one artifact that tokenizer, stages and evaluation all read.

texts.{train,validation}.jsonl · interactions.… · conversations.…  + tokenizer.json made from the training rows
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from rxt_platform.config.run import DataConfig
from rxt_platform.data import sources
from rxt_platform.data.batches import Example, text_examples
from rxt_platform.data.rows import Conversation, conversation_from_row, conversation_to_row, interaction_to_row
from rxt_platform.data.story_world import Split
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import DataError

RowKind = Literal["texts", "interactions", "conversations"]
ROW_KINDS: tuple[RowKind, ...] = ("texts", "interactions", "conversations")
SPLITS: tuple[Split, ...] = ("train", "validation")


def build_corpus(config: DataConfig, directory: Path) -> dict[str, float]:
    """Read, validate and write all rows of a run. Returns counts."""
    texts, turns, talks = sources.texts(config), sources.interactions(config), sources.conversations(config)
    counts: dict[str, float] = dict(texts.notes)
    for split in SPLITS:
        rows: dict[RowKind, Iterable[dict[str, Any]]] = {
            "texts": ({"text": text} for text in getattr(texts, split)),
            "interactions": (interaction_to_row(turn) for turn in getattr(turns, split)),
            "conversations": (conversation_to_row(talk) for talk in getattr(talks, split)),
        }
        for kind, values in rows.items():
            counts[f"{kind}_{split}"] = _write_lines(directory / f"{kind}.{split}.jsonl", values)
    return counts


def read_rows(directory: Path, kind: RowKind, split: Split) -> Iterator[dict[str, Any]]:
    """Rows of a corpus as they were written."""
    with (directory / f"{kind}.{split}.jsonl").open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def corpus_texts(directory: Path) -> Iterator[str]:
    """Every training text, query and answer: what the tokenizer learns from."""
    for row in read_rows(directory, "texts", "train"):
        yield row["text"]
    for kind in ("interactions", "conversations"):
        for row in read_rows(directory, kind, "train"):
            for turn in conversation_from_row(row).interactions:
                yield turn.query
                yield turn.answer


def load_examples(
    directory: Path, kind: RowKind, split: Split, tokenizer: RxtTokenizer, max_length: int
) -> list[Example]:
    """Rows of one kind as token ids, in their order."""
    if kind == "texts":
        return [
            example
            for row in read_rows(directory, kind, split)
            for example in text_examples(row["text"], tokenizer, max_length)
        ]
    return [
        encode_conversation(conversation_from_row(row), tokenizer, max_length, f"{kind}.{split}, row {number}")
        for number, row in enumerate(read_rows(directory, kind, split), start=1)
    ]


def encode_conversation(talk: Conversation, tokenizer: RxtTokenizer, max_length: int, place: str) -> Example:
    """A conversation as token ids. Raises DataError that names `place` and the turn when a query fills the window."""
    turns = []
    for index, turn in enumerate(talk.interactions):
        try:
            turns.append(tokenizer.encode_interaction(turn.query, turn.answer, max_length))
        except DataError as error:
            shown = turn.query if len(turn.query) <= 60 else turn.query[:60] + "..."
            raise DataError(
                f"{place}, turn {index} ({shown!r}): {error}: shorten the query, or use a model with a longer window"
            ) from None
    return Example.from_interactions(turns)


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
