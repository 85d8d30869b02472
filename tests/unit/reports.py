"""A run's report with made-up figures, each of which can be found again in what is shown."""

from typing import Any

NOTHING = dict.fromkeys(("with_memory", "reset", "gain"))
UNASKED = {**NOTHING, "count": 0, "intervals": NOTHING}


def recalled(with_memory: float, reset: float, count: int) -> dict[str, Any]:
    """An entry of a recall table."""
    shares = {"with_memory": with_memory, "reset": reset, "gain": with_memory - reset}
    intervals = {name: [round(share - 0.05, 3), round(share + 0.05, 3)] for name, share in shares.items()}
    return {**shares, "count": count, "intervals": intervals}


def tokens(loss: float, perplexity: float, accuracy: float, count: int) -> dict[str, Any]:
    """An entry of answer tokens."""
    values = {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}
    return {**values, "count": count, "intervals": {name: [0.9 * x, 1.1 * x] for name, x in values.items()}}


def rewarded(*scores: float) -> dict[str, Any]:
    """A reward entry."""
    return {
        "mean": sum(scores) / len(scores),
        "interval": [min(scores), max(scores)],
        "min": min(scores),
        "max": max(scores),
        "components": {"bleu": 0.25, "cosine": 0.75, "length": 0.5},
        "conversations": len(scores),
        "scores": list(scores),
    }


KITES = {
    "responder": {"kind": "reactive", "history": None, "window": 128, "interaction_window": 100},
    "settings": {"reward": {"scale": 10.0}},
    "conversations": 2,
    "turns": 4,
    "cut": {"answers": 3, "queries": 0, "conversations": 2, "left_out": 1},
    "questions": {"kind": "keyed", "conversations": 1},
    "answer_tokens": tokens(0.511, 1.667, 0.812, 4242),
    "memory_reset": tokens(1.511, 4.531, 0.404, 4242),
    "follow_up_gain": {"nats": 1.4, "interval": [1.25, 1.5], "count": 2242},
    "by_turn": [
        {
            "turn": 1,
            "count": 2000,
            "with_memory": tokens(0.5, 1.649, 0.75, 2000),
            "memory_reset": tokens(0.6, 1.822, 0.7, 2000),
        },
        {
            "turn": 2,
            "count": 2242,
            "with_memory": tokens(0.7, 2.014, 0.65, 2242),
            "memory_reset": tokens(2.1, 8.166, 0.3, 2242),
        },
    ],
    "recall": {"10": recalled(0.5, 0.6, 10), "2": recalled(0.9, 0.1, 30), "17+": recalled(0.25, 0.0, 4)},
    "recall_by_task": {"recall": recalled(0.8, 0.225, 40)},
    "recall_long_range": {},
    "recall_by_teller": {},
    "recall_overall": recalled(0.8, 0.225, 40),
    "reward": rewarded(5.5, 3.5),
    "free_running": {
        "recall": {"10": recalled(0.25, 0.6, 10), "2": recalled(0.75, 0.1, 30), "17+": recalled(0.0, 0.0, 4)},
        "recall_by_task": {},
        "recall_long_range": {},
        "recall_by_teller": {},
        "recall_overall": recalled(0.625, 0.225, 40),
        "reward": rewarded(2.5, 0.5),
    },
    "memory": {
        "by_write": [
            {
                "write": 0,
                "conversations": 2,
                "norm": 1.0,
                "change": None,
                "effective_rank": 0.99,
                "slot_similarity": 0.0625,
            },
            {
                "write": 1,
                "conversations": 2,
                "norm": 1.125,
                "change": 0.42,
                "effective_rank": 0.875,
                "slot_similarity": 0.125,
            },
        ],
        "gates": [{"layer": 1, "mean": 0.375, "min": 0.015, "max": 0.985}],
    },
    "masked": {
        "loss": 1.25,
        "accuracy": 0.64,
        "count": 321,
        "intervals": {"loss": [1.125, 1.375], "accuracy": [0.6, 0.68]},
    },
    "latency": [
        {"turn": 1, "conversations": 2, "prompt_ms": 12.34, "tokens_per_second": 1234.5, "write_ms": 5.67},
        {"turn": 2, "conversations": 1, "prompt_ms": 13.0, "tokens_per_second": None, "write_ms": 5.0},
    ],
    "samples": [[{"query": "<script>alert('&')</script>", "reference": 'A "red" hat.', "answer": "A <b>hat</b>."}]],
}
REPORT: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "created": "2025-01-02T03:04:05+00:00",
    "run_seconds": 754.2,
    "model": "runs/artifacts/memory_aware-0123",
    "versions": {"torch": "2.9.0"},
    "parameters": {"decoder": 901_234, "encoder": 1, "memory_attention": 2, "mlm_head": 3, "total": 901_240},
    "steps": [
        {
            "name": "corpus",
            "kind": "corpus",
            "status": "reused",
            "seconds": 0.1,
            "fingerprint": "ab" * 32,
            "artifact": "runs/artifacts/corpus-abab",
        }
    ],
    "stages": [
        {
            "name": "joint",
            "kind": "joint_pretraining",
            "status": "made",
            "seconds": 61.0,
            "steps": 1200,
            "stateless": False,
            "tokens": 1_000_000,
            "loss_before": 6.543,
            "loss_after": 1.234,
            "held_out": None,
            "baselines": {"unigram": 4.321, "bigram": 2.109, "tokens": 5000},
        },
        {
            "name": "a_memory_stage_with_quite_a_long_name_indeed",
            "kind": "memory_pretraining",
            "status": "resumed",
            "seconds": 4000.0,
            "steps": 10,
            "stateless": False,
            "tokens": 20_000,
            "loss_before": -0.125,
            "loss_after": -0.875,
            "held_out": None,
            "baselines": None,
        },
    ],
    "data": {
        "validation": {
            "texts": {
                "validation": [{"rows": 100, "kept": 100, "duplicates": 0, "near_duplicates": 0, "bad": {}}],
                "train": [
                    {
                        "rows": 2003,
                        "kept": 2000,
                        "duplicates": 1,
                        "near_duplicates": 0,
                        "bad": {"column 'text': <empty>": 2},
                    }
                ],
            }
        },
        "tokens": {
            "texts_train": {
                "examples": 2100,
                "tokens": 41500,
                "longest": 128,
                "truncated": 7,
                "queries_cut": 0,
                "too_long": 0,
            },
            "texts_validation": {
                "examples": 100,
                "tokens": 2000,
                "longest": 99,
                "truncated": 0,
                "queries_cut": 0,
                "too_long": 0,
            },
        },
        "fertility": {
            "texts": {
                "tokens_per_word": 1.25,
                "bytes_per_token": 3.5,
                "unknown": 0,
                "changed_by_round_trip": 0,
                "words": 1600,
            }
        },
    },
    **KITES,
    "baseline": None,
}
PICTURES = dict.fromkeys(("recall", "turns", "memory", "rewards", "latency", "losses", "comparison"), b"png")
HISTORIES = {"joint": [{"step": 1, "loss": 6.5, "lr": 0.1}, {"step": 2, "loss": 5.0, "lr": 0.1}], "memory": []}
