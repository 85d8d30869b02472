"""Models to hold, for tests: tiny ones of random weights, and one that has learned to think before some answers."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform import RxTAlpha
from rxt_platform.data.rows import Interaction
from rxt_platform.data.tokenizer import EOS, assemble, interaction_texts
from rxt_platform.model.files import save_model
from tests.unit.helpers import padded, tiny_config, tiny_model, word_tokenizer

CONFIG = tiny_config(vocab_size=300, max_length=64)
QUERIES = ["What has Tom?", "Lily likes cake and plays near the lake.", "Hat?"]
TOM = word_tokenizer().encode("Tom")[0]  # " Tom", as a word has the same token anywhere
assert word_tokenizer().decode([TOM, TOM]) == "Tom Tom"

STARTED, DONE = -1, -2

HYBRID = {
    "thinks": Interaction("What has Tom?", "Tom has cake.", None, True, think="a red hat, cake"),
    "thinks too": Interaction("What likes Lily near the lake?", "Lily likes cake.", None, True, think="Lily plays"),
    "answers": Interaction("Hat?", "red hat.", None, True),
    "answers too": Interaction("Has Lily a lake near the red hat?", "Lily plays.", None, True),
    "calls": Interaction("Tom plays?", "", None, True, think="What plays", tool_call="lake cake"),
    "tool": Interaction("Hat?", "Tom has a red hat.", None, True, from_tool=True),  # answered unlike the query "Hat?"
}


def alpha(likelier: dict[int, float] | None = None, kind: type[RxTAlpha] = RxTAlpha) -> RxTAlpha:
    """A tiny model in which some tokens are likelier than by chance; `[EOS]` sometimes, unless said otherwise."""
    model = tiny_model(CONFIG)
    for token, bias in ({EOS: 2.5} | (likelier or {})).items():
        model.decoder.head.bias.data[token] += bias
    return kind(model, word_tokenizer())


def saved_alpha(path: Path, model: RxTAlpha | None = None) -> Path:
    """The directory of a saved model."""
    save_model(path, CONFIG, (model or alpha()).model.state_dict(), word_tokenizer())
    return path


def hybrid(name: str) -> tuple[list[int], list[int]]:
    """Prompt (`[BOS][Q]query` or `[BOS][U]result`) and reply, from its marker to `[EOS]`, as training has them."""
    interaction = HYBRID[name]
    whole = assemble(interaction, word_tokenizer().encode_all(interaction_texts(interaction)), CONFIG.max_length)
    return list(whole.ids[: whole.answer_start]), list(whole.ids[whole.answer_start :])


def thinker() -> RxTAlpha:
    """A model that has learned the `HYBRID` interactions by heart, over any memory."""
    model = tiny_model(CONFIG)
    model.load_state_dict(_learned())
    return RxTAlpha(model, word_tokenizer())


@cache
def _learned() -> dict[str, Tensor]:
    """Weights after a second of training."""
    interactions = [hybrid(name) for name in HYBRID]
    ids, mask = padded([prompt + reply for prompt, reply in interactions])
    starts = torch.tensor([[len(prompt)] for prompt, _ in interactions])
    targets = mask[:, 1:] & (torch.arange(1, ids.shape[1]) >= starts)
    model = tiny_model(CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(90):
        memory = model.initial_memory(torch.arange(len(ids)) + 100 * step)
        with torch.no_grad():
            for _ in range(step % 3):
                order = torch.randperm(len(ids), generator=generator)
                memory = model.write(memory, ids[order], mask[order])
        loss = F.cross_entropy(model.decode(ids, mask, memory)[:, :-1][targets], ids[:, 1:][targets])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def turn(model: RxTAlpha, text: str, **options: Any) -> list[int]:
    """The ids of one whole turn, without the signals."""
    *ids, started, done = model.interact(**model.tokenize_query(text), **options)
    assert (started, done) == (STARTED, DONE)
    return ids
