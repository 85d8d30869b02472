"""Promises of data sources and the corpus: good rows arrive as they are, a bad one is named by file, line, column."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rxt_platform.config.run import DataConfig
from rxt_platform.data import sources
from rxt_platform.data.corpus import build_corpus, corpus_texts, load_examples, read_rows
from rxt_platform.data.rows import Conversation, Interaction, Recall
from rxt_platform.data.sources import read_conversations, source_identity
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, QUERY
from rxt_platform.errors import DataError
from tests.unit.helpers import word_tokenizer

WORLD = {"kind": "story_world", "train_rows": 6, "validation_rows": 2}
END = "<|endoftext|>"


def config(root: Path, **changes: dict[str, Any]) -> DataConfig:
    """A data section over the story world, with some sources exchanged."""
    whole = {"texts": WORLD, "interactions": WORLD, "conversations": WORLD, **changes}
    return DataConfig.model_validate({"root": str(root), **whole})


def text_config(root: Path, content: str | bytes, **changes: Any) -> DataConfig:
    raw = content if isinstance(content, bytes) else content.encode()
    (root / "stories.txt").write_bytes(raw)
    return config(root, texts={"kind": "text", "path": "stories.txt", "validation_share": 0.25, **changes})


def turn(number: int, **more: Any) -> dict[str, Any]:
    return {"query": f"q{number}", "answer": f"a{number}", **more}


def write_lines(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def jsonl_config(root: Path, *rows: dict[str, Any] | str, **changes: Any) -> DataConfig:
    write_lines(root / "train.jsonl", *rows)
    write_lines(root / "valid.jsonl", turn(90, interactions=[turn(91)]))
    source = {"kind": "jsonl", "path": "train.jsonl", "validation_path": "valid.jsonl", **changes}
    return config(root, interactions=source, conversations=source)


def talk(*numbers: int) -> Conversation:
    return Conversation(tuple(Interaction(f"q{number}", f"a{number}") for number in numbers))


# ---- plain text


def test_a_text_file_is_parted_by_its_separator_lines(tmp_path: Path) -> None:
    text = "".join(f"Story {i}.\nIts second line.\n{END}\n" for i in range(8))
    rows = sources.texts(text_config(tmp_path, text))
    assert rows.train + rows.validation == [f"Story {i}.\nIts second line." for i in range(8)]
    assert len(rows.validation) == 2, "the share is taken from the end"
    assert rows.notes["dropped_unfinished_documents"] == 0


def test_a_cut_off_last_document_is_dropped_and_counted(tmp_path: Path) -> None:
    text = "".join(f"Story {i}.\n{END}\n" for i in range(4)) + "Once upon a ti"
    rows = sources.texts(text_config(tmp_path, text))
    assert rows.train + rows.validation == [f"Story {i}." for i in range(4)]
    assert rows.notes == {"dropped_unfinished_documents": 1}
    counts = build_corpus(text_config(tmp_path, text), tmp_path)
    assert counts["dropped_unfinished_documents"] == 1
    assert (counts["texts_train"], counts["texts_validation"]) == (3, 1)


def test_blank_documents_are_no_rows_and_another_separator_can_be_named(tmp_path: Path) -> None:
    rows = sources.texts(text_config(tmp_path, "one\n---\n\n---\n  \n---\ntwo\n---\n", separator="---"))
    assert rows.train + rows.validation == ["one", "two"]


def test_only_the_first_rows_are_used_when_asked_for(tmp_path: Path) -> None:
    text = "".join(f"Story {i}.\n{END}\n" for i in range(8))
    rows = sources.texts(text_config(tmp_path, text, max_rows=4))
    assert rows.train + rows.validation == [f"Story {i}." for i in range(4)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", r"stories\.txt: empty"),
        (" \n\n", r"stories\.txt: empty"),
        ("A story without an end.", r"stories\.txt: no document ends with a line '<\|endoftext\|>'"),
        (f"Only one.\n{END}\n", r"stories\.txt: 1 documents can't be split"),
        (b"fine\n\xff\xfe", r"stories\.txt: byte 5 is not UTF-8: convert the file to UTF-8"),
    ],
)
def test_a_bad_text_file_is_named_with_the_reason(tmp_path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        sources.texts(text_config(tmp_path, content))
    assert raised.value.exit_code == 2


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path: Path) -> None:
    missing = config(tmp_path, texts={"kind": "text", "path": "none.txt"})
    for use in (sources.texts, source_identity):
        with pytest.raises(DataError, match=f"{tmp_path}/none.txt: no such file; relative paths are taken from"):
            use(missing)


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="separator"):
        text_config(tmp_path, f"One.\n{END}\nTwo.\n{END}\n", separator="")


# ---- JSON lines


def test_all_published_layouts_are_read(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl",
        turn(1, interactions=[turn(2), turn(3)]),
        {"interactions": [turn(4), turn(5)]},
        turn(6, source="unknown columns are ignored"),
        "",
        turn(7, interactions=[]),
    )
    assert read_conversations(path) == [talk(1, 2, 3), talk(4, 5), talk(6), talk(7)]


def test_answer_keys_are_read_with_their_rows(tmp_path: Path) -> None:
    key = {"answer_span": "a2", "distance": 1, "long_range": False}
    (row,) = read_conversations(write_lines(tmp_path / "rows.jsonl", turn(1, interactions=[turn(2, **key)])))
    assert row.interactions[1].recall == Recall("a2", 1, False)


def test_single_interactions_are_the_turns_of_all_rows(tmp_path: Path) -> None:
    rows = sources.interactions(jsonl_config(tmp_path, turn(1, interactions=[turn(2)]), turn(3)))
    assert rows.train == [Interaction(f"q{i}", f"a{i}") for i in (1, 2, 3)]
    assert rows.validation == [Interaction(f"q{i}", f"a{i}") for i in (90, 91)]


def test_long_conversations_are_cut_when_asked_for(tmp_path: Path) -> None:
    whole = jsonl_config(tmp_path, turn(1, interactions=[turn(2), turn(3)]))
    assert sources.conversations(whole).train == [talk(1, 2, 3)]
    assert sources.conversations(
        jsonl_config(tmp_path, turn(1, interactions=[turn(2), turn(3)]), max_turns=2)
    ).train == [talk(1, 2)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{not json", r"train\.jsonl:2: not JSON"),
        ("[1, 2]", r"train\.jsonl:2: expected an object with 'query' and 'answer', got list"),
        ({"query": "q"}, r"train\.jsonl:2: column 'answer': missing"),
        ({"query": None, "answer": "a"}, r"train\.jsonl:2: column 'query': null"),
        ({"query": "q", "answer": " "}, r"train\.jsonl:2: column 'answer': empty"),
        ({"query": "q", "answer": 3}, r"train\.jsonl:2: column 'answer': expected text, got int"),
        (
            turn(1, interactions=[turn(2), {"query": "q3"}]),
            r"train\.jsonl:2: column 'interactions\[1\]\.answer': missing",
        ),
        (turn(1, interactions="none"), r"train\.jsonl:2: column 'interactions': expected a list, got str"),
        (turn(1, interactions=[None]), r"train\.jsonl:2: column 'interactions\[0\]': null"),
        (
            turn(1, interactions=[turn(2, answer_span="blue", distance=1, long_range=False)]),
            r"train\.jsonl:2: column 'interactions\[0\]\.answer_span': 'blue' does not occur in the answer",
        ),
        (
            turn(1, interactions=[turn(2, answer_span="a2", distance=2, long_range=False)]),
            r"train\.jsonl:2: column 'interactions\[0\]\.distance': 2 turns back is before the conversation starts",
        ),
    ],
)
@pytest.mark.parametrize("read", [sources.interactions, sources.conversations])
def test_a_bad_row_is_named_by_file_line_and_column(
    tmp_path: Path, bad: dict[str, Any] | str, words: str, read: Callable[[DataConfig], Any]
) -> None:
    with pytest.raises(DataError, match=words):
        read(jsonl_config(tmp_path, turn(0, interactions=[turn(1)]), bad))


def test_a_bad_validation_row_is_named_too(tmp_path: Path) -> None:
    good = jsonl_config(tmp_path, turn(0, interactions=[turn(1)]))
    write_lines(tmp_path / "valid.jsonl", "oops")
    with pytest.raises(DataError, match=r"valid\.jsonl:1: not JSON"):
        sources.conversations(good)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_named_with_what_belongs_there(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"rows\.jsonl: empty: no rows; write one JSON object a line"):
        read_conversations(path)


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"query": "zażółć"}'.encode("cp1250"))
    with pytest.raises(DataError, match=r"rows\.jsonl: byte 13 is not UTF-8"):
        read_conversations(path)


def test_single_turn_rows_are_no_conversations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl: no row has a follow-up interaction: column 'interactions'"):
        sources.conversations(jsonl_config(tmp_path, turn(1), turn(2)))


def test_half_a_surrogate_pair_is_a_bad_row_too(tmp_path: Path) -> None:
    bad = jsonl_config(tmp_path, turn(0, interactions=[turn(1)]), r'{"query": "half \ud83d", "answer": "a"}')
    with pytest.raises(DataError, match=r"train\.jsonl:2: column 'query'"):
        build_corpus(bad, tmp_path)


# ---- the corpus


def test_a_corpus_gives_back_the_rows_it_was_made_from(tmp_path: Path) -> None:
    hard = {"query": "line\nbreak \u2028 and 🐈", "answer": '"quoted" \\ back'}
    data = jsonl_config(tmp_path, turn(1, interactions=[turn(2)]), {**hard, "interactions": [turn(3)]})
    folder = tmp_path / "corpus"
    folder.mkdir()
    counts = build_corpus(data, folder)
    assert counts["conversations_train"] == 2
    assert counts["interactions_train"] == 4
    assert counts["texts_train"] == 6
    assert read_conversations(folder / "conversations.train.jsonl") == sources.conversations(data).train
    assert read_conversations(folder / "conversations.validation.jsonl") == [talk(90, 91)]
    texts = [row["text"] for row in read_rows(folder, "texts", "train")]
    assert texts == sources.texts(data).train
    learned = list(corpus_texts(folder))
    assert hard["query"] in learned
    assert set(texts) <= set(learned)
    assert not any(text in learned for text in ("q90", "a91", *sources.texts(data).validation)), "held-out rows"


def test_a_question_of_a_conversation_can_be_a_single_interaction_too(tmp_path: Path) -> None:
    key = {"answer_span": "a2", "distance": 1, "long_range": False}
    build_corpus(jsonl_config(tmp_path, turn(1, interactions=[turn(2, **key)])), tmp_path)
    assert "q2" in list(corpus_texts(tmp_path))
    assert len(load_examples(tmp_path, "interactions", "train", word_tokenizer(), 64)) == 2


def test_examples_of_a_corpus_are_its_rows_as_token_ids(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    data = jsonl_config(tmp_path, turn(1, interactions=[turn(2)]))
    build_corpus(data, tmp_path)
    (example,) = load_examples(tmp_path, "conversations", "train", tokenizer, 64)
    assert example.turns == tuple(
        (BOS, QUERY, *tokenizer.encode(f"q{i}"), ANSWER, *tokenizer.encode(f"a{i}"), EOS) for i in (1, 2)
    )
    assert [ids[start - 1] for ids, start in zip(example.turns, example.target_starts, strict=True)] == [ANSWER] * 2
    singles = load_examples(tmp_path, "interactions", "train", tokenizer, 64)
    assert [single.turns[0] for single in singles] == list(example.turns)
    with pytest.raises(DataError, match=r"conversations\.train, row 1, turn 0"):
        load_examples(tmp_path, "conversations", "train", tokenizer, 5)


def test_the_story_world_gives_the_asked_rows_and_the_same_ones_again(tmp_path: Path) -> None:
    mixed = {**WORLD, "turns": [2, 3], "train_rows": 5}
    data = config(tmp_path, conversations=mixed)
    rows = sources.conversations(data)
    assert [len(row.interactions) for row in rows.train] == [2, 3, 2, 3, 2]
    assert rows == sources.conversations(data)
    assert len(sources.texts(data).train) == 6
    assert len(sources.interactions(data).validation) == 2
    assert rows.train != sources.conversations(config(tmp_path, conversations={**mixed, "seed": 1})).train


# ---- identity


def test_identity_of_a_source_is_its_content_not_its_path(tmp_path: Path) -> None:
    text = f"One.\n{END}\nTwo.\n{END}\n"
    identities = []
    for name, content in (("here", text), ("there", text), ("changed", text + " ")):
        root = tmp_path / name
        root.mkdir()
        rows = [turn(1, interactions=[turn(2)])]
        both = jsonl_config(root, *rows)
        (root / "other.txt").write_text(content)
        texts = {"kind": "text", "path": "other.txt" if name == "here" else str(root / "other.txt")}
        identities.append(source_identity(both.model_copy(update={"texts": config(root, texts=texts).texts})))
    here, there, changed = identities
    assert here == there
    assert here["texts"] != changed["texts"]
    assert here["conversations"] == changed["conversations"]
    assert str(tmp_path) not in json.dumps(identities)


def test_identity_covers_what_selects_the_rows(tmp_path: Path) -> None:
    text = f"One.\n{END}\nTwo.\n{END}\n"
    base = source_identity(text_config(tmp_path, text))
    assert source_identity(text_config(tmp_path, text, max_rows=2)) != base
    assert source_identity(text_config(tmp_path, text, separator="---")) != base
    assert source_identity(config(tmp_path, texts={**WORLD, "seed": 1})) != source_identity(config(tmp_path))
    talks = source_identity(jsonl_config(tmp_path, turn(1, interactions=[turn(2)])))
    source = jsonl_config(tmp_path, turn(1, interactions=[turn(2)]))
    write_lines(tmp_path / "valid.jsonl", turn(5, interactions=[turn(6)]))
    assert source_identity(source)["conversations"] != talks["conversations"], "held-out rows count too"
