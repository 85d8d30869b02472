"""Everything: the supervised stages, then the curriculum of Memory Reinforcement Learning.

python pipelines/full.py --config pipelines/configs/mrl.yaml [key=value ...]
ray job submit --working-dir . -- python pipelines/full.py --config pipelines/configs/mrl.yaml storage=/shared/runs
"""

import sys

from full_smst import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
