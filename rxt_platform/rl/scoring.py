"""From held episodes to rewards: what is scored, by which mode, in this process or by whoever is asked (REF 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rxt_platform.config.mrl import Strategy
from rxt_platform.config.rewards import RewardConfig
from rxt_platform.data.rows import Interaction
from rxt_platform.data.tokenizer import RxtTokenizer, answer_ids
from rxt_platform.errors import RewardError
from rxt_platform.rl.critic import Scorer
from rxt_platform.rl.episodes import Rollout
from rxt_platform.rl.rewards import Reward, ScoredTurn, TextEmbedding, score_conversations


class LocalScorer:
    """Rewards computed in this process."""

    def __init__(self, config: RewardConfig, embedding: TextEmbedding) -> None:
        self.config, self.embedding = config, embedding

    def score(self, conversations: Sequence[Sequence[ScoredTurn]]) -> list[list[Reward]]:
        """See `Scorer`."""
        return score_conversations(conversations, self.config, self.embedding)


def scored_turns(rollout: Rollout, number: int, tokenizer: RxtTokenizer, strategy: Strategy) -> list[ScoredTurn]:
    """A held episode as text, with the sampled answer `number` of each question, or its last.

    What an answer is compared with as saved is the reference interaction before it: else a model would be paid for
    saying the same again.
    """
    episode = rollout.episode
    first, *asked = episode.interactions
    turns = [ScoredTurn(first.query, first.reply, first.reply, None)]
    far = strategy == "long_range" or (strategy == "mixed" and _long_range(asked[-1]))
    saved = first_saved = f"{first.query} {first.reply}"
    for step, item in enumerate(asked):
        sampled = rollout.answers[episode.given + step]
        said = tokenizer.decode(answer_ids(sampled[min(number, len(sampled) - 1)]))
        last = far and step == len(asked) - 1
        turns.append(
            ScoredTurn(
                item.query,
                item.reply,
                said,
                first_saved if last else saved,
                spans=None if item.recall is None else item.recall.spans,
                mode="long_range" if last else "topic_change" if far and not step else "standard",
            )
        )
        saved = f"{item.query} {item.reply}"
    return turns


def score_rollouts(
    rollouts: Sequence[Rollout], scorer: Scorer, tokenizer: RxtTokenizer, strategy: Strategy, config: RewardConfig
) -> list[list[list[float | None]]]:
    """The reward of every sampled answer, by episode, turn and number; None for one that can't have any.

    Raises RewardError when the scorer gives another number of rewards than were asked for, none to an answer that has
    one by `config`, or one that is not finite.
    """
    groups = max(len(answers) for one in rollouts for answers in one.answers)
    talks = [scored_turns(one, number, tokenizer, strategy) for number in range(groups) for one in rollouts]
    rewards = scorer.score(talks)
    if [len(one) for one in rewards] != [len(talk) - 1 for talk in talks]:
        raise RewardError(f"{sum(map(len, rewards))} rewards for {sum(map(len, talks)) - len(talks)} answers")
    for talk, given in zip(talks, rewards, strict=True):
        for turn, reward in zip(talk[1:], given, strict=True):
            if (reward.total is None) != (config.weights.recall == 1 and not turn.spans):
                told = "no reward" if reward.total is None else "a reward"
                raise RewardError(
                    f"the question {turn.query!r} got {told}, by the stage's weights it must be the other way round: "
                    "who gives rewards has other weights"
                )
    made = list[list[list[float | None]]]()
    for at, one in enumerate(rollouts):
        of = [rewards[number * len(rollouts) + at] for number in range(groups)]
        counts = [len(answers) for answers in one.answers[one.episode.given :]]
        totals = [[_finite(group[step].total) for group in of[:count]] for step, count in enumerate(counts)]
        nothing: list[list[float | None]] = [[] for _ in range(one.episode.given)]
        made.append(nothing + totals)
    return made


def reward_tensors(rewards: Sequence[Sequence[Sequence[float | None]]], turns: int) -> tuple[Tensor, Tensor]:
    """Rewards and which answers have one, [B, N, G] both."""
    groups = max(len(one) for row in rewards for one in row)
    made = torch.zeros(len(rewards), turns, groups)
    known = torch.zeros(made.shape, dtype=torch.bool)
    for b, row in enumerate(rewards):
        for n, answers in enumerate(row):
            for g, value in enumerate(answers):
                if value is not None:
                    made[b, n, g], known[b, n, g] = value, True
    return made, known


def _long_range(question: Interaction) -> bool:
    return question.recall is not None and question.recall.long_range


def _finite(value: float | None) -> float | None:
    if value is not None and not -1e9 < value < 1e9:
        raise RewardError(f"a reward of {value}: it must be a finite number")
    return value
