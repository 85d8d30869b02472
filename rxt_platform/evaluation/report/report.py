"""Reports: `report.json`, the tables a terminal shows, and pages with pictures, of a run and of `rxt eval`. No torch.

The headline is memory: how many facts told in an earlier turn the model recalls on held-out conversations, with its
memory and with the memory reset, and the gain, by distance in turns.
"""

import json
import math
import os
import textwrap
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rxt_platform.errors import ArtifactError
from rxt_platform.evaluation.report.comparison import comparison_tables
from rxt_platform.evaluation.report.data_tables import data_note
from rxt_platform.evaluation.report.pages import render_evaluation_html, render_html
from rxt_platform.evaluation.report.pictures import draw_comparison, draw_evaluation, draw_losses
from rxt_platform.evaluation.report.reinforcement import REINFORCEMENT_NOTE, reinforcement_table
from rxt_platform.evaluation.report.sections import Section, sections
from rxt_platform.evaluation.report.tables import (
    COSINE_KIND,
    LOSS_NOTE,
    UNKNOWN_NOTE,
    duration,
    scope,
    stage_table,
)
from rxt_platform.tables import text_table

REPORT_FILES = ("report.json", "report.html", "recall.png", "losses.png")

_COLUMNS = 100

Report = dict[str, Any]
"""Names and shapes; seconds are wall-clock, losses nats per token (negative cosine for memory pre-training).

    name, seed, created (ISO 8601), run_seconds, model (path)
    versions          {package: version}
    parameters        {decoder, encoder, memory_attention, mlm_head, total, baseline (of a run that has one)}
    steps             [{name, kind, status: made | reused | resumed, seconds, fingerprint, artifact}]
    stages            [{name, kind, stateless, status, seconds, steps, tokens, loss_before, loss_after (None of
                        stages of episodes), held_out: {metric: [before, after]} (of those alone, else None),
                        baselines: {unigram, bigram, tokens} | None,
                        expert_load: {max, min} | None}]: the busiest and the idlest expert's share of held-out
                      tokens, as multiples of a fair one
    data              {validation: as `validation.json`, tokens: the parts of `tokens.json`, fertility: as
                      `fertility.json`}
    settings, responder, conversations, turns, cut, questions, answer_tokens, memory_reset, follow_up_gain,
    by_turn, recall, recall_by_task, recall_long_range, recall_by_teller, recall_overall, reward, free_running, memory,
    masked, latency, samples
                      of the last model on held-out conversations: as `Evaluation` in `evaluation/evaluate.py` says
    baseline          the same of the stateless baseline, with its whole history; None of a run without one
"""


def render_table(report: Report) -> str:
    """The report for a terminal, at most 100 columns (but the model's path is never cut)."""
    parts = [
        f"{report['name']} (seed {report['seed']}): stages, with held-out loss",
        text_table(stage_table(report)),
        *([f"\n{text_table(table)}\n{REINFORCEMENT_NOTE}"] if (table := reinforcement_table(report)).rows else []),
    ]
    if any(stage["kind"] == COSINE_KIND for stage in report["stages"]):
        parts.append(LOSS_NOTE)
    parts.append("\n" + render_evaluation(report))
    if report["baseline"] is not None:
        parts.append("\nBeside the stateless baseline")
        parts.append("\n\n".join(text_table(table) for table in comparison_tables(report)))
    parts += [
        *([f"\n{note}"] if (note := data_note(report["data"])) else []),
        f"\nTotal time: {duration(report['run_seconds'])}",
        f"Model: {report['model']}",
    ]
    return "\n".join(parts)


def render_evaluation(result: Mapping[str, Any]) -> str:
    """What `rxt eval` prints of what was measured."""
    return "\n\n".join([_wrapped(f"{scope(result)}. {UNKNOWN_NOTE}"), *map(_section, sections(result))])


def _section(section: Section) -> str:
    tables = "\n\n".join(map(text_table, section.tables))
    return "\n".join(part for part in (section.title, _wrapped(section.note), tables) if part)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _COLUMNS))


def write_report(directory: Path, report: Report, histories: dict[str, list[dict[str, float]]]) -> None:
    """Write `recall.png`, `losses.png`, `report.html` and `report.json`, replacing what is there.

    Each file is whole or absent. The JSON comes last: who finds it finds the others. Raises ArtifactError.
    """
    pictures = {**draw_evaluation(report), "losses": draw_losses(histories)}
    files = {f"{name}.png": pictures[name] for name in ("recall", "losses")}
    if report["baseline"] is not None:
        pictures["comparison"] = draw_comparison(report)
    files["report.html"] = render_html(report, pictures).encode()
    files["report.json"] = (to_json(report) + "\n").encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _replace(directory / name, content)
    except OSError as error:
        raise ArtifactError(f"{directory}: the report cannot be written: {error}") from error


def write_evaluation_page(path: Path, title: str, result: Mapping[str, Any]) -> None:
    """Write the page of one evaluation, replacing what is there. Raises ArtifactError."""
    page = render_evaluation_html(title, result, draw_evaluation(result))
    try:
        _replace(path, page.encode())
    except OSError as error:
        raise ArtifactError(f"{path}: the report cannot be written: {error}") from error


def to_json(value: Mapping[str, Any]) -> str:
    """JSON that strict readers take."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False, ensure_ascii=False)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _without_nan(value: Any) -> Any:
    """NaN and infinities as None: JSON has no word for them, and strict readers refuse Python's."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
