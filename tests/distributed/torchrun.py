"""torchrun as a user starts it, on one host or, in a network namespace, on another; never longer than *timeout*."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(
    arguments: Sequence[str], script: str, *given: str, prefix: Sequence[str] = (), **environment: str
) -> "Agent":
    """Start ``torchrun *arguments script *given``, below the command *prefix*."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *arguments, str(ROOT / script), *given]
    return Agent(command, environment)


class Agent:
    """A torchrun under way, and its workers.

    Args:
        command: What is run.
        environment: Added to this process's own.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout: float = 100.0) -> tuple[int, str]:
        """Return its exit code and what it and its workers said."""
        try:
            said, _ = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            said, _ = self._process.communicate()
            said += f"\nkilled after {timeout:.0f} s"
        return self._process.returncode, said

    def kill(self) -> None:
        """Take the host away: the agent, and every worker of it."""
        if self._process.poll() is not None:
            return
        pids = [self._process.pid]
        for pid in pids:
            children = Path(f"/proc/{pid}/task/{pid}/children")
            pids += map(int, children.read_text().split()) if children.exists() else ()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
