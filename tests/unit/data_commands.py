"""How the tests of `rxt data` call it, and what they give it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rxt_platform.cli import guarded, rxt
from tests.support import ROOT
from tests.unit.helpers import word_tokenizer

QUICKSTART = ROOT / "pipelines/configs/quickstart.yaml"
LONG = " ".join(f"word{number}" for number in range(60))
Capture = pytest.CaptureFixture[str]


def ran(capsys: Capture, *arguments: object) -> str:
    """What `rxt data` prints when all is well."""
    code = guarded(lambda: rxt(["data", *map(str, arguments)], standalone_mode=False))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def figures(capsys: Capture, *arguments: object) -> Any:
    """The same as read from JSON."""
    return json.loads(ran(capsys, *arguments, "--json"))


def refused(capsys: Capture, *arguments: object) -> tuple[str, str]:
    """What it prints, and its one line of error, when it leaves with exit code 2."""
    code = guarded(lambda: rxt(["data", *map(str, arguments)], standalone_mode=False))
    captured = capsys.readouterr()
    assert code == 2, captured.out + captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.out, captured.err


def a_tokenizer(folder: Path) -> Path:
    """The tokenizer of the other tests as a file."""
    word_tokenizer().save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def a_run(folder: Path, **data: Any) -> Path:
    """A run's YAML over the story world, with other data."""
    raw = yaml.safe_load(QUICKSTART.read_text())
    world = {"kind": "story_world", "train_rows": 8, "validation_rows": 4}
    raw["data"] = {"root": str(folder), **dict.fromkeys(("texts", "interactions", "conversations"), world), **data}
    for stage in raw["stages"].values():
        stage.pop("sources", None)
    raw["storage"] = str(folder / "runs")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
