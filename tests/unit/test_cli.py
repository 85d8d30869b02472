"""Promises of `rxt` itself: help that fits a screen, quickly there; a config checked without anything else."""

import json
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from rxt_platform.cli import guarded, rxt
from rxt_platform.config.run import RunConfig
from tests.support import BIN, ROOT

QUICKSTART = str(ROOT / "pipelines/configs/quickstart.yaml")
_SCREEN = (80, 36)  # columns and lines


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command, by the words that call it."""
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(commands(rxt)), ids=" ".join)
def test_help_fits_a_screen(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: rxt([*path, "--help"], standalone_mode=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Usage: ")
    assert len(lines) <= _SCREEN[1]
    assert max(map(len, lines)) <= _SCREEN[0]


@pytest.mark.parametrize("arguments", [("--help",), ("validate", QUICKSTART)], ids=["help", "validate"])
def test_what_must_be_quick_does_without_torch(arguments: tuple[str, ...]) -> None:
    code = f"""
import sys
from rxt_platform.cli import guarded, rxt
status = guarded(lambda: rxt({list(arguments)!r}, standalone_mode=False))
sys.exit(status or bool({{"torch", "ray", "mlflow", "transformers", "datasets"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_validate_names_stages_or_the_wrong_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: rxt(["validate", QUICKSTART], standalone_mode=False)) == 0
    assert capsys.readouterr().out == (
        "valid: quickstart: pretraining (joint_pretraining), sft (interaction_sft), memory_pretraining "
        "(memory_pretraining), memory_aware (memory_aware), mrl (memory_rl)\n"
    )
    assert guarded(lambda: rxt(["validate", QUICKSTART, "stages.sft.epoch=3"], standalone_mode=False)) == 2
    assert "unknown key 'stages.sft.epoch'; nearest valid: epochs" in capsys.readouterr().err


def test_validate_shows_the_whole_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: rxt(["validate", QUICKSTART, "seed=7", "--json"], standalone_mode=False)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["model"]["hidden_size"]) == (7, 128)
    assert RunConfig.model_validate(shown).seed == 7


def test_the_installed_script_is_this_one() -> None:
    told = subprocess.run([BIN / "rxt", "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert {name for name in rxt.commands if f"\n  {name} " in told} == set(rxt.commands)
