"""Everything that is measured at the end of a run: the last model on held-out conversations, and simple baselines."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rxt_platform.config.data import Section
from rxt_platform.config.run import EvaluationConfig
from rxt_platform.data.corpus import read_conversations
from rxt_platform.data.examples import TooLong
from rxt_platform.data.shards import TokenShards
from rxt_platform.evaluation.baselines import count_baselines
from rxt_platform.evaluation.conversations import evaluate_conversations
from rxt_platform.evaluation.samples import sample_conversations
from rxt_platform.model.files import load_model
from rxt_platform.model.sampling import SamplingOptions

_BASELINE_ROWS = 256  # those that the stages' own held-out losses are measured on


def measure(
    model_directory: Path,
    corpus: Path,
    tokens: Path,
    sections: Mapping[str, Section],
    settings: EvaluationConfig,
    seed: int,
    too_long: TooLong,
) -> dict[str, Any]:
    """Answer tokens, recall and sampled conversations of a model, and count baselines for the stages in `sections`."""
    model, tokenizer = load_model(model_directory)
    talks = list(islice(read_conversations(corpus, "validation"), settings.conversations))
    measured = evaluate_conversations(model, tokenizer, talks, seed, too_long=too_long)
    baselines = {}
    for name, section in sections.items():
        train, held_out = (TokenShards(tokens, section, split) for split in ("train", "validation"))
        baselines[name] = count_baselines(train, held_out[:_BASELINE_ROWS], model.config.vocab_size)
    spread = [talks[i * len(talks) // settings.samples] for i in range(min(settings.samples, len(talks)))]
    samples = sample_conversations(model, tokenizer, spread, SamplingOptions(seed=seed))
    return {**asdict(measured), "baselines": baselines, "samples": samples}
