"""All benchmarks, one after the other: ``tox run -e bench -- --quick --check``, or ``python tests/benchmarks``.

What they print goes into one Markdown file, which docs/performance.md includes, with a picture of the steps beside it;
of scale, into another one, which docs/scale.md includes.
``--check`` fails where a bound is broken, after all have run.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: draws without a display

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
QUESTIONS = {  # file: what it asks
    "step": "A step",
    "phase": "The optimizer phase alone",
    "processors": "Schedules, by param groups",
    "hooks": "Hooks that do not fire",
    "plan": "A plan",
    "recording": "TensorBoard",
    "checkpoint": "The stall of a checkpoint",
    "memory": "What memory it takes",
    "ddp": "Accumulation over ranks",
    "consolidation": "ZeRO's state to one rank",
    "scale": "Scale, by arithmetic and by real ranks",
}
PATIENCE = 1800.0  # seconds for one file


def ask(name: str, *options: str) -> tuple[str, str | None]:
    """Run one file; return what it printed, and what was wrong."""
    # -u: what a process that ends by os._exit has printed is not lost.
    command = [sys.executable, "-u", str(HERE / f"{name}.py"), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return "", f"took more than {PATIENCE:.0f} s"
    if done.returncode == 0:
        return done.stdout, None
    return done.stdout, (done.stderr.strip().splitlines() or ["a bound is broken, see its table"])[-1]


def markdown(printed: str) -> str:
    """Return it as Markdown: tables as they are, all else as text."""
    parts = []
    for is_table, lines in itertools.groupby(printed.strip().splitlines(), key=lambda line: line.startswith("|")):
        part = "\n".join(lines).strip("\n")
        parts += [part if is_table else f"```text\n{part}\n```"] if part.strip() else []
    return "\n\n".join(parts)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw the ratio of each loop in each case, with quartiles; the loop by hand is at 1."""
    figure, every = plt.subplots(1, len(results), figsize=(2.6 * len(results), 3.2), sharey=True, layout="constrained")
    names = list(dict.fromkeys(loop for found in results.values() for loop in found))
    for axes, (case, found) in zip(every, results.items(), strict=True):
        for place, name in enumerate(names):
            if name in found:
                low, middle, high = (found[name][key] for key in ("low", "median", "high"))
                axes.barh(place, middle, color="#2166ac" if "ours" in name else "#a8a8a8")
                axes.plot([low, high], [place, place], color="#333333", linewidth=1)
        axes.axvline(1.0, color="#333333", linewidth=0.8, linestyle=":")
        axes.set_title(case, fontsize=9)
        axes.set_xlim(0, 4.2)
    every[0].set_yticks(range(len(names)), names, fontsize=8)
    every[0].invert_yaxis()
    figure.supxlabel("time of a step, the loop by hand is 1", fontsize=9)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Ask everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds of each: minutes instead of most of an hour")
    parser.add_argument("--check", action="store_true", help="fail where a bound is broken")
    parser.add_argument("--only", nargs="*", default=list(QUESTIONS), choices=list(QUESTIONS), help="files")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "measured", help="a folder")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    parts, wrong = [], {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "step.json"
        for name in asked.only:
            options = ["--check", *(["--quick"] * asked.quick)]
            options += ["--json", str(numbers)] if name == "step" else []
            load, begin = os.getloadavg()[0], time.perf_counter()
            printed, error = ask(name, *options)
            command = " ".join(["python", f"tests/benchmarks/{name}.py", *(["--quick"] * asked.quick)])
            took = f"`{command}`: {time.perf_counter() - begin:.0f} s, load {load:.1f} at its start"
            part = f"### {QUESTIONS[name]}\n\n{took}\n\n{markdown(printed)}\n"
            print(f"{part}\n{error or 'ok'}\n", flush=True)
            if error:
                wrong[name] = error
            if name == "scale":
                (asked.out / "scale.md").write_text(part)
                continue
            parts.append(part)
            (asked.out / "benchmarks.md").write_text("\n".join(parts))
            if name == "step" and numbers.exists():
                draw(json.loads(numbers.read_text())["results"], asked.out / "benchmarks.png")
    print("\n".join(f"{name}: {error}" for name, error in wrong.items()) or "all bounds are kept")
    if asked.check and wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
