"""The process group that DeepSpeed trains in: made by Ray Train, by torchrun, or here for a single process."""

import ctypes
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from rxt_platform.errors import ArtifactError, RxtError

Result = TypeVar("Result")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 2**30  # bytes
_PATIENCE = 6 * 3600  # seconds
_patient: dist.ProcessGroup | None = None  # of `on_rank_zero`


def use_cpus(count: int) -> None:
    """One torch thread for each CPU that this worker was given (DESIGN 13), before anything else runs.

    And keep freed memory: glibc hands blocks above 32 MiB back at once, so that every large tensor begins with page
    faults (a quarter of the time of a mixture of experts of 8,192 tokens, benchmarks/LOG.md).
    """
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in other C libraries
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _KEPT):  # older glibc refuses, and the other alone does harm
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Meanwhile a module can't be imported, unless it is there already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if sys.modules.get(module) is None:
            sys.modules.pop(module, None)


def start_process_group(use_gpu: bool, timeout: float) -> torch.device:
    """Initialise DeepSpeed's communication (NCCL or gloo) on the group that is there; returns this rank's device.

    Collectives fail after `timeout` seconds; `on_rank_zero` waits longer, for rank 0 may hash or fetch large files.
    """
    global _patient
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    with _hidden("mlflow"):  # DeepSpeed's autotuner, of which nothing is used here, would import it for two seconds
        import deepspeed

    if not use_gpu:
        # The shared-memory op is compiled on first use (40 s) and not needed: gloo does the collectives.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False, timeout=timedelta(seconds=timeout))
        device = torch.device("cpu")
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed(dist_backend="nccl", verbose=False, timeout=timedelta(seconds=timeout))
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    _patient = dist.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE))
    return device


def set_timeout(seconds: float) -> None:
    """How long collectives wait, in all groups of this process that have come since, DeepSpeed's own ones included."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not _patient:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def stop_process_group() -> None:
    """Leave the group, if there is one: DeepSpeed aborts at interpreter exit otherwise."""
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Rank 0's result of a function on every rank; what it raises is raised on every rank, as an RxtError."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except RxtError as error:
            box[1] = error
        except OSError as error:
            box[1] = ArtifactError(f"the run's storage failed: {error}")
    dist.broadcast_object_list(box, src=0, group=_patient)
    if box[1] is not None:
        raise_together(box[1])
    result: Result = box[0]
    return result


def raise_together(error: RxtError) -> NoReturn:
    """Raise an error that every rank raises at this place, so that none is left waiting for another."""
    error.on_all_ranks = True
    raise error
