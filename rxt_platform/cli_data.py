"""`rxt data`: inspect, validate, build, sample. Thin: every command is a function of a lower floor."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from rxt_platform.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rxt_platform.config.run import RunConfig
    from rxt_platform.data.sources import PlacedRow
    from rxt_platform.data.tokenizer import RxtTokenizer
    from rxt_platform.inspection.histogram import Panel
    from rxt_platform.inspection.parts import Part
    from rxt_platform.inspection.samples import Line
    from rxt_platform.inspection.validation import Finding

Command = Callable[..., Any]
KINDS = ("text", "interaction", "conversation", "hybrid", "preference")
FORMATS = ("parquet", "jsonl", "csv", "text")
_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")


@click.group()
def data() -> None:
    """Look at rows before training on them. SOURCE: a file, folder or glob, hf:owner/name, or a run's YAML."""


def _source_options(command: Command) -> Command:
    """SOURCE and how to read it."""
    for option in (
        click.option("--separator", help="What parts the documents of plain text; empty: a file is a document."),
        click.option("--format", "file_format", type=click.Choice(FORMATS), help="By the name's ending if not given."),
        click.option("--split", help="Split of the data set; of a run or the story world, train or validation."),
        click.option("--config", "hub_config", help="Configuration of a data set of the Hub."),
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.argument("source"),
    ):
        command = option(command)
    return command


@data.command()
@_source_options
@click.option("--tokenizer", help="tokenizer.json, model directory or run's folder: also count tokens.")
@click.option(
    "--window", type=click.IntRange(min=8), help="Tokens: count what is longer. Of a run, its own by default."
)
@click.option("--rows", type=click.IntRange(min=1), help="Look at the first rows of each source only.")
@click.option("--histogram", help="Write a picture of the lengths to this PNG file.")
@_AS_JSON
def inspect(
    source: str,
    overrides: tuple[str, ...],
    tokenizer: str | None,
    window: int | None,
    rows: int | None,
    histogram: str | None,
    as_json: bool,
    **how: str | None,
) -> None:
    """Show what is in SOURCE: files, columns, rows, and how long everything is."""
    from rxt_platform.inspection.measures import inspect_part
    from rxt_platform.inspection.parts import run_parts

    picture = _picture(histogram)
    if _is_run(source):
        run = _run(source, overrides, how)
        parts = run_parts(run.data)
        window = window or (run.model.max_length if tokenizer else None)
    else:
        parts = [_named(source, overrides, how)]
    counter = _tokenizer(tokenizer, window)
    progress = _Progress()
    found = [inspect_part(part, counter, window, rows, progress) for part in parts]
    progress.clear()
    if picture:
        from rxt_platform.inspection.histogram import panels_of

        _draw(picture, panels_of(found))
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], indent=2))
        return
    from rxt_platform.inspection.listing import render_inspection

    click.echo("\n\n\n".join(map(render_inspection, found)))


@data.command()
@_source_options
@click.option("--held-out", help="Another source, such as hf:owner/name[test]: find what SOURCE says again.")
@click.option("--kind", type=click.Choice(KINDS), help="Row kind; guessed from each file's columns if not given.")
@click.option("--tokenizer", help="With --window: rows that don't fit are bad. A run cuts them, or as its YAML says.")
@click.option("--window", type=click.IntRange(min=8), help="Tokens. Of a run, its own by default.")
@click.option("--bad-rows", help="Write every finding to this JSON-lines file.")
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="Findings that are shown.")
@_AS_JSON
def validate(
    source: str,
    overrides: tuple[str, ...],
    held_out: str | None,
    kind: str | None,
    tokenizer: str | None,
    window: int | None,
    bad_rows: str | None,
    limit: int,
    as_json: bool,
    **how: str | None,
) -> None:
    """Check every row of SOURCE, or all sources of a run by its own policies. Exit code 2 if any can't be used.

    Rows of a run that its policies set aside are listed too, but are no error.
    """
    from rxt_platform.data.examples import RowEncoder, TooLong
    from rxt_platform.inspection.listing import render_validation
    from rxt_platform.inspection.validation import Validation

    policy: TooLong = "quarantine"
    run: RunConfig | None = None
    if _is_run(source):
        run = _run(source, overrides, how)
        if held_out or kind:
            raise ConfigError("--held-out and --kind are for a source; a run's YAML names its own held-out rows")
        window, policy = window or (run.model.max_length if tokenizer else None), run.data.validation.too_long
    elif tokenizer and not window:
        raise ConfigError("--tokenizer checks whether rows fit the model's window: give --window too")
    counter = _tokenizer(tokenizer, window)
    progress = _Progress()
    check = Validation(RowEncoder(counter, window, policy) if counter and window else None, progress)
    if run is None:
        part = _named(source, overrides, {**how, "kind": kind})
        other = None
        if held_out:  # of the same sort, it is read in the same way
            alike = held_out.startswith("hf:") == source.startswith("hf:")
            other = _named(held_out, (), {**how, "split": None, "kind": kind} if alike else {"kind": kind})
        findings = check.source(part, other)
    else:
        findings = check.run(run.data)
    shown = _show_findings(findings, limit, bad_rows, as_json, progress)
    refused = [f"{one.section} {one.split}: {reason}" for one in check.checked for reason in one.refused]
    if as_json:
        counts = {"checked": [vars(one) for one in check.checked], "reasons": dict(check.reasons.most_common())}
        click.echo(json.dumps({**counts, "findings": shown, "refused": refused}, indent=2, ensure_ascii=False))
    else:
        click.echo(render_validation(check))
    unusable = f"rows that can't be used: {check.bad:,} of {check.rows:,}"
    if run is None and (check.bad or check.unreadable):
        files = f"; files that can't be read to their end: {check.unreadable:,}" if check.unreadable else ""
        raise DataError(f"{source}: {unusable}{files}")
    if refused:
        raise DataError(f"{source}: {unusable}; a run would stop: {'; '.join(refused)}")
    if not as_json:
        click.echo(f"\n{unusable}" + ("; the run sets them aside" if check.bad else ""))


@data.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--histogram", help="Write a picture of the token lengths to this PNG file.")
@_AS_JSON
def build(config: str, overrides: tuple[str, ...], histogram: str | None, as_json: bool) -> None:
    """Make corpus, tokenizer and token shards of the run CONFIG, which `rxt run` then reuses."""
    from rxt_platform.config.loading import load_run
    from rxt_platform.orchestration.data_build import build_data, render_built

    picture = _picture(histogram)
    built = build_data(load_run(config, overrides))
    if picture:
        from rxt_platform.inspection.histogram import panels_of_tokens

        _draw(picture, panels_of_tokens(built["tokens"]))
    click.echo(json.dumps(built, indent=2, ensure_ascii=False) if as_json else render_built(built))


@data.command()
@_source_options
@click.option("-n", "--rows", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--first", is_flag=True, help="The first rows instead of a fair sample of all.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of sample or story world."
)
@click.option("--turns", type=int, help="Of the story world's conversations; 4 if not given.")
@click.option("--tasks", help="Of the story world's questions, with commas between them; recall if not given.")
@_AS_JSON
def sample(
    source: str,
    overrides: tuple[str, ...],
    rows: int,
    first: bool,
    seed: int,
    turns: int | None,
    tasks: str | None,
    as_json: bool,
    **how: str | None,
) -> None:
    """Print some rows of SOURCE, or of the `story_world`, to read: questions with their answer keys."""
    from rxt_platform.inspection import samples

    dice = None if first else seed
    split = how["split"] or "train"
    found: list[tuple[str | None, Sequence[PlacedRow]]]
    if source == "story_world":
        if overrides or any(how[name] is not None for name in ("hub_config", "file_format", "separator")):
            raise ConfigError("story_world takes --seed, --turns, --tasks and --split only")
        asked = [task.strip() for task in (tasks or "recall").split(",")]
        found = [(None, samples.sample_world(seed, split, rows, turns if turns is not None else 4, asked))]
    elif turns is not None or tasks is not None:
        raise ConfigError("--turns and --tasks are for story_world")
    elif _is_run(source):
        run = _run(source, overrides, {**how, "split": None})
        found = [*samples.sample_run(run.data, samples.split_named(split), rows, dice)]
    else:
        found = [(None, samples.sample_part(_named(source, overrides, how), rows, dice))]
    if as_json:
        listed = [samples.sample_to_json(section, row) for section, group in found for row in group]
        click.echo(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    for section, group in found:
        for placed in group:
            click.echo(click.style(f"{f'{section}  ' if section else ''}{placed.file}:{placed.number}", bold=True))
            assert placed.row is not None
            for line in samples.lines_of(placed.row):
                click.echo(styled(line))
            click.echo()


def styled(line: Line) -> str:
    """A line of a dialogue for the terminal; what the answer key says is dim."""
    note = click.style(f"   [{line.note}]", dim=True) if line.note else ""
    label = f"{line.speaker:<5}> " if line.speaker else ""
    return label + line.text.replace("\n", "\n" + " " * len(label)) + note


def _show_findings(
    findings: Iterable[Finding], limit: int, path: str | None, quiet: bool, progress: _Progress
) -> list[dict[str, Any]]:
    """Print the first findings as they come, write all to `path`; returns those that are shown."""
    shown: list[dict[str, Any]] = []
    total = 0
    out = _new_file(path) if path else None
    try:
        for finding in findings:
            total += 1
            if out is not None:
                out.write(json.dumps(finding.to_json(), ensure_ascii=False) + "\n")
            if len(shown) < limit:
                shown.append(finding.to_json())
                if not quiet:
                    progress.clear()
                    click.echo(str(finding))
    finally:
        progress.clear()
        if out is not None:
            out.close()
    if not quiet and total:
        more = f"and {total - len(shown):,} more{f', all in {path}' if path else '; --bad-rows writes all to a file'}\n"
        click.echo(more if total > len(shown) else "")
    return shown


def _is_run(source: str) -> bool:
    return source.endswith((".yaml", ".yml"))


def _run(source: str, overrides: Sequence[str], how: dict[str, str | None]) -> RunConfig:
    from rxt_platform.config.loading import load_run

    named = {"hub_config": "config", "file_format": "format"}
    given = [f"--{named.get(name, name)}" for name, value in how.items() if value is not None]
    if given:
        raise ConfigError(f"{source}: a run's YAML says how its sources are read: leave out {', '.join(given)}")
    return load_run(source, overrides)


def _named(source: str, overrides: Sequence[str], how: dict[str, Any]) -> Part:
    from rxt_platform.inspection.parts import named_part

    if overrides:
        raise ConfigError(f"{overrides[0]!r}: KEY=VALUE changes a run's YAML, and {source} is none")
    renamed = {"hub_config": "config"}
    return named_part(source, **{renamed.get(name, name): value for name, value in how.items()})


def _tokenizer(path: str | None, window: int | None) -> RxtTokenizer | None:
    """Of a file, a model directory or a run's folder. Raises ConfigError for a window without one."""
    if path is None:
        if window is not None:
            raise ConfigError("--window counts tokens: give --tokenizer too")
        return None
    from rxt_platform.data.tokenizer import RxtTokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if file.is_file():
        return RxtTokenizer.load(file)
    from rxt_platform.model.pretrained import load_tokenizer_from_hf_hub

    return load_tokenizer_from_hf_hub(path)


def _picture(path: str | None) -> Path | None:
    """Where a picture goes, checked before anything is read."""
    if path is None:
        return None
    if not path.lower().endswith(".png"):
        raise ConfigError(f"--histogram {path}: a picture is a PNG file: let its name end with .png")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--histogram {path}: there is no folder {Path(path).absolute().parent}")
    return Path(path)


def _draw(path: Path, panels: Sequence[Panel]) -> None:
    from rxt_platform.inspection.histogram import draw_lengths

    if not panels:
        raise DataError(f"--histogram {path}: no row can be used, so there is no length to draw")
    try:
        path.write_bytes(draw_lengths(panels))
    except OSError as error:
        raise ConfigError(f"--histogram {path}: cannot be written: {error.strerror}") from None


def _new_file(path: str) -> IO[str]:
    try:
        return open(path, "x", encoding="utf-8")  # never over a file of rows
    except FileExistsError:
        raise ConfigError(f"--bad-rows {path}: there is such a file already: delete it or name another") from None
    except OSError as error:
        raise ConfigError(f"--bad-rows {path}: cannot be written: {error.strerror}") from None


class _Progress:
    """How many rows were read so far: on a terminal, every other second."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 2
        self._shown = 0

    def __call__(self, rows: int) -> None:
        if sys.stderr.isatty() and time.monotonic() > self._next:
            self._next = time.monotonic() + 2
            text = f"  {rows:,} rows read"
            click.echo(f"\r{text}", err=True, nl=False)
            self._shown = len(text)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            click.echo("\r" + " " * self._shown + "\r", err=True, nl=False)
            self._shown = 0
