"""Draws what latency_by_turn.py measured: prompt latency, speed and state by turn.

python benchmarks/turn_plot.py turns.json turns.png
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

# One colour for each arm, told apart by colour-blind readers too; the execution is a line style.
COLOURS = {"reactive": "#0072B2", "rereading": "#D55E00", "keeping": "#009E73"}
NAMES = {
    "reactive": "Reactive Transformer",
    "rereading": "stateless, rereads history",
    "keeping": "stateless, keeps KV cache",
}
STYLES = {"eager": "-", "compile": "--", "cuda_graph": ":"}
PANELS = (
    ("prompt_ms", "Time to first token", "ms", 1.0),
    ("tokens_per_second", "Rest of the answer", "tokens/s", 1.0),
    ("kept_bytes", "State kept between turns", "MiB", 2.0**20),
)


def plot(found: Mapping[str, Any], file: Path) -> None:
    """Three panels over the turns of a conversation, about 1200x400 pixels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = found["results"]["arms"]
    several = len({arm["execution"] for arm in arms.values()}) > 1
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, (value, title, unit, scale) in zip(axes, PANELS, strict=True):
        for arm in arms.values():
            if value == "kept_bytes" and arm["execution"] != next(iter(arms.values()))["execution"]:
                continue  # the same whatever the execution
            turns = [turn["turn"] for turn in arm["turns"]]
            label = NAMES[arm["kind"]] + (f", {arm['execution']}" if several else "")
            values = [turn[value] / scale for turn in arm["turns"]]
            style = STYLES[arm["execution"]]
            axis.plot(turns, values, style, color=COLOURS[arm["kind"]], linewidth=2, label=label)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("turn of the conversation", fontsize=11)
        axis.set_ylabel(unit, fontsize=11)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=11)
    environment, settings = found["environment"], found["settings"]
    figure.supxlabel(
        f"{settings['preset']}, {settings['batch']} conversation(s), {settings['query_tokens']} + "
        f"{settings['answer_tokens']} tokens a turn · {environment['device']}, {environment['dtype']}, "
        f"{environment['threads']} CPU thread(s), torch {environment['torch']}, commit {environment['commit']}",
        fontsize=8,
        color="gray",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


@click.command()
@click.argument("results", type=click.Path(exists=True, path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def main(results: Path, file: Path) -> None:
    """Draw the JSON RESULTS of latency_by_turn.py into a PNG FILE."""
    plot(json.loads(results.read_text()), file)


if __name__ == "__main__":
    main()
