"""What a step calls, counted by cProfile: ``python tests/benchmarks/profiles.py [TREE ...]``.

Prints a Markdown table with a column for each tree of this repository, its own if none is given; so an earlier commit
is compared by

    git worktree add /tmp/bbfec6a bbfec6a
    python tests/benchmarks/profiles.py /tmp/bbfec6a .

Each is profiled in a process of its own: 5,000 steps of ``Linear(16, 1)`` with SGD, ``clip_norm`` and a cosine in
``create_trainer``. Counts do not depend on the machine and its load; times do, and a profiler stretches them.
"""

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STEPS, WARM_UP = 5000, 10
COUNTED = {  # row: the end of a file's path, and the function, as cProfile calls them; "~" for what is written in C
    "Ignite's `_fire_event`": ("ignite/engine/engine.py", "_fire_event"),
    "the quiet engine's `_fire_event`": ("ice_engine/quiet_engine.py", "_fire_event"),
    "`isfinite` of a tensor": ("~", "<method 'isfinite' of 'torch._C.TensorBase' objects>"),
    "`clipping.coefficient`": ("ice_engine/clipping.py", "coefficient"),
    "`torch.where`": ("~", "<built-in method torch.where>"),
    "`mul_`": ("~", "<method 'mul_' of 'torch._C.TensorBase' objects>"),
    "`_foreach_mul_` of the gradients": ("~", "<built-in method torch._foreach_mul_>"),
    "`item` of a tensor": ("~", "<method 'item' of 'torch._C.TensorBase' objects>"),
    "the profiler's `record_function`": ("torch/autograd/profiler.py", "__enter__"),
}


def profiled() -> pstats.Stats:
    """Train under the profiler with the ice_engine that is imported here."""
    import ice_engine as ice  # of the tree that the command line names

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Linear(16, 1)
    optimizer = ice.Optimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        processors=[ice.schedules.cosine(total=10**9)],
        clip=ice.clip_norm(1.0),
    )
    trainer = ice.create_trainer(model, optimizer, torch.nn.functional.mse_loss)
    batch = torch.randn(8, 16), torch.randn(8, 1)
    trainer.run([batch] * WARM_UP, max_epochs=1)
    profile = cProfile.Profile()
    with profile:
        trainer.run([batch] * STEPS, max_epochs=1)
    return pstats.Stats(profile)


def counts(stats: Any) -> dict[str, str]:
    """Return the table's column: calls a step, and which functions take most by themselves."""
    calls = {key: each[1] for key, each in stats.stats.items()}
    column = {"function calls": f"{sum(calls.values()) / STEPS:.0f}"}
    for row, (file, name) in COUNTED.items():
        found = [n for (path, _, function), n in calls.items() if path.endswith(file) and name == function]
        column[row] = f"{round(sum(found) / STEPS, 2):g}"
    own_time = sorted(stats.stats, key=lambda key: -stats.stats[key][2])
    column["first by own time"] = ", ".join(f"`{spoken(*key)}`" for key in own_time[:4])
    return column


def spoken(path: str, _: int, function: str) -> str:
    """Return ``file:function``; of what is written in C, its name."""
    if path != "~":
        return f"{Path(path).name}:{function}"
    return function.strip("<>").removeprefix("built-in method ").removeprefix("method ").split(" of ")[0].strip("'")


def column_of(tree: Path) -> dict[str, str]:
    """Profile the ice_engine of *tree* in a process of its own."""
    command = [sys.executable, __file__, "--json", str(tree.resolve())]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", type=Path, nargs="*", default=[Path(__file__).parents[2]], help="of this repository")
    parser.add_argument("--json", type=Path, metavar="TREE", help="print the column of one tree as JSON")
    asked = parser.parse_args()
    if asked.json:
        sys.path.insert(0, str(asked.json))
        print(json.dumps(counts(profiled())))
        return
    columns = {commit(tree): column_of(tree) for tree in asked.trees}
    print(f"| a step | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main()
