"""Promises of an evaluation as a whole: the same numbers every time; JSON, tables and a page, whatever is measured."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from rxt_platform.cli import guarded, rxt
from rxt_platform.config.rewards import RewardConfig
from rxt_platform.config.run import EvaluationConfig
from rxt_platform.data.rows import Conversation, Interaction, Recall, row_to_json
from rxt_platform.data.story_world import TASKS, StoryWorld
from rxt_platform.evaluation.conversations import hold_conversations
from rxt_platform.evaluation.evaluate import evaluate
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.report.report import render_evaluation, to_json, write_evaluation_page
from rxt_platform.evaluation.summary import recall_tables
from rxt_platform.model.baseline import StatelessTransformer, matched_baseline
from rxt_platform.model.files import STATELESS, save_model
from rxt_platform.model.transformer import ReactiveTransformer
from tests.unit.evaluations import ALONE, HAT, KITE, WINDOW, Listener, needs_references, talks_of
from tests.unit.helpers import tiny_config, tiny_model, word_tokenizer

CONFIG = tiny_config(vocab_size=word_tokenizer().vocab_size, max_length=WINDOW)
SETTINGS = EvaluationConfig(latency_conversations=0, samples=2)
STORIES = (*StoryWorld(0).conversations("validation", 4, 5, TASKS), replace(KITE, system="Lily plays."), ALONE, HAT)
EVALUATION = [
    "responder",
    "settings",
    "seed",
    "conversations",
    "turns",
    "cut",
    "questions",
    "answer_tokens",
    "memory_reset",
    "follow_up_gain",
    "by_turn",
    "recall",
    "recall_by_task",
    "recall_long_range",
    "recall_by_teller",
    "recall_overall",
    "reward",
    "free_running",
    "memory",
    "masked",
    "latency",
    "samples",
]
SHAPES: dict[str, Sequence[Conversation]] = {
    "one turn": [ALONE],
    "one conversation": [HAT],
    "single turns": [ALONE, ALONE],
    "no keys": [Conversation((Interaction("Tom plays.", "Good."), Interaction("What has Tom?", "A hat.")))] * 2,
    "system prompts": [replace(HAT, system="Lily plays."), HAT],
    "many turns": [Conversation(tuple(Interaction(f"Say {number}.", "Good.") for number in range(20)))],
    "hybrid": [
        Conversation(
            (
                Interaction("Tom has a kite.", "Good.", hybrid=True),
                Interaction("Fly it.", "", hybrid=True, think="Tom likes it.", tool_call="fly kite"),
            )
        )
    ],
}


@cache
def reactive() -> ReactiveTransformer:
    return tiny_model(CONFIG)


@cache
def stateless() -> StatelessTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return StatelessTransformer(matched_baseline(CONFIG, 256)).eval()


def measured(model: Any, talks: Sequence[Conversation], settings: EvaluationConfig = SETTINGS, **options: Any) -> Any:
    return evaluate(model, word_tokenizer(), talks, settings, **options)


def assert_close(found: Any, expected: Any) -> None:
    """The same, but for the rounding of its numbers."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    elif isinstance(expected, dict | list):
        keys = list(expected) if isinstance(expected, dict) else range(len(expected))
        assert len(found) == len(expected)
        for key in keys:
            assert_close(found[key], expected[key])
    else:
        assert found == expected


@pytest.mark.parametrize("model", [reactive, stateless])
def test_two_evaluations_are_the_same_and_the_batch_size_does_not_matter(model: Any) -> None:
    first = measured(model(), STORIES, seed=5)
    assert to_json(measured(model(), STORIES, seed=5)) == to_json(first)
    for batch_size in (1, 3):
        assert_close(measured(model(), STORIES, seed=5, batch_size=batch_size), first)
    other = measured(model(), STORIES, seed=6)
    for name in ("answer_tokens", "memory", "masked", "free_running") if model is reactive else ("answer_tokens",):
        assert (other[name] != first[name]) == (model is reactive), f"{name}: only memories are drawn at random"


@pytest.mark.parametrize("model", [reactive, stateless])
@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_is_measured_ends_in_strict_json_tables_and_a_page(model: Any, shape: str, tmp_path: Path) -> None:
    free_running = shape != "no keys"
    settings = EvaluationConfig(latency_conversations=1, samples=1, free_running=free_running)
    result = measured(model(), SHAPES[shape], settings)
    assert list(result) == EVALUATION
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["free_running"] is not None) == free_running
    assert (result["memory"] is None) == (result["masked"] is None) == (model is stateless)
    text = render_evaluation(result)
    assert not re.search(r"\b(nan|None|inf)\b", text)
    assert max(map(len, text.splitlines())) <= 100
    path = tmp_path / "page.html"
    write_evaluation_page(path, "<model> on <file>", result)
    page = path.read_text()
    assert "<model>" not in page
    assert not re.search(r"https?:|@import|url\(", page)
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_a_reactive_evaluation_has_all_measures() -> None:
    result = measured(reactive(), STORIES, EvaluationConfig(samples=2))
    assert result["responder"] == {
        "kind": "reactive",
        "history": None,
        "window": WINDOW,
        "interaction_window": WINDOW,
    }
    assert (result["conversations"], result["turns"]) == (7, 4 * 5 + 4 + 1 + 2)
    assert sum(row["count"] for row in result["by_turn"]) == result["answer_tokens"]["count"]
    assert len(result["memory"]["by_write"]) == 6
    assert len(result["memory"]["gates"]) == 2
    assert result["masked"]["count"] > 0
    assert result["reward"]["conversations"] == 6
    assert [row["turn"] for row in result["latency"]] == [1, 2, 3, 4, 5]
    assert len(result["samples"]) == 2
    assert set(result["recall_by_task"]) <= {*TASKS}
    by_distance = sum(entry["count"] for entry in result["recall"].values())
    assert by_distance == result["recall_overall"]["count"] == result["free_running"]["recall_overall"]["count"]


def test_the_first_turn_has_nothing_to_remember_so_a_reset_changes_nothing() -> None:
    first, second = measured(reactive(), STORIES[:4])["by_turn"][:2]
    assert first["with_memory"] == first["memory_reset"]
    assert second["with_memory"] != second["memory_reset"]
    with_prompt = measured(reactive(), STORIES[4:5])["by_turn"][0]
    assert with_prompt["with_memory"] == with_prompt["memory_reset"], "a system prompt is not forgotten"


def test_free_running_is_of_the_answers_over_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one who remembers references and nothing else."""
    talks, teller = talks_of(*[KITE, HAT] * 6), Listener(needs_references(KITE, HAT))
    outcomes = hold_conversations(teller, word_tokenizer(), talks, 0)
    monkeypatch.setattr("rxt_platform.evaluation.evaluate.hold_conversations", lambda *_: outcomes)
    result = measured(reactive(), [KITE, HAT] * 6)
    assert result["recall_overall"]["with_memory"] == 1.0
    own = recall_tables(outcomes, Bootstrap(12, 0), own=True)
    assert own["recall_overall"]["with_memory"] == 0.0
    assert result["free_running"] | {"reward": None} == own | {"reward": None}
    assert result["free_running"]["reward"]["mean"] < result["reward"]["mean"]


def test_a_stateless_model_without_history_gains_nothing() -> None:
    result = measured(stateless(), STORIES, history="none")
    assert result["responder"] == {"kind": "stateless", "history": "none", "window": 256, "interaction_window": 256}
    assert result["answer_tokens"] == result["memory_reset"]
    assert result["recall_overall"]["gain"] == 0.0
    full = measured(stateless(), STORIES)
    assert full["memory_reset"] == result["answer_tokens"]
    assert full["answer_tokens"]["loss"] != full["memory_reset"]["loss"]


def test_both_kinds_are_measured_on_the_same_tokens() -> None:
    long = Conversation((Interaction("Tom plays.", "Tom has a red hat. " * 30), Interaction("What?", "A hat.")))
    one = measured(reactive(), [long, HAT])["answer_tokens"]["count"]
    assert measured(stateless(), [long, HAT])["answer_tokens"]["count"] > one
    assert measured(stateless(), [long, HAT], window=WINDOW)["answer_tokens"]["count"] == one


def test_settings_reach_the_reward(tmp_path: Path) -> None:
    plain = measured(reactive(), [HAT])["reward"]
    tenth = measured(reactive(), [HAT], SETTINGS.model_copy(update={"reward": RewardConfig(scale=1.0)}))["reward"]
    assert tenth["mean"] == pytest.approx(plain["mean"] / 10)
    save_model(tmp_path, CONFIG, tiny_model(CONFIG, 4).state_dict(), word_tokenizer())
    other = measured(reactive(), [HAT], SETTINGS.model_copy(update={"reward_model": str(tmp_path)}))["reward"]
    assert other["components"]["cosine"] != plain["components"]["cosine"]
    assert other["components"]["bleu"] == plain["components"]["bleu"]


# ---- rxt eval


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A saved model of each kind, and conversations."""
    for name, model, kind in (("reactive", reactive(), "RxTAlpha"), ("stateless", stateless(), STATELESS)):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, model.config, dict(model.state_dict()), word_tokenizer(), kind)
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps(row_to_json(talk)) + "\n" for talk in STORIES))
    return {name: str(tmp_path / name) for name in ("reactive", "stateless", "talks.jsonl", "page.html")}


def ran(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What `rxt eval` prints, or its error."""
    assert guarded(lambda: rxt(["eval", *arguments], standalone_mode=False)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.mark.parametrize("name", ["reactive", "stateless"])
def test_eval_prints_json_and_writes_a_page(
    name: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (files[name], "--data", files["talks.jsonl"], "--seed", "5")
    printed = json.loads(ran(capsys, *arguments, "--json", "--report", files["page.html"]))
    model = reactive() if name == "reactive" else stateless()
    expected = measured(model, STORIES, EvaluationConfig(), seed=5)
    named = {"model": files[name], "data": files["talks.jsonl"]}
    assert printed | {"latency": []} == named | expected | {"latency": []}
    page = Path(files["page.html"]).read_text()
    assert f"{name} on talks.jsonl" in page
    assert page.count("data:image/png;base64,") == (5 if name == "reactive" else 4)
    text = ran(capsys, *arguments, "--limit", "2")
    assert text.startswith(f"{name} on talks.jsonl, seed 5\n2 conversations, ")
    assert "gain" in text


def test_eval_takes_history_free_running_limit_and_reward_model(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--history", "none", "--no-free-running", "--limit", "2", "--reward-model", files["reactive"], "--json")
    printed = json.loads(ran(capsys, files["stateless"], "--data", files["talks.jsonl"], *options))
    assert printed["responder"]["history"] == "none"
    assert printed["free_running"] is None
    assert printed["conversations"] == 2
    settings = EvaluationConfig(free_running=False, reward_model=files["reactive"])
    assert printed["reward"] == measured(stateless(), STORIES[:2], settings, history="none")["reward"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("reactive", ("--history", "full"), "--history is for stateless models"),
        ("reactive", ("--report", "/no/such/folder/page.html"), "no such folder"),
        ("reactive", ("--reward-model", "/no/such/model"), "no such model directory"),
        ("talks.jsonl", (), "no such model directory"),
    ],
)
def test_eval_says_what_is_wrong_before_it_measures(
    model: str,
    options: tuple[str, ...],
    message: str,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rxt_platform.evaluation.evaluate.hold_conversations", lambda *_: pytest.fail("measured"))
    assert message in ran(capsys, files[model], "--data", files["talks.jsonl"], *options, code=2)


def test_what_the_window_took_away_is_counted() -> None:
    long = Conversation((Interaction("Tom plays.", "Tom has a red hat. " * 30), Interaction("What?", "A hat.")))
    result = measured(reactive(), [long, HAT])
    assert result["cut"] == {"answers": 1, "queries": 0, "conversations": 1, "left_out": 0}
    left = measured(reactive(), [long, HAT], too_long="quarantine")
    assert left["cut"] == {"answers": 0, "queries": 0, "conversations": 0, "left_out": 1}


def test_questions_are_keyed_ones_or_all_follow_ups() -> None:
    plain = Conversation((Interaction("Tom plays.", "Good."), Interaction("What?", "A hat.")))
    assert measured(reactive(), [plain, plain])["questions"] == {"kind": "follow-ups", "conversations": 2}
    key = Recall(("hat",), 1, False)
    asked = Conversation((plain.interactions[0], replace(plain.interactions[1], recall=key)))
    assert measured(reactive(), [plain, asked])["questions"] == {"kind": "keyed", "conversations": 1}
