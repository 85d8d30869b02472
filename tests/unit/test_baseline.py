"""Promises of the stateless baseline: matched size, no memory, the whole history read, cached = recomputed."""

from functools import cache
from typing import Any

import pytest
import torch

from rxt_platform.config.loading import load_preset, preset_names
from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD, QUERY
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.generation import answer_batch
from rxt_platform.model.parameters import count, measure_size
from rxt_platform.model.sampling import SamplingOptions
from tests.unit.helpers import FIRST_WORD, VOCAB, padded, rows_of, tiny_config

WINDOW = 40  # longer than one interaction of the model it is compared with
LENGTHS = (5, 1, 30, 14, 3, 20, 7, 2)


def variant(attention: dict[str, Any] | None = None, **decoder: Any) -> ModelConfig:
    """The tiny model with changes to its decoder, which is what a baseline takes over."""
    base = tiny_config().decoder.model_dump() | decoder
    if attention is not None:
        base["self_attention"] = attention
    return tiny_config(decoder=base)


EXPERTS: dict[str, Any] = {"number": 3, "per_token": 2, "size": 32}
CONFIGS = {
    "as the model": tiny_config(),
    "MHA": variant({"query_heads": 4, "key_value_heads": 4}),
    "GQA": variant({"query_heads": 4, "key_value_heads": 2}),
    "reverse SQA": variant({"query_heads": 2, "key_value_heads": 4}),
    "gated, normed GQA": variant({"query_heads": 4, "key_value_heads": 2, "gated": True, "query_key_norm": True}),
    "dense": variant(experts=None, feed_forward_size=48),
    "stateless layers": variant(
        feed_forward_size=48, stateless_layers=["dense", "moe"], final_stateless_layers=["moe", "dense"]
    ),
    "final norm": variant(final_norm=True),
    "shared experts": variant(experts={**EXPERTS, "shared": 2, "bias": "global"}),
    "balanced by a bias": variant(experts={**EXPERTS, "balancing": "bias"}),
    "another rope base": tiny_config(rope_base=500.0),
}


@cache
def baseline(name: str) -> StatelessTransformer:
    """The baseline of a configuration, which sometimes ends an answer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = StatelessTransformer(matched_baseline(CONFIGS[name], WINDOW)).eval()
    model.decoder.head.bias.data[EOS] += 0.3
    return model


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[BOS, QUERY, *row, ANSWER] for row in rows_of(*lengths, seed=3)]


def recomputed(model: StatelessTransformer, prompt: list[int]) -> list[int]:
    """The greedy answer, with the whole history read anew for every token."""
    ids = list(prompt)
    while len(ids) < WINDOW and EOS not in ids[len(prompt) :]:
        with torch.no_grad():
            ids.append(int(model.decode(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- size and parts


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_s_baseline_has_its_parameters_within_a_percent(preset: str) -> None:
    config = load_preset(preset)
    matched = matched_baseline(config, 4096)
    with torch.device("meta"):
        found = count(StatelessTransformer(matched)).parameters
    assert found == pytest.approx(measure_size(config).total.parameters, rel=0.01)
    assert matched.max_length == 4096
    assert (matched.vocab_size, matched.hidden_size) == (config.vocab_size, config.hidden_size)
    assert matched.decoder.self_attention == config.decoder.self_attention


@pytest.mark.parametrize("name", CONFIGS)
def test_a_baseline_has_neither_memory_nor_encoder(name: str) -> None:
    parts = {part for key, _ in baseline(name).named_parameters() for part in key.split(".")}
    assert parts.isdisjoint({"cross_attention", "cross_norm", "memory_norm", "memory_attention", "encoder", "mlm_head"})
    assert not any(layer.stateful for layer in baseline(name).decoder.layers)


def test_a_baseline_keeps_the_stateless_layers_and_final_norm() -> None:
    kept = matched_baseline(CONFIGS["stateless layers"], WINDOW)
    layers = StatelessTransformer(kept).decoder.layers
    kinds = [type(layer.feed_forward).__name__ for layer in layers]
    assert kinds == ["SwiGLU", *["MixtureOfExperts"] * (kept.layers + 2), "SwiGLU"]
    assert baseline("final norm").decoder.norm is not None


# ---- what it reads


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_token_reads_the_first(name: str) -> None:
    ids, _ = padded(rows_of(WINDOW))
    changed = ids.clone()
    changed[0, 0] = FIRST_WORD + (int(ids[0, 0]) - FIRST_WORD + 1) % (VOCAB - FIRST_WORD)
    with torch.no_grad():
        moved = (baseline(name).decode(changed) - baseline(name).decode(ids)).abs().amax(dim=-1)[0]
    assert (moved > 1e-5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_nothing_that_comes_later(name: str) -> None:
    ids, mask = padded(rows_of(12))
    changed = ids.clone()
    changed[0, 7] = FIRST_WORD + (int(ids[0, 7]) - FIRST_WORD + 1) % (VOCAB - FIRST_WORD)
    with torch.no_grad():
        before, after = baseline(name).decode(ids, mask), baseline(name).decode(changed, mask)
    torch.testing.assert_close(after[:, :7], before[:, :7], atol=1e-6, rtol=0)
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(dim=-1) > 1e-5).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name: str) -> None:
    model, rows = baseline(name), rows_of(9, 4, 6)
    ids, mask = padded(rows)
    wide_ids, wide_mask = padded(rows, 20)
    with torch.no_grad():
        logits = model.decode(ids, mask)[mask]
        torch.testing.assert_close(model.decode(wide_ids, wide_mask)[wide_mask], logits, atol=2e-6, rtol=0)
        others = ids.masked_fill(~mask, FIRST_WORD + 3)
        torch.testing.assert_close(model.decode(others, mask)[mask], logits, atol=2e-6, rtol=0)
        torch.testing.assert_close(
            model.decode(ids[:1]), model.decode(ids[:1], torch.ones_like(ids[:1], dtype=torch.bool)), atol=0, rtol=0
        )


# ---- generation


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_answers_are_those_of_recomputation_alone_and_in_a_batch(name: str) -> None:
    model, prompts = baseline(name), prompts_of(*LENGTHS)
    expected = [recomputed(model, prompt) for prompt in prompts]
    assert len({token for answer in expected for token in answer}) > 3, "too dull an answer to show anything"
    assert answer_batch(model, prompts, None, SamplingOptions()) == expected
    assert answer_batch(model, prompts[:1], None, SamplingOptions()) == expected[:1]


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_are_those_of_recomputation(name: str) -> None:
    model = baseline(name)
    (row,) = rows_of(WINDOW)
    ids = torch.tensor([row, row[::-1]])
    lengths = [9, 4]
    with torch.no_grad():
        cache = model.decoder.start_cache(None, 2, WINDOW)
        mask = torch.arange(9) < torch.tensor(lengths)[:, None]
        model.decoder.prefill(model.embedding(ids[:, :9].masked_fill(~mask, PAD)), mask, cache)
        for turn in range(WINDOW - 9):
            at = torch.tensor(lengths)[:, None] + turn
            states = model.decoder.step(model.embedding(ids.gather(1, at)), at, cache, 9 + turn + 1)
            for i, end in enumerate((at[:, 0] + 1).tolist()):
                expected = model.decode(ids[i : i + 1, :end])[0, -1]
                torch.testing.assert_close(model.decoder.head(states)[i, 0], expected, atol=1e-5, rtol=0)
