"""The evaluation step: the last model on held-out conversations, and what counting tokens would predict."""

import json
import time
from dataclasses import asdict
from itertools import islice

from rxt_platform.config.run import RunConfig
from rxt_platform.data.corpus import load_examples, read_rows
from rxt_platform.data.rows import conversation_from_row
from rxt_platform.evaluation.baselines import count_baselines
from rxt_platform.evaluation.conversations import evaluate_conversations
from rxt_platform.evaluation.recall import mean_recall
from rxt_platform.evaluation.samples import sample_conversations
from rxt_platform.model.files import load_model
from rxt_platform.model.generation import SamplingOptions
from rxt_platform.orchestration.plan import ARTIFACT_KIND, Step
from rxt_platform.stages.build import row_kind
from rxt_platform.storage.directory import Provenance, commit_directory, verify_directory
from rxt_platform.training.distributed import use_cpus

RESULT = "evaluation.json"


def evaluate_run(config: RunConfig, plan: list[Step], step: Step) -> None:
    """Evaluate the plan's last model and commit `evaluation.json`."""
    started = time.monotonic()
    use_cpus(config.resources.cpus_per_worker)
    corpus, trained = plan[0].artifact, plan[-2].artifact
    verify_directory(trained, "model")
    model, tokenizer = load_model(trained)
    settings = config.evaluation
    rows = islice(read_rows(corpus, "conversations", "validation"), settings.conversations)
    talks = [conversation_from_row(row) for row in rows]
    measured = evaluate_conversations(model, tokenizer, talks, config.seed)
    baselines = {}
    for other in plan:
        if other.stage is not None and other.stage.kind != "memory_pretraining":
            kind, window = row_kind(other.stage), config.model.max_length
            train, held_out = (
                load_examples(corpus, kind, split, tokenizer, window) for split in ("train", "validation")
            )
            baselines[other.name] = count_baselines(train, held_out[:256], config.model.vocab_size)
    samples = sample_conversations(model, tokenizer, talks[: settings.samples], SamplingOptions(seed=config.seed))
    result = {**asdict(measured), "baselines": baselines, "samples": samples}
    recall = mean_recall(measured.recall)
    metrics = {
        "recall": recall["with_memory"],
        "memory_gain": recall["gain"],
        **{f"answer_{name}": value for name, value in measured.answer_tokens.items()},
        "seconds": time.monotonic() - started,
    }
    provenance = Provenance(step.provenance, step.inputs, metrics)
    with commit_directory(step.artifact, ARTIFACT_KIND[step.kind], provenance) as folder:
        (folder / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False))
