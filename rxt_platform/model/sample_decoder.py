"""Text in, text out, with the decoder alone: the interface of the published decoder cards.

sampler = Sampler(RxTAlphaDecoder.from_pretrained("my-model"), "cpu", end_token_id=3)
sample = SampleDecoder(sampler, load_tokenizer_from_hf_hub("my-model"))
sample("[Q] Tell me a story about a cat. [A]", temperature=0.1, top_p=0.9, max_seq_len=256, print_stream=True)
"""

import sys
from collections.abc import Iterator, Sequence

import torch

from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.errors import DataError
from rxt_platform.model.alpha import RxTAlpha, usable_window
from rxt_platform.model.generation import generate
from rxt_platform.model.sampling import SamplingOptions


class Sampler:
    """Continues token ids with a model's decoder, one token at a time."""

    def __init__(self, model: RxTAlpha, device: torch.device | str, end_token_id: int = 3) -> None:
        self.model = model.to(device)
        self.end_token_id = end_token_id

    def __call__(
        self,
        input_ids: Sequence[int],
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_seq_len: int | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yields the ids that follow `input_ids`, up to the end token or a whole length of `max_seq_len`."""
        window = usable_window(self.model.model.config, max_seq_len)
        if len(input_ids) >= window:
            raise DataError(f"a prompt of {len(input_ids)} tokens leaves no room in a window of {window}")
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        options = SamplingOptions(
            temperature,
            1.0 if top_p is None else top_p,
            seed,
            window - len(input_ids),
            top_k,
            (self.end_token_id,),
        )
        for (token,) in generate(
            self.model.model, [list(input_ids)], self.model.memory, options, stepper=self.model.stepper
        ):
            assert token is not None  # a single row's generation stops when it ends
            yield token


class SampleDecoder:
    """Text in, text out: `SampleDecoder(sampler, tokenizer)("[Q] Who are you? [A]", temperature=0.1)`."""

    def __init__(self, sampler: Sampler, tokenizer: RxtTokenizer) -> None:
        self.sampler, self.tokenizer = sampler, tokenizer

    def __call__(
        self,
        text: str,
        temperature: float = 0.1,
        top_p: float = 0.9,
        max_seq_len: int | None = None,
        print_stream: bool = False,
        seed: int | None = None,
    ) -> str:
        """What the model makes of `text`, in which markers such as `[Q]` and `[A]` stand for themselves.

        Returns the new text; `print_stream` also prints it as it comes.
        """
        prompt = self.tokenizer.encode_marked(text)
        stream, pieces = self.tokenizer.stream(), []
        for token in self.sampler(prompt, temperature, top_p=top_p, max_seq_len=max_seq_len, seed=seed):
            pieces.append(stream.push(token))
            if print_stream:
                sys.stdout.write(pieces[-1])
                sys.stdout.flush()
        pieces.append(stream.end())
        if print_stream:
            sys.stdout.write(pieces[-1] + "\n")
        return "".join(pieces)
