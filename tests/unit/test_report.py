"""Promises of the report that ends a run."""

from __future__ import annotations

import copy
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

NOTHING = dict.fromkeys(("with_memory", "reset", "gain"))
UNASKED = {**NOTHING, "count": 0, "intervals": NOTHING}


def recalled(with_memory: float, reset: float, count: int) -> dict[str, Any]:
    """An entry of a recall table."""
    shares = {"with_memory": with_memory, "reset": reset, "gain": with_memory - reset}
    intervals = {name: [round(share - 0.05, 3), round(share + 0.05, 3)] for name, share in shares.items()}
    return {**shares, "count": count, "intervals": intervals}


def tokens(loss: float, perplexity: float, accuracy: float, count: int) -> dict[str, Any]:
    """An entry of answer tokens."""
    values = {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}
    return {**values, "count": count, "intervals": {name: [0.9 * x, 1.1 * x] for name, x in values.items()}}


def rewarded(*scores: float) -> dict[str, Any]:
    """A reward entry."""
    return {
        "mean": sum(scores) / len(scores),
        "interval": [min(scores), max(scores)],
        "min": min(scores),
        "max": max(scores),
        "components": {"bleu": 0.25, "cosine": 0.75, "length": 0.5},
        "conversations": len(scores),
        "scores": list(scores),
    }


KITES = {
    "responder": {"kind": "reactive", "history": None, "window": 128, "interaction_window": 100},
    "settings": {"reward": {"scale": 10.0}},
    "conversations": 2,
    "turns": 4,
    "cut": {"answers": 3, "queries": 0, "conversations": 2, "left_out": 1},
    "questions": {"kind": "keyed", "conversations": 1},
    "answer_tokens": tokens(0.511, 1.667, 0.812, 4242),
    "memory_reset": tokens(1.511, 4.531, 0.404, 4242),
    "follow_up_gain": {"nats": 1.4, "interval": [1.25, 1.5], "count": 2242},
    "by_turn": [
        {
            "turn": 1,
            "count": 2000,
            "with_memory": tokens(0.5, 1.649, 0.75, 2000),
            "memory_reset": tokens(0.6, 1.822, 0.7, 2000),
        },
        {
            "turn": 2,
            "count": 2242,
            "with_memory": tokens(0.7, 2.014, 0.65, 2242),
            "memory_reset": tokens(2.1, 8.166, 0.3, 2242),
        },
    ],
    "recall": {"10": recalled(0.5, 0.6, 10), "2": recalled(0.9, 0.1, 30), "17+": recalled(0.25, 0.0, 4)},
    "recall_by_task": {"recall": recalled(0.8, 0.225, 40)},
    "recall_long_range": {},
    "recall_by_teller": {},
    "recall_overall": recalled(0.8, 0.225, 40),
    "reward": rewarded(5.5, 3.5),
    "free_running": {
        "recall": {"10": recalled(0.25, 0.6, 10), "2": recalled(0.75, 0.1, 30), "17+": recalled(0.0, 0.0, 4)},
        "recall_by_task": {},
        "recall_long_range": {},
        "recall_by_teller": {},
        "recall_overall": recalled(0.625, 0.225, 40),
        "reward": rewarded(2.5, 0.5),
    },
    "memory": {
        "by_write": [
            {
                "write": 0,
                "conversations": 2,
                "norm": 1.0,
                "change": None,
                "effective_rank": 0.99,
                "slot_similarity": 0.0625,
            },
            {
                "write": 1,
                "conversations": 2,
                "norm": 1.125,
                "change": 0.42,
                "effective_rank": 0.875,
                "slot_similarity": 0.125,
            },
        ],
        "gates": [{"layer": 1, "mean": 0.375, "min": 0.015, "max": 0.985}],
    },
    "masked": {
        "loss": 1.25,
        "accuracy": 0.64,
        "count": 321,
        "intervals": {"loss": [1.125, 1.375], "accuracy": [0.6, 0.68]},
    },
    "latency": [
        {"turn": 1, "conversations": 2, "prompt_ms": 12.34, "tokens_per_second": 1234.5, "write_ms": 5.67},
        {"turn": 2, "conversations": 1, "prompt_ms": 13.0, "tokens_per_second": None, "write_ms": 5.0},
    ],
    "samples": [[{"query": "<script>alert('&')</script>", "reference": 'A "red" hat.', "answer": "A <b>hat</b>."}]],
}
REPORT: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "created": "2025-01-02T03:04:05+00:00",
    "run_seconds": 754.2,
    "model": "runs/artifacts/memory_aware-0123",
    "versions": {"torch": "2.9.0"},
    "parameters": {"decoder": 901_234, "encoder": 1, "memory_attention": 2, "mlm_head": 3, "total": 901_240},
    "steps": [
        {
            "name": "corpus",
            "kind": "corpus",
            "status": "reused",
            "seconds": 0.1,
            "fingerprint": "ab" * 32,
            "artifact": "runs/artifacts/corpus-abab",
        }
    ],
    "stages": [
        {
            "name": "joint",
            "kind": "joint_pretraining",
            "status": "made",
            "seconds": 61.0,
            "steps": 1200,
            "stateless": False,
            "tokens": 1_000_000,
            "loss_before": 6.543,
            "loss_after": 1.234,
            "baselines": {"unigram": 4.321, "bigram": 2.109, "tokens": 5000},
        },
        {
            "name": "a_memory_stage_with_quite_a_long_name_indeed",
            "kind": "memory_pretraining",
            "status": "resumed",
            "seconds": 4000.0,
            "steps": 10,
            "stateless": False,
            "tokens": 20_000,
            "loss_before": -0.125,
            "loss_after": -0.875,
            "baselines": None,
        },
    ],
    "data": {
        "validation": {
            "texts": {
                "validation": [{"rows": 100, "kept": 100, "duplicates": 0, "near_duplicates": 0, "bad": {}}],
                "train": [
                    {
                        "rows": 2003,
                        "kept": 2000,
                        "duplicates": 1,
                        "near_duplicates": 0,
                        "bad": {"column 'text': <empty>": 2},
                    }
                ],
            }
        },
        "tokens": {
            "texts_train": {
                "examples": 2100,
                "tokens": 41500,
                "longest": 128,
                "truncated": 7,
                "queries_cut": 0,
                "too_long": 0,
            },
            "texts_validation": {
                "examples": 100,
                "tokens": 2000,
                "longest": 99,
                "truncated": 0,
                "queries_cut": 0,
                "too_long": 0,
            },
        },
        "fertility": {
            "texts": {
                "tokens_per_word": 1.25,
                "bytes_per_token": 3.5,
                "unknown": 0,
                "changed_by_round_trip": 0,
                "words": 1600,
            }
        },
    },
    **KITES,
    "baseline": None,
}
PICTURES = dict.fromkeys(("recall", "turns", "memory", "rewards", "latency", "losses", "comparison"), b"png")
HISTORIES = {"joint": [{"step": 1, "loss": 6.5, "lr": 0.1}, {"step": 2, "loss": 5.0, "lr": 0.1}], "memory": []}


def _unasked() -> dict[str, Any]:
    nothing = {"recall": {}, "recall_by_task": {}, "recall_overall": UNASKED}
    return {**copy.deepcopy(REPORT), **nothing, "free_running": None}


def test_table_holds_every_measurement_within_100_columns() -> None:
    text = render_table(REPORT)
    rows = [line.split() for line in text.splitlines()]
    assert ["joint", "made", "1,200", "1", "min", "01", "s", "6.543", "1.234", "4.321", "2.109"] in rows
    for line in (
        "10 turns 50.0 % 60.0 % -10.0 pt -15.0 to -5.0 pt 10",
        "17+ turns 25.0 % 0.0 % +25.0 pt +20.0 to +30.0 pt 4",
        "overall 80.0 % 22.5 % +57.5 pt +52.5 to +62.5 pt 40",
        "references 80.0 % 22.5 % +57.5 pt +52.5 to +62.5 pt 40",
        "its own 62.5 % 22.5 % +40.0 pt +35.0 to +45.0 pt 40",
        "memory reset 1.511 1.360 to 1.662 4.531 40.4 % 36.4 to 44.4 % 4,242",
        "encoder, MLM head 1.250 1.125 to 1.375 – 64.0 % 60.0 to 68.0 % 321",
        "2 0.700 2.100 2.014 8.166 65.0 % 30.0 % 2,242",
        "before 1.000 – 99.0 % 0.062 2",
        "1 1.125 42.0 % 87.5 % 0.125 2",
        "1 0.375 0.015 0.985",
        "references 4.500 3.500 to 5.500 3.500 5.500 0.250 0.750 0.500 2",
        "its own 1.500 0.500 to 2.500 0.500 2.500 0.250 0.750 0.500 2",
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
        [" ".join(re.sub("<[^>]*>", " ", line).split()) for line in text.splitlines()]
        for text in (render_table(report), render_evaluation(report), page)
    ]


def test_recall_by_task_is_shown_where_there_are_several_tasks() -> None:
    several = {**REPORT, "recall_by_task": {**REPORT["recall_by_task"], "two_facts": recalled(0.25, 0.05, 1717)}}
    for lines in _shown(several):
        assert "recall 80.0 % 22.5 % +57.5 pt +52.5 to +62.5 pt 40" in lines
        assert "two_facts 25.0 % 5.0 % +20.0 pt +15.0 to +25.0 pt 1,717" in lines
    for report in (REPORT, _unasked()):
        for lines in _shown(report):
            assert not any(line.startswith(("task ", "recall 80.0")) for line in lines)
    assert max(map(len, render_table(several).splitlines())) <= 100


def test_recall_is_shown_by_range_and_by_who_told_where_both_occur() -> None:
    both = {"recall_long_range": {"true": recalled(0.2, 0.1, 5), "false": recalled(0.3, 0.1, 6)}}
    both["recall_by_teller"] = {"user": recalled(0.4, 0.1, 7), "model": recalled(0.5, 0.1, 8)}
    own = {**KITES["free_running"], "recall_by_teller": {"user": recalled(0.6, 0.1, 7), "model": recalled(0.7, 0.1, 8)}}
    for lines in _shown({**REPORT, **both, "free_running": own}):
        assert "only unrelated 20.0 % 10.0 % +10.0 pt +5.0 to +15.0 pt 5" in lines
        assert "references, user told 40.0 % 10.0 % +30.0 pt +25.0 to +35.0 pt 7" in lines
        assert "its own, user told 60.0 % 10.0 % +50.0 pt +45.0 to +55.0 pt 7" in lines
        assert "references, model told 50.0 % 10.0 % +40.0 pt +35.0 to +45.0 pt 8" in lines
        assert "its own, model told 70.0 % 10.0 % +60.0 pt +55.0 to +65.0 pt 8" in lines
    for lines in _shown(REPORT):
        assert not any(line.startswith(("only unrelated", "references, user", "its own, user")) for line in lines)


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
    assert _tiles(page) == {"gain": "+57.5 pt", "memory": "80.0 %", "own": "62.5 %", "reset": "22.5 %"}
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
    assert "recall was not measured" in (tmp_path / "report.html").read_text()
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
        said = "costs 1.400 nats less with its memory than without (95 %: 1.250 to 1.500)."
        assert said in " ".join(lines)
    one = {**REPORT, "follow_up_gain": {"nats": 1.4, "interval": None, "count": 3}}
    for lines in _shown(one):
        assert "costs 1.400 nats less with its memory than without." in " ".join(lines)
    for lines in _shown({**REPORT, "follow_up_gain": {"nats": None, "interval": None, "count": 0}}):
        assert "nats less" not in " ".join(lines)


def test_without_answer_keys_nothing_is_called_recall_of_facts() -> None:
    plain = {**REPORT, "questions": {"kind": "follow-ups", "conversations": 2}}
    for lines in _shown(plain):
        text = " ".join(lines)
        assert "Follow-ups answered word for word" in text
        assert "Recall of facts" not in text
        assert any(line.startswith("turn 3 90.0 %") for line in lines), "the distance 2 is asked in turn 3"
        assert any(line.startswith("turn 18+ 25.0 %") for line in lines)
        assert "carry answer keys" not in text
