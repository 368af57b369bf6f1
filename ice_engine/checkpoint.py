"""Ignite's Checkpoint that loses nothing: exact, whole or not there, agreed by all ranks, and written beside training.

.. code-block:: text

    event ──▶ decide ──▶ collect ──▶ snapshot ──────────▶ the next step waits, if it must
              all ranks  all ranks   └─ in a thread: copy ▶ write beside ▶ verify ▶ rename ▶ prune
"""

import functools
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, cast

import torch
from ignite.engine import Engine, Events
from ignite.engine.deterministic import DeterministicEngine
from ignite.handlers import Checkpoint as IgniteCheckpoint
from ignite.handlers.checkpoint import CheckpointEvents
from ignite.metrics import Metric

from ice_engine import checkpoint_file, saved_objects
from ice_engine.arguments import choice, count
from ice_engine.checkpoint_folder import Folder
from ice_engine.checkpoint_names import Names
from ice_engine.distributed import world
from ice_engine.distributed.plain import plain
from ice_engine.distributed.together import agree, gather, gather_plain, together
from ice_engine.errors import ArgumentTypeError, ArgumentValueError, CheckpointError, warn
from ice_engine.events import clock_of, is_running
from ice_engine.hooks import HookRegistry
from ice_engine.of_engine import optimizers_of
from ice_engine.peers import Peers, peers
from ice_engine.preemption import SIGNALS
from ice_engine.resuming import OURS, Item, adopted, find, load
from ice_engine.run_position import RunPosition, run_position
from ice_engine.save_times import Request, SaveTimes
from ice_engine.summary import summary
from ice_engine.under_way import Save, UnderWay

logger = logging.getLogger(__name__)


class Checkpoint(IgniteCheckpoint):
    """Saves objects during a run, and resumes from the newest file as if the run had never stopped.

    Takes the arguments of ``ignite.handlers.Checkpoint``. With a folder as *save_handler*:

    - A file is written beside, read back and renamed; only then an older one is removed. It carries its sha256.
    - With the trainer in *to_save* (and not alone), the file holds where the run is: epoch, place in the data, random
      generators, the numbers in ``state.metrics``, and the open window. What goes on from there is bit-equal to what
      would have been.
    - It is written by a thread. Parameters and optimizer state are copied during the next forward and backward, in
      memory of their own; everything else at once. ``last_checkpoint`` waits for it, and so does the end of a run.
    - SIGTERM or SIGUSR1 lets the run save and end at its next window's edge, with :class:`Preempted
      <ice_engine.errors.Preempted>`, which is exit code 75.
    - In many processes, attach it on every rank. All save the same step, at a window's edge, into one file, as from
      one process.

    Where an epoch's last micro-batch is done, a save waits for the epoch's end, so that a resumed run misses no
    handler of it; for the run's end, if that is stopped there.

    Args:
        to_save: Objects with ``state_dict`` by name; the trainer among them, so that a run goes on where it was: of
            several engines, the first to which an optimizer is attached, else the first.
        save_handler: A folder; or a save handler of Ignite's, which is called at once, as there.
        filename_prefix: Prefix of the file names. This and what follows, up to *save_on_rank*, as Ignite has them.
        score_function: Measures what is saved, of the engine, when that is asked for; the *n_saved* files with the
            highest scores are kept.
        score_name: What file names call the score.
        n_saved: Files to keep, at least 1; None for all.
        global_step_transform: Returns the number in a file's name, of the engine and the event; else it is the event's
            own clock.
        filename_pattern: Pattern of the file names.
        include_self: Save which files there are, too.
        greater_or_equal: Keep the newer one of two files with equal scores.
        save_on_rank: The rank that writes.
        background: Write in a thread, from one copy of the state in the host's memory; else at once, without a copy.
        on_failure: What becomes of the run when a file cannot be written: ``"raise"`` stops it with the reason,
            ``"warn"`` lets it go on. Files that were there still are.
        signals: Those that a run saves and ends at; those of a trainer's first Checkpoint hold.

    Raises:
        ArgumentTypeError: If an argument has the wrong type, or an object of *to_save* has no ``state_dict``, or is a
            ``DeterministicEngine``.
        ArgumentValueError: If an argument has an impossible value.
        CheckpointError: If the folder cannot be made.

    .. versionadded:: 0.1.0
    """

    def __init__(  # noqa: PLR0917 - in the order that Ignite has them
        self,
        to_save: Mapping[str, Any],
        save_handler: str | Path | Callable[..., None],
        filename_prefix: str = "",
        score_function: Callable[[Engine], int | float] | None = None,
        score_name: str | None = None,
        n_saved: int | None = 1,
        global_step_transform: Callable[..., Any] | None = None,
        filename_pattern: str | None = None,
        include_self: bool = False,
        greater_or_equal: bool = False,
        save_on_rank: int = 0,
        *,
        background: bool = True,
        on_failure: Literal["raise", "warn"] = "raise",
        signals: Iterable[int] = SIGNALS,
    ) -> None:
        if not isinstance(to_save, Mapping):
            message = (
                f"to_save must be a dict of objects by name, such as {{'model': model}}, got {type(to_save).__name__}"
            )
            raise ArgumentTypeError(message)
        if OURS in to_save:
            message = f"to_save must not have {OURS!r}: that entry says where the run is; use another name"
            raise ArgumentValueError(message)
        self._folder: Path | None = None
        if isinstance(save_handler, str | Path):
            self._folder = Path(save_handler).expanduser()
            save_handler = Folder(self._folder, save_on_rank)
        if n_saved is not None:
            n_saved = count("n_saved", n_saved, 1)
        try:
            super().__init__(
                to_save,
                save_handler,
                filename_prefix,
                score_function,
                score_name,
                n_saved,
                global_step_transform,
                filename_pattern,
                include_self,
                greater_or_equal,
                save_on_rank,
            )
        except TypeError as err:
            raise ArgumentTypeError(*err.args) from err
        except ValueError as err:
            raise ArgumentValueError(*err.args) from err
        self._background = background
        choice("on_failure", on_failure, ("raise", "warn"))
        self._under_way = UnderWay(self.save_handler, self._count, goes_on=on_failure == "warn")
        self._position: RunPosition | None = None
        engines = [saved for saved in to_save.values() if isinstance(saved, Engine)]
        if any(isinstance(engine, DeterministicEngine) for engine in engines):
            message = (
                "to_save has a DeterministicEngine, whose state cannot be saved safely; make it an Engine, as "
                "ice.create_trainer does: a checkpoint in a folder keeps all random generators and the place in the "
                "data itself"
            )
            raise ArgumentTypeError(message)
        # An evaluator may come first.
        self._trainer = next((engine for engine in engines if optimizers_of(engine)), next(iter(engines), None))
        if self._trainer is not None and self._folder is not None and len(to_save) > 1:
            self._position = run_position(self._trainer)
        # A file that is kept for its score may not be the newest, and so is nothing to go on from after a signal.
        stops = self._position is not None and self.score_function is None
        signals = signals if stops else ()
        self._times = SaveTimes(self._position, signals, self._save, self._under_way.settle, self._under_way.finish)
        if self._trainer is not None and self._folder is not None:
            self._times.follow(self._trainer)

    # -- a run ---------------------------------------------------------------------------------------------

    def attach(self, engine: Engine, event: Any = Events.EPOCH_COMPLETED, *, name: str | None = None) -> "Checkpoint":
        """Save on *event*, when all handlers of its iteration or epoch have run.

        One by score that is asked for where these are completed, such as in a validation there, is taken at once.

        Args:
            engine: The trainer.
            event: An event of Ignite's or ours, with or without a filter. Files are numbered by the event's own clock,
                such as the optimizer's step, and on Ignite's events by iteration, unless ``global_step_transform``
                says otherwise.
            name: Name of the hook, unique on the engine; made up if left out.

        Returns:
            This object.
        """
        if not engine.has_registered_events(CheckpointEvents.SAVED_CHECKPOINT):
            engine.register_events(*CheckpointEvents)
        self._times.attached, self._times.clock = True, clock_of(event)
        handler = functools.partial(self._on_event, clock=self._times.clock)
        registry = HookRegistry(engine)
        registry.add(event, handler, name=name or registry.free_name("Checkpoint"), order=50)
        if self._folder is not None:
            summary(engine).wrote(self._folder)
        return self

    def __call__(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        """Save, if the score or the time says so; for Ignite's ``add_event_handler``.

        Raises:
            CheckpointError: If the file cannot be written; files that were there are untouched.
        """
        if self._folder is None:
            self._save_by_ignite(engine, *args, **kwargs)
        else:
            self._on_event(engine, clock_of(engine.last_event_name))

    @staticmethod
    def load_objects(to_load: Mapping[str, Any], checkpoint: str | Path | Mapping[str, Any], **kwargs: Any) -> None:
        """Load states as Ignite does; those of a file only if it is as it was written.

        Args:
            to_load: Objects with ``load_state_dict`` by name.
            checkpoint: A file, or what is in it.
            **kwargs: For the ``load_state_dict`` of modules, such as ``strict``.

        Raises:
            CheckpointError: If the file is damaged, not there, or of a newer version; nothing is loaded then.
        """
        if isinstance(checkpoint, str | Path):
            file = Path(checkpoint)
            damage = checkpoint_file.damage(file)
            if damage is not None:
                message = (
                    f"{file} is not loaded: {damage}; take an older one, or resume(), which passes over such files"
                )
                raise CheckpointError(message)
            checkpoint = checkpoint_file.read(file)
        IgniteCheckpoint.load_objects(to_load, checkpoint, **kwargs)

    @property
    def last_checkpoint(self) -> str | Path | None:
        """The file with the highest priority; waits for one that is being written."""
        self._finish()
        return super().last_checkpoint

    def state_dict(self) -> "OrderedDict[str, Any]":
        """Return which files there are, for another one's ``to_save``; waits for one that is being written."""
        self._finish()
        return super().state_dict()

    def _finish(self) -> None:
        self._times.take_wanted()
        self._under_way.finish()

    def _on_event(self, engine: Engine, clock: str = "iteration") -> None:
        if self._folder is None:
            self._save_by_ignite(engine)
            return
        self._times.follow(self._trainer or engine)
        self._times.ask(engine, clock, None if self.score_function is None else self._score)

    @property
    def _peers(self) -> Peers | None:
        """Those of the trainer, if it has an optimizer of ours that others take part in."""
        together = world.world_size() > 1 and optimizers_of(self._trainer)
        return peers(self._trainer) if self._trainer is not None and together else None

    # -- saving --------------------------------------------------------------------------------------------

    def _save(self, request: Request) -> None:
        """Decide, collect and write, together with all ranks."""
        self._under_way.finish()
        save = self._decide(request)
        if save is None:
            return
        content = self._content(save)
        run = self._times.run
        aside = self._background and run is not None and is_running(run)
        writes = world.rank() == self.save_on_rank
        self._under_way.begin(save, content if writes else None, run, self._optimizers() if aside else None)

    def _decide(self, request: Request) -> Save | None:
        engine = request.engine
        if not engine.has_registered_events(CheckpointEvents.SAVED_CHECKPOINT):
            engine.register_events(*CheckpointEvents)
        step, priority = self._told(*self._measured(request))
        if self.score_function is None:
            # A run that starts over counts from 1 again; Ignite would save nothing until it is further than the last.
            self._saved = [item for item in self._saved if item.priority <= priority]
        elif not (self._check_lt_n_saved() or self._compare_fn(priority)):
            return None
        text = f"{priority}" if isinstance(priority, int) else f"{priority:.4f}"
        if isinstance(priority, float) and math.isnan(priority):
            priority = -math.inf  # below all others; nothing is above or below NaN
        filename = self._names(step).file(step, text if self.score_function is not None else None)
        agree("a checkpoint", filename)
        others = [item for item in self._saved if item.filename != filename]
        saved = sorted([*others, Item(priority, filename)], key=lambda item: item.priority)
        kept = saved[-self.n_saved :] if self.n_saved is not None else saved
        outdated = [item.filename for item in saved if item not in kept]
        return Save(engine, filename, kept, outdated)

    def _measured(self, request: Request) -> tuple[Any, Any]:
        engine, step = request.engine, None
        if self.global_step_transform is not None:
            step = self.global_step_transform(engine, request.event_name)
        if self.score_function is not None:
            return step, self._score(engine) if request.score is None else request.score
        step = getattr(engine.state, request.clock) if step is None else step
        return step, step

    def _score(self, engine: Engine) -> float:
        score = cast("Callable[[Engine], Any]", self.score_function)(engine)
        if isinstance(score, torch.Tensor) and score.numel() == 1:
            score = score.item()
        if not isinstance(score, Real):
            message = f"score_function must return a number, got {score!r} ({type(score).__name__})"
            raise ArgumentValueError(message)
        return int(score) if isinstance(score, Integral) else float(score)

    def _told(self, step: Any, priority: Any) -> tuple[Any, Any]:
        """Return what the rank that saves has measured: a score may differ between ranks, the decision must not."""
        if world.world_size() == 1:
            return step, priority
        told = json.loads(gather("a checkpoint", json.dumps([step, priority]))[self.save_on_rank])
        return told[0], told[1]

    def _content(self, save: Save) -> dict[str, Any]:
        content = saved_objects.collect(self.to_save, self.save_on_rank)
        if len(content) == 1 and not self.include_self:
            alone: dict[str, Any] = next(iter(content.values()))
            return alone
        if self._position is not None:
            position = plain(OURS, self._position.state_dict())
            content[OURS] = {"version": checkpoint_file.VERSION, "positions": gather_plain("a checkpoint", position)}
            if self._peers is not None:
                content[OURS]["layouts"] = self._peers.layouts()
        if self.include_self:
            content["checkpointer"] = {"_saved": [tuple(item) for item in save.saved]}
        return content

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Return those whose steps change what is saved."""
        found = [saved for saved in self.to_save.values() if isinstance(saved, torch.optim.Optimizer)]
        return found + [o for o in optimizers_of(self._times.run) if o not in found]

    def _count(self, save: Save) -> None:
        self._saved = save.saved

    def _save_by_ignite(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        saved = list(self._saved)
        try:
            super().__call__(engine, *args, **kwargs)
        except BaseException:
            # Ignite notes a file as saved before it is, and would take the next attempt for a repetition.
            self._saved = saved
            raise

    def _setup_checkpoint(self) -> dict[str, Any]:
        return saved_objects.collect(self.to_save, self.save_on_rank)

    # -- resuming ------------------------------------------------------------------------------------------

    def resume(self, engine: Engine) -> Path | None:
        """Load the newest whole checkpoint of the folder, and let the next run go on where it is.

        Call it on every rank, after the optimizer is attached and before the run; give the run the same data. Files
        that are damaged are named in the log, and passed over. A run that was at its end starts over, as Ignite has it,
        unless ``run(max_epochs=...)`` asks for more epochs. Files of other names in the folder, such as those of a
        second ``Checkpoint`` with a prefix, are left alone.

        Args:
            engine: The trainer; must be among ``to_save``, or its counters would start anew.

        Returns:
            The file that was loaded; None if there is none, and the run starts fresh, with a line in the log.

        Raises:
            CheckpointError: If the folder is unknown, the trainer is not saved, all files are damaged, or the newest
                whole one does not fit what it is loaded into.
        """
        if self._folder is None:
            message = "resume() looks into the folder given as save_handler, got another save handler; use load_objects"
            raise CheckpointError(message)
        if not any(saved is engine for saved in self.to_save.values()):
            message = (
                "resume() needs the trainer in to_save, or its epoch would start anew: "
                "to_save={'trainer': trainer, ...}"
            )
            raise CheckpointError(message)
        if self._trainer is not engine:
            message = (
                "resume() was given another engine than to_save has first of those with an optimizer, or at all, whose "
                "place in the run is saved; name the trainer first: to_save={'trainer': trainer, ...}"
            )
            raise CheckpointError(message)
        self._under_way.finish()
        saves = world.rank() == self.save_on_rank
        own = together("resume()", functools.partial(self._find, self._folder) if saves else list[Item])
        # All must know what is there, to decide alike what is better.
        found = [Item(*item) for item in json.loads(gather("resume()", json.dumps(own))[self.save_on_rank])]
        if not found:
            if saves:
                logger.warning("no checkpoint in %s: the run starts fresh", self._folder)
            return None
        file = self._folder / found[-1].filename
        together(f"resume() from {file}", functools.partial(self._load, file, found))
        if alone := saved_objects.without_model(self.to_save):
            warn(
                f"resume() gives optimizer {alone[0]!r} its state back, and not the parameters it trains, which no "
                "module of to_save has: to_save={'model': model, ...}"
            )
        if not self.include_self:
            self._saved = adopted(found, self.n_saved, by_score=self.score_function is not None)
        return file

    def _find(self, folder: Path) -> list[Item]:
        by_number = self.global_step_transform is not None or self.score_function is None
        return find(folder, self._names(0 if by_number else None))

    def _load(self, file: Path, found: list[Item]) -> None:
        trainer = self._trainer if self._position is not None else None
        content, listed = load(file, found, self.to_save, trainer, lists=self.include_self)
        saved_objects.start_over(self.to_save, self._trainer)
        if listed is not None:
            self._saved = listed
        if self._position is not None and OURS in content:
            metrics = {name: saved for name, saved in self.to_save.items() if isinstance(saved, Metric)}
            again = functools.partial(saved_objects.load, metrics, content)
            self._position.load_state_dict(content[OURS]["positions"], again)
            if self._peers is not None:
                self._peers.lay_out(content[OURS].get("layouts", ()))

    def _names(self, step: Any) -> Names:
        alone = len(self.to_save) == 1 and not self.include_self
        name = next(iter(self.to_save)) if alone else "checkpoint"
        pattern = self._get_filename_pattern(step)
        by_score = self.score_function is not None
        return Names(pattern, self.filename_prefix, name, self.ext, self.score_name, by_score)
