"""Promises of file formats: every row arrives with its place, a bad one costs itself alone, damage is never silent."""

import bz2
import csv
import gzip
import io
import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rxt_platform.data import raw
from rxt_platform.data.formats import columns_of, read_file
from rxt_platform.data.paths import FileFormat, expand, format_of
from rxt_platform.data.raw import RawRow
from rxt_platform.errors import DataError

END = "<|end|>"
Shown = tuple[int, Any, str | None, str]


def put(folder: Path, name: str, content: bytes | str = "{}\n") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, file_format: FileFormat | None = None, **options: Any) -> list[RawRow]:
    return list(read_file(path, file_format or format_of(path), **options))


def values(rows: list[RawRow]) -> list[tuple[int, Any]]:
    """Numbers and values of rows that must all be good."""
    assert [str(row.problem) for row in rows if row.problem] == []
    return [(row.number, row.value) for row in rows]


def shown(rows: list[RawRow]) -> list[Shown]:
    return [(row.number, row.value, row.problem and str(row.problem), row.raw) for row in rows]


def file_error(path: Path, file_format: FileFormat | None = None, **options: Any) -> str:
    """The message with which reading ends; it names the file first."""
    with pytest.raises(DataError) as caught:
        rows_of(path, file_format, **options)
    start = f"{path}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def parquet(folder: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, folder / "rows.parquet", **options)
    return folder / "rows.parquet"


def strings(*cells: bytes | None) -> pa.Array:
    """A text column whose bytes Arrow does not check."""
    return pa.Array.from_buffers(pa.string(), len(cells), pa.array(cells, pa.binary()).buffers())


# ---- which files


def test_a_path_is_a_file_a_folder_or_a_pattern_relative_to_root(tmp_path: Path) -> None:
    names = ["b.jsonl.gz", "deep/er/c.csv", "a.parquet"]
    for name in [*names, "notes.md", ".hidden.jsonl", "_SUCCESS.txt", ".git/x.jsonl", "_tmp/0/y.parquet"]:
        put(tmp_path, f"data/{name}")
    files = sorted(tmp_path / "data" / name for name in names)
    assert expand("data", tmp_path) == files
    assert expand(str(tmp_path / "data"), Path("/nowhere")) == files
    assert expand("data/b.jsonl.gz", tmp_path) == [tmp_path / "data/b.jsonl.gz"]
    assert expand("data/notes.md", tmp_path) == [tmp_path / "data/notes.md"], (
        "a file named by itself may end in anything"
    )
    matched = ["_SUCCESS.txt", "a.parquet", "b.jsonl.gz", "notes.md"]
    assert expand("data/*.*", tmp_path) == [tmp_path / "data" / name for name in matched], (
        "a pattern means what it says"
    )
    assert expand("data/**/[ac].*[vt]", tmp_path) == [tmp_path / "data/a.parquet", tmp_path / "data/deep/er/c.csv"]
    assert expand(f"{tmp_path}/data/**/**/c.*", Path("/nowhere")) == [tmp_path / "data/deep/er/c.csv"], "once"


def test_an_existing_name_is_no_pattern(tmp_path: Path) -> None:
    put(tmp_path, "a1.jsonl")
    literal = put(tmp_path, "a[1].jsonl")
    assert expand("a[1].jsonl", tmp_path) == [literal]
    inside = put(tmp_path, "set[1]/x.jsonl")
    assert expand("set[1]", tmp_path) == [inside]
    assert expand("*.jsonl", tmp_path / "set[1]") == [inside], "nor is the root's"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "none.jsonl",
            "none.jsonl: no such file or folder: looked for {root}/none.jsonl; relative paths are taken from",
        ),
        ("no*.jsonl", "no*.jsonl: no file matches: looked for {root}/no*.jsonl; relative paths are taken from {root}"),
        ("mark*", "mark*: no file matches"),
        ("markdown", "{root}/markdown: none of its 2 files has a known ending; known are .parquet, .pq, .jsonl, "),
        ("bare", "{root}/bare: an empty folder"),
        ("x" * 300, "cannot look into {root}/xxx"),
    ],
)
def test_nothing_there_is_an_error_that_says_what_was_looked_for(tmp_path: Path, path: str, message: str) -> None:
    put(tmp_path, "markdown/a.md")
    put(tmp_path, "markdown/b.md")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError) as caught:
        expand(path, tmp_path)
    assert message.format(root=tmp_path) in str(caught.value)


def test_no_file_of_a_folder_is_left_out_silently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "data/a.jsonl")
    (tmp_path / "data/b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert expand("data", tmp_path) == [tmp_path / "data/a.jsonl", tmp_path / "data/b.jsonl"]
    assert "cannot be read: No such file" in file_error(tmp_path / "data/b.jsonl")

    def closed(folder: Any) -> Any:  # tests may run as root, whom no permission stops
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"data: cannot look into .*/data: Permission denied; check the path"):
        expand("data", tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.parquet", "parquet"),
        ("a.pq", "parquet"),
        ("a.v2.jsonl", "jsonl"),
        ("a.ndjson.zst", "jsonl"),
        ("A.JSON.GZ", "jsonl"),
        ("a.csv.bz2", "csv"),
        ("a.tsv", "csv"),
        ("a.txt.lz4", "text"),
    ],
)
def test_the_ending_tells_the_format(name: str, expected: FileFormat) -> None:
    assert format_of(Path("some.where") / name) == expected


@pytest.mark.parametrize("name", ["a.dat", "a", "a.gz", "a.jsonl.xz", "a.parquet.gz", "jsonl", ".jsonl"])
def test_an_unknown_ending_is_an_error_that_lists_the_known(name: str) -> None:
    with pytest.raises(DataError) as caught:
        format_of(Path(name))
    assert str(caught.value) == (
        f"{name}: the format can't be told from the name: known endings are .parquet, .pq, .jsonl, .ndjson, .json, "
        ".csv, .tsv, .txt, each but Parquet also with .gz, .zst, .bz2, .lz4; rename it or give `format`"
    )


# ---- good rows


def test_json_lines_come_with_their_line(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n \t\n{"a": [1, {"b": null}]}\n{}')
    assert values(rows_of(path)) == [(1, {"a": "é"}), (4, {"a": [1, {"b": None}]}), (5, {})]


def test_csv_rows_come_with_the_line_where_they_start(tmp_path: Path) -> None:
    text = '\ufeffquery,answer\r\n\r\n1,\r\n"two\r\nlines, a "" and é", x \r\n \r\n5\'6",6'
    expected = [
        (3, {"query": "1", "answer": ""}),
        (4, {"query": 'two\nlines, a " and é', "answer": " x "}),
        (7, {"query": "5'6\"", "answer": "6"}),
    ]
    assert values(rows_of(put(tmp_path, "a.csv", text))) == expected
    assert values(rows_of(put(tmp_path, "a.dat", text), "csv")) == expected


def test_tsv_is_parted_by_tabs(tmp_path: Path) -> None:
    path = put(tmp_path, "a.tsv.gz", gzip.compress(b'a\tb\n1,2\t"3\t4"\n'))
    assert values(rows_of(path)) == [(2, {"a": "1,2", "b": "3\t4"})]
    assert columns_of(path, "csv") == ["a", "b"]


def test_a_one_column_csv_keeps_cells_that_are_empty_text(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", 'text\n""\n\n"x\n\ny"\n')
    assert values(rows_of(path)) == [(2, {"text": ""}), (4, {"text": "x\n\ny"})]


def test_csv_cells_may_be_as_large_as_a_row(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", f"text\n{'x' * 300_000}\n")
    assert values(rows_of(path)) == [(2, {"text": "x" * 300_000})]


@pytest.mark.parametrize(
    ("separator", "content", "documents"),
    [
        (None, "\ufeff One\r\nstory.\n\n", ["One\nstory."]),
        (END, f"one\n{END}\n two \n{END}\n", ["one", "two"]),
        (END, f"{END}{END} \u00a0\n{END}one{END}\n\n", ["one"]),
        (END, f"one{END}two\n", ["one", "two"]),
        (f"\r\n{END}\r\n", f"one\n{END}\ntwo\r\n{END}\r\n", ["one", "two"]),
        ("\n", "one\ntwo", ["one", "two"]),
        ("\n\n", "one\r\none\r\n\r\n\r\n\r\n\r\ntwo", ["one\none", "two"]),
        ("aab", "xaaabyaab\n", ["xa", "y"]),
        ("é", "oneé\ntwoé", ["one", "two"]),
    ],
)
def test_documents_of_a_text_file(tmp_path: Path, separator: str | None, content: str, documents: list[str]) -> None:
    rows = rows_of(put(tmp_path, "a.txt", content), separator=separator)
    assert values(rows) == [(number, {"text": text}) for number, text in enumerate(documents, start=1)]


def test_parquet_rows_keep_their_types(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "n": i, "turns": [{"a": None}, {"a": "é"}], "raw": b"\xff"} for i in range(2_500)]
    path = parquet(tmp_path, pa.Table.from_pylist(rows), row_group_size=700)
    assert values(rows_of(path)) == list(enumerate(rows, start=1))


@pytest.mark.parametrize("codec", ["gz", "zst", "bz2", "lz4"])
def test_compressed_text_reads_as_the_plain_one(tmp_path: Path, codec: str) -> None:
    content = "".join(json.dumps({"a": i}) + "\n" for i in range(50_000)).encode()
    path = tmp_path / f"a.jsonl.{codec.upper()}"
    names = {"gz": "gzip", "zst": "zstd", "bz2": "bz2", "lz4": "lz4"}
    with pa.CompressedOutputStream(str(path), names[codec]) as stream:
        stream.write(content)
    assert [row.value["a"] for row in rows_of(path)] == list(range(50_000))
    torn = put(tmp_path, f"b.jsonl.{codec}", path.read_bytes()[:-9])
    assert "the compressed data is damaged or torn" in file_error(torn)


def test_compressed_parts_written_one_after_the_other_are_all_read(tmp_path: Path) -> None:
    for name, pack in (("a.jsonl.gz", gzip.compress), ("a.jsonl.bz2", bz2.compress)):
        path = put(tmp_path, name, pack(b'{"a":1}\n') + pack(b'{"a":2}\n'))
        assert values(rows_of(path)) == [(1, {"a": 1}), (2, {"a": 2})]


# ---- rows that can't be read

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "\xff"}', "row: not UTF-8 at byte 7"),
        (b'{"a": 1', "row: not JSON: Expecting ',' delimiter at column 8"),
        (b'{"a": "x', "row: not JSON: Unterminated string starting at column 7"),
        (b"{} {}", "row: not JSON: Extra data at column 4"),
        (b'{"a": NaN}', "row: not JSON: NaN is not a JSON number"),
        (b'{"a": -Infinity}', "row: not JSON: -Infinity is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "row: not JSON: Exceeds the limit (4300 digits)"),
        (b'{"a": ' + DEEP.encode(), "row: JSON nested too deep"),
        (b'{"b": [{"a": 1, "a": 1}]}', "row: key 'a' stands twice"),
        (b"[{}]", "row: expected an object, got list"),
        (b'"text"', "row: expected an object, got str"),
        (b"null", "row: expected an object, got null"),
        (b'{"a": "\0"}', "row: NUL at byte 7"),
        (b"\0\0\0", "row: NUL at byte 0"),
    ],
)
def test_a_bad_json_line_costs_itself_alone(tmp_path: Path, line: bytes, problem: str) -> None:
    path = put(tmp_path, "a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    before, bad, after = rows_of(path)
    assert (before.value, after.value, after.number) == ({"a": 1}, {"a": 2}, 4)
    assert (bad.number, bad.value) == (3, None)
    assert str(bad.problem).startswith(problem)
    assert bad.raw == line.decode(errors="replace")[:2_000]


@pytest.mark.parametrize(
    ("row", "problem", "rest"),
    [
        (b"1", "row: the header has 2 fields, this row 1", []),
        (b"1,2,3", "row: the header has 2 fields, this row 3", []),
        (b'"a"b,2', "row: not CSV: ',' expected after '\"'", []),
        (b"a\rb,2", "row: not CSV: new-line character seen in unquoted field", []),
        (b"1,\xff2", "column 'answer': not UTF-8 at byte 2", []),
        (b'"\xc3\xa9\n\xc3",2', "column 'query': not UTF-8 at byte 4", []),
        (b"\xff", "row: not UTF-8 at byte 0", []),
        (b"1,2\0", "column 'answer': NUL at byte 3", []),
        (b'1,"open', "row: a quoted field is not closed", []),
        (b'1,"open\n5,6\n7,8', "row: a quoted field is not closed", [(4, "5"), (5, "7")]),
        (b'1,"open\n5,6\n"7","8"', "row: not CSV: ',' expected after '\"'", [(4, "5"), (5, "7")]),
    ],
)
def test_a_bad_csv_row_costs_itself_alone(
    tmp_path: Path, row: bytes, problem: str, rest: list[tuple[int, str]]
) -> None:
    path = put(tmp_path, "a.csv", b"query,answer\n1,2\n" + row + b"\n3,4\n")
    before, bad, *after = rows_of(path)
    assert before.value == {"query": "1", "answer": "2"}
    assert (bad.number, bad.value, str(bad.problem)) == (3, None, problem)
    last = 4 + row.count(b"\n")
    assert [(number, value["query"]) for number, value in values(after)] == [*rest, (last, "3")]
    lost = row.split(b"\n")[0] if rest else row
    assert bad.raw == lost.decode(errors="replace")


@pytest.mark.parametrize(
    ("document", "problem"),
    [(b"tw\xff", "column 'text': not UTF-8 at byte 3"), (b"\0two", "column 'text': NUL at byte 1")],
)
def test_a_bad_document_costs_itself_alone(tmp_path: Path, document: bytes, problem: str) -> None:
    path = put(tmp_path, "a.txt", b"one----\n" + document + b"----three----")
    assert shown(rows_of(path, separator="----")) == [
        (1, {"text": "one"}, None, ""),
        (2, None, problem, "\n" + document.decode(errors="replace")),
        (3, {"text": "three"}, None, ""),
    ]


def test_a_document_cut_off_by_the_end_of_the_file_is_a_problem(tmp_path: Path) -> None:
    problem = "column 'text': cut off: the file ends without a separator or a newline after it"
    for last in ("\nOnce upon a ti", "Once\r"):
        path = put(tmp_path, "a.txt", f"one\n{END}{last}")
        assert shown(rows_of(path, separator=END))[1:] == [(2, None, problem, last)]


def test_a_parquet_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    nested = pa.ListArray.from_arrays([0, 1, 2, 3, 4], strings(b"a", b"b", b"c", b"\xfe"))
    table = pa.table({"query": strings(b"one", b"tw\xff", None, "é".encode()), "turns": nested})
    assert shown(rows_of(parquet(tmp_path, table))) == [
        (1, {"query": "one", "turns": ["a"]}, None, ""),
        (2, None, "column 'query': not UTF-8 at byte 2", '{"query": "tw\ufffd"}'),
        (3, {"query": None, "turns": ["c"]}, None, ""),
        (4, None, "column 'turns': not UTF-8 at byte 0", '{"query": "é"}'),
    ]


def test_a_parquet_value_that_python_can_not_hold_costs_its_row_alone(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "age": pa.array([2**62, 1], pa.duration("s"))})
    bad, good = rows_of(parquet(tmp_path, table))
    assert str(bad.problem).startswith("column 'age': can't be read: ")
    assert good.value["text"] == "b"


@pytest.mark.parametrize(
    ("name", "content", "raw"),
    [
        ("a.jsonl", '{"a": "1"}\n{"a": "' + "é" * 40 + '"}\n{"a": "3"}\n', '{"a": "'),
        ("a.csv", "a\n1\n" + "é" * 51 + "\n3\n", ""),
        ("a.txt", "1----" + "é" * 51 + "----3----", ""),
    ],
)
def test_a_row_larger_than_the_largest_is_a_problem_and_reading_goes_on(
    tmp_path: Path, name: str, content: str, raw: str
) -> None:
    path = put(tmp_path, name, content)
    good, bad, after = rows_of(path, separator="----", largest_row=100 if raw == "" else 88)
    assert ([*good.value.values()], [*after.value.values()]) == (["1"], ["3"])
    assert after.number == bad.number + 1 == good.number + 2
    assert str(bad.problem) == f"row: row of more than {100 if raw == '' else 88} bytes"
    assert bad.raw.startswith(f"{raw}éééé")
    assert values(rows_of(path, separator="----", largest_row=102))[1][1] == {
        next(iter(good.value)): "é" * (40 if raw else 51)
    }


@pytest.mark.parametrize("content", ["x" * 101, " " * 20_000])
def test_a_whole_file_larger_than_the_largest_row_is_a_problem(tmp_path: Path, content: str) -> None:
    problem = "row: row of more than 100 bytes"
    assert shown(rows_of(put(tmp_path, "a.txt", content), largest_row=100)) == [(1, None, problem, content[:2_000])]
    assert shown(rows_of(put(tmp_path, "a.jsonl", content), largest_row=100)) == [(1, None, problem, content[:2_000])]


def test_an_open_quote_costs_one_line_however_far_the_next_quote_is(tmp_path: Path) -> None:
    lines = [f"{number},{number}" for number in range(100)]
    path = put(tmp_path, "a.csv", "a,b\n" + '"1,1\n' + "\n".join(lines) + "\n")
    bad, *good = rows_of(path, largest_row=50)
    assert (str(bad.problem), bad.raw) == ("row: a quoted field is not closed within 50 bytes", '"1,1')
    assert values(good) == [(number + 3, {"a": str(number), "b": str(number)}) for number in range(100)]


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_a_parquet_row_larger_than_the_largest_is_a_problem(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["a", "é" * 5_000, "c"]).cast(kind), "turns": [[], [{"a": "b"}], []]})
    path = parquet(tmp_path, table)
    first, bad, last = rows_of(path, largest_row=10_000)
    assert (first.value["text"], last.value["text"]) == ("a", "c")
    assert str(bad.problem) == "row: row of more than 10,000 bytes"
    assert bad.raw == ('{"text": "' + "é" * 5_000)[:2_000]
    assert not any(row.problem for row in rows_of(path, largest_row=10_001))


def test_a_problem_keeps_no_more_of_its_row_than_its_beginning(tmp_path: Path) -> None:
    row = b'{"a": 1, "a": "' + b"\xf0\x9f\x98\x80" * 5_000 + b'"}'
    (bad,) = rows_of(put(tmp_path, "a.jsonl", row))
    assert bad.raw == row.decode()[:2_000]
    assert bad.problem is not None
    assert bad.problem.__traceback__ is None, "its frames would hold the whole row"


# ---- damage of a whole file


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b" \r\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    assert file_error(put(tmp_path, name, content)).startswith("empty: ")
    assert file_error(put(tmp_path, f"{name}.gz", gzip.compress(content))).startswith("empty: ")
    assert file_error(put(tmp_path, "a.parquet", b"")).startswith("empty: ")


def test_a_header_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    message = "empty: it holds no rows; fill it, or take it out of the data"
    assert file_error(put(tmp_path, "a.csv", "query,answer\n")) == message
    assert file_error(parquet(tmp_path, pa.table({"a": pa.array([], pa.string())}))) == message


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_can_not_be_opened_is_an_error(tmp_path: Path, name: str) -> None:
    assert file_error(tmp_path / name).startswith("cannot be read: No such file or directory; check the path")
    (tmp_path / name).mkdir()
    assert file_error(tmp_path / name).startswith("cannot be read: Is a directory; check the path")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        columns_of(tmp_path / name, format_of(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b' \n[{"a": 1}]', "a JSON array; write one object a line"),
        (b'{\n  "a": 1\n}\n', "an object over several lines; write one object a line"),
        ("{}".encode("utf-16"), "UTF-16 text: convert it to UTF-8"),
        (b"\xfe\xff" + "{}".encode("utf-16-be"), "UTF-16 text: convert it to UTF-8"),
        (gzip.compress(b"{}", mtime=0), "gzip data, not text: let the file's name end with .gz"),
        (b"PAR1....PAR1", "Parquet, not text: let the file's name end with .parquet"),
    ],
)
def test_a_file_that_holds_something_else_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    assert file_error(put(tmp_path, "a.json", content)).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,a\n1,2,3\n", "two columns are named 'a'; give each a name of its own"),
        (b",\n1,2\n", "no header row (no column names); the first line must name the columns"),
        (b'a,"long\ntext"\n1,2\n', "no header row (no column names); the first line must name the columns"),
        (b"a,\xff\n1,2\n", "no header row (not UTF-8 at byte 2); the first line must name the columns"),
        (b'a,"b\n1,2\n', "no header row (a quoted field is not closed); the first line must name the columns"),
        (b"a,b\r1,2\r", "no header row (not CSV: new-line character seen in unquoted field); the first line must"),
    ],
)
def test_a_csv_without_usable_column_names_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = put(tmp_path, "a.csv", content)
    assert file_error(path).startswith(message)
    with pytest.raises(DataError, match=r"a\.csv: (two columns|no header row)"):
        columns_of(path, "csv")


def test_a_separator_that_parts_nothing_is_an_error(tmp_path: Path) -> None:
    path = put(tmp_path, "a.txt", "one\ntwo\n")
    assert file_error(path, separator=END).startswith(f"the separator {END!r} never occurs; name the one that")
    assert file_error(path, separator="\n\n").startswith(r"the separator '\n\n' never occurs")
    assert file_error(path, separator="").startswith("`separator` is empty; name one, or leave it out")
    assert file_error(path, separator=END, largest_row=3).startswith(f"the separator {END!r} never occurs")


def test_a_torn_compressed_file_is_an_error_that_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", 1_000)
    content = "".join(json.dumps({"a": random.random()}) + "\n" for _ in range(5_000)).encode()
    packed = gzip.compress(content)
    path = put(tmp_path, "a.jsonl.gz", packed[: len(packed) // 2])
    read: list[RawRow] = []
    with pytest.raises(DataError) as caught:
        read.extend(read_file(path, "jsonl"))
    assert len(read) > 2_000
    assert str(caught.value) == (
        f"{path}: the compressed data is damaged or torn after line {len(read):,} (Truncated compressed stream); "
        "copy or write the file again"
    )
    assert file_error(put(tmp_path, "b.jsonl.gz", content)).startswith("the compressed data is damaged or torn (")
    changed = packed[: len(packed) // 2] + b"\0" * 9 + packed[len(packed) // 2 + 9 :]
    assert file_error(put(tmp_path, "c.jsonl.gz", changed)).startswith("the compressed data is damaged or torn")


def test_damaged_parquet_is_an_error(tmp_path: Path) -> None:
    table = pa.table({"text": [f"{number:100}" for number in range(3_000)]})
    path = parquet(
        tmp_path, table, row_group_size=1_000, write_page_checksum=True, compression="none", use_dictionary=False
    )
    content = path.read_bytes()
    for bad in (content[: len(content) // 2], content[:-1], b"PAR", b'{"a": 1}\n' * 9):
        assert file_error(put(tmp_path, "torn.parquet", bad)).startswith("damaged, or not Parquet (")
        with pytest.raises(DataError, match=r"torn.parquet: damaged, or not Parquet \("):
            columns_of(tmp_path / "torn.parquet", "parquet")
    place = content.index(f"{2_500:100}".encode())
    changed = content[:place] + b"x" + content[place + 1 :]
    message = file_error(put(tmp_path, "changed.parquet", changed))
    assert message.startswith("damaged, or not Parquet after row 2,000 ("), "the page's checksum shows it"


def test_parquet_columns_of_the_same_name_are_an_error(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert file_error(parquet(tmp_path, table)) == "two columns are named 'a'; give each a name of its own"


# ---- columns


def test_columns_of_each_format(tmp_path: Path) -> None:
    lines = ['{"b": 1}', "no", '{"a": 1, "b": 2}', *['{"c": 1}'] * 98, '{"late": 1}']
    assert columns_of(put(tmp_path, "a.jsonl", "\n".join(lines)), "jsonl") == ["b", "a", "c"]
    assert columns_of(put(tmp_path, "a.csv", "\n query,answer\n"), "csv") == [" query", "answer"]
    assert columns_of(put(tmp_path, "a.txt"), "text") == ["text"]
    assert columns_of(parquet(tmp_path, pa.table({"b": [[{"x": 1}]], "a": ["b"]})), "parquet") == ["b", "a"]


# ---- chunks and memory

COMMON = [b"\n", b"\n", b"\r\n", b"\r", b" ", b"a", b"\xc3\xa9", b"\xff", b"\0", b"y" * 30]
ALPHABETS: dict[str, list[bytes]] = {
    "jsonl": [*COMMON, b'{"a":1}\n', b'{"k":"\xc3\xa9"}\r\n', b'{"z":"' + b"y" * 18 + b'"}\n'],
    "csv": [*COMMON, b",", b",", b'"', b'""', b"c,d\n", b'"e\n",f\n', b'g,"h"\n'],
    "text": [*COMMON, b"<", b"<<", b">", b"<<>", b"<<>", b"<<>"],
}
STARTS = {"jsonl": b'{"s":0}\n', "csv": b"p,q\n", "text": b""}


def outcome(path: Path, file_format: FileFormat, chunk: int, monkeypatch: pytest.MonkeyPatch) -> list[Shown] | str:
    monkeypatch.setattr(raw, "CHUNK_BYTES", chunk)
    try:
        return shown(rows_of(path, file_format, separator="<<>", largest_row=25))
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("file_format", ["jsonl", "csv", "text"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_chunk_borders_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: FileFormat, bom: bytes
) -> None:
    draw = random.Random(f"{file_format} {bom!r}")
    read = 0
    for _ in range(150):
        content = bom + STARTS[file_format] + b"".join(draw.choices(ALPHABETS[file_format], k=draw.randrange(60)))
        path = put(tmp_path, "a.dat", content)
        whole = outcome(path, file_format, 2**20, monkeypatch)
        for chunk in (1, 7, draw.randrange(2, 40)):
            assert outcome(path, file_format, chunk, monkeypatch) == whole, (chunk, content)
        read += not isinstance(whole, str)
    assert read > 75


def test_large_files_are_parted_as_small_ones(tmp_path: Path) -> None:
    """Against Python's own splitting, over several chunks of the size that is really used."""
    draw = random.Random(3)
    documents = ["".join(draw.choices("ab <é\n", k=draw.randrange(1, 20_000))) + "." for _ in range(400)]
    text = rows_of(put(tmp_path, "a.txt", "".join(f"{d}<<>" for d in documents)), separator="<<>")
    assert [row.value["text"] for row in text] == [document.strip() for document in documents]
    lines = "".join(json.dumps({"t": document}, ensure_ascii=False) + "\n" for document in documents)
    assert [row.value["t"] for row in rows_of(put(tmp_path, "a.jsonl", lines))] == documents
    table = io.StringIO()
    csv.writer(table).writerows([["t", "u"], *((document, 1) for document in documents)])
    assert [row.value["t"] for row in rows_of(put(tmp_path, "a.csv", table.getvalue()))] == documents


@pytest.mark.parametrize(
    ("name", "start", "end"), [("a.jsonl.gz", '{"a": "', '"}\n'), ("a.csv.gz", 'x,"', '"\n'), ("a.txt.gz", "x", "----")]
)
def test_memory_stays_bounded_whatever_the_rows(tmp_path: Path, name: str, start: str, end: str) -> None:
    row = (start + "y" * 10_000 + end).encode()
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"p,q\n" if "csv" in name else b"")
        for _ in range(1_000):
            file.write(row)
        file.write((start + "y" * 40_000_000 + end).encode())
        for _ in range(1_000):
            file.write(row)
    count = problems = 0
    tracemalloc.start()
    try:
        for read in read_file(path, format_of(path), "----", largest_row=2**20):
            count += 1
            problems += read.problem is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, problems) == (2_001, 1)
    assert peak < 12e6


@pytest.mark.parametrize("size", [5_000, 200_000])
def test_memory_stays_bounded_whatever_the_size_of_a_parquet_row_group(tmp_path: Path, size: int) -> None:
    draw = random.Random(5)
    texts = [draw.randbytes(size).hex() for _ in range(20_000_000 // size)]
    pages = {"row_group_size": 10**6, "write_batch_size": 10, "compression": "none", "use_dictionary": False}
    path = parquet(tmp_path, pa.table({"text": texts}), **pages)
    assert pq.read_metadata(path).num_row_groups == 1
    del texts
    held = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        most = 0
        for row in read_file(path, "parquet"):
            most = max(most, pa.total_allocated_bytes() - held) if row.number % 10 == 0 else most
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6, "of 40 MB"
    assert most < 20e6


def test_reading_starts_before_the_file_is_read(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", b'{"a": 1}\n' * 500_000)
    rows = read_file(path, "jsonl")
    assert next(rows).number == 1
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read"):
        next(read_file(tmp_path / "b.jsonl", "jsonl"))
    read_file(tmp_path / "b.jsonl", "jsonl")  # not before it is iterated over
