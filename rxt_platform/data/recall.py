"""When an answer counts as recalled. Text only, no torch."""

import re
import unicodedata

# Scripts that don't part words by spaces (or, Korean, hang particles on them): each character is a word of its own.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


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
    return " ".join(_WORD.findall(unicodedata.normalize("NFC", text).casefold()))
