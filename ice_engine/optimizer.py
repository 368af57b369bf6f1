"""The optimizer that steps itself: composes window, precision, clipping, processors and events."""

import contextlib
import copy
import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from ignite.engine import Engine, Events

from ice_engine.arguments import choice
from ice_engine.clocks import Clocks
from ice_engine.distributed import world
from ice_engine.distributed.build import remove_last_param_group
from ice_engine.distributed.consolidation import consolidate, is_sharded, resharded
from ice_engine.distributed.sync import Sync, Synchroniser, synchroniser
from ice_engine.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    AttachError,
    ClosureError,
    warn,
)
from ice_engine.events import is_running, register
from ice_engine.hooks import HookRegistry
from ice_engine.isolation import GradOff
from ice_engine.left import Left, has_gradient
from ice_engine.matching import LoadReport, fit, shapes
from ice_engine.measures import MEASURES
from ice_engine.names import class_name
from ice_engine.peers import Member, Peers, peers
from ice_engine.plan import Plan
from ice_engine.precision import always
from ice_engine.processors.agreement import exact
from ice_engine.processors.group import check_names, rewind, set_initial_values
from ice_engine.processors.group_mapping import group_name
from ice_engine.processors.processor import name_of
from ice_engine.state import gradients_in, pack, stub, unpack
from ice_engine.stepping import Stepping
from ice_engine.summary import summary
from ice_engine.wrappers import bare

_GRADIENT = "ice_engine.gradient"
_FIRST = -100  # order of our handlers: validation and checkpoints on the same event see the step already taken


class Optimizer(Stepping):
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

    @property
    def hooks(self) -> HookRegistry:
        """The hooks of the engine it is attached to."""
        if self._engine is None:
            message = f"optimizer {self._name!r} is not attached to an engine; call optimizer.attach(engine) first"
            raise AttachError(message)
        return HookRegistry(self._engine)

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

    # -- engine -------------------------------------------------------------------------------------------

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
                processes, the ``DistributedDataParallel`` or ``fully_shard``'ed module whose reduction it drives.
            sync: What accumulation saves in many processes: ``"communication"`` reduces gradients once per window,
                ``"memory"`` in every micro-batch, so that ``fully_shard`` keeps them sharded.

        Returns:
            This optimizer.

        Raises:
            AttachError: If it is attached, another optimizer of the engine has its name or one of its
                parameters, or nothing would reduce the gradients of many ranks.
        """
        registry = HookRegistry(engine)
        if model is not None and not isinstance(model, torch.nn.Module):
            message = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise ArgumentTypeError(message)
        self._check_attachable(engine)
        driven = synchroniser(model, self._parameters(), sync) if world.world_size() > 1 else None
        if self._processors:
            check_names(self._processors, self.param_groups)
            set_initial_values(self._processors, self.param_groups)
        if model is not None:
            self._parameter_names = {id(p): n for n, p in bare(model).named_parameters()}
        self._engine = engine
        register(engine, self._name)
        self._clocks.run = engine.state
        self._publish()
        for event, handler in (
            (Events.STARTED, self._on_started),
            (Events.ITERATION_STARTED, self._on_iteration_started),
            (Events.ITERATION_COMPLETED, self._on_iteration_completed),
            (Events.EPOCH_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_ended),
            (Events.EPOCH_COMPLETED, self._on_epoch_completed),
            (Events.TERMINATE | Events.COMPLETED, self._on_run_ended),
        ):
            registry.add(event, handler, name=f"{self._name}.{handler.__name__.removeprefix('_on_')}", order=_FIRST)
        summary(engine)
        vars(engine).setdefault("_ice_optimizers", []).append(self)
        self._precision.goes_on = functools.partial(is_running, engine)
        if self._running and not self._window.is_open:
            self.zero_grad()  # as at the start of a run
        if driven is not None:
            self._member = self._join(peers(engine), driven)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`; an open window is dropped with a warning.

        Raises:
            AttachError: If it is not attached.
        """
        registry = self.hooks
        self._refuse_while_closing("detach()")
        registry.remove_of(self)
        self._discard("detach()")
        if self._member is not None:
            peers(cast("Engine", self._engine)).leave(self._member)
            self._member = None
        self._clocks.leave()
        vars(self._engine)["_ice_optimizers"].remove(self)
        if not vars(self._engine)["_ice_optimizers"]:
            summary(cast("Engine", self._engine)).leave()
        self._engine = None
        self._precision.goes_on = always

    def _join(self, together: Peers, driven: Synchroniser) -> Member:
        member = Member(
            self._name,
            self._window,
            driven,
            parameters=self._parameters,
            facts=self._facts,
            values=self._values,
            close=lambda: self._close(self._window.size),
            drop=self._drop_tail,
            discard=self._discard,
            touched=self._note_gradients,
        )
        together.join(member)
        return member

    def _facts(self) -> dict[str, Any]:
        """What must be the same on every rank for their windows and steps to be."""
        return {
            "accumulation_steps": self.accumulation_steps,
            "effective_batch_size": self._window.batch,
            "tail": self._window.tail,
            "loss_reduction": self._window.reduction,
            "nonfinite": self._precision.policy,
            "max_consecutive_skips": self._precision.max_consecutive_skips,
            "loss scale": self._precision.loss_scale,
            "step": self._clocks.counts["step"],
            "skips in a row": self._precision.consecutive_skips,
            "processors": [name_of(processor) for processor in self._processors],
            "class": class_name(self._inner),
            "sync": self._member.sync.always if self._member is not None else None,
            "number of parameters": [len(group["params"]) for group in self.param_groups],
        }

    def _values(self) -> dict[str, dict[str, str]]:
        return {
            group_name(group, i): {k: exact(v) for k, v in group.items() if k not in {"params", "param_names"}}
            for i, group in enumerate(self.param_groups)
        }

    def _check_attachable(self, engine: Engine) -> None:
        if self._engine is not None:
            this = "this" if self._engine is engine else "another"
            message = f"optimizer {self._name!r} is attached to {this} engine already; call optimizer.detach() first"
            raise AttachError(message)
        for other in vars(engine).get("_ice_optimizers", ()):
            if other.name.lower() == self._name.lower() or other.name.upper() == self._name.upper():
                message = (
                    f"an optimizer named {other.name!r} is attached to this engine already; give each its own: "
                    "Optimizer(..., name='generator')"
                )
                raise AttachError(message)
        self._refuse_shared(engine, self._parameters())

    def _refuse_shared(self, engine: Engine, parameters: Iterable[torch.Tensor]) -> None:
        mine = {id(p) for p in parameters}
        for other in vars(engine).get("_ice_optimizers", ()):
            shared = [n for n, p in other.named_parameters() if id(p) in mine] if other is not self else ()
            if shared:
                message = (
                    f"optimizers {other.name!r} and {self._name!r} share {len(shared)} parameters ({shared[0]!r}...); "
                    "each would step on the other's gradients; give every parameter to one optimizer"
                )
                raise AttachError(message)

    def _on_started(self, engine: Engine) -> None:
        if self._window.is_open and not self._loaded:
            self._discard("an exception")
        # As Ignite does with its own counters: a fresh run starts from 0, a resumed or loaded one does not.
        if engine.state.iteration == 0 and not self._loaded:
            self._clocks.counts = dict.fromkeys(self._clocks.counts, 0)
            self._clocks.plan = {}
            self._window.start_afresh()
            self._size = self._window.size
            self._course.start_afresh()
            self._precision.start_afresh()
            self._processors = self._given
            rewind(self._processors, self.param_groups if self._processors else ())
            self._measurements.clear()
        elif engine.state.iteration == 0 and self._clocks.counts["step"]:
            step = self._clocks.counts["step"]
            warn(
                f"optimizer {self._name!r} goes on at step {step}, as it was loaded, but its engine "
                "starts at iteration 0. To go on where the run was, load the engine's state too and, after a complete "
                "run, raise max_epochs"
            )
        elif engine.state.iteration > 0 and not self._loaded and not self._clocks.counts["iteration"]:
            warn(
                f"the engine goes on at iteration {engine.state.iteration}, optimizer {self._name!r} starts at step 0, "
                "and so do its schedules; load its state too: optimizer.load_state_dict(...)"
            )
        self._settle()
        self._loaded = self._said_drop = False
        self._short_windows = 0
        self._measures.watch.restart()
        self._epoch_began = engine.state.iteration
        if not self._window.is_open:
            self.zero_grad()
        self._publish()

    def _on_iteration_started(self, _: Engine) -> None:
        if self._window.pending:
            self._drop_unfinished()
        # As the zero_grad() of a plain loop: what a handler left there, such as validation, enters no window.
        if not (self._window.micro_batches or self.needs_closure) and has_gradient(self._parameters()):
            self.zero_grad()
        if "times" in self._measures.wanted:
            self._measures.watch.lap("data")

    def _on_iteration_completed(self, _: Engine) -> None:
        if "times" in self._measures.wanted:
            self._measures.watch.lap("compute")
        if self._window.pending:
            self._end_micro_batch(size=self._window.size)
            if self._member is None and self._window.is_full:  # else the peers know whether the window closes
                self._close(self._window.size)
        elif not self.needs_closure:
            self._require_own_gradients(self._parameters())

    def _drop_unfinished(self) -> None:
        # Its iteration did not complete: the exception was swallowed by a handler of EXCEPTION_RAISED.
        if self._window.pending:
            self._discard("an exception")

    def _on_epoch_completed(self, engine: Engine) -> None:
        # A run that is resumed at an epoch's last micro-batch may have none left.
        if self._clocks.counts["iteration"] <= self._epoch_began < engine.state.iteration and not self.needs_closure:
            warn(f"optimizer {self._name!r} got no loss in epoch {engine.state.epoch}: its backward() was not called")
        self._epoch_began = engine.state.iteration
        self._measures.watch.stop()  # what comes now, such as validation, is none of a window's

    def _on_epoch_ended(self, *_: Any, **__: Any) -> None:
        self._drop_unfinished()
        if self._member is not None:
            return  # the peers know whether it has ended everywhere
        if self._window.tail == "step":
            self.flush()
        self._drop_tail()

    def _on_run_ended(self, *_: Any) -> None:
        self._loaded = False  # what was loaded in the middle of this run says nothing about the next
        if self._member is None:
            self._on_epoch_ended()
            self.flush()

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
        mine = {id(p) for p in self._parameters()}
        reached = [p for module in modules for p in module.parameters()] if modules else self._foreign_parameters()
        return GradOff(p for p in reached if id(p) not in mine)

    # -- before the run -----------------------------------------------------------------------------------

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
        run = None if self._engine is None else self._engine.state
        if epoch_length is None:
            epoch_length = getattr(run, "epoch_length", None)
        if max_epochs is None and max_iters is None:
            max_iters = getattr(run, "max_iters", None)
            max_epochs = getattr(run, "max_epochs", None) if max_iters is None else None
        unknown = ["epoch_length"] if epoch_length is None else []
        unknown += ["max_epochs (or max_iters)"] if max_epochs is None and max_iters is None else []
        if epoch_length is None or unknown:
            why = "is attached to no engine" if run is None else "is attached to an engine that does not know it yet"
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

    # -- state --------------------------------------------------------------------------------------------

    def _whole_counts(self) -> dict[str, int]:
        # What is saved or copied while a window is being stepped is without that window, so without its counts.
        return dict(self._counts_before if self._closing else self._clocks.counts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; processors change it from the next step on.

        Args:
            param_group: ``params`` and the entries that differ from the defaults.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        try:
            if self._engine is not None:
                self._refuse_shared(self._engine, added)
            if self._processors:
                set_initial_values(self._processors, self.param_groups)
        except BaseException:
            remove_last_param_group(self._inner)
            raise
        if self._engine is not None or self._window.is_open:
            for parameter in added:  # what earlier losses left there came from no backward() of this optimizer
                parameter.grad = None

    def state_dict(self, rank: int = 0) -> dict[str, Any]:
        """Return torch's own state dict with parameter names and one key more, ``ice_engine``.

        A plain torch optimizer of the same class loads it as it is. Call on every rank: state that is sharded,
        by ``sharding="zero1"`` or ``fully_shard()``, is gathered, one tensor after the other.

        Args:
            rank: The rank that gets the whole state.

        Returns:
            ``state``, ``param_groups`` (each with ``param_names``) and ``ice_engine``: plain data that
            loads with ``weights_only=True``. Tensors are the live ones, as in torch; of sharded state they are
            copies on the CPU, and ranks other than *rank* get a stub that refuses to be loaded.

        Raises:
            ArgumentValueError: If there is no such *rank*.
            RankError: If the state is sharded and a rank does not call this too, within seconds.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world.world_size():
            message = f"rank must be an integer from 0 to {world.world_size() - 1}, got {rank!r}"
            raise ArgumentValueError(message)
        extra = self._extra_state()
        if not is_sharded(self._inner):
            return pack(dict(self._inner.state_dict()), self._names(), extra)
        whole = consolidate(self._inner, rank, self._name)
        return stub(rank) if whole is None else pack(whole, self._names(), extra)

    def _extra_state(self) -> dict[str, Any]:
        """What a state dict of ours has beyond torch's."""
        return {
            "name": self._name,
            "class": class_name(self._inner),
            "clocks": self._whole_counts(),
            "horizon": self._course.state_dict(self._terms()),
            "measurements": {metric: list(values) for metric, values in self._measurements.items()},
            "noise": self._measures.noise.state_dict(),
            "window": self._window_state(),
            **self._precision.state_dict(),
            "shapes": shapes(self.named_parameters()),
        }

    def _window_state(self) -> dict[str, Any]:
        # In many processes an open window's gradients are this rank's alone; inside of a micro-batch, half of its own.
        window = self._window
        whole = window.is_open and not (window.pending or self._closing or world.world_size() > 1)
        state = window.state_dict(whole=whole)
        if whole:
            parameters = enumerate(self._parameters())
            state["gradients"] = {i: p.grad for i, p in parameters if p.grad is not None}
            state["first"] = self._measures.of_first
        return state

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> LoadReport:  # type: ignore[override]
        """Load a state dict of ours or of the wrapped optimizer's class; nothing of the argument is kept.

        State goes to the parameter of the same name, however parameters are grouped and ordered now, if all of
        them have names of their own here and there (from ``model.named_parameters()``, :func:`ice.param_groups
        <ice_engine.param_groups.param_groups>` or ``attach(engine, model=model)``); else by position, as in torch.
        Group entries such as ``lr`` are the saved ones where the groups are; of other groups, one takes those of
        the saved group that has its ``name``, or else of the one that all its parameters come from and no other
        group's do, and keeps its own if there is none.

        Args:
            state_dict: From :meth:`state_dict`, or from a plain torch optimizer (clocks then stay as they are).
            strict: Refuse parameters that are new here, no longer here, or of another shape; else new ones start
                without state, and state of the others is left out.

        Returns:
            Which parameters matched, which are new and which were dropped, and which groups kept their own entries.

        Raises:
            NotConsolidatedError: If it is the stub of a rank that does not hold the whole state.
            StateDictError: If it is of a newer version or does not fit; nothing has changed then.
            AttachError: If a window is being stepped, or another one with the same GradScaler is open; likewise.
        """
        self._refuse_while_closing("load_state_dict()")
        # Copied, because torch would keep the caller's tensors as live state.
        plain, extra = unpack(copy.deepcopy(state_dict))
        for index, gradient in gradients_in(extra).items():
            plain["state"].setdefault(index, {})[_GRADIENT] = gradient  # finds its parameter as state does
        plain, report = fit(self._inner, self._names(), plain, extra, strict=strict)
        gradients = {i: state.pop(_GRADIENT) for i, state in plain["state"].items() if _GRADIENT in state}
        plain["state"] = {i: state for i, state in plain["state"].items() if state}
        if extra is not None and extra["grad_scaler"]:
            self._precision.require_loadable()
        # What processors start from; without them it is a scheduler's own, and goes as in a plain optimizer.
        kept = "initial_" if self._processors else ()
        before = [{k: v for k, v in g.items() if k.startswith(kept)} for g in self.param_groups]
        # Loaded twice before the run: what the script asked for is what it had before the first time.
        configured = before if self._course.configured is None else self._course.configured
        names = [group.get("param_names") for group in self.param_groups]
        self._inner.load_state_dict(resharded(self._inner, plain))
        for group, initial, own in zip(self.param_groups, before, names, strict=True):
            for key, value in initial.items():
                group.setdefault(key, value)
            # The names of this process's parameters, not those of the one that saved.
            group.pop("param_names", None)
            if own is not None:
                group["param_names"] = own
        if extra is not None:
            self._clocks.counts.update({clock: int(value) for clock, value in extra["clocks"].items()})
            self._course.load_state_dict(extra.get("horizon"), configured)
            if self._window.batch is not None:
                self._window.ranks = world.world_size()
                self._window.resume({} if self._course.terms is None else self._course.terms.run)
                self._size = self._window.size
            self._measurements = {metric: tuple(values) for metric, values in extra.get("measurements", {}).items()}
            self._precision.load_state_dict(extra)
            self._measures.noise.load_state_dict(extra.get("noise", (0.0, 0.0, 0.0)))
            self._loaded = True
            self._publish()
        self._discard("load_state_dict()")
        self._clear()
        if extra is not None:
            self._load_window(extra["window"], gradients, whole=not (report.new or report.dropped))
        return report

    def _load_window(self, state: dict[str, Any], gradients: dict[int, torch.Tensor], *, whole: bool) -> None:
        """Go on inside of the window that was open, if all that was in it is there."""
        self._window.common = state.get("common", 0.0)
        if not state["micro_batches"]:
            return
        if not ("gradients" in state and whole and world.world_size() == 1):
            warn(
                f"the state of optimizer {self._name!r} was saved inside a window; its {state['micro_batches']} "
                "micro-batches are not in it, or not all of its parameters are here, and the window starts anew. "
                f"Save on {self._name.upper()}_STEP_COMPLETED to lose none"
                + (", or on EPOCH_COMPLETED" if self._window.tail != "carry" else "")
            )
            return
        for i, parameter in enumerate(self._parameters()):
            found = gradients.get(i)
            parameter.grad = None if found is None else found.to(parameter.device, parameter.dtype)
        self._window.load_state_dict(state)
        self._measures.of_first = state["first"]
        self._precision.enter()
        self._note_gradients()

    def __getstate__(self) -> dict[str, Any]:
        kept = dict(vars(self))
        kept.pop("step", None)  # patched in by torch's schedulers
        kept.pop("_opt_called", None)
        if self._closing:
            kept["_clocks"] = copy.copy(self._clocks)
            kept["_clocks"].counts = self._whole_counts()
        of_this_run: dict[str, Any] = {
            "_engine": None,
            "_parameter_names": {},
            "_waits": [],
            "_last_record": None,
            "_left": Left(),
            "_bound": None,
        }
        return {**kept, **of_this_run, "_closing": False, "_in_close": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._discard("copying")  # torch copies and pickles parameters without their gradients

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
