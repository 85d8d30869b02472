"""Promises of rows as token ids: where a system prompt goes, and which tokens of a reply are learned."""

from rxt_platform.data.batches import collate
from rxt_platform.data.examples import RowEncoder, TooLong
from rxt_platform.data.rows import Conversation, Interaction, RowError
from rxt_platform.data.tokenizer import ANSWER, BOS, CALL, EOS, INTERNAL, QUERY, THINK
from tests.unit.helpers import word_tokenizer

WINDOW = 32


def encoder(too_long: TooLong = "truncate", window: int = WINDOW) -> RowEncoder:
    return RowEncoder(word_tokenizer(), window, too_long)


def test_a_system_prompt_is_a_turn_of_its_own_before_the_first_without_any_target() -> None:
    turns = (Interaction("one two", "three"), Interaction("four", "five six"))
    with_prompt, without = (encoder().encode([Conversation(turns, system)])[0] for system in ("be kind", None))
    assert isinstance(with_prompt, list)
    assert isinstance(without, list)
    (example,), (plain,) = with_prompt, without
    words = word_tokenizer().encode("be kind")
    assert example.turns == ((BOS, INTERNAL, *words, EOS), *plain.turns)
    assert (example.opening, plain.opening) == (1, 0)
    assert example.without_opening() == plain == plain.without_opening()
    assert example.first_turns(1).turns == example.turns[:2]
    assert not collate([example], [0], [0]).targets[0, 0].any()


def test_a_system_prompt_that_is_too_long_is_cut_or_refused_as_the_policy_says() -> None:
    talk = Conversation((Interaction("one", "two"),), " ".join(["kind"] * 3 * WINDOW))
    (cut,) = encoder("truncate").encode([talk])
    assert isinstance(cut, list)
    assert len(cut[0].turns[0]) == WINDOW
    assert (cut[0].truncated, cut[0].opening) == (1, 1)
    (refused,) = encoder("quarantine").encode([talk])
    assert isinstance(refused, RowError)
    assert refused.column == "system"
    assert "too long" in refused.reason


def test_all_that_a_hybrid_reply_says_is_a_target_with_its_markers_and_nothing_before_it() -> None:
    """`[BOS][I]..[Q]..` is given; `[T]..[A]..[C]..[EOS]` is learned: also whether to think first."""
    turn = Interaction("one two", "three", hybrid=True, internal="kind", think="four", tool_call="five")
    (made,) = encoder(window=64).encode([Conversation((turn,))])
    assert isinstance(made, list)
    (example,) = made
    batch = collate([example], [0], [0])
    learned = batch.ids[0, 0][batch.targets[0, 0]].tolist()
    words = word_tokenizer()
    said = [THINK, *words.encode("four"), ANSWER, *words.encode("three"), CALL, *words.encode("five"), EOS]
    assert learned == said
    given = batch.ids[0, 0][~batch.targets[0, 0]].tolist()
    assert given == [BOS, INTERNAL, *words.encode("kind"), QUERY, *words.encode("one two")]
