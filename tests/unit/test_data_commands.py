"""Promises of `rxt data`: what it counts is what a run would find, it says so clearly, it never touches the rows."""

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml
from datasets import Dataset

from rxt_platform import cli_data
from rxt_platform.cli import guarded, rxt
from rxt_platform.config.loading import load_run
from rxt_platform.data.corpus import build_corpus
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.formats import FileFormat
from rxt_platform.data.rows import Conversation, RowKind, parse_row
from rxt_platform.data.sampler import BatchSampler
from rxt_platform.data.shards import TokenShards
from rxt_platform.data.sources import PlacedRow
from rxt_platform.errors import DataError
from rxt_platform.inspection import histogram, samples, validation
from rxt_platform.inspection.listing import bars
from rxt_platform.inspection.measures import Lengths, inspect_part
from rxt_platform.inspection.parts import named_part, run_parts
from rxt_platform.orchestration import data_build
from rxt_platform.orchestration.plan import build_plan
from rxt_platform.orchestration.steps import only_holder
from rxt_platform.stages.build import sampling
from rxt_platform.training.engine import forward_rows
from tests.support import ROOT, SMALL, small_run
from tests.unit.data_files import put, put_rows, talk_row, turn
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
    raw["storage"] = str(folder / "runs")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


# ---- inspect


def test_files_are_counted_one_by_one_with_what_is_bad(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [talk_row(1, 2, 3), turn(4), {"query": "no answer"}])
    put_rows(tmp_path, "b.parquet", [{"text": "one"}, {"text": None}])
    (found,) = figures(capsys, "inspect", tmp_path)
    files = [[Path(one["name"]).name, one["format"], one["kind"], one["rows"], one["bad"]] for one in found["files"]]
    assert files == [["a.jsonl", "jsonl", "conversation", 3, 1], ["b.parquet", "parquet", "text", 2, 1]]
    assert found["files"][0]["size"] == (tmp_path / "a.jsonl").stat().st_size
    assert (found["rows"], found["bad"], found["interactions"]) == (5, 2, 4)
    assert found["bad_reasons"] == {"column 'answer': missing": 1, "column 'text': null": 1}
    text = ran(capsys, "inspect", tmp_path)
    assert "rows 5, bad 2, interactions 4\nturns of a row: min 1, median 1, max 3" in text
    assert "The files hold rows of different kinds" in text


def test_columns_are_listed_with_types_nulls_and_absences(capsys: Capture, tmp_path: Path) -> None:
    rows = [{"query": "q", "answer": "a", "n": 1, "interactions": [turn(1), {"query": None, "answer": 2}]}]
    rows += [{"query": 7, "answer": "a", "n": None}]
    put_rows(tmp_path, "a.jsonl", rows)
    (found,) = figures(capsys, "inspect", tmp_path / "a.jsonl")
    assert found["columns"] == {
        "query": {"types": {"text": 1, "int": 1}, "null": 0, "missing": 0},
        "answer": {"types": {"text": 2}, "null": 0, "missing": 0},
        "n": {"types": {"int": 1}, "null": 1, "missing": 0},
        "interactions": {"types": {"list": 1}, "null": 0, "missing": 1},
        "interactions[].query": {"types": {"text": 1}, "null": 1, "missing": 0},
        "interactions[].answer": {"types": {"text": 1, "int": 1}, "null": 0, "missing": 0},
    }


def test_lengths_are_exact_up_to_16384_and_nearly_so_beyond() -> None:
    lengths = Lengths()
    for length in [*range(1, 101), 16_383, 1_000_003]:
        lengths.add(length)
    assert (lengths.number, lengths.shortest, lengths.longest, lengths.total) == (102, 1, 1_000_003, 5050 + 1_016_386)
    assert [lengths.quantile(share) for share in (0.5, 0.95, 101 / 102)] == [51, 97, 16_383]
    assert 0 <= 1_000_003 - lengths.quantile(1) < 100
    assert lengths.histogram(4, 25).tolist() == [24, 25, 25, 25]


def test_every_text_of_a_row_has_its_lengths(capsys: Capture, tmp_path: Path) -> None:
    hybrid = {"query": "one two", "think": "hm", "answer": "three", "tool_call": None, "internal": "be brief now"}
    put_rows(tmp_path, "a.jsonl", [{"interactions": [hybrid, {"tool_use": "rain", "answer": "It rains."}]}])
    (found,) = figures(capsys, "inspect", tmp_path / "a.jsonl")
    words = {name: [of["words"]["number"], of["words"]["mean"]] for name, of in found["lengths"].items()}
    assert words == {
        "internal": [1, 3],
        "query": [1, 2],
        "think": [1, 1],
        "answer": [2, 1.5],
        "tool_use": [1, 1],
        "interaction": [2, 5],
    }
    assert found["lengths"]["query"]["characters"]["max"] == len("one two")


def test_replies_of_preferences_are_measured_by_choice(capsys: Capture, tmp_path: Path) -> None:
    row = {"query": "Why?", "accepted": {"answer": "Because."}, "rejected": {"answer": "I do not know."}}
    put_rows(tmp_path, "a.jsonl", [{"interactions": [row, row]}])
    (found,) = figures(capsys, "inspect", tmp_path / "a.jsonl")
    words = {name: [of["words"]["number"], of["words"]["mean"]] for name, of in found["lengths"].items()}
    assert words == {"query": [2, 1], "accepted.answer": [2, 1], "rejected.answer": [2, 4], "interaction": [4, 3.5]}
    assert (found["files"][0]["kind"], found["interactions"]) == ("preference", 2)


def test_questions_are_counted_by_task(capsys: Capture, tmp_path: Path) -> None:
    key = {"answer_span": "answer 2", "distance": 1, "long_range": False}
    rows = [turn(1, interactions=[turn(2, **key, task=task)]) for task in ("recall", "recall", "update")]
    put_rows(tmp_path, "a.jsonl", rows)
    assert "questions with an answer key: 3 (recall 2, update 1)" in ran(capsys, "inspect", tmp_path / "a.jsonl")


def test_rows_over_the_window_are_those_that_a_run_would_cut(capsys: Capture, tmp_path: Path) -> None:
    texts = ["Tom has a red hat. " * count for count in (1, 3, 5, 7, 9)]
    rows = [turn(1, interactions=[{"query": "What has Tom?", "answer": text}] * 2) for text in texts]
    put_rows(tmp_path, "a.jsonl", rows)
    window = 48
    made = RowEncoder(word_tokenizer(), window).encode([parse_row("conversation", row) for row in rows])
    cut = [sum(example.truncated for example in examples) for examples in made if isinstance(examples, list)]
    assert 0 < sum(map(bool, cut)) < len(rows)
    tokenizer = a_tokenizer(tmp_path)
    (found,) = figures(capsys, "inspect", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--window", window)
    assert found["over_window"] == {"window": window, "rows": sum(map(bool, cut)), "interactions": sum(cut)}
    whole = RowEncoder(word_tokenizer(), 10_000).encode([parse_row("conversation", row) for row in rows])
    lengths = Counter(len(ids) for examples in whole if isinstance(examples, list) for ids in examples[0].turns)
    assert found["lengths"]["interaction"]["tokens"]["counts"] == {str(n): lengths[n] for n in sorted(lengths)}


def test_texts_over_the_window_are_those_that_are_parted(capsys: Capture, tmp_path: Path) -> None:
    texts = ["Tom has a red hat. " * count for count in (1, 3, 5, 7, 9)]
    put_rows(tmp_path, "a.jsonl", [{"text": text} for text in texts])
    made = RowEncoder(word_tokenizer(), 32).encode(texts)
    parted = sum(len(examples) > 1 for examples in made if isinstance(examples, list))
    tokenizer = a_tokenizer(tmp_path).parent  # a directory with a tokenizer.json
    (found,) = figures(capsys, "inspect", tmp_path / "a.jsonl", "--tokenizer", tokenizer, "--window", 32)
    assert 0 < parted < 5
    assert found["over_window"]["rows"] == parted


def test_a_runs_sources_are_read_once_each_as_the_run_reads_them(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "talks.csv", [{"frage": "q", "antwort": "a"}] * 3)
    put_rows(tmp_path, "held.csv", [{"frage": "q", "antwort": "a"}])
    source = {"kind": "files", "path": "talks.csv", "validation_path": "held.csv"}
    source["columns"] = {"query": "frage", "answer": "antwort"}
    run = a_run(tmp_path, interactions=source, conversations=[{**source, "max_turns": 2}])
    found = figures(capsys, "inspect", run, "--tokenizer", a_tokenizer(tmp_path))
    assert [one["source"] for one in found] == [
        "texts: story_world, seed 0",
        "texts, held out: story_world, seed 0",
        "interactions and conversations: talks.csv",
        "interactions and conversations, held out: held.csv",
    ]
    assert [(one["rows"], one["bad"]) for one in found] == [(8, 0), (4, 0), (3, 0), (1, 0)]
    assert {one["over_window"]["window"] for one in found} == {load_run(run).model.max_length}


def test_all_files_of_a_runs_source_are_of_the_kind_that_the_run_sees(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "talks/a.jsonl", [talk_row(1, 2)])
    put_rows(tmp_path, "talks/b.jsonl", [turn(3, think="Hm.")])
    run = a_run(tmp_path, conversations="talks")
    assert [file["kind"] for file in figures(capsys, "inspect", run)[-1]["files"]] == ["hybrid"] * 2
    (alone,) = figures(capsys, "inspect", tmp_path / "talks")
    assert [file["kind"] for file in alone["files"]] == ["conversation", "hybrid"]


def test_only_the_first_rows_are_read_when_asked_for(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [turn(number) for number in range(5)])
    put(tmp_path, "b.jsonl", "damaged\n")
    (found,) = figures(capsys, "inspect", tmp_path, "--rows", 5)
    assert (found["rows"], found["bad"], len(found["files"])) == (5, 0, 1)
    (found,) = figures(capsys, "inspect", tmp_path, "--rows", 3)
    assert found["interactions"] == 3


def test_a_file_that_cannot_be_read_does_not_hide_the_others(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [turn(1)])
    put(tmp_path, "b.parquet", "no parquet")
    text = ran(capsys, "inspect", tmp_path)
    assert f"can't be read: {tmp_path / 'b.parquet'}: damaged, or not Parquet" in text
    assert "rows 1, bad 0, interactions 1" in text
    _, error = refused(capsys, "inspect", tmp_path / "b.parquet")
    assert "damaged, or not Parquet" in error


def test_rows_of_no_known_kind_are_shown_with_their_columns(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [{"question": "q", "reply": "a"}] * 2)
    text = ran(capsys, "inspect", tmp_path / "a.jsonl")
    assert "none known" in text
    assert "No row kind fits the columns: rows need text, or query and answer, or interactions." in text
    assert "row: of no row kind; columns: question, reply     2" in text
    assert "reply     text       2     0        0" in text


def test_data_sets_laid_out_as_on_the_hub_are_read_by_config_and_split(capsys: Capture, tmp_path: Path) -> None:
    for config, count in (("short", 2), ("long", 3)):
        folder = tmp_path / "set" / config
        folder.mkdir(parents=True)
        Dataset.from_list([turn(number) for number in range(count)]).to_parquet(folder / "test.parquet")
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/*"}]} for name in ("short", "long")
    ]
    (tmp_path / "set" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    named = ["inspect", f"hf:{tmp_path / 'set'}", "--split", "test", "--config"]
    assert [figures(capsys, *named, name)[0]["rows"] for name in ("short", "long")] == [2, 3]


def test_bars_show_where_lengths_are() -> None:
    lengths = Lengths()
    for length in [0, 0, 0, 0, 2, 3, 3]:
        lengths.add(length)
    assert bars(lengths) == "0 │█ ▂▄│ 3"
    for _ in range(1000):
        lengths.add(1)
    lengths.add(500)
    assert bars(lengths) == "0 │▁█│ 1  and 4 longer"


def test_the_picture_has_a_panel_for_each_field(tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [turn(number, note="x" * number) for number in range(30)])
    found = inspect_part(named_part(str(tmp_path / "a.jsonl")), word_tokenizer(), 12)
    panels = histogram.panels_of([found])
    assert [(panel.title, panel.axis, panel.window) for panel in panels] == [
        ("query", "tokens (of 30)", None),
        ("answer", "tokens (of 30)", None),
        ("interaction", "tokens (of 30)", 12),
    ]
    assert [sum(panel.series[0].counts) for panel in panels] == [30, 30, 30]


def test_the_picture_of_a_run_has_a_panel_for_each_section(capsys: Capture, tmp_path: Path) -> None:
    picture = tmp_path / "lengths.png"
    ran(capsys, "inspect", a_run(tmp_path), "--histogram", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    parts = [inspect_part(part) for part in run_parts(load_run(a_run(tmp_path)).data)]
    assert [(panel.title, panel.axis) for panel in histogram.panels_of(parts)] == [
        ("texts", "words (of 12)"),
        ("interactions", "words (of 12)"),
        ("conversations", "words (of 36)"),
    ]


# ---- validate


def test_every_bad_row_is_named_by_file_row_and_column(capsys: Capture, tmp_path: Path) -> None:
    rows = [turn(1), turn(2, answer=None), '{"query": ', turn(3, interactions=[turn(4), {"query": "q"}])]
    put(tmp_path, "a.jsonl", "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    file = tmp_path / "a.jsonl"
    out, error = refused(capsys, "validate", file)
    assert out.splitlines()[:3] == [
        f"{file}:2:answer: null",
        f"{file}:3: not JSON: Expecting value at column 11",
        f"{file}:4:interactions[1].answer: missing",
    ]
    assert error == f"error: {file}: rows that can't be used: 3 of 4\n"


def test_usable_rows_leave_with_exit_code_0(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [talk_row(1, 2), turn(3)])
    assert ran(capsys, "validate", tmp_path).endswith("\nrows that can't be used: 0 of 2\n")


def test_reasons_are_counted_without_what_only_one_row_says(capsys: Capture, tmp_path: Path) -> None:
    inner = [[turn(1), {"query": "q", "answer": f"{'x' * number}\x07"}] for number in range(3)]
    inner += [[{**turn(1), "distance": 1, "long_range": False, "answer_span": f"span{n}"}] for n in range(2)]
    put_rows(tmp_path, "a.jsonl", [turn(0, interactions=listed) for listed in inner])
    out, _ = refused(capsys, "validate", tmp_path / "a.jsonl", "--json")
    assert json.loads(out)["reasons"] == {
        "column 'interactions[].answer': control character U+0007 at position N": 3,
        "column 'interactions[].answer_span': '…' does not occur in the answer '…'": 2,
    }


def test_repeated_rows_are_found_in_the_source_and_against_held_out_ones(capsys: Capture, tmp_path: Path) -> None:
    held, near = f"{LONG} one more", f"{LONG} another end"
    put_rows(tmp_path, "train.jsonl", [{"text": held}, {"text": near}, {"text": "Tom sat."}, {"text": "tom SAT"}])
    put_rows(tmp_path, "held.jsonl", [{"text": "unlike"}, {"text": f"{held}!"}])
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    out = ran(capsys, "validate", train, "--held-out", held_out)
    assert out.splitlines()[0] == f"{train}:1: duplicate of the held-out row {held_out}:2"
    assert out.splitlines()[1].startswith(f"{train}:2: near duplicate (9")
    (_, found) = figures(capsys, "validate", train, "--held-out", held_out)["checked"]
    assert [found[name] for name in ("rows", "bad", "duplicates", "near_duplicates", "repeated")] == [4, 0, 1, 1, 1]


def test_the_held_out_rows_are_read_in_the_same_way(capsys: Capture, tmp_path: Path) -> None:
    put(tmp_path, "train.txt", "one\n--\ntwo\n--\nfour\n--\n")
    put(tmp_path, "held.txt", "two\n--\nthree\n--\n")
    named = ["validate", tmp_path / "train.txt", "--held-out", tmp_path / "held.txt", "--separator=--"]
    assert [one["duplicates"] for one in figures(capsys, *named)["checked"]] == [0, 1]
    for split, numbers in (("train", (1, 2, 3)), ("test", (3, 4))):
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_list([turn(number) for number in numbers]).to_parquet(tmp_path / f"set/{split}.parquet")
    named = ["validate", f"hf:{tmp_path / 'set'}", "--held-out", f"hf:{tmp_path / 'set'}[test]"]
    assert [(one["rows"], one["duplicates"]) for one in figures(capsys, *named)["checked"]] == [(2, 0), (3, 1)]


def test_repeats_are_counted_alike_when_they_do_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {number % 70}" for number in range(100)]
    counts = []
    for kept in (1000, 8):
        monkeypatch.setattr(validation, "_KEPT", kept)
        said = validation._Repeats()
        for text in [*texts, "...", "!"]:  # no words: repeat nothing
            said.add(text)
        counts.append(said.count())
    assert counts == [30, 30]


def test_rows_are_judged_as_the_kind_that_is_asked_for(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [{"query": "q", "answer": "a", "text": "t"}, {"query": "q", "text": "t"}])
    file = tmp_path / "a.jsonl"
    assert "0 of 2" in ran(capsys, "validate", file, "--kind", "text")
    out, _ = refused(capsys, "validate", file, "--kind", "interaction")
    assert out.startswith(f"{file}:2:answer: missing\n")


def test_all_findings_go_to_a_file_and_some_are_shown(capsys: Capture, tmp_path: Path) -> None:
    rows = [turn(number, answer=" ") for number in range(5)]
    put_rows(tmp_path, "a.jsonl", rows)
    listed = tmp_path / "bad.jsonl"
    out, _ = refused(capsys, "validate", tmp_path / "a.jsonl", "--bad-rows", listed, "--limit", 2)
    assert f":2:answer: empty\nand 3 more, all in {listed}\n" in out
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(Path(one["file"]).name, one["row"], one["column"], one["reason"]) for one in entries] == [
        ("a.jsonl", number, "answer", "empty") for number in range(1, 6)
    ]
    assert [json.loads(one["content"]) for one in entries] == rows


def test_findings_are_never_written_over_a_file(capsys: Capture, tmp_path: Path) -> None:
    file = put_rows(tmp_path, "a.jsonl", [turn(1)])
    before = file.read_bytes()
    _, error = refused(capsys, "validate", file, "--bad-rows", file)
    assert "there is such a file already" in error
    assert file.read_bytes() == before


def test_rows_that_do_not_fit_the_window_are_bad_when_it_is_named(capsys: Capture, tmp_path: Path) -> None:
    reply = {"answer": "yes"}
    asked = {"query": "q", "accepted": reply, "rejected": {"answer": LONG}}
    put_rows(tmp_path, "a.jsonl", [turn(1), turn(2, answer=LONG), turn(3, query=LONG)])
    put_rows(tmp_path, "b.jsonl", [{"interactions": [{**asked, "rejected": reply}, asked]}])
    put_rows(tmp_path, "c.jsonl", [{"text": LONG}])
    out, error = refused(capsys, "validate", tmp_path, "--tokenizer", a_tokenizer(tmp_path), "--window", 64)
    assert [line.split(": too long: ")[0] for line in out.splitlines()[:3]] == [
        f"{tmp_path / 'a.jsonl'}:2:answer",
        f"{tmp_path / 'a.jsonl'}:3:query",
        f"{tmp_path / 'b.jsonl'}:1:answer",
    ]
    assert "rows that can't be used: 3 of 5" in error


def test_a_torn_file_is_named_and_what_comes_before_and_after_is_checked(capsys: Capture, tmp_path: Path) -> None:
    whole = put(tmp_path, "a.jsonl.gz", "".join(json.dumps(turn(n, answer=None)) + "\n" for n in range(3)))
    torn = put(tmp_path, "b.jsonl.gz", "".join(json.dumps(turn(n, answer=LONG * (n % 7))) + "\n" for n in range(9000)))
    torn.write_bytes(torn.read_bytes()[:-200])
    put(tmp_path, "c.jsonl", json.dumps(turn(1, answer=None)) + "\n")
    out, error = refused(capsys, "validate", tmp_path, "--limit", 10_000)
    assert f"{whole}:3:answer: null\n" in out
    assert f"{torn}: the compressed data is damaged or torn after line" in out
    assert f"{torn}:1:answer: empty\n" in out
    assert f"{tmp_path / 'c.jsonl'}:1:answer: null\n" in out
    assert "files that can't be read to their end: 1" in error


POLICIES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({"bad": 1}, {}, "conversations train: rows are bad, and data.validation.bad_rows is fail"),
    ({"bad": 1}, {"bad_rows": "quarantine", "max_bad_share": 0.5}, None),
    ({"bad": 9}, {"bad_rows": "quarantine", "max_bad_share": 0.4}, "9 of 19 rows are bad, more than data.validation"),
    ({"repeat": 2}, {}, None),
    ({"repeat": 2}, {"duplicates": "fail"}, "rows repeat held-out ones, and data.validation.duplicates is fail"),
    ({"good": 0, "repeat": 2}, {}, "data.conversations: no train rows are left"),
    ({"good": 0, "repeat": 2}, {"duplicates": "keep"}, None),
    ({"good": 0, "single": 5}, {}, "data.conversations: no train row has a follow-up interaction"),
    ({"good": 0}, {}, "conversations train: can't be read"),
]


@pytest.mark.parametrize(("rows", "policy", "reason"), POLICIES)
def test_a_run_is_refused_exactly_when_its_corpus_would_be(
    capsys: Capture, tmp_path: Path, rows: dict[str, int], policy: dict[str, Any], reason: str | None
) -> None:
    made = [talk_row(number, number + 1000) for number in range(rows.get("good", 10))]
    made += [talk_row(5000, 5001)] * rows.get("repeat", 0) + [turn(2000 + n) for n in range(rows.get("single", 0))]
    made += [turn(number, answer=None) for number in range(rows.get("bad", 0))]
    put_rows(tmp_path, "train.jsonl", made)
    put_rows(tmp_path, "held.jsonl", [talk_row(5000, 5001), talk_row(6000, 6001)])
    source = {"kind": "files", "path": "train.jsonl", "validation_path": "held.jsonl"}
    run = a_run(tmp_path, conversations=source, validation=policy)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if reason is None:
        build_corpus(load_run(run).data, corpus)
        found = figures(capsys, "validate", run)
        counts = json.loads((corpus / "validation.json").read_text())
        for one in found["checked"]:
            (written,) = counts[one["section"]][one["split"]]
            assert one["rows"] == written["rows"]
            assert one["bad"] == sum(written["bad"].values())
            assert one["duplicates"] == written["duplicates"]
    else:
        with pytest.raises(DataError):
            build_corpus(load_run(run).data, corpus)
        _, error = refused(capsys, "validate", run)
        assert reason in error
    assert not (tmp_path / "runs").exists()


def test_turns_of_held_out_conversations_count_as_held_out_as_in_the_corpus(capsys: Capture, tmp_path: Path) -> None:
    told = {"query": f"Tell me: {LONG}", "answer": "So it was."}
    put_rows(tmp_path, "train.jsonl", [turn(number) for number in range(9)] + [told])
    put_rows(tmp_path, "talks.jsonl", [talk_row(number, number + 1) for number in range(100, 110)])
    put_rows(tmp_path, "held.jsonl", [talk_row(1, 2), {**turn(50), "interactions": [told]}])
    talks = {"kind": "files", "path": "talks.jsonl", "validation_path": "held.jsonl"}
    run = a_run(tmp_path, conversations=talks, interactions={"kind": "files", "path": "train.jsonl"})
    (tmp_path / "corpus").mkdir()
    build_corpus(load_run(run).data, tmp_path / "corpus")
    written = json.loads((tmp_path / "corpus/validation.json").read_text())["interactions"]["train"][0]["duplicates"]
    checked = figures(capsys, "validate", run)["checked"]
    found = [one["duplicates"] for one in checked if (one["section"], one["split"]) == ("interactions", "train")]
    assert found == [written] == [1]


@pytest.mark.parametrize(("policy", "bad"), [("truncate", 0), ("quarantine", 1), ("fail", 1)])
def test_a_run_judges_long_rows_by_its_policy(capsys: Capture, tmp_path: Path, policy: str, bad: int) -> None:
    put_rows(tmp_path, "train.jsonl", [talk_row(n, n + 1000) for n in range(10)] + [turn(99, answer=LONG * 9)])
    source = {"kind": "files", "path": "train.jsonl", "validation_share": 0.2}
    run = a_run(tmp_path, conversations=source, validation={"too_long": policy, "max_bad_share": 0.9})
    arguments = ["validate", run, "model.max_length=64", "--tokenizer", a_tokenizer(tmp_path)]
    if policy == "fail":
        assert "rows are too long, and data.validation.too_long is fail" in refused(capsys, *arguments)[1]
        return
    found = [one for one in figures(capsys, *arguments)["checked"] if one["section"] == "conversations"]
    assert sum(one["too_long"] for one in found) == bad
    assert sum(one["cut"] for one in found) == 1 - bad
    if policy == "quarantine":  # each part by itself, as the tokens step does: few held-out rows can't vanish in many
        small = refused(capsys, *arguments, "data.validation.max_bad_share=0.5")[1]
        assert "interactions validation: 3 of 4 rows are too long" in small


# ---- both in bounded memory


@pytest.mark.parametrize("command", [["inspect"], ["validate"], ["sample"]])
def test_memory_does_not_grow_with_the_rows(capsys: Capture, tmp_path: Path, command: list[str]) -> None:
    row = {"query": "q" * 200, "answer": "a" * 1000}
    peaks = []
    for count in (3_000, 15_000):  # of 1.2 KB: a group of rows is full in both
        file = tmp_path / f"{count}.jsonl"
        with file.open("w") as out:
            out.writelines(json.dumps({**row, "answer": f"{row['answer']}{n}"}) + "\n" for n in range(count))
        tracemalloc.start()
        ran(capsys, *command, file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 3 * 2**20, peaks  # the file has 15 MB more


# ---- build


def test_what_is_built_is_what_the_run_reuses(capsys: Capture, tmp_path: Path) -> None:
    arguments = [QUICKSTART, *SMALL, f"storage={tmp_path}"]
    first, again = figures(capsys, "build", *arguments), figures(capsys, "build", *arguments)
    assert {one["status"] for one in first["artifacts"].values()} == {"made"}
    assert {one["status"] for one in again["artifacts"].values()} == {"reused"}
    assert {name: one for name, one in first.items() if name != "artifacts"} == {
        name: one for name, one in again.items() if name != "artifacts"
    }
    steps = build_plan(small_run(tmp_path))[:3]
    assert [first["artifacts"][step.name]["path"] for step in steps] == [str(step.artifact) for step in steps]
    assert all(step.finished() for step in steps)
    assert first["tokens"]["texts_train"]["rows"] == 160


def test_the_share_of_real_tokens_is_that_of_the_stages_own_batches(capsys: Capture, tmp_path: Path) -> None:
    packed = ["stages.pretraining.packing=1", "resources.workers=2", "stages.sft.micro_batch_size=4"]
    built = figures(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path}", *packed)["batches"]
    config = small_run(tmp_path, *packed)
    tokens = build_plan(config)[2].artifact
    for name, one in built.items():
        stage = config.stages[name]
        sampler = BatchSampler(TokenShards(tokens, stage.section, "train"), sampling(stage, 0, config.model.max_length))
        assert one["steps"] == sampler.total_steps <= 50, "so that every step is measured"
        if name != "memory_aware":  # which takes turns in groups, each to its own length
            micro = 4 if name == "sft" else forward_rows(stage, sampler, 2, config.training, "cpu")
            batches = [sampler.global_batch(step) for step in range(sampler.total_steps)]
            parts = [part for batch in batches for rank in range(2) for part in batch.shares(rank, 2, micro)]
            real = sum(part.tokens for part in parts) / sum(len(part.rows) * sum(part.turn_lengths) for part in parts)
            assert one["real_share"] == pytest.approx(real)
        assert one["naive_share"] <= one["real_share"] <= 1
    assert built["pretraining"]["real_share"] > 0.85


def test_build_shows_rows_tokens_fertility_batches_and_places(capsys: Capture, tmp_path: Path) -> None:
    picture = tmp_path / "tokens.png"
    text = ran(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path / 'runs'}", "--histogram", picture)
    for words in ("conversations  validation", "tokens a word", "memory_aware        conversations", "real tokens"):
        assert words in text
    for step in build_plan(small_run(tmp_path / "runs"))[:3]:
        assert str(step.artifact) in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_tokens_sets_training_beside_held_out(capsys: Capture, tmp_path: Path) -> None:
    built = figures(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path}")
    panels = histogram.panels_of_tokens(built["tokens"])
    assert [panel.title for panel in panels] == ["texts", "interactions", "conversations"]
    for panel in panels:
        assert [series.label for series in panel.series] == ["training", "held out"]
        counts = [built["tokens"][f"{panel.title}_{split}"]["turns"] for split in ("train", "validation")]
        assert [sum(series.counts) for series in panel.series] == counts
        assert panel.series[0].width * 64 == built["tokens"][f"{panel.title}_train"]["max_length"]


def test_two_drivers_do_not_build_the_same_run(capsys: Capture, tmp_path: Path) -> None:
    with only_holder(tmp_path / "work/run.quickstart.lock"):
        _, error = refused(capsys, "build", QUICKSTART, *SMALL, f"storage={tmp_path}")
    assert "in use by process" in error
    assert not list((tmp_path / "artifacts").glob("*"))


def test_build_leaves_a_ray_that_it_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself is stood in for: no corpus of a test is worth several tasks."""
    said: list[str] = []

    def connect(_: object) -> bool:
        said.append("connected")
        return True

    monkeypatch.setattr("rxt_platform.orchestration.prepare.needs_workers", lambda _: True)
    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.connect", connect)
    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.disconnect", lambda: said.append("left"))

    def each(*_: object) -> list[object]:
        raise DataError("a task failed")

    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.each", each)
    with pytest.raises(DataError, match="a task failed"):
        data_build.build_data(small_run(tmp_path))
    assert said == ["connected", "left"]


# ---- sample


def rows_placed(count: int) -> Iterator[PlacedRow]:
    return (PlacedRow("f", number, f"text {number}") for number in range(1, count + 1))


def test_every_row_is_as_likely_to_be_sampled() -> None:
    drawn = Counter(row.number for seed in range(2000) for row in samples.sample(rows_placed(10), 3, seed))
    assert sum(drawn.values()) == 6000
    assert all(520 < drawn[number] < 680 for number in range(1, 11)), drawn  # 600 expected, deviation 20


def test_a_sample_is_in_order_and_the_same_for_a_seed(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "a.jsonl", [turn(number) for number in range(100)])
    named = ["sample", tmp_path / "a.jsonl", "-n", 5]
    drawn = [[one["row"] for one in figures(capsys, *named, "--seed", seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[2] != drawn[0]
    assert [one["row"] for one in figures(capsys, *named, "--first")] == [1, 2, 3, 4, 5]


def test_bad_rows_are_left_out_of_a_sample(capsys: Capture, tmp_path: Path) -> None:
    file = put_rows(tmp_path, "a.jsonl", [turn(1), turn(2, answer=None), turn(3)])
    assert [one["row"] for one in figures(capsys, "sample", file)] == [1, 3]
    file = put_rows(tmp_path, "b.jsonl", [turn(2, answer=None)])
    assert (
        f"no usable row to show; the first bad one: {file}:1: column 'answer': null"
        in refused(capsys, "sample", file)[1]
    )


def test_rows_are_printed_as_dialogues_with_their_answer_keys(capsys: Capture, tmp_path: Path) -> None:
    key = {"answer_span": ["red", "hat"], "distance": 2, "long_range": True, "task": "several"}
    asked = {"query": "What has Tom?", "answer": "A red hat.", **key}
    talk = {"query": "Tom has\na red hat.", "answer": "Yes.", "interactions": [turn(1), asked]}
    hybrid = {"internal": "Be kind.", "tool_use": "rain", "think": "Hm.", "answer": "It rains.", "tool_call": "map()"}
    choice = {"query": "Why?", "accepted": {"answer": "So."}, "rejected": {"answer": "No."}}
    for name, row in (("a", talk), ("b", {"interactions": [hybrid]}), ("c", {"interactions": [choice]})):
        put_rows(tmp_path, f"{name}.jsonl", [row])
    assert ran(capsys, "sample", tmp_path).splitlines() == [
        f"{tmp_path / 'a.jsonl'}:1",
        "user > Tom has",
        "       a red hat.",
        "model> Yes.",
        "user > question 1",
        "model> answer 1",
        "user > What has Tom?   [several: 'red', 'hat', 2 turns back, long range]",
        "model> A red hat.",
        "",
        f"{tmp_path / 'b.jsonl'}:1",
        "internal> Be kind.",
        "tool > rain",
        "think> Hm.",
        "model> It rains.",
        "call > map()",
        "",
        f"{tmp_path / 'c.jsonl'}:1",
        "user > Why?",
        "accepted> So.",
        "rejected> No.",
        "",
    ]


def test_answer_keys_are_dim_on_a_terminal() -> None:
    line = samples.Line("user", "What?", "recall: 'red', 1 turn back")
    assert click.unstyle(cli_data.styled(line)) == "user > What?   [recall: 'red', 1 turn back]"
    assert cli_data.styled(line).endswith(click.style("   [recall: 'red', 1 turn back]", dim=True))


def test_the_story_world_is_sampled_by_tasks_turns_and_split(capsys: Capture) -> None:
    named = ["sample", "story_world", "-n", 20, "--turns", 6, "--tasks", "update,cumulative"]
    found = figures(capsys, *named)
    talks = [parse_row("conversation", one["content"]) for one in found]
    tasks = set()
    for talk in talks:
        assert isinstance(talk, Conversation)
        assert len(talk.interactions) == 6
        tasks |= {turn.recall.task for turn in talk.interactions if turn.recall}
    assert tasks == {"update", "cumulative"}
    assert figures(capsys, *named, "--split", "validation") != found != figures(capsys, *named, "--seed", 1)


def test_a_run_is_sampled_by_section_and_split(capsys: Capture, tmp_path: Path) -> None:
    put_rows(tmp_path, "train.jsonl", [talk_row(1, 2)])
    put_rows(tmp_path, "held.jsonl", [talk_row(3, 4)])
    source = {"kind": "files", "path": "train.jsonl", "validation_path": "held.jsonl"}
    run = a_run(tmp_path, conversations=source, interactions=source)
    shown = figures(capsys, "sample", run, "--split", "validation", "-n", 1, "--first")
    assert [one["section"] for one in shown] == ["texts", "interactions", "conversations"]
    assert shown[1]["content"] == {**turn(3), "interactions": []}
    assert shown[2]["content"] == talk_row(3, 4)


# ---- what is asked for wrongly

WRONG: list[tuple[Sequence[str], str]] = [
    (["inspect", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["inspect", "empty"], "empty: an empty folder"),
    (["inspect", "rows.jsonl", "--window", "64"], "--window counts tokens: give --tokenizer too"),
    (["inspect", "rows.jsonl", "--tokenizer", "rows.jsonl"], "rows.jsonl: not a readable tokenizer"),
    (["inspect", "rows.jsonl", "--tokenizer", "empty"], "empty/tokenizer.json: not a readable tokenizer"),
    (["inspect", "rows.jsonl", "--histogram", "a.jpg"], "--histogram a.jpg: a picture is a PNG file"),
    (["inspect", "rows.jsonl", "--histogram", "no/a.png"], "--histogram no/a.png: there is no folder"),
    (["inspect", "rows.jsonl", "name=x"], "'name=x': KEY=VALUE changes a run's YAML, and rows.jsonl is none"),
    (["inspect", "rows.jsonl", "--split", "test"], "--config and --split are for data sets of the Hub"),
    (["inspect", "hf:"], "'hf:' names no source"),
    (["inspect", "hf:owner/name[test]", "--split", "train"], "names the split test and --split another"),
    (["inspect", "hf:owner/name", "--separator", "x"], "--format and --separator are for files"),
    (["inspect", "nothing.yaml"], "nothing.yaml: no such config file"),
    (["inspect", "QUICKSTART", "--format", "csv"], "a run's YAML says how its sources are read: leave out --format"),
    (["inspect", "QUICKSTART", "data.tests=x"], "unknown key 'data.tests'"),
    (["validate", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["validate", "rows.jsonl", "--held-out", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["validate", "rows.jsonl", "--tokenizer", "rows.jsonl"], "--tokenizer checks whether rows fit the model's window"),
    (["validate", "QUICKSTART", "--kind", "text"], "--held-out and --kind are for a source"),
    (["validate", "rows.jsonl", "--bad-rows", "no/bad.jsonl"], "--bad-rows no/bad.jsonl: cannot be written"),
    (["build", "nothing.yaml"], "nothing.yaml: no such config file"),
    (["build", "QUICKSTART", "storage=rows.jsonl"], "cannot be made"),
    (["sample", "nothing.jsonl"], "nothing.jsonl: no such file or folder"),
    (["sample", "story_world", "--tasks", "recal"], "--tasks: unknown task 'recal'; tasks: recall, several, update"),
    (["sample", "story_world", "--tasks", "update", "--turns", "2"], "--tasks update --turns 2: tasks update take 3"),
    (["sample", "story_world", "--turns", "1"], "--turns 1: conversations have 2 to 20 turns"),
    (["sample", "story_world", "--split", "test"], "--split test: there are train and validation"),
    (["sample", "story_world", "--format", "csv"], "story_world takes --seed, --turns, --tasks and --split only"),
    (["sample", "rows.jsonl", "--turns", "4"], "--turns and --tasks are for story_world"),
    (["sample", "QUICKSTART", "--split", "test"], "--split test: there are train and validation"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_what_is_asked_for_wrongly_is_named_in_one_line(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    put_rows(tmp_path, "rows.jsonl", [turn(1)])
    (tmp_path / "empty").mkdir()
    given = [str(QUICKSTART) if argument == "QUICKSTART" else argument for argument in arguments]
    out, error = refused(capsys, *given)
    assert message in error
    assert out == ""


def test_the_choices_are_those_of_the_readers() -> None:
    assert get_args(RowKind) == cli_data.KINDS
    assert get_args(FileFormat) == cli_data.FORMATS
