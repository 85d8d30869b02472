"""When an answer counts as recalled. Text only, no torch."""

import re


def matches(answer: str, reference: str, spans: tuple[str, ...] | None) -> bool:
    """Exact match of all asked facts (`spans`, whole words anywhere in the answer) or of the whole answer.

    Case and punctuation don't count, but in what has no words, such as an emoji.
    """
    if spans is None:
        return _words(answer) == _words(reference) if _words(reference) else answer.strip() == reference.strip()
    return all(_holds(answer, span) for span in spans)


def _holds(answer: str, span: str) -> bool:
    words = _words(span)
    return f" {words} " in f" {_words(answer)} " if words else span.strip() in answer


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
