"""Where a run's rows come from, what becomes of bad ones, and how the tokenizer is trained."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from rxt_platform.config.base import Spec

Share = Annotated[float, Field(gt=0, lt=1)]
Section = Literal["texts", "interactions", "conversations"]
Column = Literal[
    "text",
    "query",
    "answer",
    "interactions",
    "system",
    "internal",
    "tool_use",
    "think",
    "tool_call",
    "answer_span",
    "distance",
    "long_range",
    "task",
]
Task = Literal["recall", "several", "update", "two_facts", "cumulative"]


class SourceBase(Spec):
    """What every source has."""

    weight: float = Field(
        1.0, gt=0, description="times that an epoch holds each training row: 2 is twice, 0.5 another half each time"
    )


class StoryWorldSource(SourceBase):
    """The embedded data: short stories and conversations, made from a seed."""

    kind: Literal["story_world"]
    seed: int = 0
    train_rows: int = Field(gt=0)
    validation_rows: int = Field(gt=0)
    turns: list[Annotated[int, Field(ge=2, le=20)]] = Field(
        [2, 4], min_length=1, description="turns of a conversation; rows take these lengths in turn"
    )
    tasks: list[Task] = Field(["recall"], min_length=1, description="what a conversation's questions take")


class RowsSource(SourceBase):
    """Rows that somebody wrote down; training rows that repeat a held-out one are `validation.duplicates`."""

    validation_share: Share = Field(
        0.05,
        description="share of the rows that are held out, chosen by their content, where no held-out part is named",
    )
    validation_rows: int = Field(2000, gt=0, description="most rows of that share; the others stay training data")
    columns: dict[Column, str] = Field(
        default_factory=dict, description="for a column of the row kind, the name it has here, also in `interactions`"
    )
    max_rows: int | None = Field(None, gt=0, description="use only the first rows of each split")
    max_turns: int | None = Field(None, ge=2, description="cut longer conversations to their first turns")

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        names = list(self.columns.values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: two of ours are mapped to '{twice[0]}'; each needs a column of its own")
        return self


class FilesSource(RowsSource):
    """Parquet, JSON lines, CSV or plain text, also compressed; a file, a folder or a glob."""

    kind: Literal["files"]
    path: str = Field(min_length=1, description="relative paths are relative to data.root")
    validation_path: str | None = Field(None, description="the held-out rows, if they are files of their own")
    format: Literal["parquet", "jsonl", "csv", "text"] | None = Field(None, description="by the name's ending")
    separator: str | None = Field(
        "<|endoftext|>", min_length=1, description="what parts the documents of plain text; null: a file is a document"
    )


class HubSource(RowsSource):
    """A data set of the Hugging Face Hub, or a folder that is laid out like one."""

    kind: Literal["hub"]
    path: str = Field(min_length=1, description="owner/name; or a folder, relative to data.root")
    config: str | None = Field(None, description="the data set's configuration, such as steps-4")
    split: str = "train"
    validation_split: str | None = Field(
        "validation", description="null: `validation_share` of the training split is held out"
    )
    revision: str | None = None
    streaming: bool = Field(True, description="read over the network; false: download first, then memory-map")


Source = Annotated[StoryWorldSource | FilesSource | HubSource, Field(discriminator="kind")]


def _as_sources(value: Any) -> Any:
    """A source is a list of one; a bare string is `hf:owner/name` or the path of files."""
    listed = value if isinstance(value, list) else [value]
    return [_as_source(one) if isinstance(one, str) else one for one in listed]


def _as_source(text: str) -> dict[str, str]:
    name = text.removeprefix("hf:")
    return {"kind": "files", "path": text} if name == text else {"kind": "hub", "path": name}


Sources = Annotated[list[Source], BeforeValidator(_as_sources), Field(min_length=1)]


class ValidationConfig(Spec):
    """What becomes of rows that can't be used as they are. All of them are counted, in the artifact and the report."""

    bad_rows: Literal["fail", "quarantine"] = Field(
        "fail", description="missing, null, wrongly typed, empty, not Unicode, unreadable; quarantine sets them aside"
    )
    max_bad_share: float = Field(0.01, ge=0, le=1, description="quarantined share of a source's rows that is an error")
    too_long: Literal["truncate", "quarantine", "fail"] = Field(
        "truncate", description="interactions longer than the model's window: cut the answer's end, or treat as bad"
    )
    duplicates: Literal["drop", "keep", "fail"] = Field(
        "drop", description="training rows that say again what a held-out row says"
    )
    near_duplicate: float = Field(
        0.8, gt=0, le=1, description="share of common word 8-grams from which rows count as the same"
    )
    largest_row: int = Field(16 * 2**20, gt=0, description="bytes of one row of a file")


class TokenizerConfig(Spec):
    """Byte-level BPE, trained on the corpus; its size is the model's `vocab_size`."""

    max_bytes: int = Field(256 * 2**20, gt=0, description="text to learn from, evenly taken from the training rows")
    min_frequency: int = Field(2, gt=0, description="a pair must occur so often to be merged")


class DataConfig(Spec):
    """Where each kind of rows comes from, one source or a list of them. Relative paths are relative to `root`."""

    root: str = "."
    texts: Sources | None = Field(None, description="documents, for language-model pre-training")
    interactions: Sources | None = Field(
        None, description="single interactions, for supervised fine-tuning; of conversations, each turn by itself"
    )
    conversations: Sources = Field(description="for the memory stages and the evaluation")
    validation: ValidationConfig = ValidationConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()

    @model_validator(mode="after")
    def _turns_where_there_are_some(self) -> Self:
        for source in self.texts or []:
            if isinstance(source, RowsSource) and source.max_turns is not None:
                raise ValueError("texts have no turns: max_turns belongs to interactions and conversations")
        return self
