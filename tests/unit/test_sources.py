"""Promises of data sources: the same rows from every format, each with its place, and splits decided by content."""

import json
import os
import random
import re
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rxt_platform.config.data import DataConfig, FilesSource, Section
from rxt_platform.data import sources
from rxt_platform.data.paths import expand
from rxt_platform.data.rows import Conversation, Interaction, Recall, Row, RowError, RowKind, parse_row, row_to_json
from rxt_platform.data.sources import guess_source_kind, read_conversations, read_source, source_identity
from rxt_platform.data.story_world import Split
from rxt_platform.errors import DataError
from tests.support import ROOT
from tests.unit.data_files import (
    END,
    WORLD,
    config_of,
    lines_of,
    placed,
    put,
    put_rows,
    rows_in,
    talk,
    talk_row,
    turn,
)

DATA = ROOT.parent / "shared" / "data"
ODD = ['"quoted", with a comma', "zażółć 🐈‍⬛ \u2028 end", "two\nlines\tand a tab", "back\\slash {'a': [1]}"]


def texts(count: int) -> list[dict[str, Any]]:
    return [{"text": f"Story {i}. {ODD[i % 4]}."} for i in range(count)]


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"query": f"Question {i}? {ODD[i % 4]}?", "answer": f"Answer {i}. {ODD[-i % 4]}"} for i in range(count)]


def talks(count: int) -> list[dict[str, Any]]:
    return [{**pair, "interactions": pairs(count)[i : i + 3]} for i, pair in enumerate(pairs(count))]


CONTENT = {"texts": texts(20), "interactions": pairs(20), "conversations": talks(20)}


def held_out(root: Path, section: Section, **source: Any) -> DataConfig:
    """A source whose held-out rows have a file of their own, so that all others are training rows in their order."""
    rows = {"texts": {"text": "held out"}, "interactions": turn(99), "conversations": talk_row(98, 99)}
    put_rows(root, "held_out.jsonl", [rows[section]])
    return config_of(root, section, {"validation_path": "held_out.jsonl", **source})


def expected(section: Section) -> list[Row]:
    return [
        row["text"]
        if section == "texts"
        else Conversation(
            tuple(Interaction(one["query"], one["answer"]) for one in [row, *row.get("interactions", [])])
        )
        for row in CONTENT[section]
    ]


# ---- the same rows from everywhere


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(("texts", f"rows.{end}") for end in ("parquet", "jsonl", "json.bz2", "csv", "tsv.gz", "txt", "txt.zst")),
        *(("interactions", f"rows.{end}") for end in ("parquet", "jsonl.gz", "ndjson.zst", "csv.gz", "tsv", "csv.bz2")),
        *(("conversations", f"rows.{end}") for end in ("parquet", "jsonl", "jsonl.gz", "jsonl.zst", "JSONL")),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, section: Section, name: str) -> None:
    path = put_rows(tmp_path, name, CONTENT[section])
    config = held_out(tmp_path, section, path=name)
    assert rows_in(config, section) == expected(section)
    assert {row.file for row in placed(config, section)} == {str(path)}
    assert {row.name for row in placed(config, section)} == {name}
    numbers = [row.number for row in placed(config, section)]
    start = 2 if "csv" in name or "tsv" in name else 1  # the header is line 1
    assert numbers[0] == start
    assert numbers == sorted(set(numbers))
    if "csv" not in name and "tsv" not in name:  # there, a row with a line break takes two lines
        assert numbers == list(range(1, 21))


@pytest.mark.parametrize("section", ["texts", "interactions", "conversations"])
@pytest.mark.parametrize("path", ["folder", "folder/*/part-*", "folder/**/part-?.*"])
def test_a_folder_and_a_glob_give_the_rows_of_their_files_in_order(tmp_path: Path, section: Section, path: str) -> None:
    rows = CONTENT[section]
    for number, (name, part) in enumerate(
        [("part-0.parquet", rows[:5]), ("part-1.jsonl.gz", rows[5:12]), ("part-2.jsonl", rows[12:])]
    ):
        put_rows(tmp_path / "folder" / f"deep{number}", name, part)
    put(tmp_path / "folder", "README.md", "not data")
    put(tmp_path / "folder" / ".cache", "part-9.jsonl", "not JSON")
    config = held_out(tmp_path, section, path=path)
    assert rows_in(config, section) == expected(section)
    assert [row.number for row in placed(config, section)] == [*range(1, 6), *range(1, 8), *range(1, 9)]


@pytest.mark.parametrize("section", ["texts", "interactions", "conversations"])
@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.zst"])
def test_story_world_rows_written_to_a_file_are_the_same_rows(tmp_path: Path, section: Section, name: str) -> None:
    made = rows_in(config_of(tmp_path, section, {**WORLD, "train_rows": 30, "turns": [2, 4]}), section)
    put_rows(tmp_path, name, [row_to_json(row) for row in made])
    read = rows_in(held_out(tmp_path, section, path=name), section)
    assert read == made
    assert len(read) == 30


def test_the_story_world_gives_the_asked_rows_and_the_same_ones_again(tmp_path: Path) -> None:
    mixed = {**WORLD, "turns": [2, 3], "train_rows": 5}
    config = config_of(tmp_path, "conversations", mixed)
    rows = rows_in(config, "conversations")
    assert [len(row.interactions) for row in rows if isinstance(row, Conversation)] == [2, 3, 2, 3, 2]
    assert rows == rows_in(config, "conversations")
    assert rows != rows_in(config_of(tmp_path, "conversations", {**mixed, "seed": 1}), "conversations")
    assert len(rows_in(config_of(tmp_path, "texts", {**WORLD, "train_rows": 7}), "texts")) == 7
    assert len(rows_in(config_of(tmp_path, "interactions", WORLD), "interactions", "validation")) == 2


def test_all_published_layouts_are_read(tmp_path: Path) -> None:
    hybrid = {"query": "q", "think": "hm", "answer": None, "tool_call": "f()"}
    rows = [talk_row(1, 2, 3), {"interactions": [turn(4), turn(5)]}, turn(6, subset="ignored"), talk_row(7)]
    put(tmp_path, "rows.jsonl", lines_of([*rows[:2], "", *rows[2:]]))
    assert read_conversations(str(tmp_path / "rows.jsonl")) == [talk(1, 2, 3), talk(4, 5), talk(6), talk(7)]
    put_rows(tmp_path, "hybrid.parquet", [hybrid, {"query": None, "tool_use": "r", "answer": "a"}])
    (first,), (second,) = (row.interactions for row in read_conversations(str(tmp_path / "hybrid.parquet")))
    assert first == Interaction("q", "", hybrid=True, think="hm", tool_call="f()")
    assert second == Interaction("r", "a", hybrid=True, from_tool=True)


def test_conversations_read_outside_of_a_run_name_the_first_bad_row(tmp_path: Path) -> None:
    path = put(tmp_path, "rows.jsonl", lines_of([talk_row(1, 2), talk_row(3, 4), {"query": "q", "interactions": []}]))
    with pytest.raises(DataError, match=f"^{path}:3: column 'answer': missing$"):
        read_conversations(str(path))


@pytest.mark.shared_data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real-data folder at {DATA}")
def test_every_row_of_the_real_files_is_read() -> None:
    """2,316 whole stories and one that is cut off; 1,194 and 154 conversations; the examples of an LLM's prompts."""
    stories = config_of(DATA, "texts", {"path": "tinystories/tinystories_*.txt"})
    found = [row for split in ("train", "validation") for row in placed(stories, "texts", split)]  # type: ignore[arg-type]
    assert sum(row.problem is None for row in found) == 2316
    assert [str(row.problem) for row in found if row.problem] == [
        "column 'text': cut off: the file ends without a separator or a newline after it"
    ]
    for split, count in (("train", 1194), ("validation", 154)):
        assert len(read_conversations(str(DATA / f"fairytaleqa/mrl_{split}.jsonl"))) == count
    for path in sorted((DATA / "rxt_examples").glob("*.jsonl")):
        talks = read_conversations(str(path))
        assert len(talks) == len(path.read_text(encoding="utf-8").splitlines())
        assert all(len(talk.interactions) > 1 for talk in talks) == path.name.startswith("mrl")


# ---- columns and kinds


def test_columns_under_other_names_are_read(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.parquet", [{"story": "One.", "text": "not this"}, {"story": "Two.", "text": "nor this"}])
    config = held_out(tmp_path, "texts", path="rows.parquet", columns={"text": "story"})
    assert rows_in(config, "texts") == ["One.", "Two."]
    put_rows(tmp_path, "rows.csv", [{"q": "One?", "answer": "Yes."}, {"q": "Two?", "answer": "No."}])
    config = held_out(tmp_path, "interactions", path="rows.csv", columns={"query": "q"})
    assert [row_to_json(row) for row in rows_in(config, "interactions")] == [
        {"query": "One?", "answer": "Yes.", "interactions": []},
        {"query": "Two?", "answer": "No.", "interactions": []},
    ]


def test_columns_under_other_names_are_read_inside_interactions_too(tmp_path: Path) -> None:
    asked = {"question": "q", "reply": "a cat", "fact": "cat", "distance": 1, "long_range": False}
    rows = [
        {"question": "q1", "reply": "a1", "turns": [{"question": "q2", "reply": "a2"}]},
        {"turns": [{"question": "q3", "reply": "a3"}, asked]},
    ]
    put_rows(tmp_path, "rows.jsonl", rows)
    columns = {"query": "question", "answer": "reply", "interactions": "turns", "answer_span": "fact"}
    first, second = rows_in(held_out(tmp_path, "conversations", path="rows.jsonl", columns=columns), "conversations")
    assert first == Conversation((Interaction("q1", "a1"), Interaction("q2", "a2")))
    assert second == Conversation((Interaction("q3", "a3"), Interaction("q", "a cat", Recall(("cat",), 1, False))))


def test_columns_can_change_places(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", [turn(1)])
    config = held_out(tmp_path, "interactions", path="rows.jsonl", columns={"query": "answer", "answer": "query"})
    assert rows_in(config, "interactions") == [Conversation((Interaction("answer 1", "question 1"),))]


@pytest.mark.parametrize(
    ("section", "row", "columns", "message"),
    [
        (
            "texts",
            {"story": "One.", "id": 3},
            {"text": "stori"},
            "rows.jsonl: no column 'stori' (columns.text); did you mean 'story'? columns: id, story",
        ),
        (
            "conversations",
            {"turns": [{"question": "q", "answer": "a"}]},
            {"interactions": "turns", "query": "frage"},
            "rows.jsonl: no column 'frage' (columns.query); columns: answer, question, turns",
        ),
        ("texts", {"story": "One.", "id": 3}, {}, "rows.jsonl: no column 'text'; columns: id, story: name one by"),
        ("interactions", {"question": "q", "answer": "a"}, {}, "rows.jsonl: no columns 'query' and 'answer'; columns:"),
        ("conversations", {"text": "One."}, {}, "rows.jsonl: no columns 'query' and 'answer'; columns: text"),
        (
            "conversations",
            {"interactions": [{"query": "q", "accepted": {"answer": "a"}, "rejected": {"answer": "b"}}]},
            {},
            "rows.jsonl: preference rows: conversations need query and answer, or interactions",
        ),
    ],
)
def test_a_wrong_column_is_one_error_before_any_row(
    tmp_path: Path, section: Section, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    put(tmp_path, "rows.jsonl", lines_of(["{not JSON", *[row] * 200]))
    config = held_out(tmp_path, section, path="rows.jsonl", columns=columns)
    (source,) = sources.section_sources(config, section)
    with pytest.raises(DataError) as caught:
        next(read_source(config, section, source, "train"))
    assert str(caught.value).startswith(message)


def test_a_name_for_a_column_that_no_row_kind_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"(?s)columns\.qury.*'query', 'answer'"):
        config_of(tmp_path, "interactions", {"path": "rows.jsonl", "columns": {"qury": "question"}})


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([{"text": "a"}], "text"),
        ([turn(1)], "interaction"),
        ([turn(1), talk_row(1, 2)], "conversation"),
        ([{"interactions": [turn(1, think="hm")]}], "hybrid"),
        ([turn(1, think=None, tool_call=None, internal=None, tool_use=None)], "interaction"),
        ([turn(1, think=None), turn(2, think="hm")], "hybrid"),
        ([{"interactions": [{"query": "q", "accepted": {}, "rejected": {}}]}], "preference"),
        ([{"body": "a"}], None),
        ([], None),
    ],
)
def test_the_kind_of_a_source_is_that_of_its_first_rows(rows: list[dict[str, Any]], kind: str | None) -> None:
    assert guess_source_kind(rows) == kind


# ---- splits


def split_of(root: Path, rows: list[dict[str, Any]], **source: Any) -> dict[Split, list[Row]]:
    put_rows(root, "rows.jsonl", rows)
    config = config_of(root, "texts", {"path": "rows.jsonl", "validation_share": 0.3, **source})
    return {split: rows_in(config, "texts", split) for split in sources.SPLITS}


def test_splits_are_disjoint_complete_and_of_the_asked_size(tmp_path: Path) -> None:
    rows = texts(1000)
    split = split_of(tmp_path, rows)
    assert set(split["train"]).isdisjoint(split["validation"])
    assert sorted([*split["train"], *split["validation"]], key=str) == sorted(row["text"] for row in rows)
    assert 250 < len(split["validation"]) < 350
    few = split_of(tmp_path, rows, validation_share=0.05)
    assert 25 < len(few["validation"]) < 80
    assert set(few["validation"]) < set(split["validation"]), "a larger share adds rows, and takes none away"


def test_a_rows_side_is_its_contents_whatever_its_file_order_and_neighbours(tmp_path: Path) -> None:
    rows = texts(300)
    held = set(split_of(tmp_path, rows)["validation"])
    shuffled = random.Random(0).sample(rows, len(rows))
    assert set(split_of(tmp_path, shuffled)["validation"]) == held
    more = [{"text": f"Another story {i}."} for i in range(100)]
    both = random.Random(1).sample(rows + more, 400)
    assert set(split_of(tmp_path, both)["validation"]) & {row["text"] for row in rows} == held
    for part in (rows[:150], rows[150:]):
        assert set(split_of(tmp_path, part)["validation"]) == held & {row["text"] for row in part}


def test_equal_rows_are_on_the_same_side_in_whichever_layout(tmp_path: Path) -> None:
    split = split_of(tmp_path, texts(100) * 3)
    assert set(split["train"]).isdisjoint(split["validation"])
    assert len(split["validation"]) == 3 * len(set(split["validation"]))
    rows = [[turn(3 * i), turn(3 * i + 1)] for i in range(200)]
    held = []
    for name, listed in (("a.jsonl", False), ("b.parquet", True)):
        put_rows(
            tmp_path, name, [{"interactions": row} if listed else {**row[0], "interactions": row[1:]} for row in rows]
        )
        config = config_of(tmp_path, "conversations", {"path": name, "validation_share": 0.3})
        held.append(rows_in(config, "conversations", "validation"))
    assert held[0] == held[1] != []


def test_held_out_rows_are_capped_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    rows = texts(500)
    whole = split_of(tmp_path, rows)["validation"]
    capped = split_of(tmp_path, rows, validation_rows=20)
    assert capped["validation"] == whole[:20]
    assert sorted([*capped["train"], *capped["validation"]], key=str) == sorted(row["text"] for row in rows)


def test_a_held_out_file_is_read_whole(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", texts(50))
    put_rows(tmp_path, "other.parquet", [{"text": f"Other {i}."} for i in range(50)])
    for cap in (2000, 10):  # only for what is held out by its content
        config = config_of(
            tmp_path, "texts", {"path": "rows.jsonl", "validation_path": "other.parquet", "validation_rows": cap}
        )
        assert rows_in(config, "texts") == expected("texts") + [row["text"] for row in texts(50)[20:]]
        assert rows_in(config, "texts", "validation") == [f"Other {i}." for i in range(50)]


def test_only_the_first_rows_of_each_split_are_used_when_asked_for(tmp_path: Path) -> None:
    rows = texts(300)
    whole, first = split_of(tmp_path, rows), split_of(tmp_path, rows, max_rows=7)
    assert first == {split: listed[:7] for split, listed in whole.items()}


def test_bad_rows_are_handed_on_once_as_training_rows(tmp_path: Path) -> None:
    put(tmp_path, "rows.jsonl", lines_of([*texts(100), {"text": None}, "{", *texts(120)[100:]]))
    config = config_of(tmp_path, "texts", {"path": "rows.jsonl", "validation_share": 0.3})
    bad = [row for row in placed(config, "texts") if row.problem]
    assert [(row.number, str(row.problem), row.raw) for row in bad] == [
        (101, "column 'text': null", '{"text": null}'),
        (102, "row: not JSON: Expecting property name enclosed in double quotes at column 2", "{"),
    ]
    assert not any(row.problem for row in placed(config, "texts", "validation"))


# ---- turns


def test_long_conversations_are_cut_to_their_first_turns(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", [talk_row(1, 2, 3), talk_row(4, 5), talk_row(6)])
    config = held_out(tmp_path, "conversations", path="rows.jsonl", max_turns=2)
    assert rows_in(config, "conversations") == [talk(1, 2), talk(4, 5), talk(6)]
    put_rows(tmp_path, "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ValidationError, match="texts have no turns"):
        config_of(tmp_path, "texts", {"path": "rows.jsonl", "max_turns": 2})


def test_interactions_of_conversations_are_their_turns_without_answer_keys(tmp_path: Path) -> None:
    key = {"answer_span": "answer 2", "distance": 1, "long_range": False}
    put_rows(tmp_path, "rows.jsonl", [turn(1, interactions=[turn(2, **key)]), turn(3), talk_row(4, 5, 6)])
    config = held_out(tmp_path, "interactions", path="rows.jsonl")
    assert rows_in(config, "interactions") == [talk(i) for i in range(1, 7)]
    assert [row.number for row in placed(config, "interactions")] == [1, 1, 2, 3, 3, 3]
    assert rows_in(config, "interactions", "validation") == [talk(99)]
    assert rows_in(held_out(tmp_path, "interactions", path="rows.jsonl", max_turns=2), "interactions") == [
        talk(i) for i in range(1, 6)
    ]


def test_limits_count_conversations_and_every_turn_is_in_one_split(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", [talk_row(*range(5 * i, 5 * i + 5)) for i in range(40)])
    source = {"path": "rows.jsonl", "validation_share": 0.4, "validation_rows": 6}
    config = config_of(tmp_path, "interactions", source)
    train, validation = (rows_in(config, "interactions", split) for split in sources.SPLITS)
    assert len(validation) == 6 * 5
    assert sorted(map(str, [*train, *validation])) == sorted(str(talk(i)) for i in range(200))
    assert len(rows_in(config_of(tmp_path, "interactions", {**source, "max_rows": 3}), "interactions")) == 3 * 5


# ---- the source as a whole


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    config = config_of(tmp_path, "texts", {"path": "none.txt"})
    for use in (lambda: rows_in(config, "texts"), lambda: source_identity(config)):
        with pytest.raises(DataError, match=f"none.txt: no such file or folder: looked for {tmp_path}/none.txt"):
            use()


def test_the_format_can_be_said_where_the_name_does_not_tell(tmp_path: Path) -> None:
    put(tmp_path, "rows.data", lines_of(CONTENT["texts"]))
    assert rows_in(held_out_as(tmp_path, "jsonl"), "texts") == expected("texts")
    with pytest.raises(DataError, match=r"rows\.data: the format can't be told from the name"):
        rows_in(held_out_as(tmp_path, None), "texts")


def held_out_as(root: Path, file_format: str | None) -> DataConfig:
    put(root, "held_out.data", lines_of([{"text": "held out"}]))
    return config_of(root, "texts", {"path": "rows.data", "validation_path": "held_out.data", "format": file_format})


def test_the_text_separator_can_be_another_or_none(tmp_path: Path) -> None:
    put(tmp_path, "rows.txt", "one\n---\n\n---\n  \n---\ntwo\n---\n")
    assert rows_in(held_out(tmp_path, "texts", path="rows.txt", separator="---"), "texts") == ["one", "two"]
    assert rows_in(held_out(tmp_path, "texts", path="rows.txt", separator=None), "texts") == [
        "one\n---\n\n---\n  \n---\ntwo\n---"
    ]
    with pytest.raises(DataError, match="never occurs"):
        rows_in(held_out(tmp_path, "texts", path="rows.txt"), "texts")
    with pytest.raises(ValidationError, match="separator"):
        held_out(tmp_path, "texts", path="rows.txt", separator="")


def test_a_file_name_that_is_no_unicode_is_shown_as_well_as_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "folder") + b"/odd\xff.jsonl")).write_text('{"text": "One."}\n')
    (row,) = placed(held_out(tmp_path, "texts", path="folder"), "texts")
    assert (row.row, row.name) == ("One.", "odd?.jsonl")
    row.file.encode()


def test_looking_at_the_first_rows_takes_little_memory_however_large_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PEEK_BYTES", 2**20)
    size = 2**19
    put(tmp_path, "rows.jsonl.gz", "".join(f'{{"text": "{i} {"a" * size}"}}\n' for i in range(40)))
    config = held_out(tmp_path, "texts", path="rows.jsonl.gz")
    (source,) = sources.section_sources(config, "texts")
    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(read_source(config, "texts", source, "train"), 40)) == 40
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20, "all 40 rows are 20 MiB"
    finally:
        tracemalloc.stop()


# ---- identity


def test_identity_of_a_source_is_its_content_not_its_path(tmp_path: Path) -> None:
    identities = []
    for folder, name in (("here", "rows.jsonl"), ("there/deep", "other.name.jsonl")):
        root = tmp_path / folder
        put_rows(root, name, CONTENT["texts"])
        put_rows(root, "held.csv", texts(3))
        path = name if folder == "here" else str(root / name)
        identities.append(source_identity(config_of(root, "texts", {"path": path, "validation_path": "held.csv"})))
    here, there = identities
    assert here == there
    assert str(tmp_path) not in json.dumps(identities)
    json.dumps(here)


@pytest.mark.parametrize("changed", ["rows.jsonl", "held.jsonl"])
def test_identity_changes_with_the_content_of_any_file(tmp_path: Path, changed: str) -> None:
    for name in ("rows.jsonl", "held.jsonl"):
        put_rows(tmp_path, name, texts(3))
    config = config_of(tmp_path, "texts", {"path": "rows.jsonl", "validation_path": "held.jsonl"})
    before = source_identity(config)
    put(tmp_path, changed, (tmp_path / changed).read_bytes() + b"\n")
    after = source_identity(config)
    assert before["texts"] != after["texts"]
    assert before["conversations"] == after["conversations"]


def test_identity_changes_with_what_the_names_ending_says_of_the_format(tmp_path: Path) -> None:
    content = "text\tb\na,b\tc\n"
    seen = []
    for name in ("rows.csv", "rows.tsv", "rows.txt", "rows.jsonl"):
        put(tmp_path, name, content)
        seen.append(source_identity(config_of(tmp_path, "texts", {"path": name})))
    assert all(seen.count(one) == 1 for one in seen)
    put(tmp_path, "again.csv", content)
    assert source_identity(config_of(tmp_path, "texts", {"path": "again.csv"})) == seen[0]


@pytest.mark.parametrize(
    "change",
    [
        {"max_rows": 2},
        {"separator": "---"},
        {"validation_share": 0.1},
        {"validation_rows": 3},
        {"columns": {"text": "story"}},
        {"format": "text"},
        {"validation_path": "rows.jsonl"},
    ],
)
def test_identity_covers_what_selects_the_rows(tmp_path: Path, change: dict[str, Any]) -> None:
    put_rows(tmp_path, "rows.jsonl", texts(3))
    base, changed = (
        source_identity(config_of(tmp_path, "texts", {"path": "rows.jsonl", **more})) for more in ({}, change)
    )
    assert base != changed


def test_identity_covers_the_story_world_and_the_policies(tmp_path: Path) -> None:
    base = source_identity(config_of(tmp_path, "texts", WORLD))
    for change in ({"seed": 1}, {"train_rows": 5}, {"validation_rows": 3}):
        assert source_identity(config_of(tmp_path, "texts", {**WORLD, **change})) != base
    for policy in (
        {"bad_rows": "quarantine"},
        {"max_bad_share": 0.2},
        {"duplicates": "keep"},
        {"near_duplicate": 0.5},
        {"largest_row": 1000},
    ):
        assert source_identity(config_of(tmp_path, "texts", WORLD, **policy)) != base


def test_identity_leaves_out_what_only_later_steps_use(tmp_path: Path) -> None:
    base = source_identity(config_of(tmp_path, "texts", WORLD))
    assert source_identity(config_of(tmp_path, "texts", {**WORLD, "weight": 2.5})) == base
    assert source_identity(config_of(tmp_path, "texts", WORLD, too_long="fail")) == base


def test_a_bare_path_is_a_source_of_files(tmp_path: Path) -> None:
    (source,) = sources.section_sources(config_of(tmp_path, "texts", "rows.jsonl"), "texts")
    assert source == FilesSource(kind="files", path="rows.jsonl")
    assert sources.section_sources(DataConfig(conversations="a.jsonl"), "texts") == []


def test_documents_of_text_are_parted_by_their_separator(tmp_path: Path) -> None:
    put(tmp_path, "rows.txt", "".join(f"Story {i}.\nIts second line.\n{END}\n" for i in range(8)))
    rows = rows_in(held_out(tmp_path, "texts", path="rows.txt"), "texts")
    assert rows == [f"Story {i}.\nIts second line." for i in range(8)]


# ---- nothing in a row is lost without a word


LATE = [
    {"query": "q", "think": "Hm.", "answer": "a"},
    {"query": "q", "answer": "a", "interactions": [{"query": "r", "answer": "b"}]},
    {"query": "q", "answer": "a", "interactions": [{"query": "r", "answer": "b", "tool_call": "call()"}]},
]


@pytest.mark.parametrize("late", LATE)
def test_a_row_that_holds_more_than_the_first_hundred_is_read_whole(tmp_path: Path, late: dict[str, Any]) -> None:
    put_rows(tmp_path, "rows.jsonl", [*pairs(120), late])
    config = config_of(tmp_path, "conversations", {"path": "rows.jsonl", "validation_path": "rows.jsonl"})
    last = rows_in(config, "conversations")[-1]
    assert isinstance(last, Conversation)
    shown = json.dumps(row_to_json(last))
    for text in re.findall(r"Hm\.|call\(\)|\"r\"", json.dumps(late)):
        assert text in shown


@pytest.mark.parametrize(
    ("kind", "row", "column"),
    [
        ("interaction", {"query": "q", "answer": "a", "interactions": [turn(1)]}, "interactions"),
        ("interaction", {"query": "q", "answer": "a", "think": "Hm."}, "think"),
        (
            "conversation",
            {"query": "q", "answer": "a", "interactions": [turn(1, internal="x")]},
            "interactions[0].internal",
        ),
    ],
)
def test_content_that_a_row_kind_has_no_place_for_is_an_error(kind: RowKind, row: dict[str, Any], column: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(kind, row)
    assert caught.value.column == column


def test_empty_cells_of_a_csv_are_no_hybrid_content_and_no_answer_key(tmp_path: Path) -> None:
    row = {"query": "q", "tool_use": "", "think": "", "answer": "a", "tool_call": "", "answer_span": "", "distance": ""}
    put_rows(tmp_path, "rows.csv", [row, {**row, "query": "", "tool_use": "result"}])
    config = config_of(tmp_path, "interactions", {"path": "rows.csv", "validation_path": "rows.csv"})
    assert [row.interactions[0].query for row in rows_in(config, "interactions")] == ["q", "result"]  # type: ignore[union-attr]


def test_two_columns_of_ours_can_t_be_the_same_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="two of ours are mapped to 'a'"):
        config_of(tmp_path, "interactions", {"path": "rows.csv", "columns": {"query": "a", "answer": "a"}})


@pytest.mark.parametrize("path", ["data", "data/**/*.jsonl"])
def test_links_are_followed_and_what_several_lead_to_is_taken_once(tmp_path: Path, path: str) -> None:
    put_rows(tmp_path, "elsewhere/b.jsonl", texts(3))
    put_rows(tmp_path, "data/a.jsonl", texts(2))
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    files = expand(path, tmp_path)
    assert sorted(file.name for file in files) == ["a.jsonl", "b.jsonl"]
