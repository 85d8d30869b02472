"""Promises of `rxt data validate`: it judges rows as a run would, and names each bad one."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from rxt_platform.config.loading import load_run
from rxt_platform.data.corpus import build_corpus
from rxt_platform.errors import DataError
from rxt_platform.inspection import validation
from tests.unit.data_commands import LONG, Capture, a_run, a_tokenizer, figures, ran, refused
from tests.unit.data_files import put, put_rows, talk_row, turn


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
        "column 'interactions[].answer_span': '…' does not occur in the answer '…', as whole words": 2,
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
