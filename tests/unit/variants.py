"""Named configurations of every variant of the model, and what they answer when everything is recomputed."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, QUERY
from rxt_platform.model.layers import mixtures
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.helpers import padded, rows_of, tiny_config, tiny_model

WINDOW = 24
LENGTHS = (5, 1, 9, 14, 3, 20, 7, 2)
EXPERTS: dict[str, Any] = {"number": 3, "per_token": 2, "size": 32}


def heads(query: int, key_value: int, **settings: Any) -> dict[str, Any]:
    return {"query_heads": query, "key_value_heads": key_value, **settings}


def variant(
    attention: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    memory: dict[str, Any] | None = None,
    **changes: Any,
) -> ModelConfig:
    """The tiny model with changes; `attention` goes everywhere: it has 4 nominal heads of 8 channels."""
    base = tiny_config().model_dump()
    if attention is not None:
        base["encoder"] |= {"attention": attention}
        base["decoder"] |= {"self_attention": attention, "cross_attention": attention}
        base["memory"] |= {"attention": attention}
    base["decoder"] |= decoder or {}
    base["encoder"] |= encoder or {}
    base["memory"] |= memory or {}
    return ModelConfig.model_validate({**base, **changes})


ATTENTIONS = {
    "MHA": heads(4, 4),
    "GQA": heads(4, 2),
    "MQA": heads(4, 1),
    "SQA": heads(2, 1),
    "symmetric SQA": heads(2, 2),
    "extreme SQA": heads(1, 1),
    "reverse SQA": heads(2, 4),
    "no output bias": heads(2, 2, output_bias=False),
    "gated": heads(2, 2, gated=True),
    "gated reverse SQA": heads(1, 2, gated=True),
    "query-key norm": heads(2, 2, query_key_norm=True),
    "gated, normed GQA": heads(4, 2, gated=True, query_key_norm=True),
}
LAYERS: dict[str, ModelConfig] = {
    "dense": variant(decoder={"experts": None, "feed_forward_size": 48}),
    "dense layer before": variant(decoder={"feed_forward_size": 48, "stateless_layers": ["dense"]}),
    "moe layer before": variant(decoder={"stateless_layers": ["moe"]}),
    "moe layer after": variant(decoder={"final_stateless_layers": ["moe"]}),
    "dense with moe around": variant(
        decoder={"feed_forward_size": 48, "stateless_layers": ["dense", "moe"], "final_stateless_layers": ["moe"] * 2}
    ),
    "dense layers around dense": variant(
        decoder={
            "experts": None,
            "feed_forward_size": 48,
            "stateless_layers": ["dense"] * 2,
            "final_stateless_layers": ["dense"],
        }
    ),
    "final norm": variant(decoder={"final_norm": True}),
    "one shared expert": variant(decoder={"experts": {**EXPERTS, "shared": 1}}),
    "two shared experts": variant(decoder={"experts": {**EXPERTS, "shared": 2, "shared_size": 24}}),
    "one bias for all experts": variant(decoder={"experts": {**EXPERTS, "bias": "global"}}),
    "experts without bias": variant(decoder={"experts": {**EXPERTS, "bias": "off"}}),
    "experts balanced by a bias": variant(decoder={"experts": {**EXPERTS, "balancing": "bias"}}),
    "frozen encoder cross-attention": variant(encoder={"cross_attention": heads(2, 1)}),
    "another rope base": variant(rope_base=500.0),
}
MEMORIES: dict[str, ModelConfig] = {
    **{name: variant(memory={"variant": name}) for name in ("simple", "self", "interlayer", "self-interlayer")},
    "grouped": variant(layers=4, memory={"variant": "grouped-self-interlayer", "groups": 2}),
    "ungated self-attention": variant(memory={"variant": "self-interlayer", "gate_self_attention": False}),
    **{
        f"{kind} gate, {activation}, {'each slot' if per_slot else 'one'}": variant(
            memory={"gate": kind, "gate_activation": activation, "gate_per_slot": per_slot}
        )
        for kind in ("linear", "elementwise", "static")
        for activation in ("sigmoid", "tanh", "none")
        for per_slot in (True, False)
    },
    **{
        f"initially {kind}": variant(memory={"initialization": kind})
        for kind in ("standard", "normal", "uniform", "ones", "zeros", "fixed")
    },
}
BETA = variant(
    heads(2, 1, output_bias=False, gated=True),
    {
        "cross_attention": heads(2, 1, output_bias=False),
        "experts": {**EXPERTS, "bias": "global", "shared": 2, "shared_size": 16},
        "feed_forward_size": 48,
        "stateless_layers": ["dense", "moe"],
        "final_stateless_layers": ["moe", "moe"],
        "final_norm": True,
    },
    memory={"variant": "grouped-self-interlayer", "groups": 2, "gate": "elementwise", "attention": heads(2, 2)},
    layers=4,
    rope_base=100_000.0,
)
CONFIGS: dict[str, ModelConfig] = {
    **{name: variant(attention) for name, attention in ATTENTIONS.items()},
    **LAYERS,
    **MEMORIES,
    "as Beta": BETA,
}
every_variant = pytest.mark.parametrize("name", CONFIGS)


@dataclass(frozen=True)
class Recomputed:
    """A model with greedy answers to eight prompts over a written memory, the sequence decoded anew for every token."""

    model: ReactiveTransformer
    prompts: list[list[int]]
    memory: Tensor  # [L, 8, S, D]
    answers: list[list[int]]
    logits: list[list[Tensor]]  # [V] for each token of each answer


@cache
def recomputed(name: str) -> Recomputed:
    model = tiny_model(CONFIGS[name], seed=3)
    model.decoder.head.bias.data[EOS] += 0.5  # some answers end before the window does
    for layer in mixtures(model):
        if layer.config.balancing == "bias":
            layer.selection_steps += 50 * torch.arange(3)  # 0, 0.05, 0.1: changes who is chosen
    prompts = [[BOS, QUERY, *row, ANSWER] for row in rows_of(*LENGTHS, seed=3)]
    answers, logits = [], []
    with torch.no_grad():
        memory = model.write(model.initial_memory(torch.arange(8)), *padded(rows_of(*LENGTHS[::-1], seed=4)))
        for i, prompt in enumerate(prompts):
            ids, mine = list(prompt), []
            while len(ids) < WINDOW and EOS not in ids[len(prompt) :]:
                mine.append(model.decode(torch.tensor([ids]), None, memory[:, i : i + 1])[0, -1])
                ids.append(int(mine[-1].argmax()))
            answers.append(ids[len(prompt) :])
            logits.append(mine)
    return Recomputed(model, prompts, memory, answers, logits)
