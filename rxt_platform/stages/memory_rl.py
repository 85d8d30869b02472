"""MRL: conversations are held by the model itself, and answers that were worth more become likelier (REF 4).

The whole episode is one forward, as in memory-aware training: memories are written anew from the stored seed, with
gradient, and the sampled answers decoded over them, so that a late answer's reward reaches the first write (DESIGN 4).
What was collected (answers, rewards, advantages) comes from the engine's collector as an `Experience`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_platform.config.mrl import CriticPretrainingConfig, EpisodeConfig, MemoryRLConfig, PolicyObjective
from rxt_platform.config.stage_base import Component
from rxt_platform.data.batches import Batch
from rxt_platform.data.recall import matches
from rxt_platform.data.sampler import EpisodeSampler
from rxt_platform.data.tokenizer import BOS, PAD, RxtTokenizer, answer_ids
from rxt_platform.model.actor_critic import ActorCritic
from rxt_platform.model.flops import ForwardFlops
from rxt_platform.model.transformer import ReactiveTransformer
from rxt_platform.rl import objective
from rxt_platform.rl.critic import Scorer, state_ids
from rxt_platform.rl.episode_set import EpisodeSet
from rxt_platform.rl.episodes import Episode, Experience, Rollout, padded_states
from rxt_platform.rl.held_out import HeldOut
from rxt_platform.rl.rollouts import RolloutOptions, hold_episodes
from rxt_platform.rl.scoring import reward_tensors, score_rollouts
from rxt_platform.stages.answers import Answered, answered
from rxt_platform.stages.base import LossReport, Phase, with_metrics

_CRITIC: frozenset[Component] = frozenset({"critic", "critic_head"})
_MEMORY: frozenset[Component] = frozenset({"memory_attention", "memory_cross_attention"})
_MEMORY_AND_ENCODER: frozenset[Component] = _MEMORY | {"encoder"}
_ALL: frozenset[Component] = _MEMORY_AND_ENCODER | {"embedding", "decoder", "head"}


@dataclass(frozen=True)
class Judging:
    """What is needed to hold conversations and to judge them. `reference` is the frozen model of KL and DMPO."""

    held_out: EpisodeSet
    tokenizer: RxtTokenizer
    scorer: Scorer
    reference: ReactiveTransformer | None = None


class EpisodeStage:
    """What MRL and the critic's own stage share: conversations to be held, and how they are judged.

    Without `judging` a stage can be planned, but not run; the sampler's rows are an `EpisodeSet` where it runs.
    """

    def __init__(self, config: EpisodeConfig, sampler: EpisodeSampler, judging: Judging | None = None) -> None:
        self.config, self.sampler, self._judging = config, sampler, judging

    @property
    def judging(self) -> Judging:
        """What it was given."""
        assert self._judging is not None
        return self._judging

    @property
    def reference(self) -> ReactiveTransformer | None:
        """The frozen model that answers are compared with, if the objective asks for one."""
        return self.judging.reference

    @property
    def options(self) -> RolloutOptions:
        """How training episodes are held."""
        config = self.config
        return RolloutOptions(
            config.answers,
            config.temperature,
            config.max_answer_tokens,
            config.memory == "teacher_forced",
            keyed_only=config.reward.weights.recall == 1,
        )

    def episodes(self, batch: Batch, step: int) -> list[Episode]:
        """A batch of training conversations as episodes."""
        config, rows = self.config, self.sampler.examples
        assert isinstance(rows, EpisodeSet)
        carried: Sequence[int | None] = ()
        if config.carry_over and step >= self._step(config.carry_over_from):
            carried = rows.carried(batch, config.carry_over)
        return rows.episodes(batch, carried)

    def rewards(self, rollouts: Sequence[Rollout]) -> list[list[list[float | None]]]:
        """Of every sampled answer, by episode, turn and number."""
        judging = self.judging
        return score_rollouts(rollouts, judging.scorer, judging.tokenizer, self.config.strategy, self.config.reward)

    def states(self, rollouts: Sequence[Rollout], window: int) -> list[list[list[list[int]]]]:
        """What the critic reads at each asked turn: the interaction that was written last, and the query.

        A critic of answers reads each of them too.
        """
        return [
            [
                [state_ids(one.written[turn - 1], prompt, window) for prompt in self._read(one, turn)]
                for turn in range(one.episode.turns)
            ]
            for one in rollouts
        ]

    def _read(self, rollout: Rollout, turn: int) -> list[list[int]]:
        """The prompts of a turn that was asked, with the answers to it if the critic reads them."""
        prompt, answers = rollout.episode.prompt(turn), rollout.answers[turn]
        if self.reads_answers:
            return [[*prompt, *answer] for answer in answers]
        return [prompt] if answers else []

    @property
    def reads_answers(self) -> bool:
        """Whether the critic judges answers, not questions."""
        return isinstance(self.config, CriticPretrainingConfig) and self.config.learns == "preferences"

    def _step(self, epochs: float) -> int:
        return self.sampler.steps(epochs) if epochs else 0

    @torch.no_grad()
    def hold_out(self, model: ReactiveTransformer, batch: Batch) -> HeldOut:
        """Held-out conversations, held with sampled answers and, of a policy that is trained, with greedy ones."""
        if not len(batch.rows):
            return HeldOut()
        episodes = self.judging.held_out.episodes(batch)
        forced = self.config.memory == "teacher_forced"
        limit = self.config.max_answer_tokens
        sampled = hold_episodes(model, episodes, RolloutOptions(1, self.config.temperature, limit, forced))
        rewards, known = reward_tensors(self.rewards(sampled), max(one.turns for one in episodes))
        greedy, right, asked = torch.zeros(0), 0, 0
        if isinstance(self.config, MemoryRLConfig):
            answered = hold_episodes(model, episodes, RolloutOptions(1, 0.0, limit, forced))
            worth, has = reward_tensors(self.rewards(answered), rewards.shape[1])
            greedy, (right, asked) = worth[has], self._recall(answered)
        values = judged = torch.zeros(0)
        if isinstance(model, ActorCritic) and known.any():
            states = padded_states(self.states(sampled, model.critic.window), rewards.shape[1])[:, :, 0]
            has_one = known.any(dim=-1)
            values = critic_values(model, states[has_one].to(model.critic.embedding.weight.device)).cpu()
            judged = rewards[..., 0][has_one]
        return HeldOut(rewards[known].tolist(), greedy.tolist(), right, asked, values.tolist(), judged.tolist())

    def _recall(self, rollouts: Sequence[Rollout]) -> tuple[int, int]:
        """Questions with an answer key whose first answer holds it, and all that have one."""
        right = asked = 0
        for one in rollouts:
            for turn in range(one.episode.given, one.episode.turns):
                item = one.episode.asked(turn)
                if item.recall is not None:
                    asked += 1
                    said = self.judging.tokenizer.decode(answer_ids(one.answers[turn][0]))
                    right += matches(said, item.reply, item.recall.spans)
        return right, asked

    def _critic_loss(self, model: ActorCritic, part: Experience) -> Tensor:
        """Of values, on a scale of 1, the mean squared error over the states of the global batch; of answers the mean
        over pairs of -log sigmoid(V_better - V_worse) (Bradley and Terry)."""
        if not part.states.shape[-1] or not (present := part.states[..., 0] != PAD).any():
            # a forward all the same, so that every trained parameter has a gradient
            nothing = torch.full((1, 1), BOS, dtype=torch.int64, device=part.ids.device)
            return model.critic(nothing).sum() * 0.0
        values = critic_values(model, part.states[present])
        if self.reads_answers:
            pairs = values.view(-1, 2)
            return 2 * F.softplus(pairs[:, 1] - pairs[:, 0]).sum() / max(part.total_states, 1)
        error = (values - part.returns[present]) / self.config.value_scale
        return error.pow(2).sum() / max(part.total_states, 1)

    def flops(self, model: ForwardFlops, part: Experience, phase: Phase) -> int:
        """Of the update: decoding all answers, encoding and writing, forward and backward. Not of the rollouts."""
        if not phase.trains - _CRITIC:
            return 0
        rows, turns = part.written.turns.shape
        sampled = part.targets.sum(dim=(2, 3))  # of a question's answers, which are decoded after one prompt
        prompts = (((part.ids != PAD) & ~part.targets).sum(dim=-1) * part.answered).amax(dim=2)
        asked, length = int((sampled > 0).sum()), int((prompts + sampled).max())
        total = model.head(3 * int(sampled.sum()))
        total += 3 * model.decode(asked, length, int((prompts + sampled).sum()), model.config.memory.slots)
        encode = model.train_encoder if "encoder" in phase.trains else model.encode
        for turn in range(turns - 1):
            written = part.written.turn_lengths[turn]
            total += encode(rows, written) + (3 if "memory_attention" in phase.trains else 1) * model.write(
                rows, written
            )
        return total


class MemoryRLStage(EpisodeStage):
    """Trains the policy on its own answers, and the critic beside it if there is one."""

    config: MemoryRLConfig

    def phases(self) -> list[Phase]:
        """Critic alone → memory attention and memory cross-attention → the encoder too → everything."""
        config = self.config
        critic = _CRITIC if config.critic is not None else frozenset[Component]()
        first = config.critic_warmup
        second = first + config.unfreeze_encoder
        third = second + config.unfreeze_all
        phases = [
            Phase("critic", 0, critic),
            Phase("memory", self._step(first), _MEMORY | critic),
            Phase("memory + encoder", self._step(second), _MEMORY_AND_ENCODER | critic),
            Phase("all", self._step(third), _ALL | critic),
        ]
        return [
            phase
            for phase, following in zip(phases, [*phases[1:], None], strict=True)
            if following is None or following.start > phase.start
        ]

    def loss(self, model: ReactiveTransformer, part: Experience, phase: Phase) -> LossReport:
        """The objective of the answers of a part of an update, its regularisers, and the critic's loss."""
        critic = torch.zeros((), device=part.ids.device)
        if isinstance(model, ActorCritic):
            critic = self._critic_loss(model, part)
        weighted = critic * (self.config.critic.weight if self.config.critic is not None else 0.0)
        if not phase.trains - _CRITIC:
            return with_metrics(weighted, critic_loss=critic)
        found = self.answers(model, part, phase)
        measured = (
            self._policy(found, part)
            if isinstance(self.config.objective, PolicyObjective)
            else self._pairs(found, part)
        )
        loss = measured["policy_loss"] + self._inter_step(model, found, part)
        balance = found.balance / max(part.total_written, 1)
        moved, relative = (one / max(part.written.total_follow_ups, 1) for one in (found.moved, found.relative))
        total = loss + self.config.balance_weight * balance + self.config.memory_change_weight * moved + weighted
        metrics = {**measured, "balance": balance, "memory_change": relative}
        if self.config.critic is not None:
            metrics["critic_loss"] = critic
        return with_metrics(total, **metrics).using(found.usage)

    def answers(self, model: ReactiveTransformer, part: Experience, phase: Phase) -> Answered:
        """The sampled answers under a model, over its own memory of the episodes."""
        return answered(model, part, phase, self.config.bptt_window, self.config.temperature)

    def _policy(self, found: Answered, part: Experience) -> dict[str, Tensor]:
        """Each answer counts as the mean over its tokens, the loss is the mean over the answers that have a reward."""
        config = self.config.objective
        assert isinstance(config, PolicyObjective)
        old = found.log_probs.detach() if part.on_policy else found.of_tokens(part.old)
        advantages = found.of_answers(part.advantages)[found.tokens.answer]
        values, clipped = objective.clipped_objective(found.log_probs, old, advantages, config.clip)
        known = found.of_answers(part.scored).float() / max(part.total_answers, 1)
        share = 1 / max(part.total_written, 1)
        total = values
        kl = torch.zeros_like(values)
        if self.reference is not None:
            kl = objective.divergence(found.log_probs, found.of_tokens(part.reference))
            total = total + config.kl_weight * kl
        if config.entropy_weight:
            total = total - config.entropy_weight * found.entropy

        measured = {"entropy": found.entropy, "clipped": clipped.float(), "log_ratio": (found.log_probs - old).abs()}
        if self.reference is not None:
            measured["kl"] = kl
        metrics = {name: found.tokens.mean(one).sum() * share for name, one in measured.items()}
        return {"policy_loss": (found.tokens.mean(total) * known).sum(), **metrics}

    def _inter_step(self, model: ReactiveTransformer, found: Answered, part: Experience) -> Tensor:
        """KL of the distributions of the answer before to those of the answer, position by position (REF 4).

        Of each question's first answer, with no gradient to the one before; a mean over positions, then over all that
        have one before them.
        """
        config = self.config.objective
        weight = config.inter_step_weight if isinstance(config, PolicyObjective) else 0.0
        if not weight:
            return torch.zeros((), device=part.ids.device)
        logs = (model.head(found.states).float() / self.config.temperature).log_softmax(dim=-1)
        first = {(b, n): at for at, (b, n, g) in enumerate(found.place.tolist()) if g == 0}
        total = logs.new_zeros(())
        for (b, n), at in first.items():
            if (before := first.get((b, n - 1))) is not None:
                mine, theirs = logs[found.tokens.answer == at], logs[found.tokens.answer == before].detach()
                both = min(len(mine), len(theirs))
                total = total + F.kl_div(mine[:both], theirs[:both], reduction="sum", log_target=True) / both
        return weight * total / max(part.total_pairs, 1)

    def _pairs(self, found: Answered, part: Experience) -> dict[str, Tensor]:
        """DMPO: of each question answer 0 was accepted and answer 1 rejected; a third is neutral."""
        config = self.config.objective
        assert not isinstance(config, PolicyObjective)
        number = part.ids.shape[2]
        new = found.tokens.mean(found.log_probs).view(-1, number)
        reference = found.tokens.mean(found.of_tokens(part.reference)).view(-1, number)
        known = found.of_answers(part.scored).view(-1, number)[:, 0].float() / max(part.total_answers // number, 1)
        values, margin = objective.preference_loss(new[:, 0], new[:, 1], reference[:, 0], reference[:, 1], config.beta)
        if config.anchor_weight:
            values = values + config.anchor_weight * objective.anchor(new[:, 2], reference[:, 2])
        return {
            "policy_loss": (values * known).sum(),
            "margin": (margin * known).sum(),
            "preferred": ((margin > 0) * known).sum(),
        }


class CriticStage(EpisodeStage):
    """The critic alone learns what the answers of the policy, which stays as it is, are worth (REF 4)."""

    config: CriticPretrainingConfig

    def phases(self) -> list[Phase]:
        """One."""
        return [Phase("critic", 0, _CRITIC)]

    def loss(self, model: ActorCritic, part: Experience, phase: Phase) -> LossReport:
        """The critic's."""
        loss = self._critic_loss(model, part)
        return with_metrics(loss, critic_loss=loss)


def critic_values(model: ActorCritic, states: Tensor) -> Tensor:
    """V of critic inputs [n, C], right-padded: [n], fp32."""
    return model.critic(states, states != PAD)[:, 0].float()
