"""Byte-level BPE with the special tokens and the interaction template of REF section 5.

An interaction is `[BOS][Q]query[A]answer[EOS]`. Text is encoded with one space put before it, so that a word has the
same token at the start of a message as inside one; decoding takes exactly that space away, so any text survives.
Special tokens that a user types are encoded as ordinary text.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rxt_platform.errors import ArtifactError, DataError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]", "[Q]", "[A]", "[T]", "[C]", "[U]", "[I]")
PAD, UNK, BOS, EOS, MASK, QUERY, ANSWER = range(7)
_MARKER = re.compile(r"(\[[A-Z]+\])")


@dataclass(frozen=True)
class EncodedInteraction:
    """Token ids of `[BOS][Q]query[A]answer[EOS]`; `answer_start` is the index of the first token after `[A]`."""

    ids: tuple[int, ...]
    answer_start: int
    truncated: bool = False


class RxtTokenizer:
    """A trained tokenizer: text <-> ids, and the templates that stages and chat use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()  # as other libraries write into tokenizer.json
        self._tokenizer.no_truncation()
        if self._tokenizer.decoder is None:
            self._tokenizer.decoder = decoders.ByteLevel()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Self:
        """Learn merges from `texts`. A small corpus may give fewer than `vocab_size` tokens."""
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator((" " + text for text in texts), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `tokenizer.json`; raises ArtifactError when it is missing or not ours."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every cause
            raise ArtifactError(f"{path}: not a readable tokenizer: {error}") from error
        added = tokenizer.get_added_tokens_decoder()
        for index, token in enumerate(SPECIAL_TOKENS):
            if tokenizer.token_to_id(token) != index or index not in added or not added[index].special:
                raise ArtifactError(f"{path}: {token} must be a special token with id {index}")
        return cls(tokenizer)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens. Raises DataError for half a surrogate pair, which is no character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start + 1} of the text is no Unicode character: {error.reason}"
            ) from None
        return list(self._tokenizer.encode(" " + text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).removeprefix(" ")

    def stream(self) -> "TextStream":
        """Decodes an answer piece by piece."""
        return TextStream(self._tokenizer)

    def encode_query(self, query: str, max_length: int | None = None, truncate: bool = False) -> list[int]:
        """`[BOS][Q]query[A]`: what the model answers to.

        With a `max_length`, a query that leaves no room for an answer raises DataError, or with `truncate` loses its
        end (a warning says how much) so that a quarter of the window is left. An empty query is a DataError.
        """
        if not query.strip():
            raise DataError("empty query: there is nothing to answer")
        ids = self.encode(query)
        if max_length is not None and len(ids) + 3 >= max_length:
            if not truncate or max_length < 5:
                raise DataError(
                    f"query of {len(ids)} tokens leaves no room for an answer in a window of {max_length}: shorten it, "
                    "or ask for truncation"
                )
            kept = max(1, max_length - 3 - max(1, max_length // 4))
            logger.warning("query cut from %d to %d tokens: the window holds %d", len(ids), kept, max_length)
            ids = ids[:kept]
        return [BOS, QUERY, *ids, ANSWER]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text with markers in it, such as `[Q] Who are you? [A]`, after `[BOS]`; blanks around markers go.

        Raises DataError for a marker that is none of the special tokens.
        """
        ids = [BOS]
        for part in _MARKER.split(text):
            if _MARKER.fullmatch(part):
                if part not in SPECIAL_TOKENS:
                    raise DataError(f"unknown special token {part}; known: {', '.join(SPECIAL_TOKENS)}")
                ids += [SPECIAL_TOKENS.index(part)] if part != "[BOS]" else []
            elif part.strip():
                ids += self.encode(part.strip())
        return ids

    def encode_interaction(self, query: str, answer: str, max_length: int) -> EncodedInteraction:
        """`[BOS][Q]query[A]answer[EOS]`, the answer's end cut off (without `[EOS]`) when it does not fit.

        Raises DataError when the query leaves no room for an answer.
        """
        start = self.encode_query(query, max_length)
        ids = [*start, *self.encode(answer), EOS]
        return EncodedInteraction(tuple(ids[:max_length]), len(start), truncated=len(ids) > max_length)


class TextStream:
    """The text of an answer, token by token: a character whose bytes come in several tokens comes with the last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = ""  # with the space that `encode` puts before a text

    def push(self, token: int) -> str:
        """What a further token adds to the text; special tokens add nothing."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer, token) or ""
        first = not self._shown
        self._shown += piece
        return piece.removeprefix(" ") if first else piece

    def end(self) -> str:
        """What is left, if the answer ended inside a character."""
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        rest, self._shown = text[len(self._shown) :], text
        return rest
