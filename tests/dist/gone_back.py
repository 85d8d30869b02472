"""A training process that goes back once, as after a spike: `gone_back.py JOB.json`, alone or under torchrun.

It starts at a checkpoint, trains to the end, loads the same checkpoint into the engine as it is then, and trains again.
Each rank prints the held-out losses at the start and at the end of both rounds.
"""

import json
import os
import sys

import torch.distributed as dist

from rxt_platform.data.batches import Batch
from rxt_platform.training.__main__ import main
from rxt_platform.training.engine import Engine, Hooks, TrainResult


def twice(self: Engine, validation: list[Batch], hooks: Hooks) -> TrainResult:
    """Stands for `Engine.run`."""
    losses = []
    for _ in range(2):
        state = self._resume()
        assert state is not None
        losses.append(self.evaluate(validation)["loss"])
        self._train(state, validation, Hooks())
        losses.append(self.evaluate(validation)["loss"])
    sys.stdout.write(json.dumps({"rank": dist.get_rank(), "losses": losses}) + "\n")
    return run(self, validation, hooks)


if __name__ == "__main__":
    run, Engine.run = Engine.run, twice  # type: ignore[method-assign]
    status = main()
    sys.stdout.flush()
    os._exit(status)
