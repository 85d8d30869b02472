"""The evaluation step, as a Ray task runs it."""

import json
import time

from rxt_platform.config.run import RunConfig, trains_without_memory
from rxt_platform.evaluation.measure import measure
from rxt_platform.orchestration.plan import ARTIFACT_KIND, Step, last_trained
from rxt_platform.storage.directory import Provenance, commit_directory, verify_directory
from rxt_platform.training.distributed import use_cpus

RESULT = "evaluation.json"


def evaluate_run(config: RunConfig, plan: list[Step], step: Step) -> None:
    """Evaluate the plan's last model and commit `evaluation.json`."""
    started = time.monotonic()
    use_cpus(config.resources.cpus_per_worker)
    trained = last_trained(plan).artifact
    baseline = last_trained(plan, stateless=True).artifact if config.baseline is not None else None
    for directory in (trained, baseline):
        if directory is not None:
            verify_directory(directory, "model")
    # Counting tokens predicts what a decoder predicts, no cosine and no masked token.
    stages = [(other.name, other.stage) for other in plan if other.stage is not None and not other.stateless]
    sections = {name: stage.section for name, stage in stages if trains_without_memory(stage)}
    corpus, tokens, too_long = plan[0].artifact, plan[2].artifact, config.data.validation.too_long
    result = measure(trained, baseline, corpus, tokens, sections, config.evaluation, config.seed, too_long)
    headline = {
        "recall": result["recall_overall"]["with_memory"],
        "memory_gain": result["recall_overall"]["gain"],
        "reward": result["reward"]["mean"],
        **{f"answer_{name}": result["answer_tokens"][name] for name in ("loss", "perplexity", "accuracy", "count")},
        "seconds": time.monotonic() - started,
    }
    metrics = {name: value for name, value in headline.items() if value is not None}
    provenance = Provenance(step.provenance, step.inputs, metrics)
    with commit_directory(step.artifact, ARTIFACT_KIND[step.kind], provenance) as folder:
        (folder / RESULT).write_text(json.dumps(result, indent=2, ensure_ascii=False))
