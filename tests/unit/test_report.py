"""Promises of the report that ends a run."""

from __future__ import annotations

import copy
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from rxt_platform.errors import ArtifactError
from rxt_platform.evaluation.report.pages import render_html
from rxt_platform.evaluation.report.pictures import draw_comparison, draw_evaluation, draw_losses
from rxt_platform.evaluation.report.report import render_evaluation, render_table, write_report
from rxt_platform.evaluation.report.tables import thinned
from tests.unit.reports import HISTORIES, KITES, PICTURES, REPORT, UNASKED, recalled, tokens


def _unasked() -> dict[str, Any]:
    nothing = {"recall": {}, "recall_by_task": {}, "recall_overall": UNASKED}
    return {**copy.deepcopy(REPORT), **nothing, "free_running": None}


def test_table_holds_every_measurement_within_100_columns() -> None:
    text = render_table(REPORT)
    rows = [line.split() for line in text.splitlines()]
    assert ["joint", "made", "1,200", "1", "min", "01", "s", "6.543", "1.234", "4.321", "2.109"] in rows
    for line in (
        "10 turns 50.0 % 45.0 to 55.0 % 60.0 % -10.0 pt -15.0 to -5.0 pt 10",
        "17+ turns 25.0 % 20.0 to 30.0 % 0.0 % +25.0 pt +20.0 to +30.0 pt 4",
        "overall 80.0 % 75.0 to 85.0 % 22.5 % +57.5 pt +52.5 to +62.5 pt 40",
        "teacher-forced 80.0 % 75.0 to 85.0 % 22.5 % +57.5 pt +52.5 to +62.5 pt 40",
        "free-running 62.5 % 57.5 to 67.5 % 22.5 % +40.0 pt +35.0 to +45.0 pt 40",
        "memory reset 1.511 1.360 to 1.662 4.531 40.4 % 36.4 to 44.4 % 4,242",
        "encoder, MLM head 1.250 1.125 to 1.375 64.0 % 60.0 to 68.0 % 321",
        "2 0.700 2.100 2.014 8.166 65.0 % 30.0 % 2,242",
        "before 1.000 – 99.0 % 0.062 2",
        "1 1.125 42.0 % 87.5 % 0.125 2",
        "1 0.375 0.015 0.985",
        "teacher-forced 4.500 3.500 to 5.500 3.500 5.500 0.250 0.750 0.500 2",
        "free-running 1.500 0.500 to 2.500 0.500 2.500 0.250 0.750 0.500 2",
        "1 12.3 ms 1,234 5.7 ms 2",
        "2 13.0 ms – 5.0 ms 1",
    ):
        assert line.split() in rows, line
    assert ["Model:", REPORT["model"]] in rows
    assert text.index("2 turns") < text.index("10 turns") < text.index("17+ turns")  # by number, not by letter
    assert max(map(len, text.splitlines())) <= 100


def test_baselines_take_no_columns_where_no_stage_has_them() -> None:
    report = copy.deepcopy(REPORT)
    report["stages"][0]["baselines"] = None
    assert "unigram" in render_table(REPORT)
    assert "unigram" not in render_table(report)


def _shown(report: dict[str, Any]) -> list[list[str]]:
    """The lines, with single spaces, of what the terminal shows of a run and of an evaluation, and of the page."""
    page = render_html(report, PICTURES).replace("</tr>", "\n")
    return [
        [html.unescape(" ".join(re.sub("<[^>]*>", " ", line).split())) for line in text.splitlines()]
        for text in (render_table(report), render_evaluation(report), page)
    ]


def test_recall_by_task_is_shown_where_there_are_several_tasks() -> None:
    several = {**REPORT, "recall_by_task": {**REPORT["recall_by_task"], "two_facts": recalled(0.25, 0.05, 1717)}}
    for lines in _shown(several):
        assert "recall 80.0 % 75.0 to 85.0 % 22.5 % +57.5 pt +52.5 to +62.5 pt 40" in lines
        assert "two_facts 25.0 % 20.0 to 30.0 % 5.0 % +20.0 pt +15.0 to +25.0 pt 1,717" in lines
    for report in (REPORT, _unasked()):
        for lines in _shown(report):
            assert not any(line.startswith(("task ", "recall 80.0")) for line in lines)
    assert max(map(len, render_table(several).splitlines())) <= 100


def test_recall_is_shown_by_range_and_by_who_told_where_both_occur() -> None:
    both = {"recall_long_range": {"true": recalled(0.2, 0.1, 5), "false": recalled(0.3, 0.1, 6)}}
    both["recall_by_teller"] = {"user": recalled(0.4, 0.1, 7), "model": recalled(0.5, 0.1, 8)}
    own = {**KITES["free_running"], "recall_by_teller": {"user": recalled(0.6, 0.1, 7), "model": recalled(0.7, 0.1, 8)}}
    for lines in _shown({**REPORT, **both, "free_running": own}):
        assert "only unrelated 20.0 % 15.0 to 25.0 % 10.0 % +10.0 pt +5.0 to +15.0 pt 5" in lines
        assert "teacher-forced, by user 40.0 % 35.0 to 45.0 % 10.0 % +30.0 pt +25.0 to +35.0 pt 7" in lines
        assert "free-running, by user 60.0 % 55.0 to 65.0 % 10.0 % +50.0 pt +45.0 to +55.0 pt 7" in lines
        assert "teacher-forced, by model 50.0 % 45.0 to 55.0 % 10.0 % +40.0 pt +35.0 to +45.0 pt 8" in lines
        assert "free-running, by model 70.0 % 65.0 to 75.0 % 10.0 % +60.0 pt +55.0 to +65.0 pt 8" in lines
    for lines in _shown(REPORT):
        assert not any(line.startswith(("only unrelated", "teacher-forced, ", "free-running, ")) for line in lines)


def test_a_stateless_baseline_is_shown_beside_the_model() -> None:
    baseline = {
        **copy.deepcopy(KITES),
        "responder": {"kind": "stateless", "history": "full", "window": 2048, "interaction_window": 100},
        "answer_tokens": tokens(0.75, 2.117, 0.7, 4242),
        "memory": None,
        "masked": None,
    }
    baseline["recall"] = {distance: recalled(0.6, 0.1, 20) for distance in KITES["recall"]}
    baseline["latency"] = [{**row, "prompt_ms": 4 * row["prompt_ms"]} for row in KITES["latency"]]
    trained = {**REPORT["stages"][0], "name": "baseline.joint", "stateless": True, "seconds": 40.0}
    compared = {
        **REPORT,
        "baseline": baseline,
        "parameters": {**REPORT["parameters"], "baseline": 900_000},
        "stages": [*REPORT["stages"], trained],
    }
    run, _, page = _shown(compared)
    for lines in (run, page):
        assert "reactive 901,240 1,000,000 20,000 4,061 s" in lines
        assert "stateless 900,000 1,000,000 0 40 s" in lines
        assert "with memory 1.667 1.500 to 1.834 81.2 % 80.0 % 75.0 to 85.0 % 4.500" in lines
        assert "stateless, with history 2.117 1.905 to 2.329 70.0 % 80.0 % 75.0 to 85.0 % 4.500" in lines
        assert "stateless, no history 4.531 4.078 to 4.984 40.4 % 22.5 % 17.5 to 27.5 % –" in lines
        assert "1 12.3 ms 5.7 ms 49.4 ms 1,234 1,234" in lines
        assert any(line == "2 turns 90.0 % 85.0 to 95.0 % 60.0 % 55.0 to 65.0 % 10.0 % 30" for line in lines)
    assert max(map(len, render_table(compared).splitlines())) <= 100
    assert draw_comparison(compared).startswith(b"\x89PNG")
    alone = render_evaluation(baseline)
    assert "with history" in alone
    assert "memory reset" not in alone


def test_page_escapes_what_models_and_people_wrote_and_needs_nothing_from_outside() -> None:
    page = render_html({**REPORT, "name": "<script>"}, PICTURES)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert "A &lt;b&gt;hat&lt;/b&gt;." in page
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == len(PICTURES) - 1, "no comparison without a baseline"
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|@import|url\(", page)


@pytest.mark.parametrize("histories", [HISTORIES, {}, {"one": [{"step": 1, "loss": 2.0}]}])
def test_loss_picture_is_drawn_whatever_was_recorded(histories: dict[str, list[dict[str, float]]]) -> None:
    assert imread(io.BytesIO(draw_losses(histories)), format="png").std() > 0.01  # something is drawn


def test_every_measure_has_a_picture() -> None:
    drawn = draw_evaluation(KITES)
    assert set(drawn) == set(PICTURES) - {"losses", "comparison"}
    for picture in drawn.values():
        assert imread(io.BytesIO(picture), format="png").std() > 0.01  # something is drawn
    assert set(draw_evaluation({**KITES, "memory": None, "latency": []})) == {"recall", "turns", "rewards"}


def _tiles(page: str) -> dict[str, str]:
    return dict(re.findall(r'<div class="(\w+)"><b>([^<]*)</b>', page))


def test_the_figures_to_look_at_first_are_on_top_of_the_page() -> None:
    page = render_html(REPORT, PICTURES)
    tiles = {"gain": "+57.5 pt", "memory": "80.0 %", "own": "62.5 %", "reset": "22.5 %"}
    assert list(_tiles(page).items()) == list(tiles.items())
    assert "Of 40 questions about facts told in an earlier turn" in page
    plain = render_html(
        {**REPORT, "free_running": None, "questions": {"kind": "follow-ups", "conversations": 2}}, PICTURES
    )
    assert set(_tiles(plain)) == {"gain", "memory", "reset"}
    assert "Of 40 follow-ups, to be answered word for word" in plain


@pytest.mark.parametrize(("rows", "last_whole"), [(3, 3), (16, 16), (17, 17), (32, 32), (33, 16), (400, 16)])
def test_of_a_long_table_some_rows_are_left_out(rows: int, last_whole: int) -> None:
    numbers = [row["turn"] for row in thinned([{"turn": turn} for turn in range(1, rows + 1)])]
    assert numbers[:last_whole] == list(range(1, last_whole + 1))
    assert numbers[-1] == rows
    assert len(numbers) <= 33
    assert numbers == sorted({*numbers})


def test_report_without_questions_says_so_and_is_strict_json(tmp_path: Path) -> None:
    report = _unasked()
    report["stages"][1]["loss_after"] = math.nan
    write_report(tmp_path, report, {})
    text = (tmp_path / "report.json").read_text()
    stored = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert stored["recall_overall"] == UNASKED
    assert render_table(stored) == render_table(report)
    assert "nan" not in render_table(report)
    page = (tmp_path / "report.html").read_text()
    assert "recall was not measured" in page
    assert "2 conversations, 4 turns; cut to 100 tokens" in page
    assert draw_evaluation(report)["recall"] != draw_evaluation(REPORT)["recall"]


def test_second_report_replaces_the_first_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_report(tmp_path / "run", _unasked(), {})
    first = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    write_report(tmp_path / "run", REPORT, HISTORIES)
    second = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert set(first) == set(second) == {"report.json", "report.html", "recall.png", "losses.png"}
    assert all(first[name] != second[name] for name in first)
    assert json.loads(second["report.json"]) == REPORT


def test_failed_write_keeps_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, REPORT, HISTORIES)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def torn(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(ArtifactError, match="no space left"):
        write_report(tmp_path, _unasked(), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_the_data_lost_is_said_in_the_terminal_and_shown_on_the_page() -> None:
    table = render_table(REPORT)
    assert (
        "Data: 2 bad rows set aside, 1 training rows that repeat held-out ones, 7 answers cut at the window." in table
    )
    page = render_html(REPORT, PICTURES)
    assert "&lt;empty&gt;" in page
    for number in ("2,003", "41,500", "1.250", "3.500"):
        assert f">{number}<" in page
    clean = copy.deepcopy(REPORT)
    for sources in clean["data"]["validation"]["texts"].values():
        sources[0] |= {"bad": {}, "duplicates": 0}
    clean["data"]["tokens"]["texts_train"]["truncated"] = 0
    assert "Data:" not in render_table(clean)
    assert "set aside because" not in render_html(clean, PICTURES)


def test_what_was_measured_and_what_was_lost_of_it_is_said() -> None:
    run, alone, page = _shown(REPORT)
    said = "cut to 100 tokens an interaction: the ends of 3 answers and 0 queries, in 2 conversations"
    for lines in (run, alone, page):
        text = " ".join(lines)
        assert said in text
        assert "1 conversations left out" in text
        assert "only 1 conversations carry answer keys" in text
        assert "Recall of facts told in an earlier turn" in text


def test_what_the_memory_saves_is_said_in_words() -> None:
    for lines in _shown(REPORT):
        said = "With its memory, a token of a follow-up's answer costs 1.400 nats less on average"
        assert f"{said} (95 % CI of what is saved: 1.250 to 1.500)." in " ".join(lines)
    one = {**REPORT, "follow_up_gain": {"nats": 1.4, "interval": None, "count": 3}}
    for lines in _shown(one):
        assert "costs 1.400 nats less on average." in " ".join(lines)
    for lines in _shown({**REPORT, "follow_up_gain": {"nats": -0.5, "interval": None, "count": 3}}):
        assert "costs 0.500 nats more on average." in " ".join(lines), "a memory that disturbs"
    for lines in _shown({**REPORT, "follow_up_gain": {"nats": None, "interval": None, "count": 0}}):
        assert "nats less" not in " ".join(lines)
    off = {**REPORT["responder"], "kind": "stateless", "history": "none"}
    assert "nats less" not in render_evaluation({**KITES, "responder": off})


def test_a_table_that_leaves_turns_out_says_so() -> None:
    row = KITES["by_turn"][0]
    long = {**KITES, "by_turn": [{**row, "turn": turn} for turn in range(1, 41)]}
    assert "Not all turns are shown" in render_evaluation(long)
    assert "Not all turns are shown" not in render_evaluation(KITES)


def test_without_answer_keys_nothing_is_called_recall_of_facts() -> None:
    plain = {**REPORT, "questions": {"kind": "follow-ups", "conversations": 2}}
    for lines in _shown(plain):
        text = " ".join(lines)
        assert "Follow-ups answered word for word" in text
        assert "Recall of facts" not in text
        assert any(line.startswith("turn 3 90.0 %") for line in lines), "the distance 2 is asked in turn 3"
        assert any(line.startswith("turn 18+ 25.0 %") for line in lines)
        assert "carry answer keys" not in text


def test_what_reinforcement_learning_gained_stands_in_a_table_of_its_own() -> None:
    measured = {"reward": [4.25, 6.5], "greedy_reward": [5.0, 7.0], "recall": [0.512, 0.723]}
    plain = {"name": "mrl", "kind": "memory_rl", "loss_before": None, "loss_after": None, "baselines": None}
    stage = {**REPORT["stages"][0], **plain, "held_out": measured}
    report = {**REPORT, "stages": [*REPORT["stages"], stage]}
    shown = render_table(report)
    (row,) = (line for line in shown.splitlines() if line.startswith("mrl "))
    for gained in ("4.250 → 6.500", "5.000 → 7.000", "51.2 % → 72.3 %"):
        assert gained in row
    page = render_html(report, PICTURES)
    assert "Reinforcement learning" in page
    assert "51.2 % → 72.3 %" in page
    assert "Reinforcement learning" not in render_html(REPORT, PICTURES)
