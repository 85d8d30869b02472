"""The main job: the four supervised stages, from a corpus to a measured memory.

python pipelines/full_smst.py --config pipelines/configs/quickstart.yaml [key=value ...]
ray job submit --working-dir . -- python pipelines/full_smst.py --config pipelines/configs/quickstart.yaml
"""

import argparse
import sys

from rxt_platform.cli import guarded
from rxt_platform.config.loading import load_run
from rxt_platform.orchestration.runner import run_pipeline


def main(description: str | None = __doc__) -> int:
    """Parse the command line and run the pipeline."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")
    arguments = parser.parse_intermixed_args()
    return guarded(lambda: run_pipeline(load_run(arguments.config, arguments.overrides)))


if __name__ == "__main__":
    sys.exit(main())
