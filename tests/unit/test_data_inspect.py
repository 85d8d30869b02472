"""Promises of `rxt data inspect`: what it counts is what a run would find."""

from collections import Counter
from pathlib import Path

import yaml
from datasets import Dataset

from rxt_platform.config.loading import load_run
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.rows import parse_row
from rxt_platform.inspection import histogram
from rxt_platform.inspection.listing import bars
from rxt_platform.inspection.measures import Lengths, inspect_part
from rxt_platform.inspection.parts import named_part, run_parts
from tests.unit.data_commands import Capture, a_run, a_tokenizer, figures, ran, refused
from tests.unit.data_files import put, put_rows, talk_row, turn
from tests.unit.helpers import word_tokenizer


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
    turns = [hybrid, {"tool_use": "rain", "answer": "It rains."}]
    put_rows(tmp_path, "a.jsonl", [{"system": "You are a cloud.", "interactions": turns}])
    (found,) = figures(capsys, "inspect", tmp_path / "a.jsonl")
    words = {name: [of["words"]["number"], of["words"]["mean"]] for name, of in found["lengths"].items()}
    assert words == {
        "system": [1, 4],
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
