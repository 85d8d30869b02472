"""The interface of the published model cards: a thin face over the functional model, with a conversation's memory.

tokenizer = load_tokenizer_from_hf_hub("my-model")
model = RxTAlpha.from_pretrained("my-model", tokenizer=tokenizer)
model.share_components()
model.init_stm_state(**model.tokenize_full_interaction("You are Tom.", "I am Tom.", max_seq_len=256))
for token_id in model.interact(**model.tokenize_query("Who are you?"), max_seq_len=256, temperature=1.0):
    print(model.stringify_token(token_id), end="")      # token ids, then -1 (memory update starts) and -2 (done)

A hybrid-reasoning model thinks first with `thinking_mode="extended"`, or where it sees fit ("auto"); `read_token` then
tells thoughts, answer and tool call apart, and `tokenize_tool_result` gives it what the tool said.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from rxt_platform.config.model import ModelConfig
from rxt_platform.data.tokenizer import ANSWER, PAD, ReplyPiece, ReplyStream, RxtTokenizer, TextStream
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model import files
from rxt_platform.model.generation import (
    BatchEvent,
    MemoryUpdated,
    MemoryUpdateStarted,
    ThinkingMode,
    Tokens,
    check_written,
    interact_batch,
    open_reply,
    right_padded,
)
from rxt_platform.model.parameters import measure_size
from rxt_platform.model.pretrained import PretrainedModel, checked_ids
from rxt_platform.model.sampling import SamplingOptions, check_seeds
from rxt_platform.model.stepper import Execution, Stepper
from rxt_platform.model.transformer import ReactiveTransformer

logger = logging.getLogger(__name__)

UPDATE_STARTED, UPDATED = -1, -2


class Encoded(TypedDict):
    """Token ids [B, T], right-padded, and which of them are real [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor


def usable_window(config: ModelConfig, max_seq_len: int | None) -> int:
    """`max_seq_len`, but no more than the model's window (a warning says so)."""
    window = config.max_length
    if max_seq_len is not None and max_seq_len > window:
        _warn_once(f"max_seq_len {max_seq_len} is more than the model's window: {window} is used")
    return window if max_seq_len is None else min(max_seq_len, window)


@cache
def _warn_once(message: str) -> None:
    """The same message at every turn says nothing new."""
    logger.warning(message)


class RxTAlpha(PretrainedModel):
    """A Reactive Transformer with the conversation that it is in (or a batch of conversations)."""

    def __init__(self, model: ReactiveTransformer, tokenizer: RxtTokenizer | None = None) -> None:
        super().__init__()
        self.model = model
        self.figures = None
        self.tokenizer = None
        if tokenizer is not None:
            self.set_tokenizer(tokenizer)
        self._batch = 1
        self._version = 0
        self.stepper: Stepper | None = None
        self._stream: TextStream | None = None
        self._reply: ReplyStream | None = None
        self._markers = [ANSWER]
        self.reset_stm_state()

    @classmethod
    def from_directory(
        cls, directory: Path, tokenizer: RxtTokenizer | None, dtype: torch.dtype | None = None
    ) -> "RxTAlpha":
        """The model in a local directory."""
        config = files.model_config(files.read_config(directory, files.REACTIVE), directory)
        model = files.empty_model(config)
        files.load_weights(model, directory, dtype)
        return cls(model, tokenizer or files.load_tokenizer(directory, config))

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self.model.config.vocab_size

    def set_tokenizer(self, tokenizer: RxtTokenizer) -> None:
        """Use this tokenizer from now on."""
        super().set_tokenizer(tokenizer)
        self._stream = self._reply = None

    def settings(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return self.model.config.model_dump(mode="json")

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors."""
        return dict(self.model.state_dict())

    def facts(self) -> Mapping[str, str]:
        """Sizes, for the card."""
        size, config = measure_size(self.model.config), self.model.config
        decoder = size.components["decoder"]
        return {
            "Parameters": f"{size.total.parameters:,} without the MLM head",
            "Decoder": f"{decoder.parameters:,} ({decoder.active:,} active)",
            "Encoder": f"{size.components['encoder'].parameters:,}",
            "Memory attention": f"{size.components['memory_attention'].parameters:,} ({config.memory.variant})",
            "Memory": f"{config.layers} layers x {config.memory.slots} slots x {config.hidden_size}",
            "Window of one interaction": f"{config.max_length} tokens",
            "Vocabulary": f"{config.vocab_size:,}",
        }

    @property
    def description(self) -> str:
        """One line on the model and its memory."""
        config, total = self.model.config, measure_size(self.model.config).total.parameters
        return f"{total:,} parameters, memory of {config.layers} layers x {config.memory.slots} slots"

    def set_execution(self, execution: Execution) -> None:
        """Run decoding steps eagerly (the default), compiled, or as CUDA graphs: the same tokens, see `Stepper`."""
        self.stepper = Stepper(self.model, execution)

    # ---- memory

    @property
    def memory(self) -> Tensor:
        """The memory [L, B, S, D], on the model's device and in its precision."""
        weight = self.model.embedding.weight
        return self._memory.to(weight.device, weight.dtype)

    def share_components(self) -> None:
        """Start afresh. Embedding and memory are one here anyway; the cards call it once after loading."""
        self.reset_stm_state()

    def reset_stm_state(self, seeds: Sequence[int] | None = None) -> None:
        """Forget: the memory that conversations start from, drawn from `seeds` where the model draws it."""
        chosen = range(self._batch) if seeds is None else seeds
        if len(chosen) != self._batch:
            raise DataError(f"{len(chosen)} seeds for {self._batch} conversations")
        check_seeds(chosen)
        self._set(self.model.initial_memory(torch.tensor(list(chosen))))

    def set_batch_mode(self, use_batch: bool, batch_size: int | None = None) -> None:
        """Hold `batch_size` conversations at once, or one again. They start afresh."""
        if use_batch and (batch_size is None or batch_size < 1):
            raise DataError(f"set_batch_mode needs a batch_size of at least 1, not {batch_size}")
        self._batch = batch_size if use_batch and batch_size else 1
        self.reset_stm_state()

    @torch.no_grad()
    def init_stm_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Write an interaction [1 or B, T] into the memory: what a system prompt is elsewhere."""
        ids, mask = self._rows(input_ids, attention_mask)
        if ids.shape[1] > (window := self.model.config.max_length):
            raise DataError(f"an interaction of {ids.shape[1]} tokens; the model's window holds {window}")
        written = self.model.write(self.memory, ids, mask)
        check_written(written)
        self._set(written)

    def export_stm_state(self) -> Tensor:
        """A copy of the memory [L, B, S, D]: the whole state of the conversation."""
        return self.memory.detach().clone()

    def load_stm_state(self, state: Tensor) -> None:
        """Go on with an exported memory. Raises ModelError for a memory of another shape or dtype, or not finite."""
        self.model.check_memory(state.to(self.model.embedding.weight.device), self._batch)
        if not state.isfinite().all():
            raise ModelError("the memory holds NaN or infinity")
        self._set(state.detach().clone())

    # ---- text to ids and back

    def tokenize_full_interaction(
        self, query: str, answer: str, max_seq_len: int | None = None, device: torch.device | str | None = None
    ) -> Encoded:
        """`[BOS][Q]query[A]answer[EOS]` as `input_ids` and `attention_mask` [1, T]; an answer too long is cut."""
        encoded = self.own_tokenizer().encode_interaction(query, answer, self._window(max_seq_len))
        if encoded.truncated:
            logger.warning("the interaction was cut to the window of %d tokens", len(encoded.ids))
        return self._encoded([list(encoded.ids)], device)

    def tokenize_system_prompt(
        self, text: str, max_seq_len: int | None = None, device: torch.device | str | None = None
    ) -> Encoded:
        """`[BOS][I]text[EOS]` [1, T], for `init_stm_state`. An empty text, or one that does not fit, is a DataError."""
        return self._encoded([self.own_tokenizer().encode_system(text, self._window(max_seq_len))], device)

    def tokenize_query(
        self,
        text: str,
        max_seq_len: int | None = None,
        device: torch.device | str | None = None,
        truncation: bool = False,
    ) -> Encoded:
        """`[BOS][Q]text` as `input_ids` and `attention_mask` [1, T].

        A text that leaves no room for an answer is a DataError, or is cut with a warning (`truncation`).
        """
        return self.tokenize_batch([text], max_seq_len, device, truncation)

    def tokenize_tool_result(
        self,
        text: str,
        max_seq_len: int | None = None,
        device: torch.device | str | None = None,
        truncation: bool = False,
    ) -> Encoded:
        """`[BOS][U]text` [1, T]: what a tool that the model called has to say, in place of a query."""
        ids = self.own_tokenizer().encode_query(text, self._window(max_seq_len), truncation, tool=True)
        return self._encoded([ids[:-1]], device)

    def tokenize_batch(
        self,
        texts: Sequence[str],
        max_seq_len: int | None = None,
        device: torch.device | str | None = None,
        truncation: bool = False,
    ) -> Encoded:
        """`tokenize_query` for several texts, right-padded: [B, T]."""
        if not texts:
            raise DataError("no texts to tokenize")
        tokenizer, window = self.own_tokenizer(), self._window(max_seq_len)
        return self._encoded([tokenizer.encode_query(text, window, truncation)[:-1] for text in texts], device)

    def stringify_token(self, token_id: int) -> str:
        """What a token of the running answer adds to its text; '' for special tokens and signals.

        An answer that ended inside a character is completed at the signal -1.
        """
        if self._stream is None:
            self._stream = self.own_tokenizer().stream()
        if token_id == UPDATE_STARTED:
            return self._stream.end()
        return self._stream.push(token_id) if token_id >= 0 else ""

    def read_token(self, token_id: int) -> ReplyPiece:
        """What `stringify_token` says, with the part of the reply that it belongs to, each part's text for itself.

        Of a batch, a `ReplyStream` for each of `reply_markers` does the same.
        """
        if self._reply is None:
            self._reply = ReplyStream(self.own_tokenizer(), self._markers[0])
        if token_id == UPDATE_STARTED:
            return self._reply.end()
        return self._reply.push(token_id) if token_id >= 0 else ReplyPiece(self._reply.part, "")

    @property
    def reply_markers(self) -> list[int]:
        """The markers, `[A]` or `[T]`, that the replies of the last turn were opened with: B ids."""
        return list(self._markers)

    def stringify_batch(self, generated_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Texts of generated ids [B, T]."""
        mask = torch.ones_like(generated_ids) if attention_mask is None else attention_mask
        rows = zip(generated_ids, mask.bool(), strict=True)
        return [self.own_tokenizer().decode(ids[real].tolist()) for ids, real in rows]

    # ---- conversation

    def interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_self_attn_cache: bool = True,
        seed: int | None = None,
        thinking_mode: ThinkingMode = "fast",
    ) -> Iterator[int]:
        """Answer `[BOS][Q]text` [1, T] and write query and answer into the memory.

        Yields token ids up to `[EOS]` or the end of the window, -1 when the memory update starts and -2 when it is
        done. `thinking_mode` "fast" asks for the answer at once, "extended" for thoughts first, "auto" lets the model
        choose; the marker that opens the reply (`reply_markers`) belongs to the prompt and is not yielded, but written.
        Sampling follows `seed`, or torch's global generator without one; temperature 0 is greedy. Tokens are the
        same with and without a cache, so there always is one, whatever `use_self_attn_cache` says.
        """
        if self._batch != 1:
            raise DataError(
                f"the model holds {self._batch} conversations: use batch_interact, or set_batch_mode(False)"
            )
        seeds = None if seed is None else [seed]
        for ids in self.batch_interact(
            input_ids, attention_mask, max_seq_len, temperature, top_k, top_p, use_self_attn_cache, seeds, thinking_mode
        ):
            yield ids[0]

    def batch_interact(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        use_self_attn_cache: bool = True,
        seeds: Sequence[int] | None = None,
        thinking_mode: ThinkingMode = "fast",
    ) -> Iterator[list[int]]:
        """The same for a batch [B, T]: yields B ids (`[PAD]` = 0 in rows that have ended), then B times -1 and -2."""
        for event in self._turn(
            input_ids, attention_mask, max_seq_len, temperature, top_k, top_p, seeds, thinking_mode
        ):
            if isinstance(event, Tokens):
                yield [PAD if token is None else token for token in event.ids]
            else:
                yield [UPDATE_STARTED if isinstance(event, MemoryUpdateStarted) else UPDATED] * self._batch

    def batch_interactions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_seq_len: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seeds: Sequence[int] | None = None,
        thinking_mode: ThinkingMode = "fast",
    ) -> tuple[Tensor, Tensor]:
        """Answer a batch [B, T] and write the memories.

        Returns the answers' ids [B, N], right-padded, and their mask [B, N].
        """
        events = self._turn(input_ids, attention_mask, max_seq_len, temperature, top_k, top_p, seeds, thinking_mode)
        steps = [event.ids for event in events if isinstance(event, Tokens)]
        ids = [[PAD if token is None else token for token in row] for row in zip(*steps, strict=True)]
        real = [[token is not None for token in row] for row in zip(*steps, strict=True)]
        return torch.tensor(ids, device=input_ids.device), torch.tensor(real, device=input_ids.device)

    def _turn(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_seq_len: int | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seeds: Sequence[int] | None,
        thinking_mode: ThinkingMode,
    ) -> Iterator[BatchEvent]:
        """One turn of every conversation; at its end the memory is the written one."""
        ids, mask = self._rows(input_ids, attention_mask)
        asked = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        window = self._window(max_seq_len)
        if (longest := 1 + max(map(len, asked))) >= window:
            raise DataError(f"a prompt of {longest} tokens leaves no room for an answer in a window of {window}")
        prompts = open_reply(self.model, asked, self.memory, thinking_mode)
        if seeds is None:
            seeds = torch.randint(2**62, (len(prompts),)).tolist()
        options = SamplingOptions(temperature, 1.0 if top_p is None else top_p, top_k=top_k)
        limits = [window - len(prompt) for prompt in prompts]
        self._stream = self._reply = None
        self._markers = [prompt[-1] for prompt in prompts]
        self._set(self.memory)
        mine = self._version
        for event in interact_batch(self.model, prompts, self.memory, options, seeds, limits, self.stepper):
            if self._version != mine:
                raise ModelError("the memory was changed or another turn begun before this turn ended: it is not kept")
            if isinstance(event, MemoryUpdated):
                self._set(event.memory)
            yield event

    # ---- helpers

    def _set(self, memory: Tensor) -> None:
        """Take over a memory; a turn that is under way then ends with an error."""
        self._memory = memory
        self._version += 1

    def _window(self, max_seq_len: int | None) -> int:
        return usable_window(self.model.config, max_seq_len)

    def _encoded(self, rows: list[list[int]], device: torch.device | str | None) -> Encoded:
        place = self.model.embedding.weight.device if device is None else device
        ids, mask = right_padded(rows, torch.tensor([len(row) for row in rows], device=place))
        return {"input_ids": ids, "attention_mask": mask}

    def _rows(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids and mask for every conversation, on the model's device; one row is taken for all of them."""
        ids, mask = checked_ids(input_ids.to(self.model.embedding.weight.device), attention_mask, self.vocab_size)
        if ids.shape[0] not in (1, self._batch):
            raise DataError(
                f"input_ids {list(ids.shape)} must be [{self._batch}, T]: the model holds {self._batch} "
                "conversation(s), see set_batch_mode"
            )
        return ids.expand(self._batch, -1), mask.expand(self._batch, -1)


class RxTAlphaDecoder(RxTAlpha):
    """A Reactive Transformer of which `Sampler` uses the decoder only, over the memory that conversations start from.

    It is loaded from and saved with all of its weights; it takes part in no conversation.
    """

    def _turn(self, *_: Any, **__: Any) -> Iterator[BatchEvent]:
        raise ModelError("RxTAlphaDecoder has no conversation: use Sampler, or RxTAlpha")

    def init_stm_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Raises ModelError: it writes no memory."""
        raise ModelError("RxTAlphaDecoder writes no memory: use RxTAlpha")
