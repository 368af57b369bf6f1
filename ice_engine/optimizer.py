"""The optimizer that steps itself: composes window, precision, clipping, processors and events."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine

from ice_engine.arguments import choice
from ice_engine.clocks import Clocks
from ice_engine.distributed.gathered import fully_sharded, gather_anew
from ice_engine.distributed.synchroniser import Sync
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    AttachError,
    ClosureError,
)
from ice_engine.isolation import GradOff
from ice_engine.measures import MEASURES
from ice_engine.of_engine import optimizers_of
from ice_engine.plan import Plan
from ice_engine.saving import Saving


class Optimizer(Saving):
    """Wraps a torch optimizer and steps it, exactly once per window of micro-batches.

    It *is* a ``torch.optim.Optimizer``: schedulers, loggers and checkpoints take it unchanged, and
    ``step()`` always steps. Windows, the loss scale, clipping and processors live in
    :meth:`backward` and :meth:`update`; :meth:`attach` lets an Ignite engine call the latter.

    Args:
        optimizer: A torch optimizer, or a factory of one such as ``functools.partial(AdamW, lr=3e-3)``. A factory of
            Adam or AdamW that leaves ``fused`` and ``foreach`` open gets the fused form, which differs by rounding;
            an instance stays as it is. ``repr(optimizer)`` says which runs.
        params: With a factory: parameters, ``(name, parameter)`` pairs or param groups.
        name: Identifier that prefixes events, ``engine.state`` attributes and tags; unique per engine.
        processors: Functions from dict to dict, run in this order once per step and param group. A schedule over the
            whole run takes every iteration for a micro-batch; for an optimizer that gets a loss in some of them only,
            give it ``unit="iteration"`` or a ``total=`` of its own.
        accumulation_steps: Micro-batches per window, at least 1.
        effective_batch_size: Items (whatever the weights of :meth:`backward` count) of one step over all ranks,
            instead of *accumulation_steps*: windows have the number of micro-batches that comes nearest to it, at
            least 1, by the first weight of the run (the largest of all ranks). Where later ones weigh more or less, so
            does the window; its mean is over what it has. A resumed run keeps that number with as many ranks, and
            decides it anew with others: the steps of the run are then about as many, schedules over the whole run
            follow with a line in the log, and ``on_change`` is not asked.
        tail: What becomes of a short last window of an epoch: ``"step"`` with its own mean,
            ``"carry"`` into the next epoch (and step at the run's end), or ``"drop"``, with a line in the log: a
            warning the first time in a run.
        loss_reduction: What ``backward(loss, weight=n)`` is given: a ``"mean"`` over n items or their ``"sum"``.
        clip: Called with the parameters; limits their gradients and returns the norm before.
        grad_scaler: A ``torch.amp.GradScaler`` for any device, whose ``scale``, ``unscale_``, ``step`` and ``update``
            are then called here and nowhere else. Optimizers may share one: its scale adapts once, when none of their
            windows is open that it entered.
        nonfinite: What an infinite or NaN gradient means: ``"skip"`` the step, ``"raise"``, or ``"off"``;
            None for ``"skip"`` where a norm or a scaler is at hand, else ``"off"``.
        max_consecutive_skips: Skips in a row after which training stops with an error; at least 1. A window of
            weight 0, which is skipped as well, neither counts nor ends the row.
        sharding: ``"zero1"`` shards optimizer state over ranks (needs a factory); in one process nothing changes.
        on_change: What holds when a run is resumed and its schedules would give other values, because the horizon,
            the window, a schedule or an initial value changed: ``"error"`` stops, ``"replan"`` takes the new values,
            ``"keep"`` stays with the saved ones, ``"stretch"`` stretches what is left of the saved schedules over
            what is left of the run. All but the first say in one line what the next value becomes.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or *optimizer* is wrapped already.
        ArgumentValueError: If an argument has an impossible value.
        ClosureError: If the wrapped optimizer needs a closure, and windows, a scaler, processors or a policy are asked
            for.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=2)
        >>> for target in (1.0, 3.0):
        ...     optimizer.backward(weight * target)
        ...     stepped = optimizer.update()
        >>> stepped, round(weight.item(), 4)  # 1 - 0.1 * (1 + 3) / 2
        (True, 0.8)

    Checkpoint:
        :meth:`state_dict` is torch's own with one key more, ``ice_engine``: clocks, loss scale and
        skips in a row. Schedules are functions of the clocks and need no state of their own.

    .. versionadded:: 0.1.0
    """

    def measure(self, *what: str) -> "Optimizer":
        """Let the record of every step say more.

        Args:
            what: ``"grad_norm"``, if nothing else computes it (one more pass over the gradients); ``"noise_scale"``,
                the batch size, in items, from which on a larger one brings little (one more pass over the gradients
                of the first micro-batch); ``"update_ratio"``, how far the step moves each param group, as a part of
                its length (a copy of the parameters); ``"times"``, the seconds of the window spent on data, on
                forward and backward, and on the step (on a GPU, of the host; in an attached run).

        Returns:
            This optimizer.

        Raises:
            ArgumentValueError: If there is no such measure.

        Examples:
            >>> weight = torch.nn.Parameter(torch.tensor(2.0))
            >>> optimizer = Optimizer(torch.optim.SGD([weight], lr=0.1)).measure("grad_norm", "update_ratio")
            >>> optimizer.backward(weight * 3.0)
            >>> stepped = optimizer.update()
            >>> float(optimizer.record.grad_norm), round(float(optimizer.record.update_ratio["group_0"]), 4)
            (3.0, 0.15)
        """
        for measure in what:
            choice("measure()", measure, MEASURES)
        self._measures.wanted |= {*what}
        return self

    def attach(
        self, engine: Engine, model: torch.nn.Module | None = None, *, sync: Sync = "communication"
    ) -> "Optimizer":
        """Let *engine* step this optimizer: after each iteration, and at an epoch's end if a window is open.

        In many processes, call it on every rank. Windows then close, epochs end and runs stop on all ranks or on none:
        a step's gradient is the mean over the items of all ranks, a rank that runs out of data takes part with weight
        0 until all have, and a rank that stops or raises stops all.

        Args:
            engine: The engine whose ``train_step`` calls :meth:`backward`.
            model: The module being trained; gives parameters their names in errors and checkpoints. In many
                processes, the ``DistributedDataParallel`` or ``fully_shard``'ed module whose reduction it drives; the
                latter in one process, too.
            sync: What accumulation saves in many processes: ``"communication"`` reduces gradients once per window,
                ``"memory"`` in every micro-batch, so that ``fully_shard`` keeps them sharded;
                ``DistributedDataParallel``, whose gradients are whole, once per window either way.

        Returns:
            This optimizer.

        Raises:
            AttachError: If it is attached, another optimizer of the engine has its name or one of its
                parameters, nothing would reduce the gradients of many ranks, or parameters are sharded and there is
                no *model*.
        """
        self._attach(engine, model, sync)
        return self

    def toggle(self, *modules: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which parameters that other optimizers train require no grad.

        A loss that passes through them leaves no gradient there, and no time is spent on it; gradients of this
        optimizer's own parameters are the same. Compute the loss and call :meth:`backward` inside. At its end, also on
        an exception, every flag is as it was at its beginning. What an outer context turned off stays off.

        Args:
            *modules: Modules of which only the parameters that belong to this optimizer keep their flags, such as the
                discriminator in a generator's step. Without any: the parameters of all other optimizers of the engine.

        Returns:
            A context manager, for one ``with``.

        Raises:
            ArgumentTypeError: If one of *modules* is not a module.
            AttachError: If there are none, and this is not attached to an engine.

        Examples:
            >>> generator, discriminator = torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)
            >>> optimizer = Optimizer(torch.optim.Adam(generator.parameters()), name="generator")
            >>> with optimizer.toggle(discriminator):
            ...     optimizer.backward(-discriminator(generator(torch.randn(8, 2))).mean())
            >>> discriminator.weight.grad is None, generator.weight.grad is None
            (True, False)
            >>> discriminator.weight.requires_grad
            True

        .. versionadded:: 0.1.0
        """
        for module in modules:
            if not isinstance(module, torch.nn.Module):
                message = (
                    f"toggle() takes modules, got {type(module).__name__}; such as generator.toggle(discriminator), or "
                    "generator.toggle() for all that the other optimizers of its engine train"
                )
                raise ArgumentTypeError(message)
        if not modules and self._engine is None:
            message = (
                f"toggle() without modules means those of the other optimizers of the engine, but optimizer "
                f"{self._name!r} is attached to none; write {self._name}.toggle(module), or attach it"
            )
            raise AttachError(message)
        others = [] if self._engine is None else optimizers_of(self._engine)
        gathering = [m for other in others if other is not self for m in other._gathering]  # noqa: SLF001 - own class
        within = {part for module in modules for part in module.modules()}
        own: list[Any] = self._gathering
        gathering += [m for m in own if not within.isdisjoint(m.modules())]
        gathering += fully_sharded(*modules)
        gather_anew(gathering)  # or else modules have whole parameters now, which no optimizer has
        mine = {id(p) for p in self._parameters()}
        reached = [p for module in modules for p in module.parameters()] if modules else self._foreign_parameters()
        foreign = [p for p in reached if id(p) not in mine]
        return GradOff(foreign, functools.partial(gather_anew, gathering))

    def plan(
        self,
        epoch_length: int | None = None,
        max_epochs: int | None = None,
        *,
        max_iters: int | None = None,
        accumulation_steps: int | None = None,
    ) -> Plan:
        """Compute every scheduled key at every step of a whole run, from its beginning; change nothing.

        Copies of the processors run on copies of the param groups, which start from their initial values. What is left
        out is taken from the engine that this is attached to, if it is known there.

        Args:
            epoch_length: Micro-batches per epoch, at least 1, such as ``len(loader)``.
            max_epochs: Epochs of the run, at least 1.
            max_iters: Micro-batches of the run, at least 1, instead of *max_epochs*; it may end inside an epoch.
            accumulation_steps: Micro-batches per window, if they are to follow from ``effective_batch_size`` and no
                loss has decided them yet.

        Returns:
            What is planned; ``print(plan)`` shows a table, ``plan.problems`` lists what looks wrong, ``plan.plot()``
            is a figure.

        Raises:
            ArgumentTypeError: If an argument is no int, or a processor cannot be copied.
            ArgumentValueError: If the length of the run or of a window is not known, given twice, or below 1.
            ClosureError: If the wrapped optimizer needs a closure: it steps without windows and processors.
            ProcessorError: If a processor does something impossible; a note says at which step.

        Examples:
            >>> weight = torch.nn.Parameter(torch.tensor(1.0))
            >>> from ice_engine.processors.schedules import step
            >>> drops = Optimizer(torch.optim.SGD([weight], lr=0.1), processors=[step(step_size=2, gamma=0.5)])
            >>> list(drops.plan(epoch_length=3, max_epochs=2).series["lr/group_0"])
            [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]

        .. versionadded:: 0.1.0
        """
        if self.needs_closure:
            message = (
                f"{type(self._inner).__name__} evaluates the loss in a closure and steps without windows and "
                "processors, so there is nothing to plan"
            )
            raise ClosureError(message)
        run: Mapping[str, Any] = {} if self._engine is None else self._clocks.run_lengths()
        if epoch_length is None:
            epoch_length = run.get("epoch_length")
        if max_epochs is None and max_iters is None:
            max_iters = run.get("max_iters")
            max_epochs = run.get("max_epochs") if max_iters is None else None
        unknown = ["epoch_length"] if epoch_length is None else []
        unknown += ["max_epochs (or max_iters)"] if max_epochs is None and max_iters is None else []
        if epoch_length is None or unknown:
            why = "is attached to an engine that does not know it yet" if run else "is attached to no engine"
            message = (
                f"plan() needs {' and '.join(unknown)}: optimizer {self._name!r} {why}; "
                "write optimizer.plan(epoch_length=len(loader), max_epochs=...)"
            )
            raise ArgumentValueError(message)
        size = self.accumulation_steps if accumulation_steps is None else accumulation_steps
        if size is None:
            message = (
                f"plan() needs accumulation_steps: with effective_batch_size={self._window.batch} they follow from the "
                f"first loss, and there was none; write optimizer.plan(..., accumulation_steps=n), with n = "
                f"{self._window.batch} / (items of a micro-batch * ranks)"
            )
            raise ArgumentValueError(message)
        asked = {"epoch_length": epoch_length, "max_epochs": max_epochs, "max_iters": max_iters}
        return Plan(
            self.param_groups,
            self._processors,
            epoch_length=epoch_length,
            max_epochs=max_epochs,
            max_iters=max_iters,
            accumulation_steps=size,
            tail=self._window.tail,
            name=self._name,
            optimizer=self._stand_in,
            # The plan that on_change keeps or stretches, if it is this run that is asked for.
            resumed=self._clocks.plan if asked == self._clocks.run_lengths() else None,
        )

    def _stand_in(self, groups: list[dict[str, Any]], clocks: Clocks, engine: Any) -> tuple[Any, dict[int, Any]]:
        # Processors may look at their optimizer; what they see there must be the planned run, not this one's.
        inner = object.__new__(type(self._inner))
        vars(inner).update({**vars(self._inner), "param_groups": groups})
        stand_in = object.__new__(type(self))
        vars(stand_in).update({**vars(self), "_inner": inner, "_clocks": clocks, "_engine": engine})
        known = {id(self): stand_in, id(self._inner): inner}
        return stand_in, known if self._engine is None else {**known, id(self._engine): engine}

    def __copy__(self) -> "Optimizer":
        message = "a shallow copy would share parameters and window with its original; use copy.deepcopy(optimizer)"
        raise ArgumentTypeError(message)

    def __repr__(self) -> str:
        window = self._window
        parts = [f"name={self._name!r}"]
        parts += [f"accumulation_steps={window.size}"] if window.size else []
        parts += [f"effective_batch_size={window.batch}"] if window.batch is not None else []
        parts += [f"clip={self._clip!r}"] if self._clip is not None else []
        parts += [f"processors={list(self._processors)!r}"] if self._processors else []
        return f"Optimizer({', '.join(parts)}) of {self._inner!r}"
