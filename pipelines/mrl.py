"""Memory Reinforcement Learning alone: the stages of a config that hold conversations, on a model that is there.

python pipelines/mrl.py --config pipelines/configs/mrl.yaml --model runs/quickstart [key=value ...]
MODEL is a run's folder or a model directory; its supervised stages are not run again, its tokenizer is taken over.
"""

import argparse
import sys

from rxt_platform.cli import guarded
from rxt_platform.config.loading import load_run
from rxt_platform.orchestration.reinforce import reinforced
from rxt_platform.orchestration.runner import run_pipeline


def main() -> int:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of a run with memory_rl stages")
    parser.add_argument("--model", required=True, help="where to start from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")
    arguments = parser.parse_intermixed_args()
    return guarded(lambda: run_pipeline(reinforced(load_run(arguments.config, arguments.overrides), arguments.model)))


if __name__ == "__main__":
    sys.exit(main())
