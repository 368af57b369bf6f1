"""How an engine drives an optimizer: what happens on which of its events, alone or together with other ranks."""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from ignite.engine import Engine, Events

from ice_engine.clipping import ClipAdaptive, ClipNorm, ClipValue
from ice_engine.distributed import world
from ice_engine.distributed.build import remove_last_param_group
from ice_engine.distributed.gathered import fully_sharded, gather_anew, keep_flags, require_unsharded
from ice_engine.distributed.sync import synchroniser
from ice_engine.distributed.synchroniser import Sync, Synchroniser
from ice_engine.errors import ArgumentTypeError, AttachError, BackwardError, warn
from ice_engine.events import is_running, register
from ice_engine.hooks import HookRegistry
from ice_engine.left import has_gradient
from ice_engine.member import SPOILED, Member
from ice_engine.names import class_name
from ice_engine.of_engine import optimizers_of
from ice_engine.orders import LAST, OPTIMIZERS
from ice_engine.other_schedulers import overwritten
from ice_engine.peers import Peers, peers
from ice_engine.precision import always
from ice_engine.processors.agreement import exact
from ice_engine.processors.group import check_names, rewind, set_initial_values, written_keys
from ice_engine.processors.group_mapping import group_name
from ice_engine.processors.processor import name_of
from ice_engine.stepping import Stepping
from ice_engine.summary import summary
from ice_engine.wrappers import bare


class Attaching(Stepping):
    """Lets an engine end its micro-batches, epochs and runs."""

    @property
    def hooks(self) -> HookRegistry:
        """The hooks of the engine it is attached to.

        Raises:
            AttachError: If it is attached to none.
        """
        if self._engine is None:
            message = f"optimizer {self._name!r} is not attached to an engine; call optimizer.attach(engine) first"
            raise AttachError(message)
        return HookRegistry(self._engine)

    def _attach(self, engine: Engine, model: torch.nn.Module | None, sync: Sync) -> None:
        registry = HookRegistry(engine)
        if model is not None and not isinstance(model, torch.nn.Module):
            message = f"model must be a torch.nn.Module, got {type(model).__name__}"
            raise ArgumentTypeError(message)
        self._check_attachable(engine)
        world.warn_if_alone()
        gathering = [] if model is None else fully_sharded(model)
        gather_anew(gathering)  # or else the model has whole parameters now, which no optimizer has
        driven = synchroniser(model, self._parameters(), sync) if world.world_size() > 1 else None
        if model is None:
            require_unsharded(self._parameters())
        if self._processors:
            check_names(self._processors, self.param_groups)
            set_initial_values(self._processors, self.param_groups)
        if model is not None:
            # Not by id(): a parameter that comes later may be where one was that is gone. Not weak: torch converts
            # those of fully_shard by swapping, such as in model.cpu(), and refuses to if anybody refers to them weakly.
            self._model = bare(model)
            self._parameter_names = {p: n for n, p in self._model.named_parameters()}
        self._engine, self._gathering = engine, gathering
        self._beside = optimizers_of(engine)
        self._beside.append(self)
        try:
            self._follow(engine, registry, driven)
        except BaseException:  # such as of a hook that has one of these names, or of ranks that do not come
            self.detach()
            raise

    def _follow(self, engine: Engine, registry: HookRegistry, driven: Synchroniser | None) -> None:
        register(engine, self._name)
        self._clocks.run = engine.state
        self._publish()
        for event, handler, order in (
            (Events.STARTED, self._on_started, OPTIMIZERS),
            (Events.ITERATION_STARTED, self._on_iteration_started, OPTIMIZERS),
            (Events.ITERATION_COMPLETED, self._on_iteration_completed, OPTIMIZERS),
            (Events.EPOCH_COMPLETED | Events.TERMINATE_SINGLE_EPOCH, self._on_epoch_ended, OPTIMIZERS),
            (Events.EPOCH_COMPLETED, self._on_epoch_over, LAST),
            (Events.TERMINATE | Events.COMPLETED, self._on_run_ended, OPTIMIZERS),
        ):
            registry.add(event, handler, name=f"{self._name}.{handler.__name__.removeprefix('_on_')}", order=order)
        summary(engine)
        self._precision.goes_on = functools.partial(is_running, engine)
        if self._running and not self._window.is_open:
            self.zero_grad()  # as at the start of a run
        if driven is not None:
            self._member = self._join(peers(engine), driven)

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
        self._beside.remove(self)
        if not self._beside:
            summary(cast("Engine", self._engine)).leave()
        self._engine, self._gathering, self._beside = None, [], []
        self._precision.goes_on = always

    def _join(self, together: Peers, driven: Synchroniser) -> Member:
        member = Member(
            self._name,
            self._window,
            self._precision,
            driven,
            parameters=self._parameters,
            facts=self._facts,
            values=self._values,
            close=lambda: self._close(self._window.size),
            drop=self._drop_tail,
            is_spoiled=self._is_spoiled,
            discard=self._discard,
            let_go=self._let_go,
            touched=self._note_gradients,
            common=self._clocks.common,
        )
        together.join(member)
        if self._loaded:
            self._resume_size()
        return member

    def _facts(self) -> dict[str, Any]:
        """What must be the same on every rank for their windows and steps to be."""
        return {
            "accumulation_steps": self.accumulation_steps,
            "effective_batch_size": self._window.batch,
            "tail": self._window.tail,
            "loss_reduction": self._window.reduction,
            "clip": _said(self._clip),
            "nonfinite": self._precision.policy,
            "max_consecutive_skips": self._precision.max_consecutive_skips,
            "loss scale": self._precision.loss_scale,
            "step": self._clocks.counts["step"],
            "skips in a row": self._precision.consecutive_skips,
            "processors": [name_of(processor) for processor in self._processors],
            "class": class_name(self._inner),
            "sync": self._member.sync.always if self._member is not None else None,
            "number of ranks with data of their own": self._window.ranks,
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
        self._refuse_shared(engine, self._parameters())
        for other in optimizers_of(engine):
            if other.name.lower() == self._name.lower() or other.name.upper() == self._name.upper():
                message = (
                    f"an optimizer named {other.name!r} is attached to this engine already; give each its own: "
                    "Optimizer(..., name='generator')"
                )
                raise AttachError(message)

    def _refuse_shared(self, engine: Engine, parameters: Iterable[torch.Tensor]) -> None:
        mine = {id(p) for p in parameters}
        for other in optimizers_of(engine):
            shared = [n for n, p in other.named_parameters() if id(p) in mine] if other is not self else ()
            if shared:
                message = (
                    f"optimizers {other.name!r} and {self._name!r} share {len(shared)} parameters ({shared[0]!r}...); "
                    "each would step on the other's gradients; give every parameter to one optimizer, or, if a new one "
                    "takes the place of an old one, call old.detach() first or make the engine anew"
                )
                raise AttachError(message)

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
        if self._model is not None:  # which may have got them, in a module of theirs, since it was attached
            names = {p: n for n, p in self._model.named_parameters()}
            self._parameter_names |= {p: names[p] for p in added if p in names}
        if self._engine is not None or self._window.is_open:
            for parameter in added:  # what earlier losses left there came from no backward() of this optimizer
                parameter.grad = None

    def _on_started(self, engine: Engine) -> None:
        if self._member is None and world.world_size() > 1:
            message = (
                f"optimizer {self._name!r} was attached before there was a process group, so this is rank "
                f"{world.rank()} of {world.world_size()} and nothing would reduce its gradients; call "
                "init_process_group() first, then optimizer.attach(engine, model=DistributedDataParallel(model))"
            )
            raise AttachError(message)
        self.hooks.put_last(LAST)  # what was attached since then may still stop the run or train on an episode
        self._clocks.run = engine.state  # a new one, if somebody gave the engine one
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
            rewind(self._processors, self.param_groups if self._processors else (), self._changed)
            self._changed = set()
            self._measurements.clear()
        elif engine.state.iteration == 0 and self._clocks.counts["step"]:
            step = self._clocks.counts["step"]
            warn(
                f"optimizer {self._name!r} goes on at step {step}, as it was loaded, but its engine "
                "starts at iteration 0. To go on where the run was, load the engine's state too and, after a complete "
                "run, raise max_epochs"
            )
        elif engine.state.iteration > 0 and not self._loaded and not self._clocks.counts["iteration"]:
            self._say_behind(engine)
        self._settle()
        self._loaded = self._loaded_plain = self._said_drop = False
        self._short_windows = 0
        self._measures.watch.restart()
        # Resumed inside an epoch, its losses of before count, too.
        self._epoch_began = engine.state.iteration - engine.state.iteration % (engine.state.epoch_length or 1)
        if not self._window.is_open:
            self.zero_grad()
        self._publish()
        self._say_overwritten(engine)

    def _say_behind(self, engine: Engine) -> None:
        goes_on = f"the engine goes on at iteration {engine.state.iteration}, optimizer {self._name!r}"
        if not self._loaded_plain:
            warn(
                f"{goes_on} starts at step 0, and so do its schedules; load its state too: "
                "optimizer.load_state_dict(...)"
            )
        elif any("step" in getattr(processor, "units", {"step"}) for processor in self._processors):
            warn(
                f"{goes_on} was given a plain optimizer's state, without clocks: it starts at step 0, and so do its "
                "schedules; those with unit='iteration', such as ice.schedules.cosine(unit='iteration'), go on too"
            )

    def _say_overwritten(self, engine: Engine) -> None:
        written = {key.partition(".")[0] for _, key in written_keys(self._processors)}
        if found := overwritten(engine, self, written, f"{self._name.upper()}_STEP_STARTED") if written else []:
            warn(
                f"processors of optimizer {self._name!r} write before each step what {' and '.join(found)} "
                f"writes, which has no effect; leave out either, or let it write on {self._name.upper()}_STEP_STARTED"
            )

    def _on_iteration_started(self, _: Engine) -> None:
        if self._window.pending:
            self._drop_unfinished()
        self._in_iteration = True
        if self._gathering:
            keep_flags(self._gathering)  # such as of what a handler has unfrozen after a validation
        # As the zero_grad() of a plain loop: what a handler left there, such as validation, enters no window.
        in_window = self._window.micro_batches or self._left.expects
        if not (in_window or self.needs_closure) and has_gradient(self._parameters()):
            self.zero_grad()
        if "times" in self._measures.wanted:
            self._measures.watch.lap("data")

    def _on_iteration_completed(self, _: Engine) -> None:
        self._in_iteration = False
        if "times" in self._measures.wanted:
            self._measures.watch.lap("compute")
        if self._window.pending:
            self._end_micro_batch(size=self._window.size)
            if self._member is None and self._window.is_full:  # else the peers know whether the window closes
                self._close(self._window.size)
        elif not self.needs_closure:
            self._require_own_gradients(self._parameters())

    def _drop_unfinished(self) -> None:
        if self._window.pending and self._in_iteration:
            # Its iteration did not complete: the exception was swallowed by a handler of EXCEPTION_RAISED.
            self._discard("an exception")
        elif self._window.pending:
            self._clear()
            message = (
                f"optimizer {self._name!r} has a loss from outside train_step, and nobody would step with it; call "
                "backward() in train_step, such as where it ends an episode, or call optimizer.update() after it"
            )
            raise BackwardError(message)

    def _on_epoch_ended(self, *_: Any, **__: Any) -> None:
        self._drop_unfinished()
        if self._member is None:  # else the peers know whether it has ended everywhere
            if self._window.tail == "step":
                self.flush()
            self._drop_tail()
        self._measures.watch.stop()  # what comes now, such as validation, is none of a window's

    def _on_epoch_over(self, engine: Engine) -> None:
        # After all handlers of the epoch's end, one of which may train on an episode.
        self._drop_unfinished()
        # A run that is resumed at an epoch's last micro-batch may have none left.
        if self._clocks.counts["iteration"] <= self._epoch_began < engine.state.iteration and not self.needs_closure:
            warn(
                f"optimizer {self._name!r} got no loss in epoch {engine.state.epoch}: its backward() was not called; "
                "call optimizer.backward(loss) in train_step"
            )
        self._epoch_began = engine.state.iteration

    def _on_run_ended(self, *_: Any) -> None:
        self._loaded = False  # what was loaded in the middle of this run says nothing about the next
        if self._member is None:
            if self._is_spoiled():  # as after Ignite's TerminateOnNan
                self._discard(SPOILED)
            self._on_epoch_ended()
            self.flush()


def _said(clip: Any) -> str:
    """Return what ranks can tell each other of a clip, which may be a function of anybody's."""
    ours = clip is None or isinstance(clip, ClipNorm | ClipValue | ClipAdaptive)
    return repr(clip) if ours else name_of(clip)
