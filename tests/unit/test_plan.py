"""Promises of the plan: what identifies a step, and what the baseline adds to it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxt_platform.errors import ArtifactError
from rxt_platform.orchestration import plan, runner
from rxt_platform.orchestration.plan import build_plan, last_trained
from tests.support import small_run


def fingerprints(*overrides: str, storage: Path) -> dict[str, str]:
    return {step.name: step.fingerprint for step in build_plan(small_run(storage, *overrides))}


def test_the_reward_s_model_is_identified_by_its_weights_not_by_its_place(tmp_path: Path) -> None:
    contents = {"one": ("weights", "words"), "same": ("weights", "words")}
    contents |= {"other": ("others", "words"), "spells otherwise": ("weights", "letters")}
    for name, (weights, tokenizer) in contents.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights)
        (folder / "tokenizer.json").write_text(tokenizer)
        (folder / "config.json").write_text('{"architectures": ["RxTAlpha"]}')
    found = {
        name: fingerprints(f"evaluation.reward_model={tmp_path / name}", storage=tmp_path)["evaluation"]
        for name in contents
    }
    assert found["one"] == found["same"]
    assert len({*found.values()}) == 3
    assert found["one"] != fingerprints(storage=tmp_path)["evaluation"]
    with pytest.raises(ArtifactError, match=r"evaluation.reward_model: .*no such model directory"):
        fingerprints(f"evaluation.reward_model={tmp_path / 'none'}", storage=tmp_path)
    (tmp_path / "one/model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"evaluation.reward_model: .*model.safetensors"):
        fingerprints(f"evaluation.reward_model={tmp_path / 'one'}", storage=tmp_path)
    (tmp_path / "other/config.json").write_text('{"architectures": ["StatelessTransformer"]}')
    with pytest.raises(ArtifactError, match=r"evaluation.reward_model: .*StatelessTransformer.*not RxTAlpha"):
        fingerprints(f"evaluation.reward_model={tmp_path / 'other'}", storage=tmp_path)


def test_how_results_are_shown_is_no_part_of_an_evaluation_s_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    content = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), content(path))[1])
    plan._code.__wrapped__(("evaluation",))
    names = {path.name for path in read}
    assert {"evaluate.py", "intervals.py", "conversations.py"} <= names
    assert not {"report.py", "tables.py", "pictures.py"} & names


def test_a_baseline_adds_its_steps_and_changes_none_but_the_evaluation(tmp_path: Path) -> None:
    alone, both = fingerprints(storage=tmp_path), fingerprints("baseline={window: 512}", storage=tmp_path)
    added = ["baseline.pretraining", "baseline.sft", "baseline.memory_aware"]
    assert [name for name in both if name not in alone] == added
    assert {name for name in alone if alone[name] != both[name]} == {"evaluation"}
    assert list(both)[-1] == "evaluation"
    longer = fingerprints("baseline={window: 600}", storage=tmp_path)
    assert {name for name in both if longer[name] != both[name]} == {*added, "evaluation"}
    plan = build_plan(small_run(tmp_path, "baseline={window: 512}"))
    assert last_trained(plan).name == "mrl"
    assert last_trained(plan, stateless=True).name == "baseline.memory_aware"


def test_what_ends_a_stage_early_is_part_of_what_it_is(tmp_path: Path) -> None:
    early = "stages.memory_pretraining.early_stopping={every: 2, patience: 1}"
    plain, stopped = fingerprints(storage=tmp_path), fingerprints(early, storage=tmp_path)
    changed = {name for name in plain if plain[name] != stopped[name]}
    assert changed == {"memory_pretraining", "memory_aware", "mrl", "evaluation"}


@pytest.mark.parametrize(
    "override",
    [
        "stages.memory_aware.bptt_window=1",
        "stages.memory_aware.reset_probability=0.1",
        "stages.sft.loss.memory_noise=0.1",
        "model.memory.initialization=standard",
        "model.memory.slots=8",
    ],
)
def test_what_the_baseline_has_no_part_in_does_not_train_it_again(tmp_path: Path, override: str) -> None:
    same = "model.memory.slots=8" in override
    plain = fingerprints("baseline={window: 512}", storage=tmp_path)
    changed = fingerprints("baseline={window: 512}", override, storage=tmp_path)
    baseline = [name for name in plain if name.startswith("baseline.")]
    assert all(plain[name] == changed[name] for name in baseline)
    assert (plain["memory_aware"] == changed["memory_aware"]) == same, "slots are 8 in the small run"


def test_what_the_baseline_trains_by_is_part_of_what_it_is(tmp_path: Path) -> None:
    plain = fingerprints("baseline={window: 512}", storage=tmp_path)
    for override in ("stages.sft.optimizer.learning_rate=1e-4", "stages.sft.loss.balance_weight=0.2"):
        changed = fingerprints("baseline={window: 512}", override, storage=tmp_path)
        assert plain["baseline.pretraining"] == changed["baseline.pretraining"]
        assert plain["baseline.sft"] != changed["baseline.sft"]


def test_an_evaluation_finds_the_reward_s_model_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray tasks have working directories of their own."""
    calls: list[Any] = []
    monkeypatch.setattr("rxt_platform.orchestration.runner.ray_jobs.call", lambda *given, **_: calls.append(given))
    monkeypatch.chdir(tmp_path)
    config = small_run(tmp_path, "evaluation.reward_model=models/one")
    step: Any = None
    runner._evaluate(SimpleNamespace(config=config), step, [])  # type: ignore[arg-type]
    ((_, given, *_),) = calls
    assert given.evaluation.reward_model == str(tmp_path / "models/one")
    assert given.model_copy(update={"evaluation": config.evaluation}) == config
