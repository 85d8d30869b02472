"""Promises of token ids and batches: text survives, only answers are targets, a batch is a function of (seed, step)."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rxt_platform.data.batches import Batch, BatchSampler, Example, collate, derive_seed, text_examples
from rxt_platform.data.corpus import encode_conversation
from rxt_platform.data.rows import Conversation, Interaction
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, PAD, QUERY, SPECIAL_TOKENS, RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from tests.unit.helpers import FIRST_WORD, batch_of, conversation, rows_of, word_tokenizer

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
    talk = Conversation((Interaction("Hi", "Hi"), Interaction("What has Tom?" * 4, "A hat.")))
    with pytest.raises(DataError, match=r"interactions\.train, row 3, turn 1 .*: query of"):
        encode_conversation(talk, tokenizer, 12, "interactions.train, row 3")


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


# ---- what is a target


def target_ids(batch: Batch) -> list[list[int]]:
    """The target tokens of every turn that has any."""
    pairs = zip(batch.ids.flatten(0, 1), batch.targets.flatten(0, 1), strict=True)
    return [ids[targets].tolist() for ids, targets in pairs if targets.any()]


def test_targets_of_a_conversation_are_answers_and_eos_only() -> None:
    examples = [conversation((2, 3), (4, 1), seed=1), conversation((5, 2), seed=2)]
    batch = batch_of(examples)
    assert batch.ids.shape == (2, 2, 11)
    turns = [ids for example in examples for ids in example.turns]
    assert target_ids(batch) == [list(ids[ids.index(ANSWER) + 1 :]) for ids in turns]
    assert [ids[-1] for ids in target_ids(batch)] == [EOS] * 3
    assert batch.total_targets == 4 + 2 + 3
    assert not (batch.targets & ~batch.mask).any()
    assert (batch.ids[batch.targets] != PAD).all()


def test_targets_of_a_text_are_all_its_real_tokens_but_the_first() -> None:
    tokenizer = word_tokenizer()
    (short,), (long,) = (text_examples(text, tokenizer, 64) for text in ("Tom.", "Tom has a red hat."))
    batch = batch_of([short, long])
    assert target_ids(batch) == [list(example.turns[0][1:]) for example in (short, long)]
    assert [example.turns[0][0] for example in (short, long)] == [BOS, BOS]
    assert [example.turns[0][-1] for example in (short, long)] == [EOS, EOS]


def test_a_long_text_is_cut_into_windows_that_hold_all_of_it() -> None:
    tokenizer = word_tokenizer()
    text = "Tom has a red hat. Lily likes cake. " * 5
    windows = [example.turns[0] for example in text_examples(text, tokenizer, 16)]
    assert [token for window in windows for token in window] == [BOS, *tokenizer.encode(text), EOS]
    assert max(map(len, windows)) == 16


def test_mask_and_turns_are_true_exactly_where_there_is_something() -> None:
    examples = [conversation((2, 3), (4, 1), (1, 1), seed=1), conversation((5, 2), seed=2)]
    batch = batch_of(examples)
    assert batch.turns.tolist() == [[True, True, True], [True, False, False]]
    for b, example in enumerate(examples):
        for n, ids in enumerate(example.turns):
            assert batch.ids[b, n][batch.mask[b, n]].tolist() == list(ids)
    absent = batch.mask[1, 1:]
    assert absent.sum(dim=-1).tolist() == [1, 1], "one readable position, so that no attention row is empty"
    assert batch.tokens == sum(len(ids) for example in examples for ids in example.turns)
    assert (batch.total_rows, batch.total_turns) == (2, 4)


# ---- hidden tokens of the masked encoder


def test_hidden_tokens_are_ordinary_real_ones_at_about_the_given_rate() -> None:
    examples = [conversation((6, 10), (3, 4), seed=i) if i % 2 else conversation((12, 8), seed=i) for i in range(60)]
    batch = batch_of(examples, mask_probability=0.3)
    ordinary = batch.mask & batch.turns[:, :, None] & (batch.ids >= FIRST_WORD)
    assert not (batch.hidden & ~ordinary).any()
    assert float(batch.hidden.sum() / ordinary.sum()) == pytest.approx(0.3, abs=0.03)
    assert batch.total_hidden == int(batch.hidden.sum())
    queries = ordinary & ~batch.targets
    assert float(batch.hidden[queries].float().mean()) == pytest.approx(0.3, abs=0.05), "queries are hidden too"


def test_no_token_is_hidden_unless_asked_for_and_all_ordinary_ones_at_probability_one() -> None:
    examples = [conversation((6, 10), seed=i) for i in range(3)]
    assert not batch_of(examples).hidden.any()
    batch = batch_of(examples, mask_probability=1.0)
    assert torch.equal(batch.hidden, batch.ids >= FIRST_WORD)


def test_the_same_row_is_hidden_elsewhere_at_another_step() -> None:
    sampler = BatchSampler([conversation((12, 8))], 1, seed=3, mask_probability=0.3)
    first, again, later = (sampler.global_batch(step).hidden for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


# ---- which rows a step trains on


def numbered(rows: int) -> list[Example]:
    return [Example(((BOS, FIRST_WORD + i, EOS),), (1,)) for i in range(rows)]


def tensors(batch: Batch) -> dict[str, Tensor | int]:
    return {field.name: getattr(batch, field.name) for field in fields(Batch)}


def assert_same(one: Batch, other: Batch) -> None:
    for name, value in tensors(one).items():
        same = getattr(other, name)
        assert torch.equal(value, same) if isinstance(value, Tensor) else value == same, name


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    examples = [conversation((6, 10), (3, 4), seed=i) for i in range(7)]
    one, other = (BatchSampler(examples, 4, seed=9, mask_probability=0.2) for _ in range(2))
    straight = [one.global_batch(step) for step in range(6)]
    for step in (5, 0, 3, 3, 1, 4, 2):  # a resumed run starts anywhere
        assert_same(other.global_batch(step), straight[step])
    different = BatchSampler(examples, 4, seed=10, mask_probability=0.2)
    assert [b.rows.tolist() for b in straight] != [different.global_batch(step).rows.tolist() for step in range(6)]


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (10, 4), (7, 7), (3, 5)])
def test_every_row_comes_exactly_once_in_every_epoch(rows: int, size: int) -> None:
    sampler = BatchSampler(numbered(rows), size, seed=1)
    order = [row for step in range(-(-4 * rows // size)) for row in sampler.global_batch(step).rows.tolist()]
    epochs = [order[start : start + rows] for start in range(0, 4 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "every epoch has its own order"


def test_rows_say_which_example_they_are() -> None:
    sampler = BatchSampler(numbered(10), 4, seed=1)
    batch = sampler.global_batch(2)
    assert (batch.ids[:, 0, 1] - FIRST_WORD).tolist() == batch.rows.tolist()


def test_rows_of_all_steps_have_seeds_of_their_own() -> None:
    sampler = BatchSampler(numbered(10), 4, seed=1)
    seeds = [seed for step in range(50) for seed in sampler.global_batch(step).seeds.tolist()]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 2) != derive_seed(12)
    assert derive_seed(7, "evaluation", 3) == derive_seed(7, "evaluation", 3)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_parts_of_all_workers_are_the_whole_batch_with_its_totals(workers: int) -> None:
    examples = [conversation((2 + i, 3), *[(1, 1)] * (i % 3), seed=i) for i in range(8)]
    whole = BatchSampler(examples, 8, seed=2, mask_probability=0.3).global_batch(1)
    size = 8 // workers
    parts = [whole.part(start, start + size) for start in range(0, 8, size)]
    for name, value in tensors(whole).items():
        if isinstance(value, Tensor):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value), name
        else:
            assert [getattr(part, name) for part in parts] == [value] * workers, "totals are global"
    assert sum(int(part.targets.sum()) for part in parts) == whole.total_targets
    assert sum(int(part.hidden.sum()) for part in parts) == whole.total_hidden
    assert sum(int(part.turns.sum()) for part in parts) == whole.total_turns


def test_steps_are_the_epochs_rows_over_the_batch() -> None:
    sampler = BatchSampler(numbered(10), 4, seed=1)
    assert [sampler.steps(epochs) for epochs in (1, 2, 0.5, 0.01)] == [2, 5, 1, 1]


def test_no_rows_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        BatchSampler([], 4, seed=1)


def test_lessons_cut_conversations_for_their_epochs_and_then_no_more() -> None:
    examples = [conversation(*[(2, 2)] * 4, seed=i) for i in range(8)]
    sampler = BatchSampler(examples, 4, seed=1, lessons=[(2, 2), (1.5, 3)])  # 2 steps an epoch: 4, then 3 steps
    batches = [sampler.global_batch(step) for step in range(10)]
    assert [batch.ids.shape[1] for batch in batches] == [2] * 4 + [3] * 3 + [4] * 3
    assert [batch.total_targets for batch in batches] == [4 * 3 * turns for turns in [2] * 4 + [3] * 3 + [4] * 3]
    plain = BatchSampler(examples, 4, seed=1)
    for step, batch in enumerate(batches):
        assert torch.equal(batch.rows, plain.global_batch(step).rows), "lessons change lengths, not the order of rows"
        turns = batch.ids.shape[1]
        assert torch.equal(batch.ids, plain.global_batch(step).ids[:, :turns])


def test_a_conversation_shorter_than_its_lesson_stays_whole() -> None:
    short = conversation((2, 2), (2, 2))
    assert short.first_turns(5) == short == short.first_turns(None)
    assert short.first_turns(1).turns == short.turns[:1]


def test_a_row_s_ids_do_not_depend_on_the_rows_beside_it() -> None:
    rows = [Example((tuple(ids),), (1,)) for ids in rows_of(3, 9, 5)]
    together = collate(rows, [1, 2, 3], [0, 1, 2], 0.4)
    for i, row in enumerate(rows):
        alone = collate([row], [i + 1], [i], 0.4)
        length = len(row.turns[0])
        for name in ("ids", "mask", "targets", "hidden"):
            assert torch.equal(getattr(together, name)[i, :, :length], getattr(alone, name)[0]), name


def test_consecutive_epochs_run_on_in_one_batch() -> None:
    sampler = BatchSampler(numbered(6), 4, seed=1)
    first, middle, last = (sampler.global_batch(step).rows.tolist() for step in range(3))
    assert sorted(first + middle[:2]) == sorted(middle[2:] + last) == list(range(6))
