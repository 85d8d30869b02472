"""Every command in the README is run by CI or a test: a new one must be entered here, with who runs it."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from rxt_platform.config.data import DataConfig
from rxt_platform.config.run import ResourcesConfig
from rxt_platform.config.stages import StageConfig
from rxt_platform.config.training import TrainingConfig
from rxt_platform.data.rows import Conversation, Recall, parse_row
from rxt_platform.evaluation import evaluate
from tests.support import ROOT

RUN_BY = {
    "make quickstart": "dist/test_cluster.py runs its config with half of the steps; .ci/run sets up as it does",
    ".venv/bin/rxt chat": "dist/test_pipeline.py::test_chat_shows_when_memory_is_written",
    ".venv/bin/rxt validate": "unit/test_cli.py",
    ".venv/bin/rxt artifacts": "unit/test_artifacts.py; dist/test_pipeline.py has those of a run",
    ".venv/bin/rxt plan": "dist/test_pipeline.py::test_plan_starts_nothing",
    ".venv/bin/rxt run pipelines/configs/quickstart.yaml": "dist/test_cluster.py, unit/test_bad_input.py",
    ".venv/bin/rxt run pipelines/configs/recall.yaml": "dist/test_recipes.py; dist/test_pipeline.py has a baseline",
    ".venv/bin/rxt run pipelines/configs/tinystories.yaml": "dist/test_real_data.py",
    ".venv/bin/rxt eval": "dist/test_pipeline.py::test_eval_measures_any_conversation_file",
    ".venv/bin/python pipelines/full.py": "dist/test_mrl_on_ray.py",
    ".venv/bin/python pipelines/mrl.py": "dist/test_mrl_on_ray.py",
    ".venv/bin/rxt serve critic": "dist/test_critic_service.py",
    ".venv/bin/rxt models": "dist/test_pipeline.py::test_models_lists_exact_counts",
    ".venv/bin/rxt data": "unit/test_data_inspect.py, unit/test_data_validate.py, unit/test_data_build.py",
    ".venv/bin/mlflow ui": "dist/test_mlflow_page.py",
    "ray start": "dist/test_cluster.py::test_quickstart_as_a_ray_job_ends_with_a_memory_that_works",
    "ray job submit": "dist/test_cluster.py::test_quickstart_as_a_ray_job_ends_with_a_memory_that_works",
    "make test": ".ci/run",
    "make lint": ".ci/run",
}
STARTERS = ("make ", ".venv/bin/", "ray ", "python ", "pip ", "rxt ", "mlflow ")


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    lines = (line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    "))
    commands = [line for line in lines if line.startswith(STARTERS) and "pipelines/full_smst.py" not in line]
    assert len(commands) >= 10
    for command in commands:
        runner = next((by for start, by in RUN_BY.items() if command.startswith(start)), None)
        assert runner, f"{command!r}: nothing runs it"
        for file in re.findall(r"(?:dist|unit)/test_\w+\.py", runner):
            assert (ROOT / "tests" / file).exists()


def test_every_tier_of_tests_is_collected() -> None:
    """Pytest leaves out folders called dist unless it is told not to."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
    assert "dist" not in settings["norecursedirs"]


def test_files_that_the_readme_links_to_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_readme_s_data_section_is_valid() -> None:
    (block,) = (block for block in yaml_blocks() if "data" in block)
    config = DataConfig.model_validate(block["data"])
    assert [source.kind for source in config.texts or []] == ["hub", "files"]


def test_the_readme_s_training_section_is_valid() -> None:
    (block,) = (block for block in yaml_blocks() if "training" in block)
    training = TrainingConfig.model_validate(block["training"])
    assert training.checkpoints.best is not None
    assert ResourcesConfig.model_validate(block["resources"]).workers == 8


def test_the_readme_s_stages_are_valid() -> None:
    (block,) = (block for block in yaml_blocks() if "stages" in block)
    stages = TypeAdapter(dict[str, StageConfig]).validate_python(block["stages"])
    assert [stage.kind for stage in stages.values()] == [
        "joint_pretraining",
        "interaction_sft",
        "memory_pretraining",
        "memory_aware",
        "critic_pretraining",
        "memory_rl",
        "memory_rl",
    ]


def test_the_readme_s_example_of_an_evaluation_has_its_layout() -> None:
    """Every key stands in the layout that `Evaluation` documents."""
    layout = Path(evaluate.__file__).read_text()
    shown, *_ = json_blocks()
    assert set(shown) >= {"answer_tokens", "recall", "follow_up_gain"}
    names = [*shown, *shown["answer_tokens"], *shown["recall"]["1"], *shown["follow_up_gain"]]
    assert [name for name in names if name not in layout] == []


def test_the_readme_s_conversation_is_a_valid_row() -> None:
    _, row, _ = json_blocks()
    parsed = parse_row("conversation", row)
    assert isinstance(parsed, Conversation)
    assert parsed.interactions[1].recall == Recall(("kite",), 1, False)


def json_blocks() -> list[dict[str, Any]]:
    """The README's."""
    return [
        json.loads(block) for block in re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ]


def yaml_blocks() -> list[dict[str, Any]]:
    """The README's."""
    return [
        yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ]


def test_shipped_configs_are_plain_yaml() -> None:
    for path in (ROOT / "pipelines/configs").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict)
