"""Promises of the decoder cards' interface: text in, text out, no conversation."""

from pathlib import Path

import pytest
import torch

from rxt_platform import RxTAlphaDecoder, SampleDecoder, Sampler, load_tokenizer_from_hf_hub
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, QUERY
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.generation import answer_batch
from rxt_platform.model.sampling import SamplingOptions
from tests.unit.alphas import QUERIES, TOM, alpha, saved_alpha
from tests.unit.helpers import word_tokenizer

STORY = "[Q] Tell me a story about a cat. [A]"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    return saved_alpha(tmp_path_factory.mktemp("model"))


def sample_of(likelier: dict[int, float] | None = None, end: int = EOS) -> SampleDecoder:
    return SampleDecoder(Sampler(alpha(likelier, RxTAlphaDecoder), "cpu", end_token_id=end), word_tokenizer())  # type: ignore[arg-type]


def test_the_snippet_of_the_decoder_cards_prints_what_it_returns(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Sampler(RxTAlphaDecoder.from_pretrained(directory), "cpu", end_token_id=3)
    sample = SampleDecoder(sampler, load_tokenizer_from_hf_hub(directory))
    torch.manual_seed(1)  # an untrained model says nothing at times
    text = sample(STORY, temperature=0.1, top_p=0.9, max_seq_len=256, print_stream=True)
    assert text
    assert capsys.readouterr().out == text + "\n"
    assert sample(STORY, temperature=0.1, top_p=0.9, max_seq_len=256)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("likelier", [{}, {EOS: -1e4}, {TOM: 1e4}], ids=["ends", "fills the window", "words"])
def test_greedy_sampling_is_generation_from_the_marked_prompt(
    likelier: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    sample = sample_of(likelier)
    before = sample.sampler.model.export_stm_state()
    prompt = [BOS, QUERY, *word_tokenizer().encode("Tell me a story about a cat."), ANSWER]
    (ids,) = answer_batch(sample.sampler.model.model, [prompt], before, SamplingOptions())
    assert list(sample.sampler(prompt, temperature=0.0)) == ids
    text = sample(STORY, temperature=0.0, print_stream=True)
    assert text == word_tokenizer().decode(ids) == sample(STORY, temperature=0.0)
    assert capsys.readouterr().out == text + "\n"
    assert torch.equal(sample.sampler.model.export_stm_state(), before), "no memory is written"


def test_sampling_stops_at_the_end_token_and_at_the_whole_length() -> None:
    prompt = [BOS, QUERY, 20, 21, 22, ANSWER]
    endless = sample_of({EOS: -1e4}).sampler
    whole = list(endless(prompt, temperature=0.0))
    assert len(whole) == 64 - len(prompt)
    assert list(endless(prompt, temperature=0.0, max_seq_len=16)) == whole[:10]
    assert list(sample_of({EOS: -1e4}, end=whole[4]).sampler(prompt, temperature=0.0)) == whole[:5]
    with pytest.raises(DataError, match="a prompt of 6 tokens leaves no room in a window of 6"):
        list(endless(prompt, max_seq_len=6))


def test_samples_repeat_with_a_seed_or_the_global_generator() -> None:
    sample = sample_of()
    torch.manual_seed(1)
    first = sample(STORY, temperature=1.0)
    assert sample(STORY, temperature=1.0) != first
    torch.manual_seed(1)
    assert sample(STORY, temperature=1.0) == first
    seeded = sample(STORY, temperature=1.0, seed=4)
    assert sample(STORY, temperature=1.0, seed=4) == seeded != sample(STORY, temperature=1.0, seed=5)


def test_an_unknown_marker_is_a_data_error_that_lists_the_known() -> None:
    with pytest.raises(DataError, match=r"unknown special token \[X\]; known: \[PAD\], .*\[A\]"):
        sample_of()("[X] Hi. [A]")


def test_the_decoder_alone_takes_part_in_no_conversation() -> None:
    model = RxTAlphaDecoder(alpha().model, word_tokenizer())
    with pytest.raises(ModelError, match="has no conversation"):
        list(model.interact(**model.tokenize_query(QUERIES[0])))
    with pytest.raises(ModelError, match="writes no memory"):
        model.init_stm_state(**model.tokenize_full_interaction("Tom", "a hat"))
