"""Everything that is measured at the end of a run: the last model on held-out conversations, and simple baselines."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rxt_platform.config.run import EvaluationConfig
from rxt_platform.data.corpus import RowKind, load_examples, read_rows
from rxt_platform.data.rows import conversation_from_row
from rxt_platform.evaluation.baselines import count_baselines
from rxt_platform.evaluation.conversations import evaluate_conversations
from rxt_platform.evaluation.samples import sample_conversations
from rxt_platform.model.files import load_model
from rxt_platform.model.sampling import SamplingOptions

_BASELINE_ROWS = 256  # those that the stages' own held-out losses are measured on


def measure(
    model_directory: Path, corpus: Path, kinds: Mapping[str, RowKind], settings: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """Answer tokens, recall and sampled conversations of a model, and count baselines for the stages in `kinds`."""
    model, tokenizer = load_model(model_directory)
    rows = islice(read_rows(corpus, "conversations", "validation"), settings.conversations)
    talks = [conversation_from_row(row) for row in rows]
    measured = evaluate_conversations(model, tokenizer, talks, seed)
    window = model.config.max_length
    baselines = {}
    for name, kind in kinds.items():
        train, held_out = (load_examples(corpus, kind, split, tokenizer, window) for split in ("train", "validation"))
        baselines[name] = count_baselines(train, held_out[:_BASELINE_ROWS], model.config.vocab_size)
    spread = [talks[i * len(talks) // settings.samples] for i in range(min(settings.samples, len(talks)))]
    samples = sample_conversations(model, tokenizer, spread, SamplingOptions(seed=seed))
    return {**asdict(measured), "baselines": baselines, "samples": samples}
