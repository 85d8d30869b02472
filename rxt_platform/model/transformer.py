"""The Reactive Transformer: decoder, encoder and memory attention, with memory as an explicit value (REF 1).

    memory = model.initial_memory(seeds)                       # [L, B, S, D]
    logits = model.decode(query_ids, mask, memory)             # answer, reading the memory by cross-attention
    memory = model.write(memory, interaction_ids, mask)        # after the answer: encode and write

The decoder's stages during supervised training read encoder states as their memory (REF 3.1), which is why `decode`
also takes a mask over memory positions. Every mask [B, T] is True at real tokens; None says that there is no padding.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from rxt_platform.config.model import ModelConfig
from rxt_platform.errors import ModelError
from rxt_platform.model.decoder import Decoder
from rxt_platform.model.documents import Documents
from rxt_platform.model.encoder import Encoder
from rxt_platform.model.heads import MaskedLanguageHead
from rxt_platform.model.memory import MemoryAttention, initial_memory


@dataclass
class Decoded:
    """What the decoder computed.

    states   last hidden states [B, T, D]
    balance  the experts' balance loss of each row [B], of packed rows that of each document
    usage    real tokens sent to each expert of each mixture layer [M, E]
    """

    states: Tensor
    balance: Tensor
    usage: Tensor


class ReactiveTransformer(nn.Module):
    """Decoder, encoder, memory attention and one token embedding that encoder and decoder share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)
        self.memory_attention = MemoryAttention(config)
        self.mlm_head = MaskedLanguageHead(config.hidden_size, config.vocab_size)

    def initial_memory(self, seeds: Tensor) -> Tensor:
        """The memory [L, B, S, D] that conversations start from, one seed (`seeds` [B], int64) each."""
        weight = self.decoder.head.weight
        return initial_memory(self.config, seeds, weight.device, weight.dtype)

    def check_memory(self, memory: Tensor, batch: int) -> None:
        """Raises ModelError unless `memory` is what this model's conversations hold: [layers, batch, slots, hidden]."""
        config, weight = self.config, self.decoder.head.weight
        expected = (config.layers, batch, config.memory.slots, config.hidden_size)
        if tuple(memory.shape) != expected:
            raise ModelError(
                f"the memory is {list(memory.shape)}, this model's is [layers, batch, slots, hidden] = {list(expected)}"
            )
        if memory.dtype != weight.dtype or memory.device != weight.device:
            raise ModelError(
                f"the memory is {memory.dtype} on {memory.device}, the model {weight.dtype} on {weight.device}: "
                "use memory.to(...)"
            )

    def encode(self, ids: Tensor, mask: Tensor | None = None, documents: Documents | None = None) -> Tensor:
        """Encoder states of all layers [L, B, T, D] for token ids [B, T]; `documents` of packed rows."""
        return self.encoder(self.embedding(ids), mask, documents)

    def write_states(self, memory: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Write encoder states [L, B, T, D] into the memory."""
        self.check_memory(memory, states.shape[1])
        return self.memory_attention(memory, states, mask)

    def write(self, memory: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The memory after the interaction `ids` [B, T] (query and answer) was encoded and written."""
        return self.write_states(memory, self.encode(ids, mask), mask)

    def decode_states(
        self,
        ids: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        frozen_embedding: bool = False,
        documents: Documents | None = None,
        frozen_memory: Tensor | None = None,
    ) -> Decoded:
        """Hidden states of the decoder for ids [B, T] over `memory` [L, B, S, D]; feed those needed to `head`.

        `memory_mask` [B, S] or [B, T, S]: what may be read; `documents` of packed rows (documents don't see each other,
        positions begin anew in each); `frozen_memory` [B]: rows that give memory cross-attention no gradient.
        """
        if memory.shape[:2] != (self.config.layers, ids.shape[0]):
            raise ModelError(
                f"the memory is {list(memory.shape)}: this model reads [{self.config.layers} layers, "
                f"{ids.shape[0]} rows, slots, hidden]"
            )
        embedded = self.embedding(ids)
        if frozen_embedding:
            embedded = embedded.detach()
        return Decoded(*self.decoder(embedded, mask, memory, memory_mask, documents, frozen_memory))

    def head(self, states: Tensor) -> Tensor:
        """Next-token logits [..., V] of decoder states [..., D]."""
        return self.decoder.head(states)

    def decode(self, ids: Tensor, mask: Tensor | None, memory: Tensor, memory_mask: Tensor | None = None) -> Tensor:
        """Next-token logits [B, T, V]."""
        return self.head(self.decode_states(ids, mask, memory, memory_mask).states)
