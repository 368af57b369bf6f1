"""Processes that begin with torch and the like imported: forked from a server, which imports them once and waits.

A process of its own is what a test of kills, signals and resumed runs needs; a new interpreter takes seconds to import
torch. What is about the interpreter itself, as its end, starts one.
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]
CONTEXT = mp.get_context("forkserver")
# Also what torch imports at the first step of an optimizer, and what examples do. None of them starts a thread. Not
# ice_engine, which the server would take from this folder, and a forked process from where the tests do: a wheel.
_TORCH = ["torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard"]
CONTEXT.set_forkserver_preload(
    [*_TORCH, "ignite.handlers", "ignite.distributed", "matplotlib.pyplot", "sklearn.datasets", "tyro"]
)


def python(*command: str, cwd: Path = ROOT, timeout: float = 100.0, **environment: str) -> subprocess.CompletedProcess:
    """Return what ``python *command`` came to, where *command* is a script or ``-c`` and a program, and arguments."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = CONTEXT.Process(target=_run, args=(command, cwd, out, err, environment))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def start_as_always() -> None:
    """Let a forked process start its own, such as a DataLoader's workers, as a script does; else a server would."""
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)


def _run(command: tuple[str, ...], cwd: Path, out: Path, err: Path, environment: dict[str, str]) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.update(environment)
    start_as_always()
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 - the test's own
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")
    run_exit_functions()


def run_exit_functions() -> None:
    """Do what an interpreter does at its end, and a forked process does not."""
    atexit._run_exitfuncs()
