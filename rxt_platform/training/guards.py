"""What keeps a bad batch or a spike of the loss from spoiling a model, and what tells that it has converged."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rxt_platform.config.stage_base import EarlyStopping
from rxt_platform.config.training import SpikeConfig
from rxt_platform.errors import RxtError

_SMALLEST_DEVIATION = 1e-3  # of the median: a loss that hardly moves must not make every change a spike


class SpikeError(RxtError):
    """The loss of `step` (from 0) is far above the recent ones; the engine goes back."""

    def __init__(self, step: int, loss: float, usual: float) -> None:
        super().__init__(f"step {step + 1}: the loss is {loss:.4g}, the recent ones are around {usual:.4g}")
        self.step = step


class SpikeGuard:
    """Compares each loss with those before it. All ranks see the same losses, so all decide alike."""

    def __init__(self, config: SpikeConfig | None, recent: Sequence[float] = ()) -> None:
        self.config = config
        self.recent = list(recent)

    def check(self, step: int, loss: float) -> None:
        """Raises SpikeError before the step's update."""
        if self.config is None or len(self.recent) < self.config.window:
            return
        usual = statistics.median(self.recent)
        deviation = statistics.median(abs(one - usual) for one in self.recent)
        if loss > usual + self.config.factor * max(deviation, _SMALLEST_DEVIATION * abs(usual)):
            raise SpikeError(step, loss, usual)

    def add(self, loss: float) -> None:
        """A loss whose update was made."""
        if self.config is not None and math.isfinite(loss):
            self.recent = [*self.recent, loss][-self.config.window :]


@dataclass(frozen=True)
class Plateau:
    """How a held-out metric has fared: its best value, and the measurements since then that were no better."""

    best: float | None = None
    stale: int = 0
    reached: bool = False  # as good as the rule asks for

    def after(self, value: float, rule: EarlyStopping) -> "Plateau":
        """With a further measurement; one that is not a number is no better."""
        if not math.isfinite(value):
            return Plateau(self.best, self.stale + 1)
        gain = math.inf if self.best is None else value - self.best if rule.highest else self.best - value
        reached = rule.reach is not None and (value >= rule.reach if rule.highest else value <= rule.reach)
        if gain > rule.threshold:
            return Plateau(value, 0, reached)
        return Plateau(self.best, self.stale + 1, reached)
