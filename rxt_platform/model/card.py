"""The model card (README.md) of a saved model: what it is, how to use it, what was measured."""

from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCardData

from rxt_platform.model.figures import Figures

GENERATED = "<!-- written by rxt-platform: take this line out to keep your own text when the model is saved again -->"
_INTRODUCTION = {
    "RxTAlpha": "A Reactive Transformer ([arXiv:2510.03561](https://arxiv.org/abs/2510.03561)): it answers one message "
    "at a time and keeps the conversation in a fixed-size short-term memory, written after each answer.",
    "RxTEncoder": "The encoder of a Reactive Transformer ([arXiv:2510.03561](https://arxiv.org/abs/2510.03561)) with a "
    "head on the mean of its states.",
}
_USE = {
    "RxTAlpha": """from rxt_platform import RxTAlpha

model = RxTAlpha.from_pretrained("PATH_OR_NAME")
model.share_components()

for token_id in model.interact(**model.tokenize_query("Tom has a kite."), temperature=0.1):
    print(model.stringify_token(token_id), end="", flush=True)  # -1: memory update starts, -2: done""",
    "RxTAlphaDecoder": """from rxt_platform import RxTAlphaDecoder, SampleDecoder, Sampler, load_tokenizer_from_hf_hub

model = RxTAlphaDecoder.from_pretrained("PATH_OR_NAME")
sample = SampleDecoder(Sampler(model, "cpu", end_token_id=3), load_tokenizer_from_hf_hub("PATH_OR_NAME"))
sample("[Q] Tell me a story about a cat. [A]", temperature=0.1, top_p=0.9, max_seq_len=256, print_stream=True)""",
    "RxTEncoder": """from rxt_platform import RxTEncoder

model = RxTEncoder.from_pretrained("PATH_OR_NAME")
values = model(**model.tokenize(["What toy does Tom have?"]))""",
}


def card_metadata(architecture: str, figures: Figures | None) -> ModelCardData:
    """The card's YAML head, with the measured figures in the Hub's own layout."""
    results = []
    if figures:
        rows = [("Answer-token perplexity", "perplexity", figures.answer_tokens.perplexity)]
        rows.append(("Answer-token accuracy", "accuracy", figures.answer_tokens.accuracy))
        for distance, recall in figures.recall.items():
            rows.append((f"Memory gain at distance {distance}", "memory_gain", recall.gain))
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="conversations",
                dataset_name="held-out conversations of its run",
                metric_type=kind,
                metric_name=name,
                metric_value=round(float(value), 4),
            )
            for name, kind, value in rows
        ]
    return ModelCardData(
        library_name="rxt-platform",
        pipeline_tag="feature-extraction" if architecture == "RxTEncoder" else "text-generation",
        tags=["reactive-transformer", "memory"],
        model_name=figures.name if figures else "reactive-transformer",
        eval_results=results or None,
    )


def card_text(architecture: str, facts: Mapping[str, str], figures: Figures | None) -> str:
    """The card in Markdown."""
    lines = [
        GENERATED,
        "",
        f"# {figures.name if figures else architecture}",
        "",
        _INTRODUCTION.get(architecture, _INTRODUCTION["RxTAlpha"]),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "## Use",
        "",
        f"```python\n{_USE[architecture]}\n```",
        "",
        "## Measured",
        "",
        *(_figures(figures) if figures else ["Nothing was measured of this model."]),
        "",
        "## Limits",
        "",
        "It knows what its training data held, and nothing else.",
        "",
    ]
    return "\n".join(lines)


def _figures(figures: Figures) -> list[str]:
    lines = [
        "On the held-out conversations of its run. Recall: a fact told in an earlier turn is in the greedy answer; "
        "*memory reset*: the same with an empty memory. Loss and accuracy count answer tokens only, `[EOS]` included.",
        "",
        "| distance in turns | recall | memory reset | gain | questions |",
        "|---|---|---|---|---|",
    ]
    for distance, row in figures.recall.items():
        lines.append(f"| {distance} | {row.with_memory:.1%} | {row.reset:.1%} | {row.gain:+.3f} | {row.count} |")
    lines += ["", "| answer tokens | loss (nats) | perplexity | accuracy | tokens |", "|---|---|---|---|---|"]
    for name, tokens in (("with memory", figures.answer_tokens), ("memory reset", figures.memory_reset)):
        lines.append(
            f"| {name} | {tokens.loss:.3f} | {tokens.perplexity:.3f} | {tokens.accuracy:.1%} | {tokens.count:,} |"
        )
    lines += ["", "| stage | steps | held out | before | after |", "|---|---|---|---|---|"]
    for stage in figures.stages:
        measured = dict(stage.held_out or {})
        if stage.loss_before is not None and stage.loss_after is not None:
            measured["loss"] = (stage.loss_before, stage.loss_after)
        for name, (before, after) in measured.items():
            lines.append(f"| {stage.name} | {stage.steps} | {name.replace('_', ' ')} | {before:.3f} | {after:.3f} |")
    return lines
