"""Promises of the cards' interface: what the snippets say, text to ids and ids to text."""

from pathlib import Path

import pytest
import torch

from rxt_platform import RxTAlpha, load_tokenizer_from_hf_hub
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, INTERNAL, PAD, QUERY, SPECIAL_TOKENS, TOOL, RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from tests.unit.alphas import CONFIG, DONE, QUERIES, STARTED, TOM, alpha, saved_alpha, turn
from tests.unit.helpers import tiny_model, word_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model."""
    return saved_alpha(tmp_path_factory.mktemp("model"))


# ---- the snippets of the cards


def test_the_snippet_of_the_cards_works_as_it_stands(directory: Path) -> None:
    tokenizer = load_tokenizer_from_hf_hub(directory)
    model = RxTAlpha.from_pretrained(directory, tokenizer=tokenizer)
    model.share_components()
    model.init_stm_state(**model.tokenize_full_interaction("You are Tom.", "I am Tom.", max_seq_len=256))
    seen, text = [], ""
    for token_id in model.interact(**model.tokenize_query("Who are you?"), max_seq_len=256, temperature=1.0, seed=1):
        seen.append(token_id)
        text += model.stringify_token(token_id)
    assert seen[-2:] == [STARTED, DONE]
    assert all(0 <= token < 300 for token in seen[:-2])
    prompt = tokenizer.encode_query("Who are you?")
    assert seen[-3] == EOS or len(prompt) + len(seen) - 2 == 64
    assert text
    assert "[EOS]" not in text


def test_a_model_has_its_own_tokenizer_unless_another_is_given(directory: Path) -> None:
    own = RxTAlpha.from_pretrained(str(directory))
    assert own.tokenizer is not None
    assert own.tokenizer.encode(QUERIES[1]) == word_tokenizer().encode(QUERIES[1])
    assert not own.training
    other = RxtTokenizer.train(["Hi."], 270)
    given = RxTAlpha.from_pretrained(directory, tokenizer=other)
    assert given.tokenizer is other
    assert given.tokenize_query("Hi.")["input_ids"].tolist() == [[BOS, QUERY, *other.encode("Hi.")]]


def test_a_given_tokenizer_stands_in_for_one_that_is_missing(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a readable tokenizer"):
        RxTAlpha.from_pretrained(tmp_path)
    assert turn(RxTAlpha.from_pretrained(tmp_path, tokenizer=word_tokenizer()), "Hi.", seed=1)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(directory: Path) -> None:
    larger = RxtTokenizer.train([" ".join(f"word{i}" * 3 for i in range(60))], 310)
    with pytest.raises(DataError, match="the tokenizer has 310 tokens, the model 300: not its own"):
        RxTAlpha.from_pretrained(directory, tokenizer=larger)


def test_a_tokenizer_that_is_set_later_is_used_at_once() -> None:
    model, other = alpha(), RxtTokenizer.train(["zz yy xx Hi."], 270)
    model.set_tokenizer(other)
    assert "".join(model.stringify_token(token) for token in other.encode("Hi.")) == "Hi."


# ---- text to ids


def test_a_full_interaction_is_the_template_of_training() -> None:
    encoded = alpha().tokenize_full_interaction("What has Tom?", "Tom has a red hat.")
    asked, told = word_tokenizer().encode("What has Tom?"), word_tokenizer().encode("Tom has a red hat.")
    assert encoded["input_ids"].tolist() == [[BOS, QUERY, *asked, ANSWER, *told, EOS]]
    assert encoded["attention_mask"].tolist() == [[True] * (len(asked) + len(told) + 4)]


def test_an_answer_that_does_not_fit_is_cut_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = alpha()
    whole = model.tokenize_full_interaction("What has Tom?", "Tom has a red hat.")["input_ids"][0].tolist()
    assert not caplog.records
    cut = model.tokenize_full_interaction("What has Tom?", "Tom has a red hat.", max_seq_len=len(whole) - 2)
    assert cut["input_ids"].tolist() == [whole[:-2]]
    assert [record.getMessage() for record in caplog.records] == [
        f"the interaction was cut to the window of {len(whole) - 2} tokens"
    ]


def test_queries_are_right_padded_and_the_mask_says_where() -> None:
    model = alpha()
    encoded = model.tokenize_batch(QUERIES)
    rows = [[BOS, QUERY, *word_tokenizer().encode(text)] for text in QUERIES]
    width = max(map(len, rows))
    assert encoded["input_ids"].tolist() == [[*row, *[PAD] * (width - len(row))] for row in rows]
    assert encoded["attention_mask"].tolist() == [[i < len(row) for i in range(width)] for row in rows]
    assert model.tokenize_query(QUERIES[0])["input_ids"].tolist() == [rows[0]]
    assert model.tokenize_query(QUERIES[0], device="meta")["input_ids"].device.type == "meta"


def test_a_tool_s_result_is_tokenized_as_a_query_with_its_own_marker(caplog: pytest.LogCaptureFixture) -> None:
    model, text = alpha(), "Tom has a red hat. " * 9
    for options in ({}, {"max_seq_len": 20, "truncation": True}):
        words = text if options else "red hat"
        query, result = model.tokenize_query(words, **options), model.tokenize_tool_result(words, **options)  # type: ignore[arg-type]
        assert result["input_ids"][:, :2].tolist() == [[BOS, TOOL]]
        assert torch.equal(result["input_ids"][:, 2:], query["input_ids"][:, 2:])
        assert torch.equal(result["attention_mask"], query["attention_mask"])
    assert model.tokenize_tool_result("red hat", device="meta")["input_ids"].device.type == "meta"
    size = len(word_tokenizer().encode(text))
    with pytest.raises(DataError, match=f"tool result of {size} tokens leaves no room for an answer in a window of 64"):
        model.tokenize_tool_result(text)
    with pytest.raises(DataError, match="in a window of 12"):
        model.tokenize_tool_result(QUERIES[1], max_seq_len=12)
    with pytest.raises(DataError, match="empty tool result"):
        model.tokenize_tool_result(" ")


def test_a_system_prompt_is_written_as_training_writes_it() -> None:
    model, other = alpha(), alpha()
    encoded = model.tokenize_system_prompt("Tom has a red hat.")
    opening = [BOS, INTERNAL, *word_tokenizer().encode("Tom has a red hat."), EOS]
    assert encoded["input_ids"].tolist() == [opening]
    assert encoded["attention_mask"].tolist() == [[True] * len(opening)]
    model.init_stm_state(**encoded)
    with torch.no_grad():
        assert torch.equal(model.memory, model.model.write(other.memory, torch.tensor([opening])))
    assert model.tokenize_system_prompt("Tom.", device="meta")["input_ids"].device.type == "meta"
    size = len(opening)
    assert torch.equal(model.tokenize_system_prompt("Tom has a red hat.", size)["input_ids"], encoded["input_ids"])
    with pytest.raises(DataError, match=f"system prompt of {size} tokens: the window holds {size - 1}"):
        model.tokenize_system_prompt("Tom has a red hat.", max_seq_len=size - 1)
    with pytest.raises(DataError, match="the window holds 64"):
        model.tokenize_system_prompt("Tom has a red hat. " * 9)
    with pytest.raises(DataError, match="empty system prompt"):
        model.tokenize_system_prompt("\n ")


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_query_is_a_data_error(text: str) -> None:
    with pytest.raises(DataError, match="empty query"):
        alpha().tokenize_query(text)


def test_a_query_too_long_is_refused_or_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, text = alpha(), "Tom has a red hat. " * 9
    size = len(word_tokenizer().encode(text))
    with pytest.raises(DataError, match=f"query of {size} tokens leaves no room for an answer in a window of 64"):
        model.tokenize_query(text)
    with pytest.raises(DataError, match="in a window of 12"):
        model.tokenize_query(QUERIES[1], max_seq_len=12)
    assert not caplog.records
    ids = model.tokenize_query(text, truncation=True)["input_ids"][0].tolist()
    assert ids == [BOS, QUERY, *word_tokenizer().encode(text)][: len(ids)]
    assert len(ids) + 1 == 64 - 16, "a quarter of the window is left for the answer"
    (record,) = caplog.records
    assert record.getMessage() == f"query cut from {size} to {len(ids) - 2} tokens: the window holds 64"
    assert len(list(model.interact(torch.tensor([ids]), seed=1))) > 2


def test_a_window_larger_than_the_model_s_is_the_model_s_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = alpha({EOS: -1e4})
    warnings = []
    for _ in range(3):
        ids = turn(model, QUERIES[0], max_seq_len=1009, seed=1)  # a number that no other test warns of
        warnings += [record.getMessage() for record in caplog.records]
        caplog.clear()
    assert len(ids) + model.tokenize_query(QUERIES[0])["input_ids"].shape[1] + 1 == 64
    assert warnings == ["max_seq_len 1009 is more than the model's window: 64 is used"]


def test_a_smaller_window_is_kept() -> None:
    model = alpha({EOS: -1e4})
    asked = model.tokenize_query(QUERIES[0])["input_ids"].shape[1] + 1
    assert len(turn(model, QUERIES[0], max_seq_len=20, seed=1)) == 20 - asked
    assert len(turn(model, QUERIES[0], max_seq_len=asked + 1, seed=1)) == 1
    with pytest.raises(DataError, match=f"a prompt of {asked} tokens leaves no room for an answer in a window of"):
        turn(model, QUERIES[0], max_seq_len=asked, seed=1)


def test_a_model_without_a_tokenizer_says_what_to_do() -> None:
    model = RxTAlpha(tiny_model(CONFIG))
    for use in (
        lambda: model.tokenize_query("Hi."),
        lambda: model.tokenize_batch(["Hi."]),
        lambda: model.tokenize_tool_result("Hi."),
        lambda: model.tokenize_system_prompt("Hi."),
        lambda: model.tokenize_full_interaction("Hi.", "Hi."),
        lambda: model.stringify_token(20),
        lambda: model.stringify_batch(torch.tensor([[20]])),
    ):
        with pytest.raises(DataError, match="no tokenizer: use set_tokenizer"):
            use()
    assert list(model.interact(torch.tensor([[BOS, QUERY, 20, 21]])))[-1] == DONE, "ids need none"
    model.set_tokenizer(word_tokenizer())
    assert model.stringify_token(TOM) == "Tom"


# ---- ids to text


@pytest.mark.parametrize("text", ["Tom has a hat.", "  two spaces", "Zażółć 🐈‍⬛ 日本語 é", "🇵🇱", "[EOS] <a>\n\n b"])
def test_the_text_of_single_tokens_is_the_text_of_all(text: str) -> None:
    model = alpha()
    assert "".join(model.stringify_token(token) for token in word_tokenizer().encode(text)) == text


def test_a_character_comes_with_the_last_of_its_tokens() -> None:
    model, ids = alpha(), word_tokenizer().encode("🐈")
    assert len(ids) > 3
    assert [model.stringify_token(token) for token in ids] == [*[""] * (len(ids) - 1), "🐈"]


def test_signals_and_special_tokens_have_no_text() -> None:
    model = alpha()
    assert [model.stringify_token(token) for token in (STARTED, DONE, *range(len(SPECIAL_TOKENS)))] == [""] * 13
    assert model.stringify_token(TOM) == "Tom"


def test_every_turn_s_text_starts_anew() -> None:
    model = alpha({TOM: 1e4})
    for query in QUERIES:
        pieces = [model.stringify_token(token) for token in model.interact(**model.tokenize_query(query), seed=1)]
        assert pieces[:3] == ["Tom", " Tom", " Tom"]
        assert pieces[-2:] == ["", ""]


def test_a_running_answer_s_text_is_the_decoded_one() -> None:
    model, whole = alpha(), 0
    for seed in range(12):
        pieces, ids = [], []
        for token in model.interact(**model.tokenize_query(QUERIES[0]), seed=seed):
            pieces.append(model.stringify_token(token))
            ids.append(token)
        text, joined = word_tokenizer().decode(ids[:-2]), "".join(pieces)
        assert text.startswith(joined)
        assert set(text[len(joined) :]) <= {"\ufffd"}, "all but a character that the answer did not finish"
        whole += text == joined != ""
    assert whole > 2
