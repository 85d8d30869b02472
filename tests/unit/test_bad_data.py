"""Promises of bad input: each kind is named by its place and reason, and costs no good row of its file."""

import gzip
import io
import json
import re
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rxt_platform.config.data import Section
from rxt_platform.data.corpus import build_corpus, read_rows
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.rows import Row, row_to_json
from rxt_platform.data.shards import make_shard, plan_shards, write_summary
from rxt_platform.errors import DataError
from tests.unit.data_files import END, bad_rows_in, config_of, lines_of, put, table_of, talk_row, turn
from tests.unit.helpers import word_tokenizer

HELD = (
    "The held-out story is told once and never again, in the words that it has here and in no others. And so it ends."
)
HELD_OUT = {"texts": {"text": HELD}, "interactions": turn(99), "conversations": talk_row(98, 99)}
POLICY = {"bad_rows": "quarantine", "max_bad_share": 1.0, "largest_row": 10_000, "too_long": "quarantine"}
WINDOW = 48
GOOD: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": f"good story {i}"} for i in range(4)],
    "interactions": [turn(i) for i in range(4)],
    "conversations": [talk_row(i, i + 10) for i in range(4)],
}


def lines(section: str, bad: Any) -> bytes:
    """JSON lines: two good rows, the bad one (bytes: as it is), two good rows."""
    rows = [json.dumps(row).encode() for row in GOOD[section]]
    rows.insert(2, bad if isinstance(bad, bytes) else json.dumps(bad).encode())
    return b"".join(row + b"\n" for row in rows)


def talk_with(**changes: Any) -> bytes:
    return lines("conversations", {**talk_row(5, 6), **changes})


def table(bad: bytes) -> bytes:
    """Comma-separated interactions with a bad line in the middle."""
    rows = table_of(GOOD["interactions"]).encode().splitlines(keepends=True)
    return b"".join([*rows[:3], bad, *rows[3:]])


def parquet(bad: str | bytes | None) -> bytes:
    """Texts with a bad one in the middle; bytes need not be text."""
    column: list[str | bytes | None] = [row["text"] for row in GOOD["texts"]]
    column.insert(2, bad)
    raw = [one.encode() if isinstance(one, str) else one for one in column]
    file = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(raw).cast(pa.string(), safe=False)}), file)
    return file.getvalue()


def documents(bad: bytes = b"", end: bytes = b"") -> bytes:
    """Plain text: two good documents, the bad one, two good ones."""
    rows = [row["text"].encode() for row in GOOD["texts"]]
    return b"".join(row + f"\n{END}\n".encode() for row in [*rows[:2], *([bad] if bad else []), *rows[2:]]) + end


# (kind, file, its content, what is said after the file's name): of a row `:row: ...`, else it is about the whole file.
# A file's name starts with its section; without content there is no such file.
BAD_INPUT: list[tuple[str, str, bytes | None, str]] = [
    (
        "missing column",
        "texts-missing.jsonl",
        lines("texts", {"body": "no text"}),
        ":3: column 'text': missing",
    ),
    ("null", "texts-null.parquet", parquet(None), ":3: column 'text': null"),
    (
        "null instead of a row",
        "texts-nothing.jsonl",
        lines("texts", None),
        ":3: row: expected an object, got null",
    ),
    (
        "wrong type",
        "interactions-type.jsonl",
        lines("interactions", turn(5, query=7)),
        ":3: column 'query': expected text, got int",
    ),
    (
        "empty",
        "interactions-empty.csv",
        table(b"question,\n"),
        ":4: column 'answer': empty",
    ),
    ("only blanks", "texts-blank.parquet", parquet(" \t\n\u3000"), ":3: column 'text': empty"),
    (
        "not UTF-8, JSON lines",
        "texts-bytes.jsonl",
        lines("texts", '{"text": "zażółć"}'.encode("cp1250")),
        ":3: row: not UTF-8 at byte 12",
    ),
    (
        "not UTF-8, CSV",
        "interactions-bytes.csv",
        table(b"question,caf\xe9\n"),
        ":4: column 'answer': not UTF-8 at byte 12",
    ),
    (
        "not UTF-8, text",
        "texts-bytes.txt",
        documents(b"caf\xe9 and more"),
        ":3: column 'text': not UTF-8 at byte ",
    ),
    (
        "not UTF-8, Parquet",
        "texts-bytes.parquet",
        parquet(b"caf\xe9"),
        ":3: column 'text': not UTF-8 at byte 3",
    ),
    (
        "half of a surrogate pair",
        "texts-surrogate.jsonl",
        lines("texts", rb'{"text": "half \ud83d of one"}'),
        ":3: column 'text': half of a surrogate pair: not Unicode text",
    ),
    (
        "control character",
        "conversations-control.jsonl",
        talk_with(interactions=[turn(6, answer="\x1b[31mred")]),
        ":3: column 'interactions[0].answer': control character U+001B at position 0",
    ),
    (
        "NUL",
        "texts-nul.jsonl",
        lines("texts", b'{"text": "a\0b"}'),
        ":3: row: NUL at byte 11",
    ),
    (
        "not JSON",
        "texts-notjson.jsonl",
        lines("texts", b'{"text": "no end'),
        ":3: row: not JSON: Unterminated string starting at column 10",
    ),
    (
        "not a JSON number",
        "texts-nan.jsonl",
        lines("texts", b'{"text": "good", "score": NaN}'),
        ":3: row: not JSON: NaN is not a JSON number",
    ),
    (
        "JSON array in a line",
        "texts-array.jsonl",
        lines("texts", ["good", "story"]),
        ":3: row: expected an object, got list",
    ),
    (
        "a JSON array over the whole file",
        "texts-array.json",
        json.dumps(GOOD["texts"], indent=1).encode(),
        ": a JSON array; write one object a line",
    ),
    (
        "JSON key twice",
        "texts-twice.jsonl",
        lines("texts", b'{"text": "one", "text": "two"}'),
        ":3: row: key 'text' stands twice",
    ),
    (
        "JSON nested too deep",
        "texts-deep.jsonl",
        lines("texts", b'{"text": "good", "more": ' + b"[" * 3000 + b"]" * 3000 + b"}"),
        ":3: row: JSON nested too deep",
    ),
    (
        "huge row, JSON lines",
        "texts-huge.jsonl",
        lines("texts", {"text": "word " * 3000}),
        ":3: row: row of more than 10,000 bytes",
    ),
    (
        "huge row, Parquet",
        "texts-huge.parquet",
        parquet("word " * 3000),
        ":3: row: row of more than 10,000 bytes",
    ),
    (
        "huge row, text",
        "texts-huge.txt",
        documents(b"word " * 3000),
        ":3: row: row of more than 10,000 bytes",
    ),
    (
        "CSV with a field too many",
        "interactions-fields.csv",
        table(b"a question, with a comma,answer\n"),
        ":4: row: the header has 2 fields, this row 3",
    ),
    (
        "CSV with a field too few",
        "interactions-few.tsv",
        table(b"question\n").replace(b",", b"\t"),
        ":4: row: the header has 2 fields, this row 1",
    ),
    (
        "CSV quote that is never closed",
        "interactions-quote.csv",
        table(b'"question,answer\n'),
        ":4: row: a quoted field is not closed",
    ),
    (
        "CSV without a header",
        "interactions-header.csv",
        b"\n,\n" + table(b""),
        ": no header row (no column names); the first line must name the columns",
    ),
    (
        "torn gzip",
        "texts-torn.jsonl.gz",
        gzip.compress(lines_of({"text": f"good story {i}"} for i in range(1000)).encode(), mtime=0)[:-500],
        ": the compressed data is damaged or torn",
    ),
    (
        "torn Parquet",
        "texts-torn.parquet",
        parquet("good")[:-200],
        ": damaged, or not Parquet",
    ),
    (
        "gzip data in a file that does not say so",
        "texts-plain.jsonl",
        gzip.compress(lines_of(GOOD["texts"]).encode(), mtime=0),
        ": gzip data, not text: let the file's name end with .gz",
    ),
    (
        "UTF-16",
        "texts-wide.txt",
        documents().decode().encode("utf-16"),
        ": UTF-16 text: convert it to UTF-8",
    ),
    ("empty file", "texts-empty.jsonl", b"", ": empty: it holds no rows"),
    ("blank file", "texts-empty.txt", b"\n \n", ": empty: it holds no rows"),
    ("no such file", "texts-none.jsonl", None, ": no such file or folder: looked for "),
    ("glob without a match", "texts-*.jsonl", None, ": no file matches: looked for "),
    (
        "unknown format",
        "texts-format.docx",
        b"good story",
        ": the format can't be told from the name: known endings are ",
    ),
    (
        "text cut off",
        "texts-cut.txt",
        documents(end=b"Once upon a ti"),
        ":5: column 'text': cut off: the file ends without a separator or a newline after it",
    ),
    (
        "text whose separator never occurs",
        "texts-parted.txt",
        b"good story 0\n---\ngood story 1\n---\n",
        f": the separator '{END}' never occurs",
    ),
    (
        "interactions that are no list",
        "conversations-list.jsonl",
        talk_with(interactions="none"),
        ":3: column 'interactions': expected a list, got str",
    ),
    (
        "null among the interactions",
        "conversations-null.jsonl",
        talk_with(interactions=[turn(6), None]),
        ":3: column 'interactions[1]': null",
    ),
    (
        "turn without an answer",
        "conversations-turn.jsonl",
        talk_with(interactions=[turn(6), {"query": "and?"}]),
        ":3: column 'interactions[1].answer': missing",
    ),
    (
        "empty conversation",
        "conversations-empty.jsonl",
        lines("conversations", {"interactions": []}),
        ":3: column 'interactions': empty",
    ),
    (
        "answer key that is not in the answer",
        "conversations-key.jsonl",
        talk_with(interactions=[turn(6, answer_span="blue", distance=1, long_range=False)]),
        ":3: column 'interactions[0].answer_span': 'blue' does not occur in the answer 'answer 6', as whole words",
    ),
    (
        "answer key from before the conversation",
        "conversations-distance.jsonl",
        talk_with(interactions=[turn(6, answer_span="6", distance=2, long_range=False)]),
        ":3: column 'interactions[0].distance': 2 turns back is before the conversation starts",
    ),
    (
        "unknown columns only",
        "texts-columns.csv",
        b"title,body\nOne,A story.\nTwo,Another.\n",
        ": no column 'text'; columns: body, title: name one by `columns: {text: ...}`",
    ),
    (
        "texts for conversations",
        "conversations-columns.jsonl",
        lines_of(GOOD["texts"]).encode(),
        ": no columns 'query' and 'answer'; columns: text: conversations need query and answer",
    ),
    (
        "too long for the window",
        "interactions-long.jsonl",
        lines("interactions", turn(5, answer="the red hat " * 60)),
        ":3: column 'answer': too long: ",
    ),
    (
        "query too long for the window",
        "conversations-long.jsonl",
        talk_with(interactions=[turn(6, query="the red hat " * 60)]),
        ":3: column 'query': too long: turn 2: query of ",
    ),
    (
        "duplicate of a held-out row",
        "texts-held.jsonl",
        lines("texts", {"text": HELD.upper()}),
        ":3: row: duplicate of the held-out row held_out.jsonl:1",
    ),
    (
        "near duplicate of a held-out row",
        "texts-near.jsonl",
        lines("texts", {"text": f"{HELD} Or does it?"}),
        ":3: row: near duplicate (100% of its 8-grams) of the held-out row held_out.jsonl:1",
    ),
]
LATER = ("too long", "duplicate")  # of these, other policies than `bad_rows` decide


def result_of(root: Path, file: str, content: bytes | None, **policy: Any) -> tuple[list[str], list[Row]]:
    """What is said of a file's rows, and those that are kept as token shards. Raises DataError."""
    section: Section = next(name for name in get_args(Section) if file.startswith(name))
    if content is not None:
        (root / file).write_bytes(content)
    put(root, "held_out.jsonl", lines_of([HELD_OUT[section]]))
    config = config_of(root, section, {"path": file, "validation_path": "held_out.jsonl"}, **{**POLICY, **policy})
    corpus, tokens = root / "corpus", root / "tokens"
    corpus.mkdir()
    tokens.mkdir()
    build_corpus(config, corpus)
    encoder = RowEncoder(word_tokenizer(), WINDOW, config.validation.too_long)
    shards = [make_shard(plan, corpus, encoder, tokens) for plan in plan_shards(corpus) if plan.section == section]
    write_summary(tokens, shards, WINDOW)
    bad = [*bad_rows_in(corpus), *bad_rows_in(tokens)]
    too_long = {one["row"] for one in bad_rows_in(tokens)}
    kept = [one.row for one in read_rows(corpus, section, "train") if one.number not in too_long]
    places = [(f"column '{one['column']}'" if one["column"] else "row", one) for one in bad]
    return [f"{one['file']}:{one['row']}: {place}: {one['reason']}" for place, one in places], kept


@pytest.mark.parametrize(
    ("file", "content", "expected"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_is_named_and_costs_no_good_row(
    tmp_path: Path, file: str, content: bytes | None, expected: str
) -> None:
    if not re.match(r":\d+: ", expected):
        with pytest.raises(DataError) as caught:
            result_of(tmp_path, file, content)
        assert file + expected in str(caught.value)
        assert caught.value.exit_code == 2
        return
    messages, kept = result_of(tmp_path, file, content)
    assert len(messages) == 1
    assert messages[0].startswith(file + expected)
    section = file.partition("-")[0]
    first = [{**row, "interactions": row.get("interactions", [])} for row in GOOD[section]]
    assert [row_to_json(row) for row in kept] == (GOOD[section] if section == "texts" else first)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [row[1:] for row in BAD_INPUT if not any(word in row[3] for word in LATER)],
    ids=[row[0] for row in BAD_INPUT if not any(word in row[3] for word in LATER)],
)
def test_bad_input_stops_a_run_that_does_not_set_it_aside(
    tmp_path: Path, file: str, content: bytes | None, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        result_of(tmp_path, file, content, bad_rows="fail")
    assert file + expected in str(caught.value)


def test_every_kind_is_there_once() -> None:
    for column in (0, 1):
        assert len({row[column] for row in BAD_INPUT}) == len(BAD_INPUT) > 40
