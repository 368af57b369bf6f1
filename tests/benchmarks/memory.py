"""What memory training takes, as the kernel counts it: ``python tests/benchmarks/memory.py``.

The peak of a step beside the loop by hand; the state of each rank under ZeRO, and the peak of its step; what a
checkpoint in the background keeps, and whether the next one takes it again. Each is measured in a process of its own,
whose peak is set back before (``/proc/self/clear_refs``: Linux only). Bytes of a large tensor are given back at once.
``--check`` fails where a ratio is beyond its bound.
"""

import argparse
import functools
import gc
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from checkpoint import peak
from consolidation import resident
from measure import EXACT_HEAP, machine
from torch.nn.parallel import DistributedDataParallel

import ice_engine as ice
from tests import two_ways
from tests.distributed.launch import launch

WIDTH, BATCH = 1024, 4
LAYER = 4 * WIDTH * WIDTH / 2**20  # MB of a layer's parameters
PARTS = 6  # layers that 1, 2 and 3 ranks share equally, as do their multiples
WARM_UP = 3  # steps that are not counted: the first ones make the state
SAVES = 5
STEP_BOUND = 1.01  # of the loop by hand
ZERO_BOUND = 1.01  # of 1 / ranks
COPY_BOUND = 0.02  # of the state: what a save may keep besides one copy of it, and four more saves again


def grown(call: Callable[[], Any]) -> tuple[float, float]:
    """Return by how many MB this process grew at most during *call*, and by how many it has grown after it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    call()
    return peak() - before, resident() - before


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Return what *function* returns in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def model(layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))


# -- a step ---------------------------------------------------------------------------------------------------


CASES = [(form, k, scaled) for form in two_ways.FORMS for k, scaled in ((1, False), (4, False), (1, True))]


def by_hand(layers: int, form: str, k: int, *, scaled: bool) -> float:
    """Return the MB that a window of the loop by hand takes at most, gradients included."""
    window = two_ways.by_hand(model(layers), two_ways.FORMS[form], k, scaled=scaled)
    return most(functools.partial(window, torch.randn(BATCH, WIDTH)))


def ours(layers: int, form: str, k: int, *, scaled: bool) -> float:
    """Return the same of ours, with everything on that a step has."""
    net, batch = model(layers), torch.randn(BATCH, WIDTH)
    optimizer = two_ways.wrapped(net, two_ways.FORMS[form], k, scaled=scaled)
    trainer = ice.create_trainer(net, optimizer, lambda y_pred, _: y_pred.square().mean())
    return most(lambda: trainer.run([(batch, batch)] * k, max_epochs=1))


def most(window: Callable[[], Any]) -> float:
    for _ in range(WARM_UP):
        window()
    return max(grown(window)[0] for _ in range(5))


def windows(way: Callable[..., float], layers: int) -> list[float]:
    found = []
    for form, k, scaled in CASES:
        found.append(way(layers, form, k, scaled=scaled))
        gc.collect()  # one model at a time
    return found


def step(layers: int) -> list[str]:
    """Print what a window takes, and return what is beyond its bound."""
    print(f"| a window of {layers} layers, {layers * LAYER:.0f} MB of gradients | by hand, MB | ours, MB | ratio |")
    print("|---|---|---|---|")
    broken = []
    both = [alone(windows, way, layers) for way in (by_hand, ours)]
    for (form, k, scaled), hand, own in zip(CASES, *both, strict=True):
        name = f"{form}, k={k}" + ", GradScaler" * scaled
        print(f"| {name} | {hand:.1f} | {own:.1f} | {own / hand:.3f} |", flush=True)
        broken += [f"{name}: {own / hand:.3f} of the loop by hand"] if own > STEP_BOUND * hand else []
    return broken


# -- ZeRO -----------------------------------------------------------------------------------------------------


def rank_work(layers: int) -> list[tuple[float, float]]:
    """Return, plain and under ZeRO, this rank's MB of state, and of a step's peak above what it has without a model."""
    found = []
    for sharding in (None, "zero1"):
        trained(PARTS, sharding)  # loads code and makes connections, which are not the model's
        gc.collect()
        base = resident()
        state, highest = trained(layers, sharding)
        found.append((state, highest - base))
        gc.collect()
    return found


def trained(layers: int, sharding: Any) -> tuple[float, float]:
    """Train, and return the MB of the optimizer's state, and of the process at most in a step."""
    net = DistributedDataParallel(model(layers), gradient_as_bucket_view=True)
    adamw = functools.partial(torch.optim.AdamW, fused=True)
    optimizer = ice.Optimizer(adamw, net.parameters(), clip=ice.clip_norm(1.0), sharding=sharding)
    trainer = ice.create_trainer(net, optimizer, torch.nn.functional.mse_loss)
    batch = torch.randn(BATCH, WIDTH)
    for _ in range(WARM_UP):
        trainer.run([(batch, batch)], max_epochs=1)
    grown(lambda: trainer.run([(batch, batch)], max_epochs=1))
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) / 2**20, peak()


def zero(layers: int) -> list[str]:
    """Print what each rank holds under ZeRO beside plain, and return what is beyond its bound."""
    print(
        f'\n| `sharding="zero1"`, AdamW, {layers * LAYER:.0f} MB of parameters | state of a rank, MB | of plain | '
        "peak of a step, MB | of plain | computed |\n" + "|---" * 6 + "|"
    )
    broken = []
    for ranks in (1, 2, 3):
        every = zip(*launch(rank_work, ranks, layers, timeout=300.0), strict=True)
        (plain, plain_peak), (own, own_peak) = (map(max, zip(*ranks_of, strict=True)) for ranks_of in every)
        computed = (2 + 2 / ranks) / 4  # parameters and gradients, and a part of two moments
        print(f"| {ranks} {'ranks' if ranks > 1 else 'rank'}, plain | {plain:.1f} | 1 | {plain_peak:.0f} | 1 | 1 |")
        print(
            f"| {ranks} {'ranks' if ranks > 1 else 'rank'}, ZeRO | {own:.1f} | {own / plain:.4f} | {own_peak:.0f} | "
            f"{own_peak / plain_peak:.2f} | {computed:.2f} |",
            flush=True,
        )
        broken += [f"{ranks} ranks: {own / plain:.4f} of the state"] if own > ZERO_BOUND * plain / ranks else []
    return broken


# -- checkpoints ----------------------------------------------------------------------------------------------


def saved(layers: int, *, background: bool) -> tuple[float, float, float]:
    """Return the MB that the first save leaves taken, that four more leave, and the peak of any above no save."""
    net, batch = model(layers), torch.randn(BATCH, WIDTH)
    optimizer = ice.Optimizer(torch.optim.AdamW(net.parameters(), fused=True))
    trainer = ice.create_trainer(net, optimizer, torch.nn.functional.mse_loss)

    def epoch() -> None:
        trainer.run([(batch, batch)] * 2, max_epochs=1)

    for _ in range(WARM_UP):
        epoch()
    without = grown(epoch)[0]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ice.Checkpoint({"model": net, "optimizer": optimizer}, folder, background=background)
        checkpoint.attach(trainer, ice.OptimizerEvents.OPTIMIZER_STEP_COMPLETED(once=1))
        start, highest, kept, buffers = resident(), 0.0, [], []
        for _ in range(SAVES):
            highest = max(highest, resident() - start + grown(epoch)[0])
            kept.append(resident() - start)
            # Held here, so that a save which took others would be seen.
            buffers.append(list(checkpoint._under_way._writer._snapshots._memory.values()))
    return kept[0], kept[-1] - kept[0], highest - without


def checkpoints(layers: int) -> list[str]:
    """Print what checkpoints keep, and return what is beyond its bound."""
    state = 3 * layers * LAYER
    print(
        f"\n| `ice.Checkpoint` of {state:.0f} MB of state | kept after the first save, MB | of the state | "
        f"after {SAVES - 1} more, MB more | peak above a run without, MB |\n" + "|---" * 5 + "|"
    )
    broken = []
    for name, background in (("in the background", True), ("`background=False`", False)):
        first, more, highest = alone(functools.partial(saved, layers, background=background))
        print(f"| {name} | {first:.1f} | {first / state:.3f} | {more:.1f} | {highest:.1f} |", flush=True)
        if max(first, highest) > (background + COPY_BOUND) * state:
            broken.append(f"{name}: keeps {first / state:.3f} of the state, at most {highest / state:.3f}")
        if more > COPY_BOUND * state:
            broken.append(f"{name}: {SAVES - 1} more saves keep {more / state:.3f} of the state more")
    return broken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="of a million parameters; a multiple of 12")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is beyond its bound")
    parser.add_argument("--quick", action="store_true", help="half the layers")
    asked = parser.parse_args()
    layers = asked.layers // 2 if asked.quick else asked.layers
    os.environ.update(EXACT_HEAP)
    print(machine())
    broken = [*step(layers), *zero(layers), *checkpoints(layers)]
    print("\n" + ("\n".join(broken) if broken else "every ratio is within its bound"))
    if asked.check and broken:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
