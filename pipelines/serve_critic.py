"""The reward and critic service as a job: what `rxt serve critic` does, with the same options.

python pipelines/serve_critic.py --versions runs/critic --token-file token
ray job submit --working-dir . -- python pipelines/serve_critic.py --versions /shared/critic --token-file /shared/token

Give a job its token by file: environment variables of a job can be read on Ray's dashboard.
"""

import sys

from rxt_platform.cli import guarded
from rxt_platform.cli_serve import critic


def main() -> int:
    """Serve until SIGTERM, which `ray job stop` sends."""
    return guarded(lambda: critic(standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
