"""A process as Linux shows it to others on its host: whether it runs, is stopped or gone, known without asking it."""

import dataclasses
import os
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Process:
    """Which one it is.

    Attributes:
        host: The boot of the host, and the namespace that *number* is of; empty where there is no ``/proc``.
        number: Its process id.
        began: When it began, in ticks since then: numbers are used again.
    """

    host: str
    number: int
    began: str

    @property
    def fate(self) -> Literal["runs", "is stopped", "is gone", "unknown"]:
        """What has become of it; unknown on another host.

        One that a debugger holds runs: it goes on when the debugger lets it.
        """
        if not self.host or self.host != _host():
            return "unknown"
        state, began = _state(self.number)
        if began != self.began or state in {"Z", "X"}:
            return "is gone"
        return "is stopped" if state == "T" else "runs"


def this_process() -> Process:
    """Return the one that asks."""
    return Process(_host(), os.getpid(), _state(os.getpid())[1])


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return ""


def _state(number: int) -> tuple[str, str]:
    """Return the letter of its state, and when it began."""
    try:
        # After the name, which is in parentheses and may have any.
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "X", ""
    return fields[0], fields[19]
