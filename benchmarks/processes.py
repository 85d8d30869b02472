"""How benchmarks start a stage's job without Ray."""

import os


def launcher(workers: int) -> list[str]:
    """Arguments of Python that start `-m`'s module in so many processes."""
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(workers), "-m"] if workers > 1 else ["-m"]


def job_environment() -> dict[str, str]:
    """Of a job's processes: one thread each."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
