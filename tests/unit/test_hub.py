"""Promises of Hub data sets: the right part is read, streamed or not, and what identifies it is what is read.

The data set is a folder laid out like a repository of the Hub: there is no network here, and no test reaches for it.
"""

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import huggingface_hub.constants
import pytest

from rxt_platform.config.data import DataConfig, HubSource
from rxt_platform.data import hub
from rxt_platform.data.rows import Row
from rxt_platform.data.sources import SPLITS, source_identity
from rxt_platform.data.story_world import Split
from rxt_platform.errors import DataError
from tests.unit.data_files import bad_rows_in, config_of, corpus_of, kept_in, placed, put, put_rows, rows_in, talk, turn

TURNS = (2, 4)
ROWS = {"train": 12, "validation": 3}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A connection that is tried fails the test; what `datasets` keeps goes into the test's folder."""
    tried = []

    def refuse(*where: Any, **_: Any) -> None:
        tried.append(where)
        raise OSError("there is no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # other tests may have imported them before
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert tried == []


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`steps-2` and `steps-4`, 12 training and 3 held-out rows each, as the published sets are laid out."""
    folder = tmp_path_factory.mktemp("hub") / "talks"
    card = "---\nconfigs:\n"
    for turns in TURNS:
        card += f"- config_name: steps-{turns}\n  data_files:\n"
        for split in ROWS:
            name = f"data/steps-{turns}-{split}.parquet"
            card += f"  - split: {split}\n    path: {name}\n"
            put_rows(folder, name, [{**turn(a), "interactions": [*map(turn, b)]} for a, *b in numbers(turns, split)])
    put(folder, "README.md", f"{card}---\n# Talks\n")
    return folder


def numbers(turns: int, split: str) -> list[range]:
    """Those of each conversation's turns; no two conversations share one."""
    start = 10_000 * turns + (1000 if split == "validation" else 0)
    return [range(start + turns * i, start + turns * (i + 1)) for i in range(ROWS[split])]


def expected(turns: int, split: str) -> list[Row]:
    return [talk(*each) for each in numbers(turns, split)]


def source(path: Path | str, **settings: Any) -> dict[str, Any]:
    return {"kind": "hub", "path": str(path), "config": "steps-2", **settings}


def run_of(path: Path | str, **settings: Any) -> DataConfig:
    return config_of(Path("."), "conversations", source(path, **settings))


# ---- rows


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_named_configuration_and_split_are_read(
    talks: Path, tmp_path: Path, turns: int, split: Split, streaming: bool
) -> None:
    config = run_of(talks, config=f"steps-{turns}", streaming=streaming)
    assert rows_in(config, "conversations", split) == expected(turns, split)
    rows = placed(config, "conversations", split)
    assert [row.number for row in rows] == list(range(1, ROWS[split] + 1))
    assert {row.file for row in rows} == {row.name for row in rows} == {f"hf:talks:steps-{turns}[{split}]"}
    kept = list((tmp_path / "cache").rglob("*.arrow"))
    assert bool(kept) != streaming, "streamed rows leave no copy on the disk, others are read from there"


def test_another_split_can_be_named_for_either_side(talks: Path) -> None:
    config = run_of(talks, split="validation", validation_split="train")
    assert rows_in(config, "conversations") == expected(2, "validation")
    assert rows_in(config, "conversations", "validation") == expected(2, "train")


def test_without_a_held_out_split_a_share_of_the_rows_is_held_out(talks: Path) -> None:
    config = run_of(talks, validation_split=None, validation_share=0.4)
    train, held_out = (rows_in(config, "conversations", split) for split in SPLITS)
    assert 0 < len(held_out) < 12
    assert sorted(map(str, train + held_out)) == sorted(map(str, expected(2, "train")))


def test_texts_and_single_interactions_are_read_too(talks: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        put_rows(tmp_path, f"stories/{split}.jsonl", [{"story": f"{split} {i}"} for i in range(3)])
    stories = config_of(tmp_path, "texts", source("stories", config=None, columns={"text": "story"}))
    assert rows_in(stories, "texts") == ["train 0", "train 1", "train 2"]
    singles = config_of(tmp_path, "interactions", source(talks, max_rows=2))
    assert rows_in(singles, "interactions") == [talk(20_000), talk(20_001), talk(20_002), talk(20_003)]


def test_a_folder_is_found_from_the_data_root_and_a_bare_name_is_enough(talks: Path, tmp_path: Path) -> None:
    shutil.copytree(talks / "data", tmp_path / "plain")
    for path in (tmp_path / "plain").glob("steps-4*"):
        path.unlink()
    config = config_of(tmp_path, "conversations", "hf:plain")
    assert rows_in(config, "conversations") == expected(2, "train")


def test_a_corpus_of_two_configurations_says_which_row_is_from_which(talks: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, "conversations", source(talks), source(talks, config="steps-4", weight=2.0))
    corpus_of(config, tmp_path / "corpus")
    rows = kept_in(tmp_path / "corpus", "conversations")
    assert [row.row for row in rows] == expected(2, "train") + expected(4, "train")
    assert [row.source for row in rows] == [0] * 12 + [1] * 12
    assert {row.file for row in rows} == {"hf:talks:steps-2[train]", "hf:talks:steps-4[train]"}


@pytest.mark.parametrize("streaming", [True, False])
def test_bad_rows_have_their_place(tmp_path: Path, streaming: bool) -> None:
    rows = [turn(1), turn(2, answer=None), turn(3, query=" "), turn(4)]
    put_rows(tmp_path, "set/train.jsonl", rows)
    put_rows(tmp_path, "set/validation.jsonl", [turn(9)])
    settings = source("set", config=None, streaming=streaming)
    config = config_of(tmp_path, "interactions", settings, bad_rows="quarantine", max_bad_share=0.5)
    corpus_of(config, tmp_path / "corpus")
    assert [row.row for row in kept_in(tmp_path / "corpus", "interactions")] == [talk(1), talk(4)]
    assert [(row["file"], row["row"], row["column"], row["reason"]) for row in bad_rows_in(tmp_path / "corpus")] == [
        ("hf:set[train]", 2, "answer", "null"),
        ("hf:set[train]", 3, "query", "empty"),
    ]


# ---- what can't be read


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"split": "test"}, r"test.*\['train', 'validation'\]"),
        ({"config": "steps-9"}, r"'steps-9' not found\. Available: \['steps-2', 'steps-4'\]"),
        ({"config": None}, r"Config name is missing.*\['steps-2', 'steps-4'\]"),
    ],
)
def test_a_wrong_part_is_named_with_those_there_are(
    talks: Path, settings: dict[str, Any], reason: str, streaming: bool
) -> None:
    with pytest.raises(
        DataError, match=f"^hf:{talks}: cannot be read: .*{reason}.*; check the name, `config`, `split`"
    ):
        placed(run_of(talks, streaming=streaming, **settings), "conversations")


def test_a_missing_held_out_split_is_said_with_what_to_do(talks: Path) -> None:
    with pytest.raises(DataError, match=r"dev.*`validation_split` \(null if it has none\)"):
        placed(run_of(talks, validation_split="dev"), "conversations", "validation")


@pytest.mark.parametrize("name", ["nobody/nothing-such", "no name at all"])
def test_a_name_that_is_nowhere_says_what_to_check(name: str) -> None:
    for use in (lambda config: placed(config, "conversations"), source_identity):
        with pytest.raises(DataError, match=f"^hf:{name}: cannot be read: .*; check the name, .*`hf auth login`"):
            use(run_of(name))


def test_a_data_set_without_rows_is_an_error(tmp_path: Path) -> None:
    for split in SPLITS:
        put_rows(tmp_path, f"set/{split}.csv", [turn(1)])
    put(tmp_path, "set/train.csv", "query,answer\n")
    with pytest.raises(DataError, match=r"hf:set\[train\]: empty: no rows|cannot be read"):
        placed(config_of(tmp_path, "conversations", source("set", config=None)), "conversations")


def test_damage_in_the_middle_names_the_last_good_row(tmp_path: Path) -> None:
    lines = "".join(f'{{"text": "row {i} {"x" * 1000}"}}\n' for i in range(30_000))
    put(tmp_path, "set/train.jsonl", lines + '{"text": "torn')
    settings = source("set", config=None, validation_split=None)
    with pytest.raises(DataError, match=r"hf:set\[train\]: after row \d+: "):
        placed(config_of(tmp_path, "texts", settings), "texts")


# ---- identity


def test_identity_is_the_folders_content_not_its_place(talks: Path, tmp_path: Path) -> None:
    base = source_identity(run_of(talks))
    copy = tmp_path / ".cache" / "huggingface" / "snapshots" / "other name"
    shutil.copytree(talks, copy)
    for streaming in (True, False):
        assert source_identity(run_of(copy, streaming=streaming)) == base
    put(copy, ".git/index", "what git keeps")
    put(copy, ".cache/huggingface/download/lock", "what a download leaves")
    assert source_identity(run_of(copy)) == base
    put_rows(copy, "data/steps-2-train.parquet", [{**turn(1), "interactions": [turn(2)]}])
    assert source_identity(run_of(copy)) != base


@pytest.mark.parametrize(
    "change",
    [{"config": "steps-4"}, {"split": "validation"}, {"validation_split": None}, {"max_rows": 3}],
)
def test_identity_covers_what_selects_the_rows(talks: Path, change: dict[str, Any]) -> None:
    assert source_identity(run_of(talks, **change)) != source_identity(run_of(talks))


def test_rows_are_read_from_the_commit_that_identifies_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch may move on between plan and reading. The Hub is played: it can't be reached here."""
    commits = iter(["a" * 40, "b" * 40])
    asked, read = [], []

    def dataset_info(_: Any, path: str, revision: str | None, timeout: float) -> Any:
        asked.append((path, revision))
        return huggingface_hub.DatasetInfo(id=path, sha=next(commits), private=False, downloads=0, likes=0, tags=[])

    def load_dataset(path: str, revision: str | None, **_: Any) -> Any:
        read.append((path, revision))
        return [turn(1)]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    moving = HubSource(kind="hub", path="owner/moving", revision="main")
    assert hub.commit_of(moving) == "a" * 40
    assert [row.value for row in hub.read(moving, "train")] == [turn(1)]
    fixed = HubSource(kind="hub", path="owner/moving", revision="c" * 40)
    assert hub.commit_of(fixed) == "c" * 40
    assert len(list(hub.read(fixed, "train"))) == 1
    assert read == [("owner/moving", "a" * 40), ("owner/moving", "c" * 40)]
    assert asked == [("owner/moving", "main")]
