"""The report that ends a run: `report.json`, the tables a terminal shows, and a page with pictures. No torch.

The headline is memory: how many facts told in an earlier turn the model recalls on held-out conversations, with its
memory and with the memory reset, and the gain, by distance in turns.
"""

import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rxt_platform.errors import ArtifactError
from rxt_platform.evaluation.data_tables import data_note
from rxt_platform.evaluation.recall import mean_recall
from rxt_platform.evaluation.report_page import (
    COSINE_KIND,
    LOSS_NOTE,
    answer_table,
    draw_losses,
    draw_recall,
    duration,
    recall_table,
    render_html,
    stage_table,
    task_tables,
)
from rxt_platform.tables import text_table

__all__ = [
    "REPORT_FILES",
    "Report",
    "draw_losses",
    "draw_recall",
    "render_evaluation",
    "render_html",
    "render_table",
    "write_report",
]

REPORT_FILES = ("report.json", "report.html", "recall.png", "losses.png")

Report = dict[str, Any]
"""Names and shapes; seconds are wall-clock, losses nats per token (negative cosine for memory pre-training).

    name, seed, created (ISO 8601), run_seconds, model (path)
    versions          {package: version}
    parameters        {decoder, encoder, memory_attention, mlm_head, total}
    steps             [{name, kind, status: made | reused | resumed, seconds, fingerprint, artifact}]
    stages            [{name, kind, status, seconds, steps, loss_before, loss_after,
                        baselines: {unigram, bigram, tokens} | None,
                        expert_load: {max, min} | None}]: the busiest and the idlest expert's share of held-out
                      tokens, as multiples of a fair one
    answer_tokens     {loss, perplexity, accuracy, count}, and memory_reset the same
    recall            {distance in turns: {with_memory, reset, gain, count}}; recall_by_task {task: the same}, empty
                      where no row carries answer keys; recall_overall one such entry, of NaN when nothing was asked
    data              {validation: as `validation.json`, tokens: the parts of `tokens.json`, fertility: as
                      `fertility.json`}
    samples           [[{query, reference, answer} for each turn] for each conversation]
"""


def render_table(report: Report) -> str:
    """The report for a terminal, at most 100 columns (but the model's path is never cut)."""
    parts = [
        f"{report['name']} (seed {report['seed']}): stages, with held-out loss",
        text_table(stage_table(report)),
    ]
    if any(stage["kind"] == COSINE_KIND for stage in report["stages"]):
        parts.append(LOSS_NOTE)
    parts += [
        "\nRecall of facts told in an earlier turn, held-out conversations",
        text_table(recall_table(report)),
        *("\n" + text_table(table) for table in task_tables(report)),
        "\n" + text_table(answer_table(report)),
        *([f"\n{note}"] if (note := data_note(report["data"])) else []),
        f"\nTotal time: {duration(report['run_seconds'])}",
        f"Model: {report['model']}",
    ]
    return "\n".join(parts)


def render_evaluation(result: Mapping[str, Any]) -> str:
    """What `rxt eval` prints: answer tokens and recall of one model on one file."""
    rows = {**result, "recall_overall": mean_recall(result["recall"])}
    return "\n\n".join(text_table(table) for table in (answer_table(rows), recall_table(rows), *task_tables(rows)))


def write_report(directory: Path, report: Report, histories: dict[str, list[dict[str, float]]]) -> None:
    """Write `recall.png`, `losses.png`, `report.html` and `report.json`, replacing what is there.

    Each file is whole or absent. The JSON comes last: who finds it finds the others. Raises ArtifactError.
    """
    pictures = {"recall": draw_recall(report), "losses": draw_losses(histories)}
    files = {f"{name}.png": png for name, png in pictures.items()}
    files["report.html"] = render_html(report, pictures).encode()
    files["report.json"] = (json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n").encode()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            _replace(directory / name, content)
    except OSError as error:
        raise ArtifactError(f"{directory}: the report cannot be written: {error}") from error


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
