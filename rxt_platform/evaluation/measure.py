"""Everything that is measured at the end of a run: its last model on held-out conversations, and what it is beside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rxt_platform.config.data import Section
from rxt_platform.config.run import EvaluationConfig
from rxt_platform.data.corpus import read_conversations
from rxt_platform.data.examples import TooLong, evenly
from rxt_platform.data.shards import TokenShards
from rxt_platform.evaluation.baselines import count_baselines
from rxt_platform.evaluation.evaluate import evaluate
from rxt_platform.model.files import load_any, load_model

_BASELINE_ROWS = 256  # those that the stages' own held-out losses are measured on


def measure(
    model_directory: Path,
    baseline_directory: Path | None,
    corpus: Path,
    tokens: Path,
    sections: Mapping[str, Section],
    settings: EvaluationConfig,
    seed: int,
    too_long: TooLong,
) -> dict[str, Any]:
    """An `Evaluation` of the model; `baseline`, one of the stateless baseline on the same tokens (None without one);
    `baselines`, the counting ones of the stages in `sections`."""
    model, tokenizer = load_model(model_directory)
    held_out_talks = list(read_conversations(corpus, "validation"))
    talks = [held_out_talks[place] for place in evenly(len(held_out_talks), settings.conversations)]
    measured = evaluate(model, tokenizer, talks, settings, seed, too_long=too_long)
    baseline = None
    if baseline_directory is not None:
        window = model.config.max_length
        baseline = evaluate(*load_any(baseline_directory), talks, settings, seed, too_long=too_long, window=window)
    baselines = {}
    for name, section in sections.items():
        train, held_out = (TokenShards(tokens, section, split) for split in ("train", "validation"))
        rows = [held_out[place] for place in evenly(len(held_out), _BASELINE_ROWS)]
        baselines[name] = count_baselines(train, rows, model.config.vocab_size)
    return {**measured, "baseline": baseline, "baselines": baselines}
