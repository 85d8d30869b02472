"""The pipeline's promises on real Ray, DeepSpeed and MLflow: reuse, reasons, lineage, one driver."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rxt_platform.errors import BusyError
from rxt_platform.orchestration.commands import plan_rows
from rxt_platform.orchestration.plan import build_plan
from rxt_platform.orchestration.runner import run_pipeline
from rxt_platform.orchestration.store import lineage, read_store
from rxt_platform.storage.directory import verify_directory
from rxt_platform.storage.locks import only_holder
from tests.support import ALL_STAGES, ROOT, SMALL, environment, read_report, run_driver, small_run, weights_of

pytestmark = pytest.mark.dist


def test_report_holds_what_was_measured(finished_pipeline: Path) -> None:
    report = read_report(finished_pipeline)
    assert [stage["name"] for stage in report["stages"]] == list(ALL_STAGES)
    *supervised, mrl = report["stages"]
    assert set(mrl["held_out"]) == {"reward", "recall", "greedy_reward"}
    assert all(0 <= value <= 10 for pair in mrl["held_out"].values() for value in pair)
    assert mrl["loss_before"] is None
    for stage in supervised:
        if stage["kind"] != "memory_pretraining":  # the only one without experts
            assert stage["expert_load"]["max"] >= 1 >= stage["expert_load"]["min"] >= 0
        assert stage["seconds"] > 0
        assert stage["loss_after"] < stage["loss_before"]
    assert set(report["recall"]) == {"1", "2", "3", "4"}
    for entry in report["recall"].values():
        assert entry["gain"] == pytest.approx(entry["with_memory"] - entry["reset"])
        assert entry["count"] > 0
    assert report["answer_tokens"]["count"] == report["memory_reset"]["count"] > 0
    assert sum(row["count"] for row in report["by_turn"]) == report["answer_tokens"]["count"]
    low, high = report["recall_overall"]["intervals"]["gain"]
    assert low <= report["recall_overall"]["gain"] <= high
    assert len(report["memory"]["by_write"]) == 6
    assert report["free_running"]["recall_overall"]["count"] == report["recall_overall"]["count"]
    assert 0 <= report["reward"]["mean"] <= 10
    assert report["baseline"] is None
    assert Path(report["model"]).is_dir()
    folder = finished_pipeline / "quickstart"
    for name in ("report.html", "recall.png", "losses.png"):
        assert (folder / name).stat().st_size > 1000
    assert not [path for path in (finished_pipeline / "work").iterdir() if path.is_dir()], "resume states are gone"
    assert not list((finished_pipeline / "artifacts").glob(".*"))


def test_rerun_reuses_every_step_and_starts_no_ray(
    finished_pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_ray(*_: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("rxt_platform.orchestration.ray_jobs.connect", no_ray)
    before = read_report(finished_pipeline)
    report = run_pipeline(small_run(finished_pipeline))
    assert {step["status"] for step in report["steps"]} == {"reused"}
    assert weights_of(report, "mrl") == weights_of(before, "mrl")
    assert capsys.readouterr().out.count("reused") >= 7


def test_plan_names_the_field_that_changed_and_what_follows(finished_pipeline: Path) -> None:
    changed = small_run(finished_pipeline, "stages.sft.optimizer.learning_rate=2e-4")
    rows = {row["step"]: row for row in plan_rows(changed)}
    cached = [name for name, row in rows.items() if row["state"] == "cached"]
    assert cached == ["corpus", "tokenizer", "tokens", "pretraining"]
    assert "stage.optimizer.learning_rate: 0.001 → 0.0002" in rows["sft"]["why"]
    assert rows["memory_pretraining"]["why"] == "input model changed"


def test_workers_and_checkpoints_are_not_part_of_what_a_result_is(finished_pipeline: Path) -> None:
    other = small_run(finished_pipeline, "resources.workers=1", "training.checkpoints.every=7", "training.zero_stage=2")
    assert {row["state"] for row in plan_rows(other)} == {"cached"}


def test_artifacts_say_what_they_were_made_from(finished_pipeline: Path) -> None:
    plan = {step.name: step for step in build_plan(small_run(finished_pipeline))}
    for step in plan.values():
        manifest = verify_directory(step.artifact)
        assert manifest.parents == step.inputs
        assert manifest.config["fingerprint"] == step.fingerprint
    assert plan["sft"].inputs["model"] == plan["pretraining"].fingerprint


def test_mlflow_holds_parent_children_metrics_and_lineage(finished_pipeline: Path) -> None:
    client = MlflowClient(f"sqlite:///{finished_pipeline / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rxt_platform")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parent = next(run for run in runs if run.data.tags["rxt.kind"] == "pipeline")
    children = {
        run.data.tags["rxt.step"]: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert list(children) == ["corpus", "tokenizer", "tokens", *ALL_STAGES, "evaluation"]
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    sft = children["sft"]
    history = client.get_metric_history(sft.info.run_id, "loss")
    assert [entry.step for entry in history] == list(range(1, 11))
    for name in ("gradient_norm", "tokens_per_second", "learning_rate"):
        assert len(client.get_metric_history(sft.info.run_id, name)) == 10
    assert all(entry.value > 0 for entry in client.get_metric_history(sft.info.run_id, "gradient_norm"))
    assert len(client.get_metric_history(children["memory_aware"].info.run_id, "memory_change")) == 10
    assert json.loads(sft.data.tags["rxt.parents"])["model"] == children["pretraining"].data.tags["rxt.fingerprint"]
    assert {entry.dataset.name for entry in sft.inputs.dataset_inputs} == {"tokens", "model"}
    files = {entry.path for entry in client.list_artifacts(sft.info.run_id, "artifact")}
    assert {"artifact/model.safetensors", "artifact/manifest.json", "artifact/tokenizer.json"} <= files
    assert sft.data.params["stage.optimizer.learning_rate"] == "0.001"
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id, "report")} >= {"report/report.html"}


def test_a_run_s_artifacts_are_in_use_whole_and_go_back_to_the_corpus(finished_pipeline: Path) -> None:
    stored = [one for one in read_store(finished_pipeline) if "quickstart" in one.runs]
    assert {one.path.name.partition("-")[0] for one in stored} >= {"corpus", "tokens", *ALL_STAGES, "evaluation"}
    for one in stored:
        assert verify_directory(one.path) == one.manifest
    (mrl,) = (one for one in stored if one.path.name.startswith("mrl-"))
    ancestors = lineage(mrl.path)
    assert all(one.stored is not None for one in ancestors), "every input is in the same storage"
    assert {one.name for one in ancestors[1:]} == {"corpus", "tokenizer", "tokens", "model"}


def test_second_driver_leaves_and_names_the_first(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    lock = tmp_path / "work" / f"run.{config.name}.lock"
    with only_holder(lock), pytest.raises(BusyError, match=r"run.quickstart: in use by process \d+ on "):
        run_pipeline(config)


def test_step_that_another_run_is_making_is_not_made_twice(tmp_path: Path) -> None:
    """Runs of other names share steps by their fingerprint."""
    config = small_run(tmp_path, "name=other")
    step = build_plan(config)[3]
    lock = step.work.with_name(step.work.name + ".lock")
    with only_holder(lock), pytest.raises(BusyError, match=r"pretraining-\w+: in use by process \d+ on "):
        run_pipeline(config)


def test_tracking_server_that_is_away_costs_records_not_the_run(finished_pipeline: Path, tmp_path: Path) -> None:
    """Only the evaluation runs again; its record can't be written."""
    done = run_driver(finished_pipeline, "evaluation.samples=2", "tracking.uri=http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("training goes on") == 1
    assert len(read_report(finished_pipeline)["samples"]) == 2


def test_a_baseline_is_trained_beside_a_finished_model_and_measured_by_the_same_code(finished_pipeline: Path) -> None:
    done = run_driver(finished_pipeline, "name=compared", "baseline={window: 512}")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((finished_pipeline / "compared/report.json").read_text())
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert {status[stage] for stage in ALL_STAGES} == {"reused"}
    baseline = ["baseline.pretraining", "baseline.sft", "baseline.memory_aware"]
    assert [name for name, how in status.items() if how == "made"] == [*baseline, "evaluation"]
    assert report["baseline"]["responder"] == {
        "kind": "stateless",
        "history": "full",
        "window": 512,
        "interaction_window": 128,
    }
    for name in ("conversations", "turns"):
        assert report["baseline"][name] == report[name]
    assert report["baseline"]["answer_tokens"]["count"] == report["answer_tokens"]["count"]
    assert report["parameters"]["baseline"] == pytest.approx(report["parameters"]["total"], rel=0.05)
    tokens = {stage["name"]: stage["tokens"] for stage in report["stages"]}
    assert all(tokens[name] == tokens[name.removeprefix("baseline.")] > 0 for name in baseline)
    assert "Beside the stateless baseline" in done.stdout
    assert report["model"] == read_report(finished_pipeline)["model"], "the model, not the baseline"


def rxt(*arguments: str, stdin: str = "") -> str:
    """What a user's `rxt` command prints."""
    command = [str(Path(sys.executable).parent / "rxt"), *arguments]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_eval_measures_any_conversation_file(finished_pipeline: Path, tmp_path: Path) -> None:
    rows = [
        {
            "query": "Tom has a kite.",
            "answer": "That is nice.",
            "interactions": [{"query": "What toy does Tom have?", "answer": "Tom has a kite."}],
        },
        {"query": "Hello.", "answer": "Hello. How are you?"},
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads(rxt("eval", str(finished_pipeline / "quickstart"), "--data", str(path), "--json"))
    for part in ("answer_tokens", "memory_reset"):
        assert set(result[part]) == {"loss", "perplexity", "accuracy", "count", "intervals"}
    assert set(result["recall"]["1"]) == {"with_memory", "reset", "gain", "count", "intervals"}
    assert result["recall"]["1"]["count"] == result["free_running"]["recall"]["1"]["count"] == 1
    assert [row["turn"] for row in result["latency"]] == [1, 2]
    page = tmp_path / "page.html"
    shown = rxt("eval", str(finished_pipeline / "quickstart"), "--data", str(path), "--report", str(page))
    assert "with memory" in shown
    assert "with memory" in page.read_text()


def test_chat_shows_when_memory_is_written(finished_pipeline: Path) -> None:
    out = rxt("chat", str(finished_pipeline / "quickstart"), stdin="Tom has a kite.\n/reset\nHello.\n/quit\n")
    assert out.count("[memory written, changed by ") == 2
    assert "memory reset" in out


def test_models_lists_exact_counts() -> None:
    (nano,) = (row for row in json.loads(rxt("models", "--json")) if row["name"] == "alpha-nano")
    assert nano["components"]["decoder"] == {"parameters": 9_458_508, "active": 3_521_868}
    assert nano["total"] == 11_734_220
    assert "9,458,508" in rxt("models")


def test_plan_starts_nothing(finished_pipeline: Path) -> None:
    overrides = [*SMALL, f"storage={finished_pipeline}"]
    rows = json.loads(rxt("plan", "pipelines/configs/quickstart.yaml", *overrides, "--json"))
    assert [row["step"] for row in rows] == ["corpus", "tokenizer", "tokens", *ALL_STAGES, "evaluation"]
    assert "pretraining            cached" in rxt("plan", "pipelines/configs/quickstart.yaml", *overrides)
