"""The commands, such as ``python -m ice_engine plan train:optimizer`` and ``python -m ice_engine inspect last.pt``."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ice_engine.comparison import compare
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, IceEngineError
from ice_engine.inspection import difference, files_in, inspect
from ice_engine.object_path import call, load_object
from ice_engine.optimizer import Optimizer
from ice_engine.plan import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; print what it returns.

    Args:
        arguments: What follows ``python -m ice_engine``; that of this process if left out.

    Returns:
        The exit code of the command; what is wrong exits with 2 and a message.
    """
    parser = argparse.ArgumentParser(prog="python -m ice_engine", description="Look at runs from outside.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_plan(commands)
    _add_inspect(commands)
    _add_diff(commands)
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without these characters still shows the numbers
    try:
        text, code = options.command(options)
    except (IceEngineError, OSError, ModuleNotFoundError) as error:
        message = "\n".join([str(error), *getattr(error, "__notes__", ())])
        options.parser.exit(2, f"{options.parser.prog}: error: {message}\n")
    print(text)
    return int(code)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="show every scheduled value of a run before it starts",
        description="Show every scheduled value at every step of a run that has not happened, and what looks wrong.",
    )
    parser.add_argument(
        "object",
        metavar="module:object",
        help="an Optimizer, a Plan, or a function without arguments that returns one",
    )
    parser.add_argument("--epoch-length", type=int, metavar="N", help="micro-batches per epoch, len(loader)")
    parser.add_argument("--max-epochs", type=int, metavar="N", help="epochs of the run")
    parser.add_argument("--max-iters", type=int, metavar="N", help="micro-batches of the run, instead of --max-epochs")
    parser.add_argument(
        "--accumulation-steps", type=int, metavar="N", help="micro-batches per step, with effective_batch_size"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw it into FILE, such as plan.png or plan.svg")
    parser.add_argument("--csv", metavar="FILE", help="write one line per step into FILE")
    parser.set_defaults(command=_plan, parser=parser)


def _plan(options: argparse.Namespace) -> tuple[str, int]:
    names = ("epoch_length", "max_epochs", "max_iters", "accumulation_steps")
    lengths = {name: value for name in names if (value := getattr(options, name)) is not None}
    plan = _planned(options.object, lengths)
    lines = [str(plan)]
    if options.csv:
        plan.to_csv(options.csv)
        lines.append(f"wrote {options.csv}")
    if options.plot:
        _draw(plan, options.plot)
        lines.append(f"wrote {options.plot}")
    return "\n".join(lines), 0


def _planned(path: str, lengths: dict[str, int]) -> Plan:
    found = load_object(path)
    wanted = "wanted is an Optimizer, a Plan, or a function without arguments that returns one"
    if callable(found) and not isinstance(found, type):
        found, path = call(found, path), f"{path}()"
    if isinstance(found, Optimizer):
        return _plan_of(found, lengths)
    if not isinstance(found, Plan):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        message = f"{path} is {what}; {wanted}"
        raise ArgumentTypeError(message)
    if lengths:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in lengths)
        message = f"{path} is a Plan, which has its lengths already; leave out {given}"
        raise ArgumentValueError(message)
    return found


def _plan_of(optimizer: Optimizer, lengths: dict[str, int]) -> Plan:
    try:
        return optimizer.plan(**lengths)
    except ArgumentValueError as error:
        message = f"{error}; these are options here, such as --epoch-length 100 --max-epochs 20"
        raise ArgumentValueError(message) from error


def _draw(plan: Plan, file: str) -> None:
    figure = plan.plot()
    try:
        figure.savefig(file, dpi=120)
    except ValueError as error:  # matplotlib knows no such format, and lists those it knows
        message = f"--plot {file}: {error}"
        raise ArgumentValueError(message) from error


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a checkpoint holds and whether it is whole, or how two differ",
        description="Show what a checkpoint holds, at which step, and whether every byte is as it was written; or in "
        "what two checkpoints differ. Tensors are not loaded. Exits with 0 if it is whole, or both hold the same, 1 "
        "if not, 2 if there is none.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, a sharded checkpoint, or a folder of files")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="another one, to be compared with it")
    parser.set_defaults(command=_inspect, parser=parser)


def _inspect(options: argparse.Namespace) -> tuple[str, int]:
    try:
        (first, said), *other = [_chosen(path) for path in (options.checkpoint, options.other) if path is not None]
        contents = inspect(first)
        if not other:
            return "\n".join([*said, str(contents)]), 0
        found = difference(contents, inspect(other[0][0]))
    except CheckpointError as error:
        return str(error), 1
    return str(found), 0 if found.is_none else 1


def _chosen(path: str) -> tuple[Path, list[str]]:
    """Return the checkpoint at *path*; of a folder of files the newest whole one, and a line for each file."""
    folder = Path(path)
    files = files_in(folder) if folder.is_dir() else []
    if not files:
        return folder, []
    said = [f"{file.name}: {problem or 'whole'}" for file, problem in files]
    whole = [file for file, problem in files if problem is None]
    if not whole:
        raise CheckpointError("\n".join([*said, f"{folder}: no checkpoint is whole"]))
    return whole[0], [*said, ""]


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
