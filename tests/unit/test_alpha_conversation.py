"""Promises of a held model's turns: exactly what the functional model does, one conversation or several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_platform import RxTAlpha
from rxt_platform.data.tokenizer import BOS, EOS, PAD, QUERY
from rxt_platform.errors import DataError, ModelError
from rxt_platform.model.generation import generate
from rxt_platform.model.sampling import SamplingOptions
from tests.unit.alphas import DONE, QUERIES, STARTED, alpha, saved_alpha, turn
from tests.unit.helpers import word_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    return saved_alpha(tmp_path_factory.mktemp("model"))


def poisoned(model: RxTAlpha, text: str, place: int) -> RxTAlpha:
    """The same model, whose greedy answer meets NaN after its token number `place`."""
    memory = model.export_stm_state()
    ids = turn(model, text, temperature=0.0)
    model.load_stm_state(memory)
    token = ids[place - 1]
    assert token not in ids[: place - 1]
    assert token not in model.tokenize_query(text)["input_ids"]
    model.model.embedding.weight.data[token] = torch.nan
    return model


# ---- one conversation


OPTIONS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    "short": {"temperature": 0.0, "max_seq_len": 20},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_turn_is_exactly_the_functional_one(name: str) -> None:
    options = OPTIONS[name]
    model, tokenizer = alpha(), word_tokenizer()
    memory = model.model.initial_memory(torch.tensor([0]))
    assert torch.equal(model.export_stm_state(), memory)
    system = tokenizer.encode_interaction("You are Tom.", "I am Tom.", 64).ids
    model.init_stm_state(**model.tokenize_full_interaction("You are Tom.", "I am Tom."))
    with torch.no_grad():
        memory = model.model.write(memory, torch.tensor([system]))
    assert torch.equal(model.export_stm_state(), memory)
    for number, query in enumerate(QUERIES):
        prompt = tokenizer.encode_query(query)
        sampling = SamplingOptions(
            temperature=options["temperature"],
            top_p=options.get("top_p", 1.0),
            top_k=options.get("top_k"),  # type: ignore[arg-type]
            max_new_tokens=options.get("max_seq_len", 64) - len(prompt),  # type: ignore[arg-type]
        )
        expected = [ids[0] for ids in generate(model.model, [prompt], memory, sampling, seeds=[number])]
        assert turn(model, query, seed=number, **options) == expected
        with torch.no_grad():
            memory = model.model.write(memory, torch.tensor([[*prompt, *expected]]))
        assert torch.equal(model.export_stm_state(), memory)


def test_the_memory_changes_only_at_the_end_of_a_turn() -> None:
    model = alpha()
    model.init_stm_state(**model.tokenize_full_interaction("You are Tom.", "I am Tom."))
    before = model.export_stm_state()
    for event in model.interact(**model.tokenize_query(QUERIES[0]), seed=1):
        assert torch.equal(model.memory, before) == (event != DONE)


@pytest.mark.parametrize("last", [0, 3, STARTED])
def test_a_turn_abandoned_half_way_never_was(last: int) -> None:
    model, other = alpha({EOS: -1e4}), alpha({EOS: -1e4})
    for either in (model, other):
        either.init_stm_state(**model.tokenize_full_interaction("You are Tom.", "I am Tom."))
    before = model.export_stm_state()
    events = model.interact(**model.tokenize_query(QUERIES[1]), seed=5)
    for number, event in enumerate(events):
        if event == last or number == last:
            break
    assert isinstance(events, Iterator)
    events.close()  # type: ignore[attr-defined]
    assert torch.equal(model.export_stm_state(), before)
    assert turn(model, QUERIES[0], seed=1) == turn(other, QUERIES[0], seed=1)
    assert torch.equal(model.export_stm_state(), other.export_stm_state())


def test_an_exported_conversation_goes_on_elsewhere_exactly(directory: Path) -> None:
    model = RxTAlpha.from_pretrained(directory)
    turn(model, QUERIES[0], seed=1)
    state = model.export_stm_state()
    kept = state.clone()
    expected = turn(model, QUERIES[1], seed=2)
    assert torch.equal(state, kept), "what was exported is a value"
    after = model.export_stm_state()
    model.export_stm_state().zero_()
    assert torch.equal(model.export_stm_state(), after)
    elsewhere = RxTAlpha.from_pretrained(directory)
    elsewhere.load_stm_state(state)
    state.zero_()
    assert torch.equal(elsewhere.memory, kept), "and so is what was loaded"
    assert turn(elsewhere, QUERIES[1], seed=2) == expected
    assert torch.equal(elsewhere.export_stm_state(), model.export_stm_state())
    assert turn(RxTAlpha.from_pretrained(directory), QUERIES[1], seed=2) != expected, "the memory must matter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state[:1], r"the memory is \[1, 1, 8, 32\], this model's is .* = \[2, 1, 8, 32\]"),
        (lambda state: state.repeat(1, 2, 1, 1), r"the memory is \[2, 2, 8, 32\]"),
        (lambda state: state[0], r"the memory is \[1, 8, 32\]"),
        (lambda state: state.double(), r"the memory is torch\.float64 on cpu, the model torch\.float32"),
        (lambda state: state.long(), r"the memory is torch\.int64"),
        (lambda state: state.index_fill(2, torch.tensor(3), torch.nan), "the memory holds NaN or infinity"),
        (lambda state: state.index_fill(2, torch.tensor(3), -torch.inf), "the memory holds NaN or infinity"),
    ],
)
def test_a_memory_that_is_not_the_model_s_is_refused_and_the_old_one_stays(change: Any, message: str) -> None:
    model = alpha()
    before = model.export_stm_state()
    with pytest.raises(ModelError, match=message):
        model.load_stm_state(change(before))
    assert torch.equal(model.export_stm_state(), before)


def test_resetting_starts_the_conversation_afresh() -> None:
    model = alpha()
    first = model.export_stm_state()
    for reset in (model.share_components, model.reset_stm_state):
        turn(model, QUERIES[0], seed=1)
        assert not torch.equal(model.export_stm_state(), first)
        reset()
        assert torch.equal(model.export_stm_state(), first)
    model.reset_stm_state(seeds=[7])
    assert torch.equal(model.export_stm_state(), model.model.initial_memory(torch.tensor([7])))
    with pytest.raises(DataError, match="2 seeds for 1 conversations"):
        model.reset_stm_state(seeds=[1, 2])


def test_initialising_is_a_write_on_top_of_what_was_there() -> None:
    model = alpha()
    one, two = (model.tokenize_full_interaction(query, "Tom has a hat.") for query in QUERIES[:2])
    model.init_stm_state(**one)
    after_one = model.export_stm_state()
    model.init_stm_state(**two)
    with torch.no_grad():
        assert torch.equal(model.export_stm_state(), model.model.write(after_one, two["input_ids"]))
    assert not model.memory.requires_grad


def test_sampling_follows_the_global_generator_or_its_own_seed() -> None:
    model = alpha()

    def sample(manual: int, **options: Any) -> list[int]:
        model.reset_stm_state()
        torch.manual_seed(manual)
        return turn(model, QUERIES[0], **options)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, seed=4) == sample(2, seed=4)
    assert sample(1, seed=4) != sample(1, seed=5)
    assert sample(1, seed=4) == sample(1, seed=4, use_self_attn_cache=False)
    assert sample(1, temperature=0.0) == sample(2, temperature=0.0) == sample(1, temperature=1.0, top_k=1)


def test_an_execution_that_cannot_be_is_refused() -> None:
    model = alpha()
    with pytest.raises(ModelError, match="cuda_graph needs a model on a CUDA device"):
        model.set_execution("cuda_graph")
    with pytest.raises(ModelError, match="execution 'compiled': one of eager, compile, cuda_graph"):
        model.set_execution("compiled")  # type: ignore[arg-type]


def test_of_two_turns_at_once_the_first_is_ended_and_the_second_kept() -> None:
    model, other = alpha(), alpha()
    first, second = (model.interact(**model.tokenize_query(query), seed=1) for query in QUERIES[:2])
    next(first)
    tokens = list(second)
    with pytest.raises(ModelError, match="another turn begun"):
        list(first)
    assert tokens == list(other.interact(**other.tokenize_query(QUERIES[1]), seed=1))
    assert torch.equal(model.export_stm_state(), other.export_stm_state())


@pytest.mark.parametrize("how", ["turn", "init"])
def test_a_memory_that_would_not_be_finite_is_not_kept(how: str) -> None:
    model = alpha()
    before = model.export_stm_state()
    model.model.memory_attention.layers[1].write_attention.output.bias.data[3] = torch.nan
    encoded = model.tokenize_full_interaction("Tom", "a hat")
    write = {"turn": lambda: list(model.interact(**encoded)), "init": lambda: model.init_stm_state(**encoded)}[how]
    with pytest.raises(ModelError, match="written into the memory is not finite"):
        write()
    assert torch.equal(model.export_stm_state(), before)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(DataError, match="must be a whole number in"):
        alpha().reset_stm_state([seed])


def test_half_a_character_and_ids_that_are_no_whole_numbers_are_refused() -> None:
    model = alpha()
    with pytest.raises(DataError, match="character 5 of the text is no Unicode character"):
        model.tokenize_query("Tom \ud800")
    with pytest.raises(DataError, match="ids whole numbers"):
        list(model.interact(torch.tensor([[2.0, 5.0]])))


def test_a_turn_without_a_real_token_or_of_another_shape_is_refused() -> None:
    model = alpha()
    ids = torch.tensor([[BOS, QUERY, 20]])
    for bad, mask, message in (
        (ids[0], None, r"input_ids \[3\]"),
        (ids.repeat(2, 1), None, r"input_ids \[2, 3\] must be \[1, T\]"),
        (ids, torch.ones(1, 2), r"attention_mask \[1, 2\]"),
        (ids, torch.zeros(1, 3), "a row of the attention mask has no real token"),
        (torch.tensor([[BOS, 300]]), None, "input_ids hold 2 to 300: the model knows 0 to 299"),
        (torch.tensor([[BOS, -1]]), None, "input_ids hold -1 to 2: the model knows 0 to 299"),
    ):
        with pytest.raises(DataError, match=message):
            list(model.interact(bad, mask))


@pytest.mark.parametrize(
    "use",
    [lambda model: model.init_stm_state(torch.tensor([[BOS, 300]])), lambda model: model.tokenize_batch([])],
    ids=["ids out of range", "no texts"],
)
def test_an_interaction_that_cannot_be_is_a_data_error(use: Any) -> None:
    with pytest.raises(DataError):
        use(alpha())


def test_what_is_masked_out_is_not_read() -> None:
    model, asked = alpha(), alpha().tokenize_query(QUERIES[0])
    expected = list(model.interact(**asked, seed=1))
    memory = model.export_stm_state()
    for left, right in ((0, 3), (4, 0)):
        model.reset_stm_state()
        ids = torch.nn.functional.pad(asked["input_ids"], (left, right), value=77)
        mask = torch.nn.functional.pad(asked["attention_mask"], (left, right), value=False)
        assert list(model.interact(ids, mask.long(), seed=1)) == expected
        assert torch.equal(model.export_stm_state(), memory)


# ---- several conversations


def one_by_one(texts: list[str], seeds: list[int], likelier: dict[int, float]) -> tuple[list[list[int]], Tensor]:
    """Ids of the answers to two turns of each conversation, held alone, and their memories [L, B, S, D]."""
    answers, memories = [], []
    for row, seed in enumerate(seeds):
        model = alpha(likelier)
        model.reset_stm_state(seeds=[row])
        for query in texts[row::3]:
            answers.append(turn(model, query, seed=seed))
        memories.append(model.export_stm_state())
    return answers, torch.cat(memories, dim=1)


@pytest.mark.parametrize("likelier", [{}, {PAD: 3.0}, {EOS: -1e4}], ids=["ends", "pads", "never ends"])
def test_a_batch_is_its_conversations_one_by_one(likelier: dict[int, float]) -> None:
    texts, seeds = [*QUERIES, *reversed(QUERIES)], [3, 1, 9]
    expected, memories = one_by_one(texts, seeds, likelier)
    streaming, whole = alpha(likelier), alpha(likelier)
    for model in (streaming, whole):
        model.set_batch_mode(True, 3)
        assert torch.equal(model.export_stm_state(), model.model.initial_memory(torch.arange(3)))
    for number in range(2):
        alone = expected[number::2]
        lengths = [len(ids) for ids in alone]
        encoded = whole.tokenize_batch(texts[3 * number : 3 * number + 3])

        *steps, started, done = streaming.batch_interact(**encoded, seeds=seeds)
        assert (started, done) == ([STARTED] * 3, [DONE] * 3)
        assert len(steps) == max(lengths)
        columns = [list(column) for column in zip(*steps, strict=True)]
        assert columns == [[*ids, *[PAD] * (len(steps) - len(ids))] for ids in alone]

        ids, mask = whole.batch_interactions(**encoded, seeds=seeds)
        assert ids.tolist() == columns
        assert mask.dtype == torch.bool
        assert mask.sum(dim=1).tolist() == lengths
        assert [row[real].tolist() for row, real in zip(ids, mask, strict=True)] == alone
        assert whole.stringify_batch(ids, mask) == [word_tokenizer().decode(row) for row in alone]
        if PAD in likelier:
            assert (ids[mask] == PAD).any(), "a [PAD] that the model said is its word"
            assert not mask.all()
    torch.testing.assert_close(whole.export_stm_state(), memories, atol=1e-5, rtol=0)
    assert torch.equal(whole.export_stm_state(), streaming.export_stm_state())


def test_the_same_prompt_can_be_put_to_every_conversation() -> None:
    model = alpha()
    model.set_batch_mode(True, 3)
    before = model.export_stm_state()
    one = model.tokenize_full_interaction("You are Tom.", "I am Tom.")
    model.init_stm_state(**one)
    with torch.no_grad():
        for row in range(3):
            alone = model.model.write(before[:, row : row + 1], one["input_ids"])
            torch.testing.assert_close(model.memory[:, row : row + 1], alone, atol=1e-5, rtol=0)
    ids, mask = model.batch_interactions(**model.tokenize_query(QUERIES[0]), seeds=[1, 2, 3])
    assert ids.shape == mask.shape
    assert len({tuple(row) for row in ids.tolist()}) == 3


def test_a_batch_without_seeds_follows_the_global_generator() -> None:
    model = alpha({EOS: -1e4})
    model.set_batch_mode(True, 3)

    def sample(manual: int) -> list[list[int]]:
        model.reset_stm_state(seeds=[1, 1, 1])
        torch.manual_seed(manual)
        rows: list[list[int]] = model.batch_interactions(**model.tokenize_query(QUERIES[0]))[0].tolist()
        return rows

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)
    assert len({tuple(row) for row in first}) == 3


def test_batch_mode_is_said_where_it_is_missing_or_in_the_way() -> None:
    model = alpha()
    for size in (None, 0, -2):
        with pytest.raises(DataError, match="set_batch_mode needs a batch_size of at least 1"):
            model.set_batch_mode(True, size)
    encoded = model.tokenize_batch(QUERIES)
    with pytest.raises(DataError, match=r"must be \[1, T\]: the model holds 1 conversation"):
        list(model.batch_interact(**encoded))
    model.set_batch_mode(True, 2)
    with pytest.raises(DataError, match="holds 2 conversations: use batch_interact"):
        list(model.interact(**model.tokenize_query("Hi.")))
    with pytest.raises(DataError, match=r"input_ids \[3, \d+\] must be \[2, T\]"):
        model.batch_interactions(**encoded)
    with pytest.raises(DataError, match=r"must be \[2, T\]"):
        model.init_stm_state(**encoded)
    with pytest.raises(DataError, match="3 seeds for 2 conversations"):
        model.reset_stm_state(seeds=range(3))
    with pytest.raises(ModelError, match=r"this model's is .* \[2, 2, 8, 32\]"):
        model.load_stm_state(alpha().export_stm_state())
    model.set_batch_mode(False)
    assert turn(model, "Hi.", seed=1) == turn(alpha(), "Hi.", seed=1)


# ---- precision and broken numbers


def test_the_memory_follows_the_model_s_precision(directory: Path) -> None:
    model = RxTAlpha.from_pretrained(directory).to(torch.bfloat16)
    assert model.memory.dtype == model.export_stm_state().dtype == torch.bfloat16
    model.init_stm_state(**model.tokenize_full_interaction("You are Tom.", "I am Tom."))
    ids = turn(model, QUERIES[0], temperature=0.0)
    assert ids
    state = model.export_stm_state()
    assert state.dtype == torch.bfloat16
    assert state.isfinite().all()
    with pytest.raises(ModelError, match=r"the memory is torch\.float32 .* the model torch\.bfloat16"):
        model.load_stm_state(state.float())
    loaded = RxTAlpha.from_pretrained(directory, dtype=torch.bfloat16)
    loaded.init_stm_state(**loaded.tokenize_full_interaction("You are Tom.", "I am Tom."))
    assert turn(loaded, QUERIES[0], temperature=0.0) == ids
    assert torch.equal(loaded.export_stm_state(), state)
    assert turn(model.to(torch.float32), QUERIES[1], seed=1)


@pytest.mark.parametrize("place", [1, 4])
def test_weights_that_are_not_finite_are_named_by_the_token_and_the_memory_stays(place: int) -> None:
    model = poisoned(alpha({EOS: -1e4}), QUERIES[0], place)
    before, seen = model.export_stm_state(), []
    with pytest.raises(ModelError, match=f"the logits of token {place + 1} are not finite: the weights or the memory"):
        seen.extend(model.interact(**model.tokenize_query(QUERIES[0]), temperature=0.0))
    assert torch.equal(model.export_stm_state(), before)
    model.model.decoder.head.weight.data[17, 3] = torch.nan
    with pytest.raises(ModelError, match="the logits of token 1 are not finite"):
        list(model.interact(**model.tokenize_query(QUERIES[0]), temperature=1.0))
