"""Tables as text for a terminal and as HTML for a page: cells come formatted, this only lays them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LABEL_WIDTH = 24  # a longer stage name is cut, which keeps every table within 100 columns


@dataclass(frozen=True)
class Table:
    """Cells ready to print. The first `labels` columns are text (left-aligned), the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


def text_table(table: Table, label_width: int = _LABEL_WIDTH) -> str:
    """Aligned columns under a rule; labels are cut to `label_width` characters."""
    lines = [
        [_cut(cell, label_width) if index < table.labels else cell for index, cell in enumerate(row)]
        for row in table.rows
    ]
    widths = [max(map(len, column)) for column in zip(table.header, *lines, strict=True)]
    ruled = [list(table.header), ["-" * width for width in widths], *lines]
    return "\n".join(_text_row(row, widths, table.labels) for row in ruled)


def _text_row(row: Sequence[str], widths: Sequence[int], labels: int) -> str:
    cells = zip(row, widths, strict=True)
    return "  ".join(cell.ljust(width) if i < labels else cell.rjust(width) for i, (cell, width) in enumerate(cells))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def html_table(table: Table) -> str:
    """The same as HTML, all text escaped."""

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ["" if index < table.labels else ' class="n"' for index in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    head = f"<thead><tr>{cells(table.header, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
