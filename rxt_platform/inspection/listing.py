"""What the data commands print: an inspection and a validation as plain text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rxt_platform.inspection.measures import FileCounts, Inspection, Lengths, Unit, unit_of
from rxt_platform.inspection.validation import Validation
from rxt_platform.tables import Table, text_table

_MOST_FILES = 20
_MOST_COLUMNS = 40
_WIDTH = 60  # of labels
_BARS = " ▁▂▃▄▅▆▇█"
_BINS = 40


def render_inspection(found: Inspection) -> str:
    """Files, columns and lengths of one part, with a small histogram of each field."""
    damage = [f"can't be read: {file.damage}" for file in found.files if file.damage]
    parts = [found.part.name, "\n".join([_files(found.files), *damage]), _summary(found)]
    columns = found.columns.to_json()
    if columns:
        parts.append(_columns(columns, found.columns.not_counted))
    if found.reasons:
        parts.append(render_reasons(found.reasons))
    if found.lengths:
        parts += [_lengths(found.lengths), _histograms(found.lengths)]
    return "\n\n".join(parts)


def render_validation(found: Validation) -> str:
    """Counts of what was checked, and of the reasons why rows are bad."""
    rows = []
    of_run = any(one.section for one in found.checked)
    sized = found.encoder is not None
    header = [*(["section", "split"] if of_run else []), "source", "rows", "bad", "duplicates", "near", "repeated"]
    header += ["too long", "cut"] if sized else []
    for one in found.checked:
        labels = [one.section or "", one.split or ""] if of_run else []
        numbers = [one.rows, one.bad, one.duplicates, one.near_duplicates, one.repeated]
        numbers += [one.too_long, one.cut] if sized else []
        rows.append([*labels, one.name, *(f"{number:,}" for number in numbers)])
    note = "duplicates, near: of held-out rows. repeated: says the same as an earlier row of its source."
    if sized:
        note += " too long: counted as bad. cut: interactions."
    parts = [text_table(Table(header, rows, labels=3 if of_run else 1), _WIDTH) + "\n" + note]
    if found.reasons:
        parts.append(render_reasons(found.reasons))
    return "\n\n".join(parts)


def render_reasons(reasons: Mapping[str, int]) -> str:
    """Why rows are bad, the commonest reason first."""
    listed = sorted(reasons.items(), key=lambda pair: -pair[1])
    rows = [[reason, f"{count:,}"] for reason, count in listed[:_MOST_COLUMNS]]
    more = [[f"{len(listed) - len(rows)} more reasons", f"{sum(n for _, n in listed[len(rows) :]):,}"]]
    return text_table(Table(["bad because", "rows"], rows + (more if len(listed) > len(rows) else [])), 90)


def bars(lengths: Lengths) -> str:
    """A histogram as one line of block characters, and what it spans."""
    width = -(-lengths.span // _BINS)
    bins = -(-lengths.span // width)
    counts = lengths.histogram(bins, width).tolist()
    most = max(counts)
    # What is there at all shows: the lowest bar stands for few, the blank for none.
    line = "".join(_BARS[0 if not count else max(1, round(8 * count / most))] for count in counts)
    hidden = lengths.number - sum(counts)
    return f"0 │{line}│ {bins * width - 1:,}" + (f"  and {hidden:,} longer" if hidden else "")


def size_text(size: int | None) -> str:
    """Bytes in the unit a person would say."""
    if size is None:
        return "–"
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{amount:,.1f} {units[0]}"


def _files(files: Sequence[FileCounts]) -> str:
    folder = ""
    if len(files) > 1:
        folder = os.path.commonpath([os.path.dirname(file.name) for file in files])
    shown = [
        [
            os.path.relpath(file.name, folder) if folder else file.name,
            file.format,
            file.kind or ("–" if file.damage else "none known"),
            f"{file.rows:,}",
            f"{file.bad:,}",
            size_text(file.size),
        ]
        for file in files[:_MOST_FILES]
    ]
    if len(files) > _MOST_FILES:
        rest = files[_MOST_FILES:]
        rows, bad = sum(file.rows for file in rest), sum(file.bad for file in rest)
        size = sum(file.size or 0 for file in rest)
        shown.append([f"{len(rest):,} more", "", "", f"{rows:,}", f"{bad:,}", size_text(size)])
    return text_table(Table(["file", "format", "row kind", "rows", "bad", "size"], shown, labels=3), _WIDTH)


def _summary(found: Inspection) -> str:
    """What the rows hold, in a few sentences."""
    lines = [f"rows {found.rows:,}, bad {found.bad:,}"]
    if found.turns.number:
        turns = found.turns
        lines[0] += f", interactions {found.interactions:,}"
        lines.append(f"turns of a row: min {turns.shortest:,}, median {turns.quantile(0.5):,}, max {turns.longest:,}")
    if found.questions:
        by_task = ", ".join(f"{task} {count:,}" for task, count in found.questions.most_common(10))
        lines.append(f"questions with an answer key: {found.questions.total():,} ({by_task})")
    if found.window is not None:
        what = f"{found.interactions_over:,} interactions, in {found.rows_over:,} rows"
        if not found.turns.number:
            what = f"{found.rows_over:,} texts, each cut into several windows"
        lines.append(f"longer than the window of {found.window:,} tokens: {what}")
    kinds = {file.kind for file in found.files if not file.damage}
    if not found.part.sections and len(kinds) > 1:
        lines.append("The files hold rows of different kinds: name them as sources of their own.")
    if None in kinds:
        lines.append(
            "No row kind fits the columns: rows need text, or query and answer, or interactions. "
            "In a run's YAML, `columns` says what they are called here."
        )
    return "\n".join(lines)


def _columns(columns: Mapping[str, Mapping[str, int | Mapping[str, int]]], not_counted: int) -> str:
    rows = []
    for name, one in list(columns.items())[:_MOST_COLUMNS]:
        types = one["types"]
        assert isinstance(types, Mapping)
        listed = ", ".join(types) if len(types) < 2 else ", ".join(f"{kind} {count:,}" for kind, count in types.items())
        rows.append([name, listed or "–", f"{sum(types.values()):,}", f"{one['null']:,}", f"{one['missing']:,}"])
    table = text_table(Table(["column", "type", "values", "null", "missing"], rows, labels=2), _WIDTH)
    more = max(0, len(columns) - _MOST_COLUMNS)
    return (
        table
        + (f"\nand {more} columns more" if more else "")
        + (f", {not_counted:,} values in others" if not_counted else "")
    )


def _lengths(lengths: Mapping[str, Mapping[Unit, Lengths]]) -> str:
    rows = []
    for name, of in lengths.items():
        for index, (unit, one) in enumerate(of.items()):
            figures = [f"{one.mean:,.1f}", *(f"{one.quantile(share):,}" for share in (0.5, 0.95)), f"{one.longest:,}"]
            rows.append(["" if index else name, unit, f"{one.number:,}", *figures])
    return text_table(Table(["length of", "in", "number", "mean", "median", "p95", "max"], rows, labels=2), _WIDTH)


def _histograms(lengths: Mapping[str, Mapping[Unit, Lengths]]) -> str:
    width = max(map(len, lengths))
    unit = unit_of(next(iter(lengths.values())))
    return "\n".join([f"{unit}:", *(f"{name:<{width}}  {bars(of[unit])}" for name, of in lengths.items())])
