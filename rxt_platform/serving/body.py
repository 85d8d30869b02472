"""From the bytes of an HTTP request to plain values: what is nested too deep is refused before it becomes objects."""

import re
from typing import Any

import numpy as np
from pydantic_core import from_json

from rxt_platform.serving.schema import Refusal

# A string, also one without an end; it always matches at a quote, so that each byte is looked at once.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)


def read_json(body: bytes, max_depth: int) -> Any:
    """The values in a request's body. Refuses (422) what is nested deeper, NaN and Infinity, and what is no JSON."""
    if (depth := json_depth(body)) > max_depth:
        raise Refusal(422, "too_deep", f"lists and objects {depth} deep; at most {max_depth}", limit=max_depth)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(422, "not_json", f"the body is no JSON (which has no NaN or Infinity): {error}") from None


def json_depth(body: bytes) -> int:
    """How deep brackets are nested, those inside strings left out, without parsing."""
    outside = np.frombuffer(_STRING.sub(b"", body), dtype=np.uint8)
    opening = (outside == ord("[")) | (outside == ord("{"))
    closing = (outside == ord("]")) | (outside == ord("}"))
    steps = opening.astype(np.int8) - closing.astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))
