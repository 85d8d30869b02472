"""Promises of `rxt data sample`: rows as they are, each as likely as the others."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from rxt_platform import cli_data
from rxt_platform.data.rows import Conversation, parse_row
from rxt_platform.data.sources import PlacedRow
from rxt_platform.inspection import samples
from tests.unit.data_commands import Capture, a_run, figures, ran, refused
from tests.unit.data_files import put_rows, talk_row, turn


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
    talk = {"query": "Tom has\na red hat.", "answer": "Yes.", "interactions": [turn(1), asked], "system": "Be true."}
    hybrid = {"internal": "Be kind.", "tool_use": "rain", "think": "Hm.", "answer": "It rains.", "tool_call": "map()"}
    choice = {"query": "Why?", "accepted": {"answer": "So."}, "rejected": {"answer": "No."}}
    for name, row in (("a", talk), ("b", {"interactions": [hybrid]}), ("c", {"interactions": [choice]})):
        put_rows(tmp_path, f"{name}.jsonl", [row])
    assert ran(capsys, "sample", tmp_path).splitlines() == [
        f"{tmp_path / 'a.jsonl'}:1",
        "system> Be true.",
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
