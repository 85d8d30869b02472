"""Promises of all of `rxt data`: bounded memory, one clear line for what is asked for wrongly."""

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from rxt_platform import cli_data
from rxt_platform.data.formats import FileFormat
from rxt_platform.data.rows import RowKind
from tests.unit.data_commands import QUICKSTART, Capture, ran, refused
from tests.unit.data_files import put_rows, turn


@pytest.mark.parametrize("command", [["inspect"], ["validate"], ["sample"]])
def test_memory_does_not_grow_with_the_rows(capsys: Capture, tmp_path: Path, command: list[str]) -> None:
    row = {"query": "q" * 200, "answer": "a" * 1000}
    peaks = []
    for count in (3_000, 15_000):  # of 1.2 KB: a group of rows is full in both
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as out:
            out.writelines(json.dumps({**row, "answer": f"{row['answer']}{n}"}) + "\n" for n in range(count))
        tracemalloc.start()
        ran(capsys, *command, file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3 * 2**20, peaks  # the file has 15 MB more


WRONG: list[tuple[Sequence[str], str]] = [
    (["inspect", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["inspect", "empty"], "empty: an empty folder"),
    (["inspect", "rows.jsonl", "--window", "64"], "--window counts tokens: give --tokenizer too"),
    (["inspect", "rows.jsonl", "--tokenizer", "rows.jsonl"], "rows.jsonl: not a readable tokenizer"),
    (["inspect", "rows.jsonl", "--tokenizer", "empty"], "empty/tokenizer.json: not a readable tokenizer"),
    (["inspect", "rows.jsonl", "--histogram", "a.jpg"], "--histogram a.jpg: a picture is a PNG file"),
    (["inspect", "rows.jsonl", "--histogram", "no/a.png"], "--histogram no/a.png: there is no folder"),
    (["inspect", "rows.jsonl", "name=x"], "'name=x': KEY=VALUE changes a run's YAML, and rows.jsonl is none"),
    (["inspect", "rows.jsonl", "--split", "test"], "--config and --split are for data sets of the Hub"),
    (["inspect", "hf:"], "'hf:' names no source"),
    (["inspect", "hf:owner/name[test]", "--split", "train"], "names the split test and --split another"),
    (["inspect", "hf:owner/name", "--separator", "x"], "--format and --separator are for files"),
    (["inspect", "nothing.yaml"], "nothing.yaml: no such config file"),
    (["inspect", "QUICKSTART", "--format", "csv"], "a run's YAML says how its sources are read: leave out --format"),
    (["inspect", "QUICKSTART", "data.tests=x"], "unknown key 'data.tests'"),
    (["validate", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["validate", "rows.jsonl", "--held-out", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["validate", "rows.jsonl", "--tokenizer", "rows.jsonl"], "--tokenizer checks whether rows fit the model's window"),
    (["validate", "QUICKSTART", "--kind", "text"], "--held-out and --kind are for a source"),
    (["validate", "rows.jsonl", "--bad-rows", "no/bad.jsonl"], "--bad-rows no/bad.jsonl: cannot be written"),
    (["build", "nothing.yaml"], "nothing.yaml: no such config file"),
    (["build", "QUICKSTART", "storage=rows.jsonl"], "cannot be made"),
    (["sample", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["sample", "story_world", "--tasks", "recal"], "--tasks: unknown task 'recal'; tasks: recall, several, update"),
    (["sample", "story_world", "--tasks", "update", "--turns", "2"], "--tasks update --turns 2: tasks update take 3"),
    (["sample", "story_world", "--turns", "1"], "--turns 1: conversations have 2 to 20 turns"),
    (["sample", "story_world", "--split", "test"], "--split test: there are train and validation"),
    (["sample", "story_world", "--format", "csv"], "story_world takes --seed, --turns, --tasks and --split only"),
    (["sample", "rows.jsonl", "--turns", "4"], "--turns and --tasks are for story_world"),
    (["sample", "QUICKSTART", "--split", "test"], "--split test: there are train and validation"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_what_is_asked_for_wrongly_is_named_in_one_line(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put_rows(tmp_path, "rows.jsonl", [turn(1)])
    (tmp_path / "empty").mkdir()
    given = [str(QUICKSTART) if argument == "QUICKSTART" else argument for argument in arguments]
    out, error = refused(capsys, *given)
    assert message in error
    assert out == ""


def test_the_choices_are_those_of_the_readers() -> None:
    assert get_args(RowKind) == cli_data.KINDS
    assert get_args(FileFormat) == cli_data.FORMATS
