"""`rxt artifacts`: what a storage holds. Thin: every command is a function of a lower floor."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from rxt_platform.errors import ArtifactError

_UNITS = ("B", "kB", "MB", "GB", "TB")


@click.group()
def artifacts() -> None:
    """Look at what runs have stored: list, show, verify, delete what is unused."""


@artifacts.command("list")
@click.argument("storage", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def list_stored(storage: str, as_json: bool) -> None:
    """The artifacts of STORAGE (by default runs), newest first, and the runs that use them."""
    from rxt_platform.orchestration.store import read_store
    from rxt_platform.tables import Table, text_table

    stored = read_store(Path(storage))
    if as_json:
        click.echo(json.dumps([_as_json(one) for one in stored], indent=2))
        return
    rows = [
        [
            one.path.name,
            one.manifest.kind if one.manifest else "damaged",
            ", ".join(one.runs) or ("an input" if one.kept else "unused"),
            _day(one.manifest.created) if one.manifest else "-",
            _bytes(one.size),
        ]
        for one in stored
    ]
    click.echo(text_table(Table(["artifact", "kind", "runs", "made (UTC)", "size"], rows, labels=4), 44))
    for one in stored:
        if one.problem:
            click.echo(f"damaged: {one.problem}")


@artifacts.command()
@click.argument("artifact")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def show(artifact: str, as_json: bool) -> None:
    """ARTIFACT (a directory): its files and hashes, and what it was made from, back to the corpus."""
    from rxt_platform.orchestration.store import lineage
    from rxt_platform.storage.directory import read_manifest

    path = Path(artifact)
    manifest, ancestors = read_manifest(path), lineage(path)
    if as_json:
        found = [{**asdict(one), "stored": one.stored and str(one.stored.path)} for one in ancestors]
        click.echo(json.dumps({**manifest.model_dump(mode="json"), "lineage": found}, indent=2))
        return
    click.echo(f"{path}: {manifest.kind}, made {_day(manifest.created)} UTC, content {manifest.content_sha256}")
    for name, entry in manifest.files.items():
        click.echo(f"  {name:<28} {_bytes(entry.size):>9}  {entry.sha256}")
    click.echo("made from")
    for one in ancestors[1:]:
        where = one.stored.path.name if one.stored else f"{one.identity[:12]} (not in this storage)"
        click.echo(f"{'  ' * one.depth}{one.name}: {where}")


@artifacts.command()
@click.argument("places", nargs=-1, metavar="[STORAGE|ARTIFACT]...")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def verify(places: tuple[str, ...], as_json: bool) -> None:
    """Read every file of artifacts, or of all of a storage, against its hash. Exit status 2 if one is damaged."""
    from rxt_platform.orchestration.store import read_store
    from rxt_platform.storage.directory import MANIFEST, verify_directory

    checked: dict[str, str] = {}
    for place in map(Path, places or ("runs",)):
        single = (place / MANIFEST).exists()
        if not single and not (place / "artifacts").is_dir():
            raise ArtifactError(f"{place}: neither an artifact ({MANIFEST}) nor a storage (a folder artifacts)")
        for path in [place] if single else [one.path for one in read_store(place)]:
            try:
                verify_directory(path)
                checked[str(path)] = ""
            except ArtifactError as error:
                checked[str(path)] = str(error)
            if not as_json:
                click.echo(f"whole    {path}" if not checked[str(path)] else f"damaged  {checked[str(path)]}")
    if as_json:
        click.echo(json.dumps([{"path": path, "damage": damage or None} for path, damage in checked.items()], indent=2))
    damaged = [path for path, damage in checked.items() if damage]
    if damaged:
        raise ArtifactError(
            f"{len(damaged)} of {len(checked)} artifacts damaged, the first is {damaged[0]}: delete its directory, and "
            "the next run makes it again"
        )


@artifacts.command()
@click.argument("storage", default="runs")
@click.option("--delete", is_flag=True, help="Delete it. Without, it is only shown.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def gc(storage: str, delete: bool, as_json: bool) -> None:
    """What no run's last invocation uses in STORAGE: artifacts, resume states, leftovers. Only --delete deletes it."""
    from rxt_platform.orchestration.store import delete_unused, find_unused

    found = []
    for one in delete_unused(Path(storage)) if delete else find_unused(Path(storage)):
        found.append(one)
        if not as_json:
            click.echo(f"{'deleted' if delete else 'unused'}  {_bytes(one.size):>9}  {one.path}  ({one.why})")
    total = sum(one.size for one in found)
    if as_json:
        rows = [{**asdict(one), "path": str(one.path)} for one in found]
        click.echo(json.dumps({"deleted": delete, "bytes": total, "unused": rows}, indent=2))
    elif not found:
        click.echo("nothing is unused")
    else:
        hint = "" if delete else "; --delete deletes it"
        click.echo(f"{len(found)} {'deleted' if delete else 'unused'}, {_bytes(total)}{hint}")


def _as_json(one: Any) -> dict[str, Any]:
    manifest = one.manifest
    return {
        "path": str(one.path),
        "kind": manifest and manifest.kind,
        "content_sha256": manifest and manifest.content_sha256,
        "created": manifest and manifest.created,
        "bytes": one.size,
        "runs": list(one.runs),
        "kept": one.kept,
        "problem": one.problem or None,
    }


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def _bytes(count: float) -> str:
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"
