"""Promises of token shards: what is read back is what was encoded, whoever made the shards and in whatever order."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rxt_platform.config.data import Section
from rxt_platform.data import corpus, shards
from rxt_platform.data.examples import Example, RowEncoder, TooLong
from rxt_platform.data.rows import RowError
from rxt_platform.data.shards import TokenShards, make_shard, plan_shards, read_summary, write_summary
from rxt_platform.data.sources import SPLITS
from rxt_platform.data.tokenizer import ANSWER, BOS, EOS, QUERY, RxtTokenizer
from rxt_platform.errors import ArtifactError, DataError
from rxt_platform.orchestration.tokens import judge_too_long
from tests.support import ROOT
from tests.unit.data_files import config_of, corpus_of, kept_in, lines_of, put, put_rows, talk_row, turn
from tests.unit.helpers import word_tokenizer

WINDOW = 32
SECTIONS: tuple[Section, ...] = ("texts", "conversations")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 16 texts and 90 conversations of two sources in many row groups, as `corpus` beside its tokenizer."""
    root = tmp_path_factory.mktemp("made")
    texts = [{"text": "Tom has a red hat near the lake. " * (1 + 7 * (i % 3))} for i in range(16)]
    talks = [talk_row(*range(4 * i, 4 * i + 2 + i % 3)) for i in range(70)]
    put_rows(root, "texts.jsonl", texts)
    put_rows(root, "talks.jsonl", talks)
    put_rows(root, "held_text.jsonl", [{"text": "held out"}])
    put_rows(root, "held_talk.jsonl", [talk_row(998, 999)])
    config = config_of(
        root,
        "conversations",
        {"path": "talks.jsonl", "validation_path": "held_talk.jsonl"},
        {"kind": "story_world", "train_rows": 20, "validation_rows": 3, "turns": [2, 3], "weight": 2.0},
    )
    texts_config = config_of(root, "texts", {"path": "texts.jsonl", "validation_path": "held_text.jsonl"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_GROUP_BYTES", 300)
        corpus_of(config.model_copy(update={"texts": texts_config.texts}), root / "corpus")
    word_tokenizer().save(root / "tokenizer.json")
    return root


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 2000)
    monkeypatch.setattr(shards, "_ROWS_AT_ONCE", 7)


def encoder(too_long: TooLong = "truncate", window: int = WINDOW) -> RowEncoder:
    return RowEncoder(word_tokenizer(), window, too_long)


def shards_of(corpus_folder: Path, folder: Path, encode: RowEncoder | None = None) -> list[dict[str, Any]]:
    """All shards of a corpus with their summary, in a new folder."""
    encode = encode or encoder()
    folder.mkdir()
    counts = [make_shard(plan, corpus_folder, encode, folder) for plan in plan_shards(corpus_folder)]
    write_summary(folder, counts, encode.max_length)
    return counts


def shown(example: Example) -> tuple[list[list[int]], list[int]]:
    return [[int(i) for i in ids] for ids in example.turns], list(example.target_starts)


def encoded(corpus_folder: Path, section: Section, split: Any = "train", encode: RowEncoder | None = None) -> list[Any]:
    """What the encoder makes of the corpus's rows, with file:row, in their order."""
    rows = kept_in(corpus_folder, section, split)
    examples = (encode or encoder()).encode([row.row for row in rows])
    assert not any(isinstance(one, RowError) for one in examples)
    return [
        (shown(one), f"{row.file}:{row.number}", row.source)
        for row, of_row in zip(rows, examples, strict=True)
        if not isinstance(of_row, RowError)
        for one in of_row
    ]


def small_corpus(root: Path, rows: list[Any], section: Section = "conversations") -> Path:
    """A corpus of a few rows of `rows.jsonl`."""
    put(root, "rows.jsonl", lines_of(rows))
    put_rows(root, "held.jsonl", [{"text": "held out"} if section == "texts" else talk_row(998, 999)])
    corpus_of(config_of(root, section, {"path": "rows.jsonl", "validation_path": "held.jsonl"}), root / "corpus")
    return root / "corpus"


# ---- what is read back


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("split", SPLITS)
def test_examples_read_back_are_those_that_were_encoded(
    made: Path, tmp_path: Path, section: Section, split: Any
) -> None:
    shards_of(made / "corpus", tmp_path / "tokens")
    expected = encoded(made / "corpus", section, split)
    read = TokenShards(tmp_path / "tokens", section, split)
    assert [shown(example) for example in read] == [example for example, _, _ in expected]
    assert [read.place(i) for i in range(len(read))] == [place for _, place, _ in expected]
    assert read.sources.tolist() == [source for _, _, source in expected]
    if split == "train":
        assert len(list((tmp_path / "tokens").glob(f"{section}.train-*.arrow"))) > 2, "of several files"


def test_a_conversation_is_its_turns_with_the_answers_as_targets(tmp_path: Path) -> None:
    shards_of(small_corpus(tmp_path, [talk_row(1, 2)]), tmp_path / "tokens")
    tokenizer = word_tokenizer()
    (example,) = TokenShards(tmp_path / "tokens", "conversations", "train")
    assert shown(example)[0] == [
        [BOS, QUERY, *tokenizer.encode(f"question {i}"), ANSWER, *tokenizer.encode(f"answer {i}"), EOS] for i in (1, 2)
    ]
    for ids, start in zip(example.turns, example.target_starts, strict=True):
        assert ids[start - 1] == ANSWER


def test_a_long_text_is_several_examples_of_the_same_place(tmp_path: Path) -> None:
    text = "Tom has a red hat. " * 20
    shards_of(small_corpus(tmp_path, [{"text": "short"}, {"text": text}], "texts"), tmp_path / "tokens")
    read = TokenShards(tmp_path / "tokens", "texts", "train")
    targets = [int(i) for example in read[1:] for i in example.turns[0][1:]]
    assert [BOS, *targets] == [BOS, *word_tokenizer().encode(text), EOS], "every token but [BOS] is one to predict"
    assert len(read) > 3
    assert {len(example.turns[0]) for example in read[1:-1]} == {WINDOW}
    assert {example.target_starts for example in read} == {(1,)}
    assert [read.place(i) for i in range(len(read))] == ["rows.jsonl:1"] + ["rows.jsonl:2"] * (len(read) - 1)


@pytest.mark.usefixtures("small_shards")
def test_shards_are_read_like_a_list(made: Path, tmp_path: Path) -> None:
    shards_of(made / "corpus", tmp_path / "tokens")
    read = TokenShards(tmp_path / "tokens", "conversations", "train")
    listed = [shown(example) for example in read]
    count = len(listed)
    assert count == 90
    for index in (0, 1, 37, count - 1, -1, -2, -count):
        assert shown(read[index]) == listed[index]
        assert read.place(index) == read.place(index % count)
    for part in (slice(3, 9), slice(-4, None), slice(None, None, -7), slice(50, 10), slice(0, 10**9)):
        assert [shown(example) for example in read[part]] == listed[part]
    for index in (count, -count - 1, 10**12):
        with pytest.raises(IndexError):
            read[index]
        with pytest.raises(IndexError):
            read.place(index)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("section", SECTIONS)
def test_turn_lengths_are_those_of_the_examples(made: Path, tmp_path: Path, section: Section) -> None:
    shards_of(made / "corpus", tmp_path / "tokens")
    read = TokenShards(tmp_path / "tokens", section, "train")
    lengths, starts = read.turn_lengths
    assert lengths.dtype == starts.dtype == np.int64
    assert len(starts) == len(read) + 1
    for i, example in enumerate(read):
        assert lengths[starts[i] : starts[i + 1]].tolist() == [len(ids) for ids in example.turns]
    assert starts[-1] == len(lengths)


def test_reading_copies_nothing(tmp_path: Path) -> None:
    text = "Tom has a red hat near the lake. " * 3000
    shards_of(small_corpus(tmp_path, [{"text": text + str(i)} for i in range(10)], "texts"), tmp_path / "tokens")
    size = sum(path.stat().st_size for path in (tmp_path / "tokens").glob("texts.train*"))
    before = pa.total_allocated_bytes()
    read = TokenShards(tmp_path / "tokens", "texts", "train")
    ids = read[3].turns[0]
    assert pa.total_allocated_bytes() - before < size / 20
    assert isinstance(ids, np.ndarray)
    assert not ids.flags.owndata
    assert not ids.flags.writeable, "a stage that changed its rows would change them for all"
    whole = ids.base
    while isinstance(whole, np.ndarray):
        whole = whole.base
    assert whole is not None, "the view keeps the file mapped"
    assert np.shares_memory(read[3].turns[0], ids)


def test_ids_take_two_bytes_and_four_where_the_vocabulary_is_larger(tmp_path: Path) -> None:
    made_corpus = small_corpus(tmp_path, [{"text": "the tok65700 hat"}], "texts")
    large = RxtTokenizer.train(["the hat"], 300)
    large._tokenizer.add_tokens([f"tok{i}" for i in range(65_800)])
    for name, tokenizer, dtype in (("small", word_tokenizer(), np.uint16), ("large", large, np.uint32)):
        encode = RowEncoder(tokenizer, WINDOW)
        shards_of(made_corpus, tmp_path / name, encode)
        (example,) = TokenShards(tmp_path / name, "texts", "train")
        assert example.turns[0].dtype == dtype
        assert shown(example) == encoded(made_corpus, "texts", encode=encode)[0][0]
    assert max(shown(example)[0][0]) > 2**16


# ---- who makes them, and when


def test_the_plan_is_every_row_group_once_by_the_corpus_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "corpus", tmp_path / "elsewhere")
    for size in (1, 2000, 10**9):
        monkeypatch.setattr(shards, "_SHARD_BYTES", size)
        plans = plan_shards(made / "corpus")
        assert plans == plan_shards(tmp_path / "elsewhere")
        assert len({plan.name for plan in plans}) == len(plans)
        for section in SECTIONS:
            for split in SPLITS:
                own = [plan for plan in plans if (plan.section, plan.split) == (section, split)]
                sizes = corpus.row_groups(made / "corpus", section, split)
                assert [i for plan in own for i in range(*plan.groups)] == list(range(len(sizes)))
                assert [plan.number for plan in own] == list(range(len(own)))
                assert [plan.bytes for plan in own] == [sum(sizes[slice(*plan.groups)]) for plan in own]
                assert all(plan.bytes - sizes[plan.groups[1] - 1] < size for plan in own), "no more than it must be"
    assert not any(plan.section == "interactions" for plan in plans), "the run has none"


MAKE_ALONE = """
import sys
from pathlib import Path
from rxt_platform.data import shards
from rxt_platform.data.examples import RowEncoder
from rxt_platform.data.tokenizer import RxtTokenizer

root, folder, window, size, first = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
shards._SHARD_BYTES = size
for plan in shards.plan_shards(root / "corpus")[first::2]:
    shards.make_shard(plan, root / "corpus", RowEncoder(RxtTokenizer.load(root / "tokenizer.json"), window), folder)
"""


@pytest.mark.usefixtures("small_shards")
def test_shards_are_the_same_bytes_in_any_order_and_in_any_process(made: Path, tmp_path: Path) -> None:
    plans = plan_shards(made / "corpus")
    folders = {name: tmp_path / name for name in ("forward", "backward", "apart")}
    for folder in folders.values():
        folder.mkdir()
    arguments = [str(made), str(folders["apart"]), str(WINDOW), str(shards._SHARD_BYTES)]
    processes = [subprocess.Popen([sys.executable, "-c", MAKE_ALONE, *arguments, str(i)], cwd=ROOT) for i in range(2)]
    for plan in plans:
        make_shard(plan, made / "corpus", encoder(), folders["forward"])
    for plan in plans[::-1]:
        make_shard(plan, made / "corpus", encoder(), folders["backward"])
    assert [process.wait(60) for process in processes] == [0, 0]
    forward, *others = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in folders.values()
    )
    assert others == [forward, forward]
    assert forward.keys() == {plan.name for plan in plans}
    assert len(set(forward.values())) == len(plans) > 6


@pytest.mark.usefixtures("small_shards")
def test_the_summary_does_not_depend_on_how_rows_are_cut_into_shards(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards_of(made / "corpus", tmp_path / "many")
    monkeypatch.setattr(shards, "_SHARD_BYTES", 10**9)
    shards_of(made / "corpus", tmp_path / "one")
    many, one = (read_summary(tmp_path / name)["parts"] for name in ("many", "one"))
    for part in many:
        assert len(many[part].pop("files")) >= len(one[part].pop("files")) == 1
    assert many == one


# ---- counts


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("section", SECTIONS)
def test_counts_are_those_of_the_examples(made: Path, tmp_path: Path, section: Section) -> None:
    shards_of(made / "corpus", tmp_path / "tokens")
    read = TokenShards(tmp_path / "tokens", section, "train")
    part = read_summary(tmp_path / "tokens")["parts"][f"{section}_train"]
    lengths = [len(ids) for example in read for ids in example.turns]
    assert part["rows"] == len(kept_in(made / "corpus", section))
    assert part["examples"] == sum(file["examples"] for file in part["files"]) == len(read)
    assert (part["turns"], part["tokens"], part["longest"]) == (len(lengths), sum(lengths), max(lengths))
    assert part["targets"] == sum(
        len(ids) - start for example in read for ids, start in zip(example.turns, example.target_starts, strict=True)
    )
    assert sum(part["histogram"]) == len(lengths)
    width = WINDOW / 64
    expected = [0] * 64
    for length in lengths:
        expected[min(63, int(length / width))] += 1
    assert part["histogram"] == expected
    assert part["max_length"] == WINDOW


def test_totals_are_given_for_the_manifest(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    plans = plan_shards(made / "corpus")
    counts = [make_shard(plan, made / "corpus", encoder(), tmp_path / "tokens") for plan in plans]
    metrics = write_summary(tmp_path / "tokens", counts, WINDOW)
    assert metrics["conversations_train_examples"] == 90
    assert metrics["texts_validation_examples"] == 1
    assert metrics["texts_train_tokens"] == sum(
        shard["tokens"] for shard in counts if (shard["section"], shard["split"]) == ("texts", "train")
    )


# ---- rows that do not fit the window

LONG_ANSWER = {"query": "Who?", "answer": "the red hat " * 40}
LONG_QUERY = {"query": "the red hat " * 40, "answer": "Tom."}
FITTING = [talk_row(1, 2), talk_row(3, 4)]
TOO_LONG = [FITTING[0], turn(5, interactions=[LONG_ANSWER]), LONG_QUERY, FITTING[1]]
HAT = len(word_tokenizer().encode("the red hat " * 40))
REASONS = [
    (
        "rows.jsonl",
        2,
        "answer",
        f"too long: turn 2: {HAT + len(word_tokenizer().encode('Who?')) + 4} tokens, the window",
    ),
    ("rows.jsonl", 3, "query", f"too long: query of {HAT} tokens leaves no room for an answer in a window of {WINDOW}"),
]


def test_what_is_too_long_is_cut_and_counted(tmp_path: Path) -> None:
    shards_of(small_corpus(tmp_path, TOO_LONG), tmp_path / "tokens")
    read = TokenShards(tmp_path / "tokens", "conversations", "train")
    assert len(read) == 4
    assert [len(ids) for ids in read[1].turns] == [len(read[1].turns[0]), WINDOW]
    assert EOS not in read[1].turns[1], "a model must not learn that an answer ends where the window does"
    query, start = read[2].turns[0], read[2].target_starts[0]
    assert len(query) <= WINDOW
    assert start == WINDOW - WINDOW // 4, "a quarter of the window is left for the answer"
    assert query[start - 1] == ANSWER
    part = read_summary(tmp_path / "tokens")["parts"]["conversations_train"]
    assert (part["truncated"], part["queries_cut"], part["too_long"]) == (1, 1, 0)
    assert (tmp_path / "tokens" / "bad_rows.jsonl").read_text() == ""


@pytest.mark.parametrize("policy", ["quarantine", "fail"])
def test_what_is_too_long_is_set_aside_with_its_place(tmp_path: Path, policy: TooLong) -> None:
    counts = shards_of(small_corpus(tmp_path, TOO_LONG), tmp_path / "tokens", encoder(policy))
    read = TokenShards(tmp_path / "tokens", "conversations", "train")
    assert [read.place(i) for i in range(len(read))] == ["rows.jsonl:1", "rows.jsonl:4"]
    set_aside = [json.loads(line) for line in (tmp_path / "tokens" / "bad_rows.jsonl").read_text().splitlines()]
    assert len(set_aside) == 2
    for entry, (file, row, column, reason) in zip(set_aside, REASONS, strict=True):
        assert (entry["section"], entry["split"]) == ("conversations", "train")
        assert (entry["file"], entry["row"], entry["column"]) == (file, row, column)
        assert entry["reason"].startswith(reason)
    part = read_summary(tmp_path / "tokens")["parts"]["conversations_train"]
    assert (part["rows"], part["examples"], part["too_long"], part["truncated"]) == (4, 2, 2, 0)
    listed = "; ".join(f"{row['file']}:{row['row']}: column '{row['column']}': {row['reason']}" for row in set_aside)
    if policy == "fail":
        message = f"{listed}: shorten them, use a longer window, or set data.validation.too_long=truncate"
    else:
        judge_too_long(counts, policy, max_bad_share=1.0)
        few = "conversations, train: 2 of 4 rows are too long"
        message = f"{few}, more than data.validation.max_bad_share 0.1: {listed}"
    with pytest.raises(DataError) as caught:
        judge_too_long(counts, policy, max_bad_share=0.1)
    assert str(caught.value) == message


def test_a_part_of_which_nothing_fits_is_an_empty_one(tmp_path: Path) -> None:
    rows = [{**LONG_QUERY, "interactions": [turn(1)]}]
    shards_of(small_corpus(tmp_path, rows), tmp_path / "tokens", encoder("quarantine"))
    read = TokenShards(tmp_path / "tokens", "conversations", "train")
    assert len(read) == 0
    assert list(read) == []
    assert [part.tolist() for part in read.turn_lengths] == [[], [0]]


# ---- damage


@pytest.fixture
def token_files(tmp_path: Path) -> Path:
    shards_of(small_corpus(tmp_path, FITTING), tmp_path / "tokens")
    return tmp_path / "tokens"


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ArtifactError, match=words) as caught:
        TokenShards(folder, "conversations", "train")
    assert caught.value.exit_code == 2


def test_a_torn_shard_is_refused_by_name(token_files: Path) -> None:
    path = token_files / "conversations.train-00000.arrow"
    whole = path.read_bytes()
    for length in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(token_files, f"^{path}: not a readable token shard: ")
    path.write_bytes(b"\0" * len(whole))
    refused(token_files, f"^{path}: not a readable token shard: ")
    path.unlink()
    refused(token_files, f"^{path}: not a readable token shard: ")


def test_a_shard_with_other_columns_is_refused_by_name(token_files: Path) -> None:
    path = token_files / "conversations.train-00000.arrow"
    batch = pa.record_batch({"turns": pa.array([[[1]], [[2]]]), "other": pa.array([1, 2])})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    refused(token_files, f"^{path}: not a readable token shard: .*target_starts")


def test_a_shard_of_another_making_is_refused(token_files: Path) -> None:
    path = token_files / "conversations.train-00000.arrow"
    shutil.copy(token_files / "conversations.validation-00000.arrow", path)
    refused(token_files, f"^{path}: holds 1 examples, tokens.json says 2")


@pytest.mark.parametrize("content", ["", "{", None])
def test_a_damaged_or_missing_summary_is_refused_by_name(token_files: Path, content: str | None) -> None:
    path = token_files / "tokens.json"
    path.unlink() if content is None else path.write_text(content)
    refused(token_files, f"^{path}: not a readable summary of token shards: ")


def test_a_section_that_the_run_does_not_have_is_said(token_files: Path) -> None:
    with pytest.raises(DataError, match=r"holds no texts for train: name a source as data\.texts"):
        TokenShards(token_files, "texts", "train")
