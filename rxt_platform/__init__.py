"""rxt_platform: trains Reactive Transformers, from a corpus to a measured conversation memory.

Models to hold are here; they are imported when first asked for, so that reading a config needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rxt_platform.model.alpha import RxTAlpha, RxTAlphaDecoder
    from rxt_platform.model.encoder_model import RxTEncoder
    from rxt_platform.model.pretrained import load_tokenizer_from_hf_hub
    from rxt_platform.model.sample_decoder import SampleDecoder, Sampler

__all__ = ["RxTAlpha", "RxTAlphaDecoder", "RxTEncoder", "SampleDecoder", "Sampler", "load_tokenizer_from_hf_hub"]

_HOMES = {
    "RxTAlpha": "alpha",
    "RxTAlphaDecoder": "alpha",
    "RxTEncoder": "encoder_model",
    "SampleDecoder": "sample_decoder",
    "Sampler": "sample_decoder",
    "load_tokenizer_from_hf_hub": "pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"rxt_platform.model.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
