"""Promises of the configuration: a mistake is named by its key and comes with the fix, before anything runs."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rxt_platform.config.data import StoryWorldSource
from rxt_platform.config.loading import load_preset, load_run, preset_names
from rxt_platform.config.model import ModelConfig
from rxt_platform.config.mrl import MemoryRLConfig
from rxt_platform.config.run import RunConfig
from rxt_platform.config.stage_base import OptimizerConfig
from rxt_platform.config.stages import JointPretrainingConfig, MemoryAwareConfig
from rxt_platform.errors import ConfigError
from tests.support import ROOT

RUN = """
name: first
model:
  preset: tiny
data:
  texts: {kind: story_world, train_rows: 20, validation_rows: 4}
  interactions: {kind: story_world, train_rows: 20, validation_rows: 4}
  conversations: {kind: story_world, train_rows: 20, validation_rows: 4}
stages:
  joint:
    kind: joint_pretraining
    epochs: 1
    global_batch_size: 8
    optimizer: {learning_rate: 0.001}
  memory:
    kind: memory_aware
    epochs: 2.5
    global_batch_size: 4
    optimizer: {learning_rate: 0.001, learning_rate_scale: {encoder: 0.5}}
    curriculum: [{turns: 2, epochs: 1}]
"""


class Runs:
    """Loads a run from changed text or with overrides."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.yaml"

    def load(self, *overrides: str, text: str = RUN) -> RunConfig:
        self.path.write_text(text)
        return load_run(self.path, overrides)

    def problem(self, *overrides: str, text: str = RUN) -> str:
        with pytest.raises(ConfigError) as raised:
            self.load(*overrides, text=text)
        message = str(raised.value)
        assert "\n" not in message, "one line"
        assert raised.value.exit_code == 2
        return message


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def without(*path: str) -> str:
    """The run's text without one key."""
    raw = node = yaml.safe_load(RUN)
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return yaml.safe_dump(raw)


def test_a_complete_run_is_loaded_with_its_types(runs: Runs) -> None:
    run = runs.load()
    assert run.model == load_preset("tiny")
    assert [type(source) for source in run.data.texts or []] == [StoryWorldSource]
    joint, memory = run.stages["joint"], run.stages["memory"]
    assert isinstance(joint, JointPretrainingConfig)
    assert isinstance(memory, MemoryAwareConfig)
    assert list(run.stages) == ["joint", "memory"], "stages train in the order of the file"
    assert memory.epochs == 2.5
    assert memory.optimizer.learning_rate_scale == {"encoder": 0.5}
    assert memory.bptt_window == "all"


def test_a_loaded_run_cannot_be_changed(runs: Runs) -> None:
    run = runs.load()
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3  # type: ignore[misc]


# ---- unknown, missing and doubled keys


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("trainign.log_every=1", "trainign", "training"),
        ("stages.joint.global_batchsize=8", "stages.joint.global_batchsize", "global_batch_size"),
        ("stages.joint.loss.mask_probabilty=0.2", "stages.joint.loss.mask_probabilty", "mask_probability"),
        ("stages.memory.bptt_windows=1", "stages.memory.bptt_windows", "bptt_window"),
        ("stages.memory.optimizer.learning_rte=1", "stages.memory.optimizer.learning_rte", "learning_rate"),
        ("data.texts.train_row=3", "data.texts.train_row", "train_rows"),
        ("model.memory.slot=8", "model.memory.slot", "slots"),
        ("model.decoder.expert=8", "model.decoder.expert", "experts"),
        ("resources.worker=2", "resources.worker", "workers"),
        ("stages.joint.start_from.artefact=x", "stages.joint.start_from.artefact", "artifact"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_ones(runs: Runs, override: str, key: str, near: str) -> None:
    message = runs.problem(override)
    assert f"unknown key '{key}'; nearest valid: " in message
    assert near in message.split("nearest valid: ")[1].split(";")[0].split(", ")


def test_an_unknown_key_inside_a_list_is_named_by_its_position(runs: Runs) -> None:
    message = runs.problem(text=RUN.replace("{turns: 2, epochs: 1}", "{turns: 2, epochs: 1, epoch: 2}"))
    assert "unknown key 'stages.memory.curriculum.0.epoch'; nearest valid: epochs" in message


def test_an_unknown_key_like_no_other_gets_all_valid_ones(runs: Runs) -> None:
    message = runs.problem("zzzz=1")
    assert "unknown key 'zzzz'" in message
    assert all(key in message for key in RunConfig.model_fields)


def test_a_key_of_another_stage_kind_is_unknown(runs: Runs) -> None:
    message = runs.problem("stages.joint.bptt_window=1")
    assert "unknown key 'stages.joint.bptt_window'" in message


def test_the_preset_is_among_the_valid_keys_of_a_model(runs: Runs) -> None:
    assert "preset" in runs.problem(text=RUN.replace("preset: tiny", "prset: tiny")).split("nearest valid: ")[1]


@pytest.mark.parametrize(
    "path",
    [
        ("name",),
        ("model",),
        ("data", "conversations"),
        ("stages", "joint", "epochs"),
        ("stages", "memory", "optimizer", "learning_rate"),
        ("data", "texts", "train_rows"),
    ],
    ids=".".join,
)
def test_a_missing_key_is_named_by_its_path(runs: Runs, path: tuple[str, ...]) -> None:
    assert f"missing key '{'.'.join(path)}'" in runs.problem(text=without(*path))


def test_a_stage_without_rows_is_named_with_the_section_that_it_needs(runs: Runs) -> None:
    message = runs.problem(text=without("data", "texts"))
    assert "stages.joint trains on texts: name a source as data.texts" in message


@pytest.mark.parametrize(
    ("text", "kind", "path"),
    [("hf:owner/name", "hub", "owner/name"), ("some/*.jsonl.gz", "files", "some/*.jsonl.gz")],
)
def test_a_bare_string_is_a_source(runs: Runs, text: str, kind: str, path: str) -> None:
    (source,) = runs.load(f"data.conversations={text}").data.conversations
    assert (source.kind, getattr(source, "path", None)) == (kind, path)


def test_several_sources_are_a_list_and_errors_name_the_one(runs: Runs) -> None:
    world = "{kind: story_world, train_rows: 5, validation_rows: 2"
    run = runs.load(f"data.conversations=[{world}}}, {world}, weight: 0.5}}]")
    assert [source.weight for source in run.data.conversations] == [1.0, 0.5]
    message = runs.problem(f"data.conversations=[{world}}}, {world}, wieght: 0.5}}]")
    assert "unknown key 'data.conversations.1.wieght'; nearest valid: weight" in message


def test_a_key_that_stands_twice_is_refused_with_its_line(runs: Runs) -> None:
    message = runs.problem(text=RUN.replace("    epochs: 1\n", "    epochs: 1\n    epochs: 2\n"))
    line = RUN.split("\n").index("    epochs: 1") + 2
    assert f"run.yaml:{line}:5" in message
    assert "'epochs' stands twice" in message


def test_all_problems_are_told_at_once(runs: Runs) -> None:
    message = runs.problem("zzzz=1", "stages.joint.epochs=-1", "training.log_every=0")
    assert "zzzz" in message
    assert "stages.joint.epochs" in message
    assert "training.log_every" in message
    assert message.index("zzzz") < message.index("stages.joint.epochs"), "unknown keys first"


# ---- presets, kinds and values


def test_every_preset_is_a_valid_model_and_a_whole_run_can_name_it(runs: Runs) -> None:
    assert {"tiny", "alpha-nano"} <= set(preset_names())
    for name in preset_names():
        assert isinstance(load_preset(name), ModelConfig)
        assert runs.load(f"model.preset={name}").model == load_preset(name)


def test_an_unknown_preset_names_the_nearest_and_all_of_them(runs: Runs) -> None:
    message = runs.problem("model.preset=alpha-nanno")
    assert "model.preset: unknown preset 'alpha-nanno'; did you mean 'alpha-nano'?" in message
    assert all(name in message for name in preset_names())


def test_a_preset_cannot_reach_another_file(runs: Runs) -> None:
    assert "unknown preset" in runs.problem("model.preset=../presets/tiny")


def test_keys_beside_a_preset_are_put_over_it(runs: Runs) -> None:
    model = runs.load("model.memory.slots=16", "model.layers=3").model
    assert (model.memory.slots, model.layers) == (16, 3)
    assert model.memory.attention == load_preset("tiny").memory.attention


@pytest.mark.parametrize("where", ["stages.joint", "data.texts"])
def test_a_wrong_kind_is_named_with_the_kinds_there_are(runs: Runs, where: str) -> None:
    message = runs.problem(f"{where}.kind=pretraining")
    assert f"{where}: kind 'pretraining' is none of " in message
    assert {"stages.joint": "'joint_pretraining'", "data.texts": "'story_world'"}[where] in message


def test_a_missing_kind_is_named(runs: Runs) -> None:
    message = runs.problem(text=without("stages", "joint", "kind"))
    assert "stages.joint" in message
    assert "kind" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stages.joint.epochs=0", "stages.joint.epochs"),
        ("stages.joint.epochs=many", "stages.joint.epochs"),
        ("stages.joint.loss.mask_probability=1.5", "stages.joint.loss.mask_probability"),
        ("stages.joint.loss={mask_random: 0.6, mask_kept: 0.5}", "mask_random 0.6 and mask_kept 0.5 are more than 1"),
        ("stages.memory.bptt_window=0", "stages.memory.bptt_window"),
        ("seed=-1", "seed"),
        ("training.precision=fp16", "training.precision"),
        ("stages={}", "stages"),
        ("model.hidden_size=0", "model.hidden_size"),
        ("data.conversations.turns=[1]", "data.conversations.turns"),
    ],
)
def test_a_bad_value_is_named_by_its_path(runs: Runs, override: str, key: str) -> None:
    assert f"{key}" in runs.problem(override)


def test_a_learning_rate_scale_of_an_unknown_component_is_named(runs: Runs) -> None:
    message = runs.problem("stages.memory.optimizer.learning_rate_scale.encodr=1")
    assert "stages.memory.optimizer.learning_rate_scale" in message
    assert "memory_attention" in message, "the components there are"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_goes_with_every_zero_stage(runs: Runs, precision: str) -> None:
    for stage in range(4):
        training = runs.load(f"training.precision={precision}", f"training.zero_stage={stage}").training
        assert (training.precision, training.zero_stage) == (precision, stage)


@pytest.mark.parametrize(("offload", "least"), [("optimizer", 1), ("parameters", 3)])
def test_offload_without_the_zero_stage_that_it_needs_is_refused_with_the_fix(
    runs: Runs, offload: str, least: int
) -> None:
    overrides = [f"training.offload={offload}", f"training.zero_stage={least - 1}"]
    message = runs.problem(*overrides)
    assert f"training: offload: {offload} needs zero_stage >= {least}, not {least - 1}" in message
    for stage in range(least, 4):
        assert runs.load(overrides[0], f"training.zero_stage={stage}").training.offload == offload
    assert runs.load("training.offload=none", "training.zero_stage=0").training.zero_stage == 0


def test_the_best_checkpoint_by_a_metric_that_is_never_measured_is_refused_with_the_fix(runs: Runs) -> None:
    best = "training.checkpoints.best={metric: validation_accuracy, highest: true}"
    message = runs.problem(best)
    assert "checkpoints.best.metric 'validation_accuracy' is never measured: set evaluate_every" in message
    assert "'validation_loss' is never measured" in runs.problem("training.checkpoints.best={}"), "the default metric"
    assert runs.load(best, "training.evaluate_every=5").training.evaluate_every == 5
    assert "best.metric" in runs.problem("training.checkpoints.best.metric=loss"), "of other rows at each step"


def test_a_rollback_must_find_a_checkpoint(runs: Runs) -> None:
    guard = "training.spike_guard={skip: 3}"
    assert "raise checkpoints.keep" in runs.problem(guard, "training.checkpoints={every: 50, keep: 1}")
    assert "raise checkpoints.keep" in runs.problem(guard, "training.checkpoints={every: 2, keep: 2}")
    assert runs.load(guard, "training.checkpoints={every: 3, keep: 2}").training.spike_guard is not None


@pytest.mark.parametrize("guard", ["skipped_batches=1", "spike_guard={}"])
def test_offload_cannot_leave_out_updates(runs: Runs, guard: str) -> None:
    message = runs.problem(f"training.{guard}", "training.offload=optimizer", "training.zero_stage=1")
    assert "no skipped_batches, no spike_guard" in message


def test_a_decay_that_begins_before_the_warmup_ends_is_refused(runs: Runs) -> None:
    shares = ["stages.joint.optimizer.warmup=0.6", "stages.joint.optimizer.decay=0.5"]
    message = runs.problem("stages.joint.optimizer.schedule=wsd", *shares)
    assert "stages.joint.optimizer: warmup 0.6 and decay 0.5 are more than all steps" in message
    runs.load("stages.joint.optimizer.schedule=wsd", shares[0], "stages.joint.optimizer.decay=0.4")
    for schedule in ("cosine", "constant"):
        runs.load(f"stages.joint.optimizer.schedule={schedule}", *shares)  # they have no decay of their own


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["resources.workers=3"], "stages.joint.global_batch_size 8 can't be shared by 3 workers: nearest 6 or 9"),
        (["resources.workers=9"], "stages.joint.global_batch_size 8 can't be shared by 9 workers: nearest 9"),
        (
            ["resources.workers=3", "stages.joint.micro_batch_size=2"],
            "stages.joint.global_batch_size 8 can't be shared by 3 workers in micro-batches of 2: nearest 6 or 12",
        ),
        (
            ["resources.workers=2", "stages.joint.micro_batch_size=3"],
            "stages.joint.global_batch_size 8 can't be shared by 2 workers in micro-batches of 3: nearest 6 or 12; "
            "or micro_batch_size 2 or 4",
        ),
        (
            ["stages.memory.micro_batch_size=8"],
            "stages.memory.global_batch_size 4 can't be shared by 1 workers in micro-batches of 8: nearest 8; "
            "or micro_batch_size 4",
        ),
    ],
)
def test_a_batch_that_cannot_be_shared_names_the_nearest_sizes_that_can(
    runs: Runs, overrides: list[str], problem: str
) -> None:
    """Micro-batch sizes only where one of them would do."""
    assert runs.problem(*overrides).endswith(problem)


def test_a_batch_that_can_be_shared_is_accepted(runs: Runs) -> None:
    run = runs.load("resources.workers=2", "stages.joint.micro_batch_size=4")
    assert run.resources.workers == 2


@pytest.mark.parametrize("name", ["../other", "a/b", "/tmp/x", "..", ".hidden", "", "artifacts", "with space", "a\\b"])
def test_a_run_name_that_is_no_plain_folder_name_is_refused(runs: Runs, name: str) -> None:
    assert "name" in runs.problem(f"name={yaml.safe_dump(name)}")


def test_a_stage_name_that_is_no_plain_folder_name_is_refused(runs: Runs) -> None:
    assert "'../joint'" in runs.problem(text=RUN.replace("  joint:", "  ../joint:"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=3"], ["hidden_size (128)", "heads (3)"]),
        (["model.decoder.experts.per_token=9"], ["per_token (9)", "experts (4)"]),
        (["model.encoder.attention.key_value_heads=3"], ["query_heads (4)", "key_value_heads (3)"]),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(runs: Runs, overrides: list[str], words: Iterable[str]) -> None:
    message = runs.problem(*overrides)
    assert all(word in message for word in words)


# ---- overrides and files


def test_overrides_reach_nested_keys_and_keep_their_types(runs: Runs) -> None:
    run = runs.load(
        "seed=7",
        "stages.joint.optimizer.learning_rate=3e-4",
        "stages.memory.curriculum=[{turns: 3, epochs: 0.5}]",
        "training.checkpoints.every=5",
        "tracking.uri=http://localhost:5000/a=b",
    )
    assert run.seed == 7
    assert run.stages["joint"].optimizer == OptimizerConfig(learning_rate=3e-4)
    memory = run.stages["memory"]
    assert isinstance(memory, MemoryAwareConfig)
    assert [(lesson.turns, lesson.epochs) for lesson in memory.curriculum] == [(3, 0.5)]
    assert run.training.checkpoints.every == 5
    assert run.tracking.uri == "http://localhost:5000/a=b", "only the first '=' parts key from value"
    assert run.training.checkpoints.keep == RunConfig.model_fields["training"].default.checkpoints.keep


def test_the_last_override_of_a_key_wins(runs: Runs) -> None:
    assert runs.load("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "override 'seed': write key.path=value"),
        ("=3", "override '=3': write key.path=value"),
        pytest.param("seed=[1", "override 'seed=[1': the value is not YAML"),
        ("name.first=x", "override 'name.first=x': 'name' holds a value, not a section"),
    ],
)
def test_a_bad_override_is_quoted_with_the_fix(runs: Runs, override: str, words: str) -> None:
    assert words in runs.problem(override)


def test_a_key_that_is_no_text_is_refused_with_its_line(runs: Runs) -> None:
    assert "run.yaml:2" in runs.problem(text=RUN.replace("name: first", "name: {{ run }}"))  # a template not filled in


def test_a_run_name_cannot_end_with_a_line_feed(runs: Runs) -> None:
    assert "name" in runs.problem('name="first\\n"')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "a run is a mapping of keys, this file holds NoneType"),
        ("- a\n- b\n", "this file holds list"),
        ("name: [unclosed\nmodel: 3\n", "run.yaml:2"),
        ("name: !!python/object/apply:os.getcwd []\n", "run.yaml:1"),
    ],
)
def test_a_file_that_is_no_run_is_named_with_its_place(runs: Runs, content: str, words: str) -> None:
    assert words in runs.problem(text=content)


def test_a_missing_file_and_a_binary_one_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        load_run(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_run(tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)


def test_a_run_survives_being_written_as_json_and_read_again(runs: Runs) -> None:
    run = runs.load()
    dumped: dict[str, Any] = run.model_dump(mode="json")
    assert RunConfig.model_validate(dumped) == run


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["baseline={window: 64}"], "baseline.window 64 is less than one interaction"),
        (["baseline={}", "stages.pretraining.start_from={artifact: elsewhere}"], "leave out start_from"),
        (["baseline={windows: 64}"], "baseline.windows"),
        (["baseline={}", "stages.sft.early_stopping={every: 5}"], "would end the model's stage and the baseline's"),
        (["stages.pretraining.trains=decoder", "stages.pretraining.loss={}"], "embedding, which would be random"),
        (["stages.sft.loss={mask_probability: 0, mask_random: 0.1}"], "no effect with mask_probability 0"),
        (["stages.pretraining.trains=encoder"], "loss.decoder_only has no effect with trains: encoder"),
        (["stages.sft.early_stopping={every: 5, metric: recall}"], "early_stopping.metric 'recall' is not measured"),
        (["stages.sft.early_stopping={}"], "early_stopping.every"),
        (["stages.memory_aware.reset_probability=1.5"], "reset_probability"),
        (["stages.memory_aware.memory_change_weight=-1"], "memory_change_weight"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(overrides: list[str], said: str) -> None:
    quickstart = Path(__file__).parents[2] / "pipelines/configs/quickstart.yaml"
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_run(quickstart, ["stages.pretraining.loss.decoder_only=0.2", *overrides])


def test_a_stage_may_take_over_another_s_settings_by_yaml_s_merge_key(tmp_path: Path) -> None:
    config = load_run(ROOT / "pipelines/configs/mrl.yaml")
    first, last = config.stages["mrl_2"], config.stages["mrl_8"]
    assert isinstance(first, MemoryRLConfig)
    assert isinstance(last, MemoryRLConfig)
    assert (first.steps, last.steps) == (2, 8)
    assert first.reward == last.reward
    twice = tmp_path / "twice.yaml"
    twice.write_text("a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}\n")
    with pytest.raises(ConfigError, match="key 'x' stands twice"):
        load_run(twice)
