"""What a worker does with the CPUs that it was given."""

import importlib.util
import json
import subprocess
import sys

import pytest

from rxt_platform.training.distributed import _hidden

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


def test_a_worker_starts_without_mlflow() -> None:
    """Two seconds of each start; the worker can import it all the same."""
    code = (
        "import sys; from rxt_platform.training.distributed import start_process_group as start; start(False, 60)\n"
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules; import mlflow"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_module_that_is_not_wanted_can_t_be_imported_for_a_while() -> None:
    """DeepSpeed then does without it; what was imported before stays."""
    name = "this"
    sys.modules.pop(name, None)
    with _hidden(name), pytest.raises(ImportError):
        __import__(name)
    assert importlib.util.find_spec(name) is not None
    with _hidden("json"):
        assert sys.modules["json"] is json
    assert sys.modules["json"] is json
