"""The commands: ``python -m ice_engine diff a.jsonl b.jsonl``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ice_engine.comparison import compare
from ice_engine.errors import IceEngineError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; print what it returns.

    Args:
        arguments: What follows ``python -m ice_engine``; that of this process if left out.

    Returns:
        The exit code of the command; what is wrong exits with 2 and a message.
    """
    parser = argparse.ArgumentParser(prog="python -m ice_engine", description="Look at runs from outside.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_diff(commands)
    options = parser.parse_args(arguments)
    try:
        text, code = options.command(options)
    except (IceEngineError, OSError) as error:
        options.parser.exit(2, f"{options.parser.prog}: error: {error}\n")
    print(text)
    return int(code)


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="find where two runs part, by their ledgers",
        description="Find the first step, skipped step or evaluation in which the ledgers of two runs differ, and "
        "what differs. Exits with 0 if they are the same, 1 if not, 2 if one is no ledger.",
    )
    parser.add_argument("a", metavar="A", help="a ledger, such as runs/a/ledger.jsonl")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--rtol", type=float, default=0.0, metavar="R", help="numbers may differ by R * |b|; 0")
    parser.add_argument("--atol", type=float, default=0.0, metavar="A", help="and by A; 0")
    parser.set_defaults(command=_diff, parser=parser)


def _diff(options: argparse.Namespace) -> tuple[str, int]:
    found = compare(options.a, options.b, rtol=options.rtol, atol=options.atol)
    return str(found), 0 if found.is_same else 1


if __name__ == "__main__":
    sys.exit(main())
