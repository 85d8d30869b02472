"""What each stage of a run adds: held-out answer tokens of every stage's model, with its memory and with it reset.

    rxt run pipelines/configs/fairytales.yaml data.root=DATA
    python benchmarks/after_each_stage.py runs/fairytales --data DATA/fairytaleqa/mrl_validation.jsonl [--json FILE]

Follow-ups are all turns but the first: what is asked there was told before.
"""

import json
import math
from pathlib import Path
from typing import Any

import click

from rxt_platform.config.run import EvaluationConfig
from rxt_platform.data.sources import read_conversations
from rxt_platform.evaluation.evaluate import evaluate
from rxt_platform.evaluation.report.tables import number, spread
from rxt_platform.model.files import load_model
from rxt_platform.tables import Table, text_table
from rxt_platform.training.distributed import use_cpus

SETTINGS = EvaluationConfig(samples=0, free_running=False)


def follow_ups(by_turn: list[dict[str, Any]], arm: str) -> float:
    """Loss in nats per answer token of all turns but the first."""
    rows = [row[arm] for row in by_turn if row["turn"] > 1]
    return sum(row["loss"] * row["count"] for row in rows) / sum(row["count"] for row in rows)


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True, help="held-out conversations")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="also write the results here")
def main(run: Path, data: str, json_file: Path | None) -> None:
    """Evaluate the model of every stage of RUN, a run's folder."""
    use_cpus(1)
    report = json.loads((run / "report.json").read_text())
    talks = read_conversations(data)
    lines, results = [], {}
    for step in report["steps"]:
        if step["kind"] != "training" or step["name"].startswith("baseline."):
            continue
        found = evaluate(*load_model(Path(step["artifact"])), talks, SETTINGS)
        results[step["name"]] = found
        with_memory, reset = (follow_ups(found["by_turn"], arm) for arm in ("with_memory", "memory_reset"))
        lines.append(
            [
                step["name"],
                f"{found['answer_tokens']['perplexity']:.2f}",
                f"{found['memory_reset']['perplexity']:.2f}",
                f"{math.exp(with_memory):.2f}",
                f"{math.exp(reset):.2f}",
                f"{found['follow_up_gain']['nats']:+.3f}",
                spread(found["follow_up_gain"]["interval"], number),
                f"{100 * found['answer_tokens']['accuracy']:.1f} %",
                f"{100 * found['masked']['accuracy']:.1f} %",
            ]
        )
    header = [
        "after",
        "perplexity",
        "reset",
        "follow-ups",
        "reset",
        "gain, nats",
        "95 % CI",
        "accuracy",
        "masked accuracy",
    ]
    click.echo(text_table(Table(header, lines)))
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
