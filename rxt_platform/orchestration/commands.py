"""The plan as rows, for the command line."""

from rxt_platform.config.run import RunConfig
from rxt_platform.orchestration.plan import build_plan, explain, unfinished_others


def plan_rows(config: RunConfig) -> list[dict[str, str]]:
    """One row for each step: cached, resumable or to run, and why."""
    rows = []
    for step in build_plan(config):
        checkpoints = sorted(path.name for path in step.work.glob("checkpoints/step-*"))
        if step.finished() is not None:
            state, why = "cached", ""
        elif checkpoints:
            state, why = "will resume", f"from {checkpoints[-1]}"
        else:
            state, why = "will run", "; ".join([explain(step), *unfinished_others(step)])
        rows.append({"step": step.name, "state": state, "why": why, "artifact": str(step.artifact)})
    return rows
