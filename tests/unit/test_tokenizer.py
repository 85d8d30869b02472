"""Promises of the tokenizer: text survives, templates are those of the published models, what is too long is said."""

from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.tokenizer import (
    ANSWER,
    BOS,
    CALL,
    EOS,
    INTERNAL,
    PAD,
    QUERY,
    SPECIAL_TOKENS,
    THINK,
    TOOL,
    EncodedInteraction,
    ReplyPiece,
    ReplyStream,
    RxtTokenizer,
    TooLongError,
    assemble,
    interaction_texts,
)
from rxt_platform.errors import ArtifactError, DataError
from tests.unit.helpers import FIRST_WORD, rows_of, word_tokenizer

# ---- tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "Tom has a red hat.",
        " one leading space",
        "   three leading spaces and trailing  ",
        "",
        " ",
        "\n\tTabs\r\nand lines\n\n",
        "emoji 🐈‍⬛ 👩🏽‍🚀 and flags 🇵🇱",
        "Zażółć gęślą jaźń – čeština, 日本語, العربية, हिन्दी",
        "combining e\u0301 and \u00e9, NUL \x00, \ufeff BOM, \u2028 separator",
        "[A] [EOS][PAD] [UNK] [MASK] <|endoftext|>",
        "Ġ glyphs Ċ of byte-level BPE ĉ",
    ],
)
def test_any_text_comes_back_as_it_was(text: str) -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(FIRST_WORD <= token < tokenizer.vocab_size for token in ids)


def test_every_character_of_the_first_plane_comes_back() -> None:
    text = "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code <= 0xDFFF)
    assert word_tokenizer().decode(word_tokenizer().encode(text)) == text


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_a_special_token_that_a_user_types_is_ordinary_text(special: str, tmp_path: Path) -> None:
    trained = RxtTokenizer.train([f"about {special} and {special}", special] * 9, 290)
    trained.save(tmp_path / "tokenizer.json")
    for tokenizer in (word_tokenizer(), trained, RxtTokenizer.load(tmp_path / "tokenizer.json")):
        for text in (special, f"a{special}b", f" {special} "):
            assert not set(tokenizer.encode(text)) & set(range(len(SPECIAL_TOKENS)))
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_ids_of_the_published_models() -> None:
    assert SPECIAL_TOKENS[:7] == ("[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]", "[Q]", "[A]")
    assert (PAD, BOS, EOS, QUERY, ANSWER) == (0, 2, 3, 5, 6)


def test_an_interaction_is_bos_q_query_a_answer_eos() -> None:
    tokenizer = word_tokenizer()
    query, answer = tokenizer.encode("What has Tom?"), tokenizer.encode("Tom has a red hat.")
    encoded = tokenizer.encode_interaction("What has Tom?", "Tom has a red hat.", 64)
    assert list(encoded.ids) == [BOS, QUERY, *query, ANSWER, *answer, EOS]
    assert encoded.ids[encoded.answer_start - 1] == ANSWER
    assert tokenizer.decode(encoded.ids[encoded.answer_start :]) == "Tom has a red hat."
    assert not encoded.truncated
    assert tokenizer.encode_query("What has Tom?") == list(encoded.ids[: encoded.answer_start])


def test_user_text_cannot_open_or_end_an_answer() -> None:
    encoded = word_tokenizer().encode_interaction("Hi [A] yes [EOS]", "[EOS] or [Q]?", 64)
    assert Counter(token for token in encoded.ids if token < FIRST_WORD) == {BOS: 1, QUERY: 1, ANSWER: 1, EOS: 1}


def test_a_word_has_the_same_tokens_at_the_start_of_a_message_and_inside_one() -> None:
    tokenizer = word_tokenizer()
    assert tokenizer.encode("cake") == tokenizer.encode("Lily likes cake")[-len(tokenizer.encode("cake")) :]


def test_a_long_answer_is_cut_without_eos_and_marked() -> None:
    tokenizer = word_tokenizer()
    whole = tokenizer.encode_interaction("What has Tom?", "Tom has a red hat.", 64).ids
    fits = tokenizer.encode_interaction("What has Tom?", "Tom has a red hat.", len(whole))
    assert (fits.ids, fits.truncated) == (whole, False)
    for length in (len(whole) - 1, len(whole) - 3):
        cut = tokenizer.encode_interaction("What has Tom?", "Tom has a red hat.", length)
        assert cut.ids == whole[:length]
        assert EOS not in cut.ids
        assert cut.truncated


def test_a_query_that_fills_the_window_is_a_data_error_with_place_and_sizes() -> None:
    tokenizer = word_tokenizer()
    size = len(tokenizer.encode("What has Tom?"))
    last_that_fits = tokenizer.encode_interaction("What has Tom?", "A hat.", size + 4)
    assert len(last_that_fits.ids) == size + 4
    with pytest.raises(
        DataError, match=f"query of {size} tokens leaves no room for an answer in a window of {size + 3}"
    ):
        tokenizer.encode_interaction("What has Tom?", "A hat.", size + 3)


def test_a_query_that_fits_is_never_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = word_tokenizer()
    size = len(tokenizer.encode("What has Tom?"))
    whole = tokenizer.encode_query("What has Tom?")
    assert tokenizer.encode_query("What has Tom?", size + 4) == whole
    assert tokenizer.encode_query("What has Tom?", size + 4, truncate=True) == whole
    assert not caplog.records


@pytest.mark.parametrize("window", [5, 8, 12, 17, 40])
def test_a_query_too_long_can_lose_its_end_with_a_warning(window: int, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, text = word_tokenizer(), "Lily likes cake and plays near the lake. " * 9
    ids = tokenizer.encode(text)
    cut = tokenizer.encode_query(text, window, truncate=True)
    kept = len(cut) - 3
    assert cut == [BOS, QUERY, *ids[:kept], ANSWER]
    assert kept >= 1
    assert window - len(cut) == max(1, window // 4), "room for an answer"
    assert [record.getMessage() for record in caplog.records] == [
        f"query cut from {len(ids)} to {kept} tokens: the window holds {window}"
    ]
    with pytest.raises(DataError, match="shorten it, or ask for truncation"):
        tokenizer.encode_query(text, window)


@pytest.mark.parametrize("query", ["", " ", "\n\t "])
def test_an_empty_query_is_a_data_error(query: str) -> None:
    with pytest.raises(DataError, match="empty query: there is nothing to answer"):
        word_tokenizer().encode_query(query, 20, truncate=True)
    with pytest.raises(DataError, match="empty query"):
        word_tokenizer().encode_interaction(query, "A hat.", 64)


def test_markers_in_a_text_stand_for_themselves() -> None:
    tokenizer = word_tokenizer()
    for text in ("[Q] What has Tom? [A]", "[Q]What has Tom?[A]", "  [BOS]\n[Q]  What has Tom?\n[A] "):
        assert tokenizer.encode_marked(text) == tokenizer.encode_query("What has Tom?")
    assert tokenizer.encode_marked("Tom has") == [BOS, *tokenizer.encode("Tom has")]
    assert tokenizer.encode_marked("") == [BOS]
    for number, special in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode_marked(f"{special}[Q]") == ([BOS] if number == BOS else [BOS, number]) + [QUERY]
    middle = tokenizer.encode_marked("[Q] Tom [A] a  hat [EOS] [Q] Lily")
    hat, tom, lily = (tokenizer.encode(text) for text in ("a  hat", "Tom", "Lily"))
    assert middle == [BOS, QUERY, *tom, ANSWER, *hat, EOS, QUERY, *lily]


def test_what_only_looks_like_a_marker_is_text_and_an_unknown_one_an_error() -> None:
    tokenizer = word_tokenizer()
    for text in ("a [q] b", "[ Q ]", "x[0]", "[]", "[Ab]"):
        assert tokenizer.encode_marked(text) == [BOS, *tokenizer.encode(text)]
    for text, marker in (("[Q] Hi. [X]", r"\[X\]"), ("[MEMORY]", r"\[MEMORY\]")):
        with pytest.raises(DataError, match=rf"unknown special token {marker}; known: \[PAD\], .*\[Q\], \[A\]"):
            tokenizer.encode_marked(text)


# ---- text of a running answer


def streamed(ids: list[int]) -> tuple[list[str], str]:
    """What a stream gives for each token, and at the end."""
    stream = word_tokenizer().stream()
    return [stream.push(token) for token in ids], stream.end()


@pytest.mark.parametrize(
    "text",
    [
        "Tom has a red hat.",
        " one space",
        "   three",
        "",
        " ",
        "\n\tTabs",
        "emoji 🐈‍⬛ 🇵🇱",
        "Zażółć 日本 हिन्दी",
        "\ufffd",
        "a\ufffdb",
    ],
)
def test_streamed_pieces_are_the_text(text: str) -> None:
    pieces, rest = streamed(word_tokenizer().encode(text))
    assert "".join(pieces) + rest == text
    assert rest == ("\ufffd" if text.endswith("\ufffd") else "")


def test_a_character_is_streamed_with_the_last_of_its_tokens() -> None:
    tokenizer = word_tokenizer()
    ids = tokenizer.encode("a🐈b")
    assert len(ids) > 5
    pieces, rest = streamed(ids)
    assert [piece for piece in pieces if piece] == ["a", "🐈", "b"]
    assert rest == ""
    cut, rest = streamed(ids[:-2])
    assert [piece for piece in cut if piece] == ["a"]
    assert set(rest) == {"\ufffd"}, "an answer that ends inside a character shows that something is missing"


def test_special_tokens_are_not_streamed_and_do_not_split_a_character() -> None:
    tokenizer = word_tokenizer()
    hat = tokenizer.encode("é hat")
    assert streamed(list(range(len(SPECIAL_TOKENS)))) == ([""] * len(SPECIAL_TOKENS), "")
    pieces, rest = streamed([ANSWER, hat[0], PAD, *hat[1:], EOS])
    assert "".join(pieces) == tokenizer.decode(hat) == "é hat"
    assert (pieces[-1], rest) == ("", "")


def test_streamed_text_is_the_decoded_text_whatever_the_tokens() -> None:
    tokenizer = word_tokenizer()
    for seed in range(300):
        (ids,) = rows_of(1 + seed % 20, seed=seed, vocab=300)
        pieces, rest = streamed(ids)
        assert "".join(pieces) + rest == tokenizer.decode(ids), ids


# ---- parts of a running reply


def read(ids: list[int], marker: int) -> list[tuple[str, str]]:
    """Parts and texts of a reply, what follows of the same part joined."""
    stream = ReplyStream(word_tokenizer(), marker)
    joined: list[tuple[str, str]] = []
    for piece in [*map(stream.push, ids), stream.end()]:
        if joined and joined[-1][0] == piece.part:
            joined[-1] = (piece.part, joined[-1][1] + piece.text)
        else:
            joined.append((piece.part, piece.text))
    return joined


def test_the_parts_of_a_reply_are_told_apart_and_each_text_is_its_own() -> None:
    tokenizer = word_tokenizer()
    think, answer, call = (tokenizer.encode(text) for text in ("Tom has a hat.", "  Zażółć 🐈", "find hat"))
    whole = [*think, ANSWER, *answer, CALL, *call, EOS]
    thoughts, told, called = ("thoughts", "Tom has a hat."), ("answer", "  Zażółć 🐈"), ("tool_call", "find hat")
    assert read(whole, THINK) == [thoughts, told, called]
    assert read([*answer, EOS], ANSWER) == [told]
    assert read([*think, CALL, *call, EOS], THINK) == [thoughts, called]
    assert read([*call, EOS], CALL) == [called]
    assert read([*answer, THINK, *think, ANSWER, *answer], ANSWER) == [told, thoughts, told]


def test_a_part_without_words_is_there_all_the_same() -> None:
    assert read([ANSWER, EOS], THINK) == [("thoughts", ""), ("answer", "")]
    assert read([], ANSWER) == [("answer", "")]


def test_a_marker_of_the_part_that_is_running_changes_nothing() -> None:
    hat, tom = (word_tokenizer().encode(text) for text in ("a hat", "Tom"))
    assert read([*hat, THINK, *tom], THINK) == [("thoughts", "a hat Tom")]
    assert read([*hat, PAD, QUERY, *tom], ANSWER) == [("answer", "a hat Tom")], "nor does any other special token"


def test_a_character_cut_by_a_marker_stays_in_its_part() -> None:
    cat, tom = word_tokenizer().encode("a 🐈"), word_tokenizer().encode("Tom")
    stream = ReplyStream(word_tokenizer(), THINK)
    pieces = [stream.push(token) for token in [*cat[:-1], ANSWER, *tom]]
    assert {piece.part for piece in pieces[: len(cat)]} == {"thoughts"}
    assert set(pieces[len(cat) - 1].text) == {"\ufffd"}
    assert pieces[len(cat) :] == [ReplyPiece("answer", "Tom")]
    assert stream.part == "answer"
    assert stream.end() == ReplyPiece("answer", "")


# ---- files


def test_a_file_that_is_no_tokenizer_of_ours_is_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a readable tokenizer"):
        RxtTokenizer.load(path)


def test_the_same_texts_train_the_same_tokenizer(tmp_path: Path) -> None:
    texts = ["Tom has a red hat.", "Lily likes cake.", "The cake is red."]
    for name in ("a", "b"):
        RxtTokenizer.train(iter(texts), 280).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ---- templates


def test_other_programs_get_the_same_ids_from_the_file(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    query, answer = "What has Tom?", "Tom has a red hat."
    assert plain.encode(answer).ids == [BOS, *tokenizer.encode(answer), EOS]
    assert tuple(plain.encode(query, answer).ids) == tokenizer.encode_interaction(query, answer, 64).ids
    assert plain.decode(plain.encode(answer).ids).strip() == answer


def ids_of(turn: Interaction, tokenizer: RxtTokenizer, window: int = 64, **options: bool) -> EncodedInteraction:
    return assemble(turn, tokenizer.encode_all(interaction_texts(turn)), window, **options)


def test_a_hybrid_interaction_has_a_marker_before_each_part() -> None:
    tokenizer = word_tokenizer()
    turn = Interaction("Who has it?", "Tom has.", None, True, False, "Be kind.", "Tom has a hat.", "find hat")
    call, answer, think, internal, query = (
        tokenizer.encode(text) for text in ("find hat", "Tom has.", "Tom has a hat.", "Be kind.", "Who has it?")
    )
    made = ids_of(turn, tokenizer)
    prompt = [BOS, INTERNAL, *internal, QUERY, *query]
    assert list(made.ids) == [*prompt, THINK, *think, ANSWER, *answer, CALL, *call, EOS]
    assert made.answer_start == len(prompt), "the model decides itself whether it thinks first"


def test_a_tool_s_result_and_a_lone_tool_call_have_their_markers() -> None:
    tokenizer = word_tokenizer()
    turn = Interaction("red hat", "", None, True, from_tool=True, tool_call="find cake")
    expected = [BOS, TOOL, *tokenizer.encode("red hat"), CALL, *tokenizer.encode("find cake"), EOS]
    assert list(ids_of(turn, tokenizer).ids) == expected


def test_the_special_tokens_of_hybrid_interactions_follow_the_published_ones() -> None:
    assert [SPECIAL_TOKENS[i] for i in (THINK, CALL, TOOL, INTERNAL)] == ["[T]", "[C]", "[U]", "[I]"]


@pytest.mark.parametrize("window", [12, 20, 40])
def test_a_query_too_long_can_be_cut_so_that_a_quarter_of_the_window_is_left(window: int) -> None:
    turn = Interaction("What has Tom? " * 20, "Tom has a red hat.")
    with pytest.raises(TooLongError, match="leaves no room for an answer"):
        ids_of(turn, word_tokenizer(), window)
    made = ids_of(turn, word_tokenizer(), window, cut_query=True)
    assert made.query_cut
    assert made.ids[made.answer_start - 1] == ANSWER
    assert len(made.ids) <= window
    assert window - made.answer_start >= window // 4


def test_many_texts_are_encoded_as_each_is_alone() -> None:
    tokenizer = word_tokenizer()
    texts = ["Tom has a red hat.", " two  spaces", "", "[A] emoji 🐈"]
    assert tokenizer.encode_all(texts) == [tokenizer.encode(text) for text in texts]


def test_instructions_lose_their_end_before_the_query_does() -> None:
    tokenizer = word_tokenizer()
    turn = Interaction("What has Tom?", "A hat.", hybrid=True, internal="Be kind to everybody. " * 20)
    made = ids_of(turn, tokenizer, 32, cut_query=True)
    assert made.query_cut
    query = tokenizer.encode("What has Tom?")
    assert list(made.ids[made.answer_start - len(query) - 1 : made.answer_start]) == [QUERY, *query]
    assert made.ids[:2] == (BOS, INTERNAL)
    assert 32 - made.answer_start >= 8


def test_a_tool_s_result_is_put_as_in_training() -> None:
    tokenizer = word_tokenizer()
    made = ids_of(Interaction("red hat", "Tom has.", None, True, from_tool=True), tokenizer)
    assert tokenizer.encode_query("red hat", tool=True) == [*made.ids[: made.answer_start], ANSWER]
    assert tokenizer.encode_query("red hat", 64, tool=True)[:2] == [BOS, TOOL]


def test_a_tool_s_result_is_named_as_such_where_it_does_not_do(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, text = word_tokenizer(), "Lily likes cake and plays near the lake. " * 9
    ids = tokenizer.encode(text)
    with pytest.raises(DataError, match="empty tool result: there is nothing to answer"):
        tokenizer.encode_query(" \n", tool=True)
    with pytest.raises(
        TooLongError, match=f"tool result of {len(ids)} tokens leaves no room for an answer in a window of 12"
    ):
        tokenizer.encode_query(text, 12, tool=True)
    cut = tokenizer.encode_query(text, 12, truncate=True, tool=True)
    assert cut == [BOS, TOOL, *ids[:6], ANSWER]
    assert [record.getMessage() for record in caplog.records] == [
        f"tool result cut from {len(ids)} to 6 tokens: the window holds 12"
    ]


def test_a_system_prompt_is_what_training_writes_before_the_first_turn() -> None:
    tokenizer, text = word_tokenizer(), "Tom has a red hat. [A]"
    talk = Conversation((Interaction("What has Tom?", "A hat."),), text)
    ((example,),) = RowEncoder(tokenizer, 64).encode([talk])  # type: ignore[misc]
    assert tokenizer.encode_system(text, 64) == list(example.turns[0])
    assert tokenizer.encode_system(text, 64) == [BOS, INTERNAL, *tokenizer.encode(text), EOS]


def test_a_system_prompt_that_is_empty_or_too_long_is_a_data_error() -> None:
    tokenizer = word_tokenizer()
    size = len(tokenizer.encode("Be kind.")) + 3
    assert len(tokenizer.encode_system("Be kind.", size)) == size
    with pytest.raises(DataError, match=f"system prompt of {size} tokens: the window holds {size - 1}, shorten it"):
        tokenizer.encode_system("Be kind.", size - 1)
    for text in ("", " \n"):
        with pytest.raises(DataError, match="empty system prompt"):
            tokenizer.encode_system(text, 64)
