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
from rxt_platform.evaluation.report import (
    draw_losses,
    draw_recall,
    render_evaluation,
    render_html,
    render_table,
    write_report,
)

NAN = math.nan
UNASKED = {"with_memory": NAN, "reset": NAN, "gain": NAN, "count": 0}
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
            "loss_before": -0.125,
            "loss_after": -0.875,
            "baselines": None,
        },
    ],
    "answer_tokens": {"loss": 0.511, "perplexity": 1.667, "accuracy": 0.812, "count": 4242},
    "memory_reset": {"loss": 1.511, "perplexity": 4.531, "accuracy": 0.404, "count": 4242},
    "recall": {
        "10": {"with_memory": 0.5, "reset": 0.6, "gain": -0.1, "count": 10},
        "2": {"with_memory": 0.9, "reset": 0.1, "gain": 0.8, "count": 30},
    },
    "recall_by_task": {"recall": {"with_memory": 0.8, "reset": 0.225, "gain": 0.575, "count": 40}},
    "recall_overall": {"with_memory": 0.8, "reset": 0.225, "gain": 0.575, "count": 40},
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
    "samples": [[{"query": "<script>alert('&')</script>", "reference": 'A "red" hat.', "answer": "A <b>hat</b>."}]],
}
HISTORIES = {"joint": [{"step": 1, "loss": 6.5, "lr": 0.1}, {"step": 2, "loss": 5.0, "lr": 0.1}], "memory": []}


def _unasked() -> dict[str, Any]:
    return {**copy.deepcopy(REPORT), "recall": {}, "recall_by_task": {}, "recall_overall": dict(UNASKED)}


def test_table_holds_every_measurement_within_100_columns() -> None:
    text = render_table(REPORT)
    rows = [line.split() for line in text.splitlines()]
    assert ["joint", "made", "1,200", "1", "min", "01", "s", "6.543", "1.234", "4.321", "2.109"] in rows
    assert ["10", "turns", "50.0", "%", "60.0", "%", "-10.0", "pt", "10"] in rows
    assert ["overall", "80.0", "%", "22.5", "%", "+57.5", "pt", "40"] in rows
    assert ["memory", "reset", "1.511", "4.531", "40.4", "%", "4,242"] in rows
    assert ["Model:", REPORT["model"]] in rows
    assert text.index("2 turns") < text.index("10 turns")  # by number, not by letter
    assert max(map(len, text.splitlines())) <= 100


def test_baselines_take_no_columns_where_no_stage_has_them() -> None:
    report = copy.deepcopy(REPORT)
    report["stages"][0]["baselines"] = None
    assert "unigram" in render_table(REPORT)
    assert "unigram" not in render_table(report)


def _shown(report: dict[str, Any]) -> list[list[list[str]]]:
    """The words of each line of what the terminal shows of a run and of an evaluation, and of the page."""
    page = render_html(report, {"recall": b"png", "losses": b"png"}).replace("</tr>", "\n")
    return [
        [re.sub("<[^>]*>", " ", line).split() for line in text.splitlines()]
        for text in (render_table(report), render_evaluation(report), page)
    ]


def test_recall_by_task_is_shown_where_there_are_several_tasks() -> None:
    entry = {"with_memory": 0.25, "reset": 0.05, "gain": 0.2, "count": 1717}
    several = {**REPORT, "recall_by_task": {**REPORT["recall_by_task"], "two_facts": entry}}
    for lines in _shown(several):
        assert ["recall", "80.0", "%", "22.5", "%", "+57.5", "pt", "40"] in lines
        assert ["two_facts", "25.0", "%", "5.0", "%", "+20.0", "pt", "1,717"] in lines
    for report in (REPORT, _unasked()):
        for lines in _shown(report):
            assert not any(line[:1] == ["task"] or line[:2] == ["recall", "80.0"] for line in lines)
    assert max(map(len, render_table(several).splitlines())) <= 100


def test_page_escapes_what_models_and_people_wrote_and_needs_nothing_from_outside() -> None:
    page = render_html({**REPORT, "name": "<script>"}, {"recall": b"png", "losses": b"png"})
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in page
    assert "A &lt;b&gt;hat&lt;/b&gt;." in page
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|@import|url\(", page)


@pytest.mark.parametrize("histories", [HISTORIES, {}, {"one": [{"step": 1, "loss": 2.0}]}])
def test_loss_picture_is_drawn_whatever_was_recorded(histories: dict[str, list[dict[str, float]]]) -> None:
    assert imread(io.BytesIO(draw_losses(histories)), format="png").std() > 0.01  # something is drawn


def test_report_without_questions_says_so_and_is_strict_json(tmp_path: Path) -> None:
    report = _unasked()
    write_report(tmp_path, report, {})
    text = (tmp_path / "report.json").read_text()
    stored = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert stored["recall_overall"] == {"with_memory": None, "reset": None, "gain": None, "count": 0}
    assert render_table(stored) == render_table(report)
    assert "nan" not in render_table(report)
    assert "recall was not measured" in (tmp_path / "report.html").read_text()
    assert draw_recall(report) != draw_recall(REPORT)


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
    page = render_html(REPORT, {"recall": b"png", "losses": b"png"})
    assert "&lt;empty&gt;" in page
    for number in ("2,003", "41,500", "1.250", "3.500"):
        assert f">{number}<" in page
    clean = copy.deepcopy(REPORT)
    for sources in clean["data"]["validation"]["texts"].values():
        sources[0] |= {"bad": {}, "duplicates": 0}
    clean["data"]["tokens"]["texts_train"]["truncated"] = 0
    assert "Data:" not in render_table(clean)
    assert "set aside because" not in render_html(clean, {"recall": b"png", "losses": b"png"})
