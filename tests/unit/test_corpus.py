"""Promises of the corpus: good rows are kept, bad ones accounted for, and memory does not grow with the data."""

import gzip
import json
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rxt_platform.config.data import DataConfig
from rxt_platform.data import corpus
from rxt_platform.data.corpus import read_conversations, read_rows, row_groups, training_texts
from rxt_platform.data.rows import Conversation, Interaction, Recall
from rxt_platform.errors import DataError
from tests.unit.data_files import (
    END,
    WORLD,
    bad_rows_in,
    config_of,
    corpus_of,
    kept_in,
    lines_of,
    put,
    put_rows,
    rows_in,
    talk,
    talk_row,
    turn,
    validation_of,
)

HELD = {"text": "The held-out story tells of nothing else than itself and its end."}
LONG = " ".join(f"word{i}" for i in range(60))
BAD = [
    {"text": "good 1"},
    {"text": None},
    {"text": "good 2"},
    "{",
    {"body": "no text"},
    {"text": "good 3"},
    {"text": None},
    {"text": "half \\ud83d"},
]
BAD_LINES = lines_of([*BAD[:3], "{", *BAD[4:7], '{"text": "half \\ud83d"}'])


def text_source(root: Path, content: str, **source: Any) -> dict[str, Any]:
    """Texts of a file `rows.jsonl`, the held-out one apart."""
    put(root, "rows.jsonl", content)
    put_rows(root, "held.jsonl", [HELD])
    return {"path": "rows.jsonl", "validation_path": "held.jsonl", **source}


def build_texts(root: Path, content: str, **validation: Any) -> dict[str, float]:
    """The corpus of such texts, in a new folder `corpus`."""
    return corpus_of(config_of(root, "texts", text_source(root, content), **validation), root / "corpus")


def failure(root: Path, content: str, **validation: Any) -> str:
    with pytest.raises(DataError) as caught:
        build_texts(root, content, **validation)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- rows come back


def test_a_corpus_gives_back_the_rows_it_was_made_from(tmp_path: Path) -> None:
    key = {"answer_span": "answer 5", "distance": 1, "long_range": False, "task": "my own"}
    odd = {"query": "line\nbreak \u2028 and 🐈", "answer": '"quoted" \\ back'}
    rows = [talk_row(1, 2), {**odd, "interactions": [turn(3)]}, turn(4, interactions=[turn(5, **key)]), turn(6)]
    put_rows(tmp_path, "rows.jsonl", rows)
    put_rows(tmp_path, "held.jsonl", [talk_row(98, 99)])
    source = {"kind": "files", "path": "rows.jsonl", "validation_path": "held.jsonl"}
    config = config_of(tmp_path, "conversations", source).model_copy(
        update={"interactions": config_of(tmp_path, "interactions", source).interactions}
    )
    counts = corpus_of(config, tmp_path / "corpus")
    for section, of_section in (("conversations", (4, 1)), ("interactions", (7, 2))):
        for split, count in zip(("train", "validation"), of_section, strict=True):
            kept = kept_in(tmp_path / "corpus", section, split)  # type: ignore[arg-type]
            assert [row.row for row in kept] == rows_in(config, section, split)  # type: ignore[arg-type]
            assert counts[f"{section}_{split}"] == len(kept) == count
    assert list(read_conversations(tmp_path / "corpus", "validation")) == [talk(98, 99)]
    third = kept_in(tmp_path / "corpus", "conversations")[2]
    assert (third.file, third.number, third.source) == ("rows.jsonl", 3, 0)
    assert isinstance(third.row, Conversation)
    assert third.row.interactions[1].recall == Recall(("answer 5",), 1, False, "my own")
    assert counts["bad_rows"] == counts["duplicates"] == counts["near_duplicates"] == 0
    assert bad_rows_in(tmp_path / "corpus") == []


def test_hybrid_rows_come_back_with_all_their_parts(tmp_path: Path) -> None:
    rows = [
        {"internal": "Be short.", "query": "q", "think": "hm", "tool_call": "f()"},
        {"tool_use": "r", "answer": "a"},
    ]
    put_rows(tmp_path, "rows.jsonl", [{"interactions": rows, "system": "You are Tom."}])
    put_rows(tmp_path, "held.jsonl", [talk_row(1, 2)])
    source = {"path": "rows.jsonl", "validation_path": "held.jsonl"}
    corpus_of(config_of(tmp_path, "conversations", source), tmp_path / "corpus")
    (row,) = kept_in(tmp_path / "corpus", "conversations")
    assert row.row == Conversation(
        (
            Interaction("q", "", hybrid=True, internal="Be short.", think="hm", tool_call="f()"),
            Interaction("r", "a", hybrid=True, from_tool=True),
        ),
        system="You are Tom.",
    )
    learned = list(training_texts(tmp_path / "corpus", 2**20))
    assert learned == ["You are Tom.", "Be short.", "q", "hm", "f()", "r", "a"]


def test_rows_that_share_a_system_prompt_do_not_repeat_each_other(tmp_path: Path) -> None:
    """However long it is: a held-out conversation must not drop all training rows of the same assistant."""
    rows = [{**talk_row(2 * i, 2 * i + 1), "system": LONG} for i in range(4)]
    put_rows(tmp_path, "rows.jsonl", rows[1:])
    put_rows(tmp_path, "held.jsonl", rows[:1])
    source = {"path": "rows.jsonl", "validation_path": "held.jsonl"}
    counts = corpus_of(config_of(tmp_path, "conversations", source), tmp_path / "corpus")
    assert counts["duplicates"] == counts["near_duplicates"] == 0
    assert len(kept_in(tmp_path / "corpus", "conversations")) == 3


def test_several_sources_keep_their_order_numbers_and_counts(tmp_path: Path) -> None:
    listed = [
        text_source(tmp_path, lines_of({"text": f"A {i}"} for i in range(5)), weight=0.5),
        {"kind": "story_world", "train_rows": 3, "validation_rows": 2, "weight": 3.0},
    ]
    put_rows(tmp_path, "more.csv", [{"text": f"B {i}"} for i in range(4)])
    listed.append({"path": "more.csv", "validation_path": "held.jsonl"})
    counts = corpus_of(config_of(tmp_path, "texts", *listed), tmp_path / "corpus")
    rows = kept_in(tmp_path / "corpus", "texts")
    assert [row.source for row in rows] == [0] * 5 + [1] * 3 + [2] * 4, "each row once: weights are the sampler's"
    assert [row.file for row in rows] == ["rows.jsonl"] * 5 + ["story_world"] * 3 + ["more.csv"] * 4
    assert [one["kept"] for one in validation_of(tmp_path / "corpus", "texts")] == [5, 3, 4]
    assert [one["kept"] for one in validation_of(tmp_path / "corpus", "texts", "validation")] == [1, 2, 1]
    assert (counts["texts_train"], counts["texts_validation"]) == (12, 4)


def test_the_tokenizer_learns_from_training_rows_alone(tmp_path: Path) -> None:
    build_texts(tmp_path, lines_of({"text": f"story {i}"} for i in range(20)))
    learned = list(training_texts(tmp_path / "corpus", 2**20))
    assert learned[:20] == [f"story {i}" for i in range(20)]
    assert HELD["text"] not in learned
    talks = [text for row in kept_in(tmp_path / "corpus", "conversations") for text in corpus.row_texts(row.row)]
    assert learned[20:] == talks


# ---- bad rows


def test_bad_rows_fail_with_their_places_columns_reasons_and_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert failure(tmp_path, BAD_LINES) == (
        f"{file}:2: column 'text': null; "
        f"{file}:4: row: not JSON: Expecting property name enclosed in double quotes at column 2; "
        f"{file}:5: column 'text': missing; "
        f"{file}:7: column 'text': null; "
        f"{file}:8: column 'text': half of a surrogate pair: not Unicode text: "
        "mend them, or set them aside with data.validation.bad_rows=quarantine"
    )


def test_of_many_bad_rows_the_first_are_shown_and_the_others_not_even_read(tmp_path: Path) -> None:
    message = failure(tmp_path, lines_of([{"text": "good"}, *[{"text": None}] * 30]))
    assert re.findall(r"rows\.jsonl:(\d+)", message) == ["2", "3", "4", "5", "6"]
    assert "column 'text': null; and more: mend them" in message


def test_quarantine_keeps_every_good_row_and_writes_every_bad_one_aside(tmp_path: Path) -> None:
    counts = build_texts(tmp_path, BAD_LINES, bad_rows="quarantine", max_bad_share=0.7)
    kept = kept_in(tmp_path / "corpus", "texts")
    assert [(row.number, row.row) for row in kept] == [(1, "good 1"), (3, "good 2"), (6, "good 3")]
    common = {"section": "texts", "split": "train", "file": "rows.jsonl"}
    assert bad_rows_in(tmp_path / "corpus") == [
        {**common, "row": 2, "column": "text", "reason": "null", "content": '{"text": null}'},
        {
            **common,
            "row": 4,
            "column": "",
            "reason": "not JSON: Expecting property name enclosed in double quotes at column 2",
            "content": "{",
        },
        {**common, "row": 5, "column": "text", "reason": "missing", "content": '{"body": "no text"}'},
        {**common, "row": 7, "column": "text", "reason": "null", "content": '{"text": null}'},
        {
            **common,
            "row": 8,
            "column": "text",
            "reason": "half of a surrogate pair: not Unicode text",
            "content": '{"text": "half \\ud83d"}',
        },
    ]
    assert (counts["texts_train"], counts["bad_rows"]) == (3, 5)
    (one,) = validation_of(tmp_path / "corpus", "texts")
    assert (one["rows"], one["kept"], one["duplicates"], one["near_duplicates"]) == (8, 3, 0, 0)
    assert sum(one["bad"].values()) == 5
    assert next(iter(one["bad"].items())) == ("column 'text': null", 2), "the most frequent first"


@pytest.mark.parametrize(("bad", "fails"), [(2, False), (3, True)])
def test_more_bad_rows_than_the_allowed_share_are_an_error(tmp_path: Path, bad: int, fails: bool) -> None:
    rows = [{"text": f"good {i}"} for i in range(20 - bad)] + [{"text": None}] * bad
    if not fails:
        assert build_texts(tmp_path, lines_of(rows), bad_rows="quarantine", max_bad_share=0.1)["texts_train"] == 18
        return
    message = failure(tmp_path, lines_of(rows), bad_rows="quarantine", max_bad_share=0.1)
    assert message.startswith("3 of 20 rows are bad, more than data.validation.max_bad_share 0.1: ")
    assert f"{tmp_path / 'rows.jsonl'}:18: column 'text': null" in message


def test_a_large_good_source_does_not_hide_a_bad_one(tmp_path: Path) -> None:
    good = text_source(tmp_path, lines_of({"text": f"good {i}"} for i in range(1000)))
    put(tmp_path, "bad.jsonl", lines_of([{"text": "fine"}, {"text": None}]))
    config = config_of(tmp_path, "texts", good, {**good, "path": "bad.jsonl"}, bad_rows="quarantine")
    with pytest.raises(DataError, match=r"1 of 2 rows are bad"):
        corpus_of(config, tmp_path / "corpus")


def test_a_bad_held_out_row_counts_too(tmp_path: Path) -> None:
    source = text_source(tmp_path, lines_of([{"text": "good"}]))
    put(tmp_path, "held.jsonl", lines_of([HELD, {"text": 3}]))
    with pytest.raises(DataError, match=r"held\.jsonl:2: column 'text': expected text, got int"):
        corpus_of(config_of(tmp_path, "texts", source), tmp_path / "failed")
    corpus_of(config_of(tmp_path, "texts", source, bad_rows="quarantine", max_bad_share=0.5), tmp_path / "corpus")
    (entry,) = bad_rows_in(tmp_path / "corpus")
    assert (entry["split"], entry["file"], entry["row"]) == ("validation", "held.jsonl", 2)


def test_counts_stay_small_where_every_bad_row_has_a_reason_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_COUNTED_APART", 10)
    lines = lines_of([{"text": "good"}, *({"text": "x" * i + "\0"} for i in range(50))])
    build_texts(tmp_path, lines, bad_rows="quarantine", max_bad_share=1.0)
    (one,) = validation_of(tmp_path / "corpus", "texts")
    assert (len(one["bad"]), one["bad"]["other reasons"]) == (11, 40)
    assert len(bad_rows_in(tmp_path / "corpus")) == 50, "each with its own reason"


# ---- rows that repeat held-out ones

SAID_AGAIN = [
    {"text": "a new story"},
    {"text": HELD["text"].upper() + "!"},
    {"text": f"{LONG} and a little more"},
    {"text": "another new story"},
]


def repeated(root: Path, **validation: Any) -> dict[str, float]:
    source = text_source(root, lines_of(SAID_AGAIN))
    put_rows(root, "held.jsonl", [HELD, {"text": LONG}])
    return corpus_of(config_of(root, "texts", source, **validation), root / "corpus")


def test_training_rows_that_repeat_a_held_out_row_are_dropped_and_written_aside(tmp_path: Path) -> None:
    counts = repeated(tmp_path)
    assert [row.number for row in kept_in(tmp_path / "corpus", "texts")] == [1, 4]
    assert (counts["duplicates"], counts["near_duplicates"], counts["bad_rows"]) == (1, 1, 0)
    exact, near = bad_rows_in(tmp_path / "corpus")
    assert (exact["file"], exact["row"], exact["column"]) == ("rows.jsonl", 2, "")
    assert exact["reason"] == "duplicate of the held-out row held.jsonl:1"
    assert json.loads(exact["content"]) == SAID_AGAIN[1], "the whole row"
    assert (near["row"], near["reason"]) == (3, "near duplicate (100% of its 8-grams) of the held-out row held.jsonl:2")
    (one,) = validation_of(tmp_path / "corpus", "texts")
    assert one == {"rows": 4, "kept": 2, "duplicates": 1, "near_duplicates": 1, "bad": {}}


def test_repeated_rows_are_kept_and_counted_when_asked_for(tmp_path: Path) -> None:
    counts = repeated(tmp_path, duplicates="keep")
    assert [row.number for row in kept_in(tmp_path / "corpus", "texts")] == [1, 2, 3, 4]
    assert (counts["duplicates"], counts["near_duplicates"]) == (1, 1)
    assert bad_rows_in(tmp_path / "corpus") == []
    (one,) = validation_of(tmp_path / "corpus", "texts")
    assert (one["rows"], one["kept"]) == (4, 4)


def test_a_repeated_row_fails_when_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        repeated(tmp_path, duplicates="fail")
    assert str(caught.value) == (
        f"{tmp_path / 'rows.jsonl'}:2: row: duplicate of the held-out row held.jsonl:1: "
        "data.validation.duplicates=drop leaves it out"
    )


def test_how_much_makes_a_near_duplicate_is_a_setting(tmp_path: Path) -> None:
    part = " ".join(LONG.split()[:30]) + " " + " ".join(f"else{i}" for i in range(30))  # 23 of 53 shingles
    for threshold, kept in ((0.8, 1), (0.4, 0)):
        root = tmp_path / str(threshold)
        source = text_source(root, lines_of([{"text": "new"}, {"text": part}]))
        put_rows(root, "held.jsonl", [{"text": LONG}])
        corpus_of(config_of(root, "texts", source, near_duplicate=threshold), root / "corpus")
        assert len(kept_in(root / "corpus", "texts")) == 1 + kept


def test_repeated_rows_are_found_in_other_sources_and_far_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_CHECKED_AT_ONCE", 7)
    rows = [{"text": f"story {i}"} for i in range(100)]
    first = text_source(tmp_path, lines_of([*rows, HELD]))
    put_rows(tmp_path, "second.jsonl", [*rows[:3], {"text": "the second held-out story"}])
    put_rows(tmp_path, "held2.jsonl", [{"text": "The second held-out story."}, rows[50]])
    second = {"path": "second.jsonl", "validation_path": "held2.jsonl"}
    corpus_of(config_of(tmp_path, "texts", first, second), tmp_path / "corpus")
    assert [(row["file"], row["row"], row["reason"]) for row in bad_rows_in(tmp_path / "corpus")] == [
        ("rows.jsonl", 51, "duplicate of the held-out row held2.jsonl:2"),
        ("rows.jsonl", 101, "duplicate of the held-out row held.jsonl:1"),
        ("second.jsonl", 4, "duplicate of the held-out row held2.jsonl:1"),
    ]
    assert len(kept_in(tmp_path / "corpus", "texts")) == 102


def test_conversations_repeat_one_another_by_all_their_turns(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", [talk_row(1, 2), talk_row(1, 3), {"interactions": [turn(1), turn(2)]}])
    put_rows(tmp_path, "held.jsonl", [talk_row(1, 2)])
    source = {"path": "rows.jsonl", "validation_path": "held.jsonl"}
    corpus_of(config_of(tmp_path, "conversations", source), tmp_path / "corpus")
    assert [row.number for row in kept_in(tmp_path / "corpus", "conversations")] == [2]


# ---- nothing is left


@pytest.mark.parametrize(
    ("rows", "held", "message"),
    [
        ([HELD, HELD], [HELD], "data.texts: no train rows are left: 2 of 2 repeat held-out rows; name other files"),
        ([{"text": None}], [HELD], "data.texts: no train rows are left: 1 rows were read, all of them bad"),
        ([HELD], [{"text": " "}], "data.texts: no validation rows are left: 1 rows were read, all of them bad"),
    ],
)
def test_a_part_without_rows_is_an_error_that_says_why(
    tmp_path: Path, rows: list[Any], held: list[Any], message: str
) -> None:
    source = text_source(tmp_path, lines_of(rows))
    put_rows(tmp_path, "held.jsonl", held)
    config = config_of(tmp_path, "texts", source, bad_rows="quarantine", max_bad_share=1.0)
    with pytest.raises(DataError) as caught:
        corpus_of(config, tmp_path / "corpus")
    assert str(caught.value).startswith(message)


def test_a_share_that_holds_out_no_row_is_an_error(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", [{"text": f"story {i}"} for i in range(3)])
    with pytest.raises(DataError, match=r"data\.texts: no validation rows are left: raise validation_share, or name"):
        corpus_of(config_of(tmp_path, "texts", {"path": "rows.jsonl", "validation_share": 0.001}), tmp_path / "corpus")


def test_single_turn_rows_are_no_conversations(tmp_path: Path) -> None:
    put_rows(tmp_path, "rows.jsonl", [turn(1), turn(2)])
    put_rows(tmp_path, "held.jsonl", [talk_row(8, 9)])
    source = {"path": "rows.jsonl", "validation_path": "held.jsonl"}
    with pytest.raises(
        DataError, match=r"data\.conversations: no train row has a follow-up interaction: column 'inter"
    ):
        corpus_of(config_of(tmp_path, "conversations", source), tmp_path / "corpus")


# ---- size


def test_a_corpus_much_larger_than_a_row_group_reads_back_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_GROUP_BYTES", 4000)
    monkeypatch.setattr(corpus, "_CHECKED_AT_ONCE", 13)
    stories = [f"story {i} {'x' * (i % 90)}" for i in range(2000)]
    build_texts(tmp_path, lines_of({"text": story} for story in stories))
    kept = kept_in(tmp_path / "corpus", "texts")
    assert [row.row for row in kept] == stories
    assert [row.number for row in kept] == list(range(1, 2001))
    with pq.ParquetFile(tmp_path / "corpus" / "texts.train.parquet") as file:
        groups = [file.read_row_group(i).column("text").to_pylist() for i in range(file.num_row_groups)]
    assert len(groups) > 20
    assert all(sum(map(len, group)) < 4000 + 100 for group in groups), "none holds more than a row too much"
    for taken in (range(3, 7), range(len(groups) - 1, len(groups)), range(0)):
        rows = [row.row for row in read_rows(tmp_path / "corpus", "texts", "train", taken)]
        assert rows == [text for i in taken for text in groups[i]]


def test_a_row_group_holds_no_more_than_so_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_GROUP_ROWS", 64)
    build_texts(tmp_path, lines_of({"text": f"story {i}"} for i in range(200)))
    assert len(row_groups(tmp_path / "corpus", "texts", "train")) == 4


def test_row_group_sizes_are_those_of_their_text_also_where_rows_repeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_GROUP_BYTES", 50_000)
    build_texts(tmp_path, lines_of([{"text": "the same story " * 30}] * 1000))
    sizes = row_groups(tmp_path / "corpus", "texts", "train")
    assert all(50_000 <= size < 60_000 for size in sizes[:-1])
    assert row_groups(tmp_path / "corpus", "interactions", "train") == [], "no such section"


def test_the_tokenizer_learns_from_an_even_share_of_a_large_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_GROUP_BYTES", 1000)
    build_texts(tmp_path, lines_of({"text": f"{i:04} {'x' * 95}"} for i in range(1000)))
    numbers = [int(text[:4]) for text in training_texts(tmp_path / "corpus", 25_000) if text[4:6] == " x"]
    assert 100 <= len(numbers) <= 250, "of 25,000 bytes, 100 a row and some for its place"
    assert numbers == sorted(numbers)
    assert all(any(start <= number < start + 100 for number in numbers) for start in range(0, 1000, 100))


def grown(root: Path, size: int) -> float:
    """MiB of memory that this process needs to make a corpus of `size` MiB from a compressed file."""
    story = "A long, long story. " * 3000
    with gzip.open(root / "rows.txt.gz", "wt", compresslevel=1) as file:
        for i in range(size * 2**20 // len(story)):
            file.write(f"Story {i}. {story}\n{END}\n")
    put(root, "held.txt", f"held out\n{END}\n")
    before = most_memory()
    corpus_of(config_of(root, "texts", {"path": "rows.txt.gz", "validation_path": "held.txt"}), root / "corpus")
    return most_memory() - before


def most_memory() -> float:
    """MiB that this process has had at most. (What `resource` says includes the process that it was forked from.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, to ask how much memory was in use")
def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Each corpus is made by a process of its own. Slow, as the larger one must be more than what may be needed."""
    needed = []
    for size in (32, 80):
        (tmp_path / str(size)).mkdir()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            needed.append(process.submit(grown, tmp_path / str(size), size).result())
    assert max(needed) < 200
    assert needed[1] - needed[0] < 16
    assert len(row_groups(tmp_path / "80" / "corpus", "texts", "train")) == 10


def test_the_same_data_makes_the_same_files(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        root = tmp_path / name
        source = text_source(root, BAD_LINES)
        config = config_of(root, "texts", source, WORLD, bad_rows="quarantine", max_bad_share=1.0)
        corpus_of(config, root / "corpus")
        made.append({path.name: path.read_bytes() for path in sorted((root / "corpus").iterdir())})
    assert made[0] == made[1]
    assert str(tmp_path) not in made[0]["bad_rows.jsonl"].decode()


def test_no_stage_trains_on_a_turn_of_a_held_out_conversation(tmp_path: Path) -> None:
    """Recall is measured on held-out conversations; their turns must not come back as interactions."""
    long = "Who was it that the old fisherman met at the well on that cold morning?"
    shared = {"query": long, "answer": "It was the miller."}
    small_talk = {"query": "Hello.", "answer": "Hello."}
    put_rows(tmp_path, "talks.jsonl", [talk_row(1, 2), talk_row(3, 4)])
    put_rows(tmp_path, "held.jsonl", [{**turn(5), "interactions": [shared, small_talk]}])
    put_rows(tmp_path, "turns.jsonl", [turn(6), shared, small_talk])
    put_rows(tmp_path, "held_turns.jsonl", [turn(7)])
    files = {"kind": "files"}
    config = DataConfig.model_validate(
        {
            "root": str(tmp_path),
            "interactions": {**files, "path": "turns.jsonl", "validation_path": "held_turns.jsonl"},
            "conversations": {**files, "path": "talks.jsonl", "validation_path": "held.jsonl"},
        }
    )
    counts = corpus_of(config, tmp_path / "corpus")
    kept = [row.row for row in kept_in(tmp_path / "corpus", "interactions")]
    assert [row.interactions[0].query for row in kept] == ["question 6", "Hello."]  # type: ignore[union-attr]
    assert counts["duplicates"] == 1
    (dropped,) = bad_rows_in(tmp_path / "corpus")
    assert dropped["reason"] == "duplicate of the held-out row held.jsonl:1"
