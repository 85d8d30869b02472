"""Every part of the published models trains on real processes, not only those that the quickstart has."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rxt_platform.model.generation import answer_batch
from rxt_platform.model.sampling import SamplingOptions
from rxt_platform.model.stepper import Stepper
from tests.support import STAGES, Jobs, make_jobs
from tests.unit.helpers import rows_of, tiny_model

pytestmark = pytest.mark.dist

_GATED = "{query_heads: 4, key_value_heads: 2, output_bias: false, gated: true}"
BETA_PARTS = [
    f"model.encoder.attention={_GATED}",
    f"model.decoder.self_attention={_GATED}",
    "model.decoder.cross_attention={query_heads: 4, key_value_heads: 8, query_key_norm: true}",
    "model.decoder.experts={number: 6, per_token: 2, size: 16, bias: global, shared: 2, shared_size: 24}",
    "model.decoder.feed_forward_size=48",
    "model.decoder.stateless_layers=[dense, moe]",
    "model.decoder.final_stateless_layers=[moe]",
    "model.decoder.final_norm=true",
    "model.memory.variant=grouped-self-interlayer",
    "model.memory.groups=2",
    "model.memory.gate=elementwise",
]
MICRO_ENCODER = "model.encoder.cross_attention={query_heads: 4, key_value_heads: 4}"


def weights(jobs: Jobs, stage: str) -> dict[str, Tensor]:
    return load_file(jobs.jobs[stage].output / "model.safetensors")


def test_the_parts_of_beta_train_in_all_stages_alike_on_one_worker_and_on_two_under_zero_3(
    new_jobs: Callable[..., Jobs], tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = new_jobs(*BETA_PARTS)
    two = make_jobs(tmp_path_factory.mktemp("zero3"), *BETA_PARTS, "training.zero_stage=3")
    for stage in STAGES:
        for jobs, workers in ((one, 1), (two, 2)):
            done = jobs.run(stage, workers)
            assert done.returncode == 0, done.stderr[-2000:]
        for alone, shared in zip(one.history(stage), two.history(stage), strict=True):
            assert alone["objective"] == pytest.approx(shared["objective"], abs=2e-5), (stage, alone["step"])
            assert alone.get("expert_load_max") == pytest.approx(shared.get("expert_load_max"), abs=0.05)
    moved = {
        name
        for name, tensor in weights(one, "sft").items()
        if not torch.equal(tensor, weights(one, "pretraining")[name])
    }
    assert {name for name in weights(one, "sft") if name.startswith("decoder.") and ".cross_" not in name} <= moved


def test_the_early_micro_encoder_s_cross_attention_is_never_trained(new_jobs: Callable[..., Jobs]) -> None:
    jobs = new_jobs(MICRO_ENCODER)
    for stage in STAGES:
        done = jobs.run(stage)
        assert done.returncode == 0, done.stderr[-2000:]
    first, last = weights(jobs, STAGES[0]), weights(jobs, STAGES[-1])
    frozen = [name for name in first if ".frozen_memory." in name]
    assert len(frozen) == 2 * 7  # layers x (two norms, four projections, the output's bias)
    assert all(torch.equal(first[name], last[name]) for name in frozen)
    assert not torch.equal(
        first["encoder.layers.0.attention.query.weight"], last["encoder.layers.0.attention.query.weight"]
    )


def test_selection_biases_follow_the_global_batch_and_survive_a_kill(
    new_jobs: Callable[..., Jobs], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """arXiv:2408.15664: the same on one worker, on two, and on one that was killed and resumed."""
    biased = "model.decoder.experts={number: 4, per_token: 2, size: 32, balancing: bias}"
    one = new_jobs(biased)
    two, killed = (make_jobs(tmp_path_factory.mktemp(name), biased) for name in ("two", "killed"))
    assert one.run("pretraining").returncode == 0
    assert two.run("pretraining", workers=2).returncode == 0
    killed.run_and_kill("pretraining", step=5)
    done = killed.run("pretraining")
    assert done.returncode == 0, done.stderr[-2000:]
    assert killed.weights_sha256("pretraining") == one.weights_sha256("pretraining")
    ours, theirs = weights(one, "pretraining"), weights(two, "pretraining")
    for layer in range(2):
        name = f"decoder.layers.{layer}.feed_forward.selection_steps"
        assert ours[name].abs().max() >= 4, "after 10 steps of the same sign it would be 10"
        assert torch.equal(ours[name], theirs[name])
    assert one.history("pretraining")[-1]["expert_load_max"] >= 1


def test_compiled_layers_train_like_eager_ones(straight_run: Jobs, new_jobs: Callable[..., Jobs]) -> None:
    """Slow: torch.compile builds every layer, for several shapes."""
    jobs = new_jobs("training.compile=true")
    done = jobs.run("pretraining")
    assert done.returncode == 0, done.stderr[-2000:]
    for eager, compiled in zip(straight_run.history("pretraining"), jobs.history("pretraining"), strict=True):
        assert eager["objective"] == pytest.approx(compiled["objective"], abs=1e-5), eager["step"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiled_generation_gives_the_tokens_of_eager_generation(temperature: float) -> None:
    """Slow: torch.compile builds the decoding step."""
    model = tiny_model(seed=1)
    prompts, memory = rows_of(5, 1, 9, 14), model.initial_memory(torch.arange(4))
    options = SamplingOptions(temperature, top_p=0.9, max_new_tokens=8)
    stepper = Stepper(model, "compile")
    eager = answer_batch(model, prompts, memory, options)
    assert answer_batch(model, prompts, memory, options, stepper=stepper) == eager
    assert len({token for answer in eager for token in answer}) > 3
