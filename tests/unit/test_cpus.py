"""What a worker does with the CPUs that it was given."""

import subprocess
import sys

FAULTS = """
import resource, torch
from rxt_platform.training.distributed import use_cpus
use_cpus(1)
assert torch.get_num_threads() == 1
for _ in range(16):  # until the heap has room for an aligned block
    torch.ones(2**24)  # 64 MiB: 16,384 pages
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_of_freed_tensors_is_kept() -> None:
    """Only where the C library is glibc; elsewhere there is nothing to set."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096
