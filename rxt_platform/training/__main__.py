"""Train one stage without Ray: `python -m rxt_platform.training JOB.json`, or the same under torchrun.

SIGTERM or Ctrl-C: a checkpoint is written, exit status 3, and the same command goes on from there; twice: at once.
"""

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from rxt_platform.errors import RxtError
from rxt_platform.training.job import STOP, StageJob, run_stage


def main() -> int:
    """Run the job file given as the only argument."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m rxt_platform.training JOB.json\n")
        return 2
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # asked twice: at once
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    try:
        job = StageJob.model_validate(json.loads(Path(sys.argv[1]).read_text()))
        (job.work / STOP).unlink(missing_ok=True)  # of a driver that is gone
        metrics = run_stage(job, stop_requested=stop.is_set)
    except RxtError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps(metrics) + "\n")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    # Everything is committed. DeepSpeed keeps its groups, whose threads now and then abort the interpreter's teardown.
    os._exit(status)
