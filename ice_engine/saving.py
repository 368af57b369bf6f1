"""An optimizer's state: what is saved of it, and how it goes on from there, also inside of a window."""

import copy
from typing import Any

import torch

from ice_engine.attaching import Attaching
from ice_engine.distributed import world
from ice_engine.distributed.consolidation import consolidate, is_spread, resharded
from ice_engine.distributed.shards import shard_of
from ice_engine.errors import ArgumentValueError, warn
from ice_engine.left import Left
from ice_engine.matching import LoadReport, fit, shapes
from ice_engine.names import class_name
from ice_engine.norms import local_part
from ice_engine.processors.history import History
from ice_engine.state import gradients_in, keep_precision_of_counts, pack, stub, unpack

_GRADIENT = "ice_engine.gradient"


class Saving(Attaching):
    """Can be saved, loaded, copied and pickled."""

    def _whole_counts(self) -> dict[str, int]:
        # What is saved or copied while a window is being stepped is without that window, so without its counts.
        return dict(self._counts_before if self._closing else self._clocks.counts)

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
        if not is_spread(self._inner):
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
            # Also of fully_shard(): the shard of one process is the whole.
            parameters = enumerate(self._parameters())
            state["gradients"] = {i: local_part(p.grad) for i, p in parameters if p.grad is not None}
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
        plain = resharded(self._inner, plain)
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
        self._inner.load_state_dict(plain)
        keep_precision_of_counts(shard_of(self._inner).state, self.param_groups, plain)
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
            if self._member is None:
                self._window.ranks = world.world_size()  # of which attach() may find that some have the same data
            self._resume_size()
            self._measurements = {metric: History(values) for metric, values in extra.get("measurements", {}).items()}
            self._changed = None
            self._precision.load_state_dict(extra)
            self._measures.noise.load_state_dict(extra.get("noise", (0.0, 0.0, 0.0)))
            self._loaded = True
            self._publish()
            self._precision.load_round(None)  # what was under way is over, and adapts nothing
        self._loaded_plain = extra is None
        self._discard("load_state_dict()")
        self._clear()
        if extra is not None:
            self._load_window(extra["window"], gradients, whole=not (report.new or report.dropped))
            self._precision.load_round(extra.get("overflowed"))
        self._in_close = False  # in a handler of a step: what was loaded is not for the end of that step to clear
        return report

    def start_over(self) -> None:
        """Count anew if the engine's next run does, though a state was loaded: that run was at its end."""
        self._loaded = False

    def count_from(self, iteration: int) -> None:
        """Count on from *iteration*, of this rank; what was loaded has that of the rank which saved."""
        if self._loaded:
            self._clocks.counts["iteration"] = iteration

    def _load_window(self, state: dict[str, Any], gradients: dict[int, torch.Tensor], *, whole: bool) -> None:
        """Go on inside of the window that was open, if all that was in it is there."""
        self._window.common = state.get("common", 0.0)
        if self._window.size:  # else the first loss is to tell how long windows are
            self._window.reset()
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
            "_gathering": [],
            "_beside": [],
            "_member": None,
            "_model": None,
            "_parameter_names": {},
            "_waits": [],
            "_last_record": None,
            "_left": Left(),
            "_bound": None,
            "_lengths": None,
        }
        return {**kept, **of_this_run, "_closing": False, "_in_close": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._discard("copying")  # torch copies and pickles parameters without their gradients
