"""Everything that is measured of one model on one set of conversations, as one JSON-ready object."""

from collections.abc import Sequence
from typing import Any

from rxt_platform.config.run import EvaluationConfig
from rxt_platform.data.examples import RowEncoder, TooLong
from rxt_platform.data.rows import Conversation
from rxt_platform.data.tokenizer import RxtTokenizer
from rxt_platform.evaluation.conversations import Progress, any_keyed, encode_talks, hold_conversations
from rxt_platform.evaluation.intervals import Bootstrap
from rxt_platform.evaluation.latency import latency_by_turn
from rxt_platform.evaluation.masked import masked_tokens
from rxt_platform.evaluation.memory_health import memory_health
from rxt_platform.evaluation.responders import History, ReactiveResponder, Responder, StatelessResponder
from rxt_platform.evaluation.rewards import reward_entry
from rxt_platform.evaluation.summary import answer_tokens, recall_tables, spread_samples
from rxt_platform.model.baseline import StatelessTransformer
from rxt_platform.model.files import WEIGHTS, find_model
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.rewards import HashedEmbedding, TextEmbedding, TokenEmbedding
from rxt_platform.storage.directory import file_hash

Evaluation = dict[str, Any]
"""What was measured; a number for which there was nothing to measure is None. Intervals are 95 %, [low, high] or None.

    responder         {kind: reactive | stateless, history: full | none | None, window (of the model), and
                      interaction_window (what an interaction was cut to): tokens}
    settings          {free_running, reward, latency_conversations, samples: as `EvaluationConfig` says; too_long;
                      reward_model: sha256 of its weights, or None}
    seed, conversations (used), turns (of all of them)
    cut               {answers, queries (interactions that lost the end of one), conversations (with such), left_out}
    questions         {kind: keyed | follow-ups, conversations (that ask some)}: without any answer key every follow-up
                      is a question about the first turn, to be answered word for word
    answer_tokens     {loss (nats), perplexity, accuracy, count, intervals: {loss, perplexity, accuracy}} of the answer
                      tokens, the memory teacher-forced; memory_reset the same with the memory reset
    follow_up_gain    {nats, interval, count}: loss with the memory reset less that with memory, of the answer tokens
                      of all turns but the first
    by_turn           [{turn (from 1), count (tokens), with_memory, memory_reset: as answer_tokens}]
    recall            {distance in turns, 1 to 16 or "17+": {with_memory, reset, gain, count (questions),
                      intervals: {with_memory, reset, gain}}}; recall_by_task {task: the same} and recall_long_range
                      {true, false: the same}, recall_by_teller {user, model: the same; who told the asked facts}, all
                      empty where no row carries answer keys; recall_overall one such
    reward            {mean, interval, min, max, components: {bleu, cosine, length}, conversations, scores}: composite
                      MRL reward of the follow-ups, 0 to 10 unless configured; `scores` by conversation; a component
                      `recall` (of questions with an answer key) where it has a weight
    free_running      {recall, recall_by_task, recall_long_range, recall_by_teller, recall_overall, reward} where the
                      memory holds the model's own answers instead of the references; None if turned off. Facts that
                      only a reference answer tells (teller "model") may then never have been told
    memory            {by_write: [{write, conversations, norm, change, effective_rank, slot_similarity}],
                      gates: [{layer, mean, min, max}]}; None of a stateless model
    masked            {loss, accuracy, count, intervals: {loss, accuracy}} of the encoder's guesses; None of a stateless
                      model
    latency           [{turn, conversations, prompt_ms, tokens_per_second, write_ms}], the only part that differs when
                      it is measured again
    samples           [[{query, reference, answer} for each turn] for some conversations], free-running if that is on

Of a stateless model, "with memory" reads as "with its history", and "reset" as "without".
"""


def evaluate(
    model: ReactiveTransformer | StatelessTransformer,
    tokenizer: RxtTokenizer,
    conversations: Sequence[Conversation],
    settings: EvaluationConfig,
    seed: int = 0,
    history: History = "full",
    too_long: TooLong = "truncate",
    window: int | None = None,
    batch_size: int = 50,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on all of `conversations` (`settings.conversations` is the caller's).

    Of an interaction, what exceeds `window` tokens (the model's window if not given) is cut; with `too_long`
    "quarantine" such a conversation is left out, with "fail" it raises DataError, as do conversations of which nothing
    is left. `history` is what a stateless model reads.
    """
    embedding = _embedding(settings)
    model.eval()
    longest = min(window or model.config.max_length, model.config.max_length)
    talks = encode_talks(conversations, RowEncoder(tokenizer, longest, too_long))
    bootstrap = Bootstrap(len(talks), seed)
    responder = _responder(model, history)
    reactive = model if isinstance(model, ReactiveTransformer) else None
    outcomes = hold_conversations(responder, tokenizer, talks, seed, settings.free_running, batch_size, progress)

    def answers(own: bool) -> Evaluation:
        reward = reward_entry(outcomes, settings.reward, embedding, bootstrap, own)
        return {**recall_tables(outcomes, bootstrap, own), "reward": reward}

    return {
        "responder": {
            "kind": "reactive" if reactive else "stateless",
            "history": None if reactive else history,
            "window": model.config.max_length,
            "interaction_window": longest,
        },
        "settings": _recorded(settings, too_long),
        "seed": seed,
        "conversations": len(talks),
        "turns": len(outcomes),
        "cut": {
            "answers": sum(talk.example.truncated for talk in talks),
            "queries": sum(talk.example.queries_cut for talk in talks),
            "conversations": sum(bool(talk.example.truncated or talk.example.queries_cut) for talk in talks),
            "left_out": len(conversations) - len(talks),
        },
        "questions": {
            "kind": "keyed" if any_keyed(talks) else "follow-ups",
            "conversations": len({one.conversation for one in outcomes if one.question is not None}),
        },
        **answer_tokens(outcomes, bootstrap),
        **answers(own=False),
        "free_running": answers(own=True) if settings.free_running else None,
        "memory": memory_health(reactive, talks, seed) if reactive else None,
        "masked": masked_tokens(reactive, talks, seed, bootstrap) if reactive else None,
        "latency": latency_by_turn(responder, talks, seed, settings.latency_conversations),
        "samples": spread_samples(outcomes, len(talks), settings.samples),
    }


def _recorded(settings: EvaluationConfig, too_long: TooLong) -> dict[str, Any]:
    path = settings.reward_model
    model = None if path is None else file_hash(find_model(path) / WEIGHTS)
    kept = settings.model_dump(mode="json", exclude={"conversations", "reward_model"})
    return {**kept, "reward_model": model, "too_long": too_long}


def _responder(model: ReactiveTransformer | StatelessTransformer, history: History) -> Responder[Any]:
    return ReactiveResponder(model) if isinstance(model, ReactiveTransformer) else StatelessResponder(model, history)


def _embedding(settings: EvaluationConfig) -> TextEmbedding:
    """What the reward measures meaning with: the same for all models that are compared."""
    if settings.reward_model is None:
        return HashedEmbedding()
    return TokenEmbedding(find_model(settings.reward_model))
