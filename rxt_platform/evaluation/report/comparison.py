"""A run's model beside its stateless baseline: what both took, how both answer, and what a turn costs. No torch."""

from collections.abc import Mapping
from typing import Any

from rxt_platform.evaluation.report.tables import arms, by_distance, number, percent, rate, spread, thinned, turns
from rxt_platform.tables import Table

Report = Mapping[str, Any]


def comparison_tables(report: Report) -> list[Table]:
    """Costs, answers, recall by distance and time by turn of both models."""
    tables = [_costs(report), _answers(report), _recall(report)]
    return [*tables, _latency(report)] if report["latency"] and report["baseline"]["latency"] else tables


def _costs(report: Report) -> Table:
    """Parameters and the tokens that the stages trained on."""
    rows = []
    for label, kind in (("reactive", False), ("stateless", True)):
        stages = [stage for stage in report["stages"] if stage["stateless"] == kind]
        parameters = report["parameters"]["baseline" if kind else "total"]
        tokens, seconds = (sum(stage[name] for stage in stages) for name in ("tokens", "seconds"))
        of_memory = sum(stage["tokens"] for stage in stages if stage["kind"] == "memory_pretraining")
        rows.append([label, f"{parameters:,}", f"{tokens - of_memory:,}", f"{of_memory:,}", f"{seconds:,.0f} s"])
    return Table(["model", "parameters", "tokens trained on", "by memory attention alone", "training time"], rows)


def _answers(report: Report) -> Table:
    """Answer tokens, recall and reward, each with and without what was said before."""
    rows = []
    for kind, result in (("", report), ("stateless, ", report["baseline"])):
        told, reset = arms(result)
        for label, tokens, arm in ((told, "answer_tokens", "with_memory"), (reset, "memory_reset", "reset")):
            recall, reward = result["recall_overall"], result["reward"]["mean"]
            rows.append(
                [
                    kind + label,
                    number(result[tokens]["perplexity"]),
                    spread(result[tokens]["intervals"]["perplexity"], number),
                    percent(result[tokens]["accuracy"]),
                    percent(recall[arm]),
                    spread(recall["intervals"][arm], percent),
                    number(reward if arm == "with_memory" else None),
                ]
            )
    return Table(["model", "perplexity", "95 % CI", "accuracy", "recall", "95 % CI", "reward"], rows)


def _recall(report: Report) -> Table:
    """Recall by distance."""
    others = dict(by_distance(report["baseline"]))
    rows = []
    for distance, entry in by_distance(report):
        cells = [turns(distance)]
        for one, arm in ((entry, "with_memory"), (others[distance], "with_memory"), (others[distance], "reset")):
            cells += [percent(one[arm]), spread(one["intervals"][arm], percent)]
        rows.append([*cells[:-1], f"{entry['count']:,}"])
    header = ["distance", "with memory", "95 % CI", "stateless, history", "95 % CI", "no history", "questions"]
    return Table(header, rows)


def _latency(report: Report) -> Table:
    """Milliseconds to the first token and of a memory write, and tokens per second, by turn."""
    others = {row["turn"]: row for row in report["baseline"]["latency"]}
    rows = []
    for row in thinned(report["latency"]):
        other = others.get(row["turn"])
        if other is not None:
            times = [f"{value:.1f} ms" for value in (row["prompt_ms"], row["write_ms"], other["prompt_ms"])]
            rates = [rate(one["tokens_per_second"]) for one in (row, other)]
            rows.append([str(row["turn"]), *times, *rates])
    return Table(["turn", "first token", "memory write", "stateless", "tokens per second", "stateless"], rows)
