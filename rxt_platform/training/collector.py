"""Collects experience between updates: every rank holds its share of the conversations, all ranks hold the results.

A collection is a function of the weights at its start and of seeds, so it is not part of a checkpoint: checkpoints are
written between collections, and a resumed run collects again what the killed one had.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rxt_platform import errors
from rxt_platform.config.mrl import MemoryRLConfig, PolicyObjective
from rxt_platform.data.batches import Batch
from rxt_platform.errors import RewardError, RxtError
from rxt_platform.model.actor_critic import ActorCritic
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl.advantages import generalised_advantages, group_advantages, normalised, value_advantages
from rxt_platform.rl.critic import RewardService
from rxt_platform.rl.episodes import Experience, Rollout, answer_tensors, padded_states, written_batch
from rxt_platform.rl.held_out import HeldOut, correlation
from rxt_platform.rl.preferences import better_and_worse, paired
from rxt_platform.rl.rollouts import hold_episodes
from rxt_platform.rl.scoring import reward_tensors
from rxt_platform.stages.answers import Answered
from rxt_platform.stages.base import Phase
from rxt_platform.stages.memory_rl import EpisodeStage, MemoryRLStage, critic_values
from rxt_platform.training.distributed import on_rank_zero, raise_together
from rxt_platform.training.measures import Metrics, StepClock
from rxt_platform.training.strategy import Strategy

logger = logging.getLogger(__name__)

_AT_ONCE, _GROUPS = 256, 4
"""Answers that are generated together, at most; and groups of them where a service gives the rewards of one while the
next is generated."""


@dataclass
class _Held:
    """What came of one rank's conversations, with their places in the collection."""

    places: list[int]
    rollouts: list[Rollout]
    rewards: list[list[list[float | None]]]
    values: list[list[list[float]]]


class Collector:
    """Gives an engine the experience of each step: of a new collection or of the one that is held."""

    def __init__(
        self,
        stage: EpisodeStage,
        strategy: Strategy,
        device: torch.device,
        clock: StepClock,
        micro: int,
        service: RewardService | None,
    ) -> None:
        self.stage, self.strategy, self.device, self.clock, self.micro = stage, strategy, device, clock, micro
        self.service = service
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.metrics: Metrics = {}
        self._reward_seconds = 0.0
        self._number: int | None = None
        self._experience: Experience | None = None
        if stage.reference is not None:
            stage.reference.to(device, strategy.precision).requires_grad_(False).eval()

    def batch(self, step: int, conversations: Batch, phase: Phase) -> Experience:
        """The experience of a step on all ranks: the same everywhere, as a global batch.

        Raises an RxtError on all ranks when one of them can't get its answers, rewards or values.
        """
        config = self.stage.config
        number, update = divmod(step, config.updates)
        if self._number != number:
            assert not update, f"step {step} is inside a collection that is not held"
            self._experience = self._collect(number, step, conversations, phase)
            self._number = number
        assert self._experience is not None
        return self._experience.minibatch(self._rows(number, update))

    def evaluate(self, validation: Sequence[Batch]) -> Metrics:
        """Held-out metrics of one batch of conversations, of which every rank holds its share. All raise if one fails.

        They are those that the stage's config lists."""
        (batch,) = validation
        share = batch.rows_at(torch.arange(len(batch.rows))[self.rank :: self.world])  # may be none
        with self.strategy.whole_model() as model:
            model.eval()
            try:
                parts: list[HeldOut] = self._together(lambda: self.stage.hold_out(model, share))
            finally:
                model.train()
        found = HeldOut.joined(parts).metrics()
        return {name: found[name] for name in self.stage.config.metrics if name in found}

    def _rows(self, number: int, update: int) -> list[int]:
        """The episodes of an update: each once in every pass, neighbours of like length kept together."""
        config = self.stage.config
        epoch, part = divmod(update, config.minibatches)
        size = config.global_batch_size
        order = np.random.default_rng([self.stage.sampler.sampling.seed, 5, number, epoch]).permutation(
            size * config.minibatches
        )
        return sorted(order[part * size : (part + 1) * size].tolist())

    @torch.no_grad()
    def _collect(self, number: int, step: int, conversations: Batch, phase: Phase) -> Experience:
        config = self.stage.config
        with self.strategy.whole_model() as model:
            model.eval()
            self._publish(model, number)
            try:
                held = self._together(lambda: self._hold(model, number, step, conversations))
            finally:
                model.train()
        with self.clock.part("collection"):
            experience = self._assemble(held, number)
            if config.updates > 1 or self.stage.reference is not None:
                experience = self._with_log_probs(experience, phase)
        return experience

    def _hold(self, model: ReactiveTransformer, number: int, step: int, conversations: Batch) -> _Held:
        """This rank's share: every `world`-th conversation, so that all have as much to do."""
        config = self.stage.config
        self._reward_seconds = 0.0
        places = list(range(self.rank, len(conversations.rows), self.world))
        episodes = self.stage.episodes(conversations.rows_at(torch.tensor(places)), step)
        size = max(1, _AT_ONCE // config.answers)
        if self.service is not None:  # what it computes, this process need not wait for
            size = min(size, max(1, len(episodes) // _GROUPS))
        groups = [slice(start, start + size) for start in range(0, len(episodes), size)]
        rollouts: list[Rollout] = []
        rewards: list[list[list[float | None]]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="rewards") as thread:
            waiting = []
            for group in groups:
                with self.clock.part("generation"):
                    held = hold_episodes(model, episodes[group], self.stage.options)
                rollouts += held
                waiting.append(thread.submit(self._timed_rewards, held))
            with self.clock.part("reward"):
                for future in waiting:
                    found, seconds = future.result()
                    rewards += found
                    self._reward_seconds += seconds
                values = self._values(model, number, rollouts)
        return _Held(places, rollouts, rewards, values)

    def _timed_rewards(self, rollouts: Sequence[Rollout]) -> tuple[list[list[list[float | None]]], float]:
        """And the seconds that they took, also while others were generated."""
        started = time.perf_counter()
        return self.stage.rewards(rollouts), time.perf_counter() - started

    def _values(self, model: ReactiveTransformer, number: int, rollouts: Sequence[Rollout]) -> list[list[list[float]]]:
        """The critic's value of each asked turn, by the weights of this collection's start; none without a critic."""
        if not isinstance(model, ActorCritic):
            return [[] for _ in rollouts]
        states = self.stage.states(rollouts, model.critic.window)
        asked = [one for row in states for group in row for one in group]
        if self.service is not None:
            found = self.service.values(asked, number)
        else:
            padded = padded_states([[[one]] for one in asked], 1)[:, 0, 0].to(self.device)
            found = [value for part in padded.split(_AT_ONCE) for value in critic_values(model, part).tolist()]
        if len(found) != len(asked) or not np.isfinite(found).all():
            raise RewardError(f"{len(found)} values for {len(asked)} states, or some that are not finite")
        given = iter(found)
        return [[[next(given) for _ in group] for group in row] for row in states]

    def _publish(self, model: ReactiveTransformer, number: int) -> None:
        """The critic's weights of this collection; a resumed run publishes the same ones again."""
        service = self.service
        if service is not None and isinstance(model, ActorCritic):
            critic = model.critic
            on_rank_zero(lambda: service.publish(number, critic))

    def _together(self, hold: Callable[[], Any]) -> list[Any]:
        """What all ranks made; if one fails, all raise its error."""
        mine: Any
        try:
            mine = hold()
        except RxtError as error:
            logger.exception("the collection failed")
            mine = (type(error).__name__, str(error))
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, mine)
        failed = {rank: one for rank, one in enumerate(everyone) if isinstance(one, tuple)}
        if failed:
            (kind, *others) = {one[0] for one in failed.values()}
            raised: type[RxtError] = RewardError if others else getattr(errors, kind)
            raise_together(raised("; ".join(f"worker {rank}: {one[1]}" for rank, one in failed.items())))
        return everyone

    def _assemble(self, held: Sequence[_Held], number: int) -> Experience:
        """All ranks' episodes in the collection's order, with advantages over all of them."""
        config = self.stage.config
        order = sorted((place, rank, at) for rank, one in enumerate(held) for at, place in enumerate(one.places))
        rollouts = [held[rank].rollouts[at] for _, rank, at in order]
        rewards = [held[rank].rewards[at] for _, rank, at in order]
        values = [held[rank].values[at] for _, rank, at in order]
        turns = max(one.episode.turns for one in rollouts)
        worth, scored = reward_tensors(rewards, turns)
        if not scored.any():
            rows = ", ".join(self.stage.sampler.place(one.episode.row) for one in rollouts)
            raise_together(
                RewardError(
                    "no question of a whole collection has an answer key, which all of the reward hangs on: give more "
                    "rows keys, take more at once (global_batch_size), or give other parts of the reward weight; "
                    f"the rows are {rows}"
                )
            )
        self.metrics = self._measured(worth, scored)
        advantages, returns = torch.zeros_like(worth), torch.zeros(*worth.shape[:2], 1)
        states = torch.zeros(len(rollouts), turns, 1, 0, dtype=torch.int64)
        if config.critic is not None:
            advantages, returns, states = self._valued(rollouts, worth, scored, values)
        if isinstance(config, MemoryRLConfig):
            if isinstance(config.objective, PolicyObjective):
                if config.objective.advantage == "group":
                    advantages = group_advantages(worth, scored, config.objective.by_deviation)
                advantages = normalised(advantages, scored, config.objective.normalise)
            else:
                rollouts, scored = paired(
                    rollouts,
                    worth,
                    scored,
                    neutral=config.objective.anchor_weight > 0,
                    teacher_forced=config.memory == "teacher_forced",
                )
                worth = advantages = torch.zeros(scored.shape)
        ids, targets = answer_tensors(rollouts, turns)
        objective = config.objective if isinstance(config, MemoryRLConfig) else None
        if isinstance(objective, PolicyObjective) and not objective.regularised:
            targets &= (advantages != 0)[..., None]  # the others would be decoded for nothing
        empty = torch.zeros(ids.shape)
        return Experience(
            written=written_batch(rollouts),
            ids=ids,
            targets=targets,
            old=empty,
            reference=empty.clone(),
            rewards=worth,
            advantages=advantages,
            scored=scored,
            states=states,
            returns=returns,
            on_policy=config.updates == 1,
            total_answers=int(scored.sum()),
            total_written=int(targets.any(dim=-1).sum()),
            total_states=0,
        )

    def _valued(
        self,
        rollouts: Sequence[Rollout],
        worth: Tensor,
        scored: Tensor,
        values: Sequence[Sequence[Sequence[float]]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages by the critic's values, its targets, and what it read; of a critic of answers only the last."""
        config, model = self.stage.config, self.strategy.model
        states = self.stage.states(rollouts, model.critic.window)
        asked = scored.any(dim=-1)
        if self.stage.reads_answers:
            places = scored.nonzero().tolist()
            told = torch.tensor([[values[b][n][k], float(worth[b, n, k])] for b, n, k in places])
            self.metrics["critic_correlation"] = float(correlation(told[:, 0], told[:, 1]))
            pairs = better_and_worse(states, worth, scored)
            read = padded_states(pairs, worth.shape[1])
            return torch.zeros_like(worth), torch.zeros(read.shape[:3]), read
        known = torch.zeros(worth.shape[:2])
        for b, row in enumerate(values):
            for n, one in enumerate(row):
                known[b, n] = one[0] if one else 0.0
        mean = (worth * scored).sum(dim=-1) / scored.sum(dim=-1).clamp(min=1)
        self.metrics["critic_correlation"] = float(correlation(known[asked], mean[asked]))
        objective = config.objective if isinstance(config, MemoryRLConfig) else None
        if isinstance(objective, PolicyObjective) and objective.advantage == "gae":
            advantages, returns = generalised_advantages(worth, scored, known, objective.discount, objective.decay)
        else:
            advantages, returns = value_advantages(worth, scored, known)
        kept = [[one if asked[b, n] else [] for n, one in enumerate(row)] for b, row in enumerate(states)]
        return advantages, returns[..., None], padded_states(kept, worth.shape[1])

    def _measured(self, worth: Tensor, scored: Tensor) -> Metrics:
        found = worth[scored]
        by_question = scored.all(dim=-1)
        spread = worth.std(dim=-1, correction=0)[by_question]
        return {
            "reward": float(found.mean()),
            "reward_deviation": float(found.std(correction=0)),
            "reward_spread": float(spread.mean()) if len(spread) else 0.0,
            "reward_work_seconds": self._reward_seconds,
        }

    def _with_log_probs(self, experience: Experience, phase: Phase) -> Experience:
        """The sampled tokens' log-probabilities by the update's own path, and by the reference over its own memory."""
        stage = self.stage
        assert isinstance(stage, MemoryRLStage)
        old, reference = experience.old, experience.reference
        for number, part in enumerate(experience.shares(self.rank, self.world, self.micro)):
            start = (number * self.world + self.rank) * self.micro
            moved = part.to(self.device)
            if not experience.on_policy:
                found: Answered = self.strategy.engine(moved, phase, answers=True)
                _put(old, start, found.spread(found.log_probs, moved.old))
            if stage.reference is not None:
                found = stage.answers(stage.reference, moved, phase)
                _put(reference, start, found.spread(found.log_probs, moved.reference))
        if self.world > 1:
            for tensor in (old, reference):
                summed = tensor.to(self.device)
                dist.all_reduce(summed)
                tensor.copy_(summed)
        return experience


def _put(whole: Tensor, start: int, part: Tensor) -> None:
    """A part's values [b, n, G, t] into those of all [B, N, G, T], from row `start` on."""
    rows, turns, _, length = part.shape
    whole[start : start + rows, :turns, :, :length] = part.cpu()
