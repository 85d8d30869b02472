"""Training processes for tests, forked from one that has imported torch, DeepSpeed and the engine already.

They run the `__main__` of `python -m rxt_platform.training`, each in a process of its own, without the imports. What a
fork hides: all have one hash seed, and MLflow is there. So the tests of signals, some kills and resumptions, and all
that use Ray start the real commands.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Self

import numpy as np

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ["deepspeed", "rxt_platform.training.__main__", "rxt_platform.training.engine"]
_GRACE_SECONDS = 30  # from SIGTERM to SIGKILL of those that are left when one has failed, as torchrun's


class Forked:
    """Ranks 0 to N - 1 of a module or script, from their start on. On leaving, those that still run are killed."""

    def __init__(self, target: str | Path, arguments: list[str], workers: int, env: dict[str, str], cwd: Path) -> None:
        self._target, self._command = target, [str(target), *arguments]
        self._workers, self._env, self._cwd = workers, env, cwd
        self._folder = tempfile.TemporaryDirectory()
        self.processes: list[ForkServerProcess] = []

    def __enter__(self) -> Self:
        _serve(self._env)
        port = str(_free_port())
        ranks = [{"WORLD_SIZE": str(self._workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}] * self._workers
        try:
            for rank, shared in enumerate(ranks):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if self._workers > 1 else {}
                arguments = (self._target, self._command, {**self._env, **own}, self._cwd, self._output(rank))
                for stream in ("out", "err"):
                    Path(f"{self._output(rank)}.{stream}").touch()
                process = _CONTEXT.Process(target=_run, args=arguments)
                process.start()
                self.processes.append(process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def poll(self) -> int | None:
        """The exit status once all have ended; when one of several has failed, the others are ended and it is 1."""
        codes = [process.exitcode for process in self.processes]
        if any(codes) and None in codes:
            self._end_all()
        elif None in codes:
            return None
        statuses = [process.exitcode for process in self.processes]
        return statuses[0] if len(statuses) == 1 else int(any(statuses))

    def wait(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Wait for the end. Raises TimeoutExpired with what was written until then."""
        deadline = time.monotonic() + seconds
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self._command, seconds, self._read("out"), self._read("err"))
            time.sleep(0.01)
        return subprocess.CompletedProcess(self._command, status, self._read("out"), self._read("err"))

    def _end_all(self) -> None:
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()

    def _output(self, rank: int) -> str:
        return str(Path(self._folder.name) / str(rank))

    def _read(self, stream: str) -> str:
        ranks = range(len(self.processes))
        return "".join(Path(f"{self._output(rank)}.{stream}").read_text(errors="replace") for rank in ranks)


def _serve(env: dict[str, str]) -> None:
    """Start the process that is forked, in the environment that its imports ask for."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(env)
    try:
        _CONTEXT.set_forkserver_preload(_PRELOADED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(target: str | Path, command: list[str], env: dict[str, str], cwd: Path, output: str) -> None:
    """The forked process: it becomes what `python target arguments` is."""
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{stream}", os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = command
    np.random.seed()  # the fork's would be that of all others
    if isinstance(target, Path):
        runpy.run_path(str(target), run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
