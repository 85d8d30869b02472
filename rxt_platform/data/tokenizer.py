"""Byte-level BPE with the special tokens and the interaction templates of REF section 5.

An interaction is `[BOS][Q]query[A]answer[EOS]`; a hybrid one (REF 3, 4b)
`[BOS]([I]internal)([Q]query | [U]tool result)([T]think)([A]answer)([C]tool call)[EOS]`. Text is encoded with one space
put before it, so that a word has the same token at the start of a message as inside one; decoding takes exactly that
space away, so any text survives. Special tokens that a user types are encoded as ordinary text.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rxt_platform.data.rows import Interaction
from rxt_platform.errors import ArtifactError, DataError

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]", "[Q]", "[A]", "[T]", "[C]", "[U]", "[I]")
PAD, UNK, BOS, EOS, MASK, QUERY, ANSWER, THINK, CALL, TOOL, INTERNAL = range(11)
_MARKER = re.compile(r"(\[[A-Z]+\])")

ReplyPart = Literal["thoughts", "answer", "tool_call"]
_PARTS: dict[int, ReplyPart] = {THINK: "thoughts", ANSWER: "answer", CALL: "tool_call"}


@dataclass(frozen=True)
class EncodedInteraction:
    """Token ids of an interaction; `answer_start` is the index of the first token that the model has to say.

    That is the one after `[A]`; in a hybrid interaction, where the model also decides whether it thinks first, the
    marker after the query. `truncated` says that the answer lost its end (and `[EOS]`), `query_cut` that the query did.
    """

    ids: tuple[int, ...]
    answer_start: int
    truncated: bool = False
    query_cut: bool = False


class TooLongError(DataError):
    """A query (or tool's result) that leaves no room for an answer; `reason` says so without the fix."""

    def __init__(self, tokens: int, window: int, what: str = "query") -> None:
        self.reason = f"{what} of {tokens} tokens leaves no room for an answer in a window of {window}"
        super().__init__(f"{self.reason}: shorten it, or ask for truncation")


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
    def train(cls, texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> Self:
        """Learn merges of pairs that occur `min_frequency` times; a small corpus may give fewer tokens than asked for.

        The file works in other programs too: there, one text becomes `[BOS]text[EOS]`, a pair
        `[BOS][Q]query[A]answer[EOS]`, with the ids that stages and chat use.
        """
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[BOS] $A [EOS]",
            pair="[BOS] [Q] $A [A] $B [EOS]",
            special_tokens=[(SPECIAL_TOKENS[i], i) for i in (BOS, EOS, QUERY, ANSWER)],
        )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
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

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on all threads that `TOKENIZERS_PARALLELISM` allows."""
        encoded = self._tokenizer.encode_batch_fast([" " + text for text in texts], add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).removeprefix(" ")

    def stream(self) -> "TextStream":
        """Decodes an answer piece by piece."""
        return TextStream(self._tokenizer)

    def encode_query(
        self, query: str, max_length: int | None = None, truncate: bool = False, tool: bool = False
    ) -> list[int]:
        """`[BOS][Q]query[A]`: what the model answers to; `[BOS][U]query[A]` if it is a `tool`'s result.

        With a `max_length`, a query that leaves no room for an answer raises DataError, or with `truncate` loses its
        end (a warning says how much) so that a quarter of the window is left. An empty query is a DataError.
        """
        what, marker = ("tool result", TOOL) if tool else ("query", QUERY)
        if not query.strip():
            raise DataError(f"empty {what}: there is nothing to answer")
        ids = self.encode(query)
        if max_length is not None and len(ids) + 3 >= max_length:
            if not truncate or max_length < 5:
                raise TooLongError(len(ids), max_length, what)
            kept = max(1, max_length - 3 - max(1, max_length // 4))
            logger.warning("%s cut from %d to %d tokens: the window holds %d", what, len(ids), kept, max_length)
            ids = ids[:kept]
        return [BOS, marker, *ids, ANSWER]

    def encode_system(self, text: str, max_length: int) -> list[int]:
        """`[BOS][I]text[EOS]`: a system prompt, as memory holds it before the first turn.

        Raises DataError for one that is empty or has more than `max_length` tokens: half an instruction is another.
        """
        if not text.strip():
            raise DataError("empty system prompt: leave it out, or say something in it")
        ids = assemble_system(self.encode(text))
        if len(ids) > max_length:
            raise DataError(f"system prompt of {len(ids)} tokens: the window holds {max_length}, shorten it")
        return ids

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
        if not query.strip():
            raise DataError("empty query: there is nothing to answer")
        turn = Interaction(query, answer)
        return assemble(turn, [self.encode(text) for text in interaction_texts(turn)], max_length)


def assemble_system(encoded: Sequence[int]) -> list[int]:
    """A system prompt from its text's ids."""
    return [BOS, INTERNAL, *encoded, EOS]


def interaction_texts(turn: Interaction) -> list[str]:
    """The texts of an interaction in the order in which `assemble` takes their ids."""
    return [text for _, text in _reply(turn) + _said(turn)]


def assemble(
    turn: Interaction, encoded: Sequence[Sequence[int]], max_length: int, cut_query: bool = False
) -> EncodedInteraction:
    """An interaction of at most `max_length` tokens from its texts' ids (`interaction_texts`).

    What does not fit is cut off at the answer's end, without `[EOS]`. A query that leaves no room for an answer raises
    TooLongError, or with `cut_query` loses its end so that a quarter of the window is left.
    """
    reply, said = _reply(turn), _said(turn)
    replies, before = encoded[: len(reply)], encoded[len(reply) :]
    prompt = [BOS]
    for (marker, _), ids in zip(said, before, strict=True):
        prompt += [marker, *ids]
    opening = [] if turn.hybrid else [ANSWER]
    query_cut = len(prompt) + len(opening) >= max_length
    if query_cut:
        if not cut_query or max_length < 5:
            raise TooLongError(len(prompt) - 1 - len(said), max_length)
        prompt = _cut_prompt(said, before, max(3, max_length - len(opening) - max(1, max_length // 4)))
    prompt += opening
    ids = list(prompt)
    for (marker, _), text_ids in zip(reply, replies, strict=True):
        ids += [marker, *text_ids] if turn.hybrid else text_ids
    ids.append(EOS)
    return EncodedInteraction(tuple(ids[:max_length]), len(prompt), len(ids) > max_length, query_cut)


def _cut_prompt(said: list[tuple[int, str]], encoded: Sequence[Sequence[int]], length: int) -> list[int]:
    """A prompt of at most `length` tokens: instructions lose their end before the query does."""
    (marker, _), query = said[-1], encoded[-1]
    kept = [marker, *query][: length - 1]
    room = length - 1 - len(kept)
    internal = [INTERNAL, *encoded[0]][:room] if len(said) > 1 and room > 1 else []
    return [BOS, *internal, *kept]


def _said(turn: Interaction) -> list[tuple[int, str]]:
    """What comes before the reply: markers and texts."""
    internal = [(INTERNAL, turn.internal)] if turn.internal else []
    return [*internal, (TOOL if turn.from_tool else QUERY, turn.query)]


def _reply(turn: Interaction) -> list[tuple[int, str]]:
    """What the model says: markers and texts."""
    parts = ((THINK, turn.think), (ANSWER, turn.answer), (CALL, turn.tool_call))
    return [(marker, text) for marker, text in parts if text]


def answer_ids(ids: Sequence[int]) -> list[int]:
    """What a reply says: all of a plain one; of a hybrid one its `[A]` part, else its `[C]` part, else its thoughts."""
    current: list[int] = []
    parts = {ANSWER: current}
    for token in ids:
        if token in (THINK, ANSWER, CALL):
            current = parts.setdefault(token, [])
        elif token != EOS:
            current.append(token)
    return next((parts[marker] for marker in (ANSWER, CALL, THINK) if parts.get(marker)), [])


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


@dataclass(frozen=True)
class ReplyPiece:
    """What one token adds to a reply's text, and to which part."""

    part: ReplyPart
    text: str


class ReplyStream:
    """The text of a reply, token by token, with its parts told apart.

    `marker` is the one that the reply was opened with (it is in the prompt), `part` where the reply is now. Each part's
    text is its own: it has no leading space, and a character does not go on across a marker.
    """

    def __init__(self, tokenizer: RxtTokenizer, marker: int = ANSWER) -> None:
        self._tokenizer = tokenizer
        self._text = tokenizer.stream()
        self.part: ReplyPart = _PARTS[marker]

    def push(self, token: int) -> ReplyPiece:
        """What a further token adds; a marker that opens another part adds only what the part before it left over."""
        part = _PARTS.get(token, self.part)
        if part == self.part:
            return ReplyPiece(part, self._text.push(token))
        ended = self.end()
        self.part, self._text = part, self._tokenizer.stream()
        return ended

    def end(self) -> ReplyPiece:
        """What is left, if the reply (or its part) ended inside a character."""
        return ReplyPiece(self.part, self._text.end())
