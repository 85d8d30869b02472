"""How long a turn takes, by turn: single conversations, one by one, as a single user would feel it.

Every turn generates the same number of tokens, also past `[EOS]`, so that turns compare. A stateless model reads its
whole history anew at every turn here; benchmarks/latency_by_turn.py also has one that keeps it.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from rxt_platform.evaluation.conversations import Talk
from rxt_platform.evaluation.responders import Responder, State
from rxt_platform.model.sampling import SamplingOptions

_TOKENS = 16  # generated in each turn
_MOST_TURNS = 32
_GREEDY_WITHOUT_END = SamplingOptions(stop=())


@torch.no_grad()
def latency_by_turn(
    responder: Responder[State], talks: Sequence[Talk], seed: int, conversations: int
) -> list[dict[str, Any]]:
    """Medians over the longest `conversations`, after one that is not timed.

    [{turn, conversations, prompt_ms (to the first token), tokens_per_second (of those after it), write_ms}]; a
    conversation's memory holds the reference answers.
    """
    chosen = sorted(talks, key=lambda talk: -len(talk.conversation.interactions))[:conversations]
    if not chosen:
        return []
    _time_conversation(responder, chosen[0], seed)
    timed = [_time_conversation(responder, talk, seed) for talk in chosen]
    rows = []
    for turn in range(len(timed[0])):
        times = [one[turn] for one in timed if turn < len(one)]
        rates = [rate for _, rate, _ in times if rate is not None]
        rows.append(
            {
                "turn": turn + 1,
                "conversations": len(times),
                "prompt_ms": 1000 * median(prompt for prompt, _, _ in times),
                "tokens_per_second": median(rates) if rates else None,
                "write_ms": 1000 * median(write for _, _, write in times),
            }
        )
    return rows


def _time_conversation(responder: Responder[State], talk: Talk, seed: int) -> list[tuple[float, float | None, float]]:
    """Of each turn, seconds to the first token, tokens per second after it, seconds of the write."""
    clock = _clock(responder.model.embedding.weight.device)
    state = responder.start([talk.seed(seed)])
    if talk.example.opening:
        state = responder.instruct(state, [talk.example.turns[0]])
    timed = []
    for turn in range(min(len(talk.conversation.interactions), _MOST_TURNS)):
        example = talk.turn(turn)
        (ids,), (answer,) = example.turns, example.target_starts
        begin = clock()
        answers = responder.stream([ids[:answer]], state, [_TOKENS], _GREEDY_WITHOUT_END)
        next(answers)
        first = clock()
        later = sum(1 for _ in answers)
        end = clock()
        state = responder.remember(state, [ids])
        timed.append((first - begin, later / (end - first) if later else None, clock() - end))
    return timed


def _clock(device: torch.device) -> Callable[[], float]:
    """Wall-clock seconds, when the device has done what it was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
