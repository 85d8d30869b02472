"""When an answer counts as recalled. Text only, no torch."""

import re


def matches(answer: str, reference: str, spans: tuple[str, ...] | None) -> bool:
    """Exact match of all asked facts (`spans`, whole words anywhere in the answer) or of the whole answer."""
    if spans is None:
        return _words(answer) == _words(reference)
    return all(f" {_words(span)} " in f" {_words(answer)} " for span in spans)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
