"""One iteration of a run as it happened: events, handlers, and what is between them, with times."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ignite.engine import Engine, Events

from ice_engine.calling import own_name
from ice_engine.events import step_events
from ice_engine.hook_table import Entry, entries, event_name, filtered

_BETWEEN = {
    "STEP_STARTED": "gradients, clip, processors",
    "STEP_SKIPPED": "gradients",
    "STEP_COMPLETED": "step()",
}
"""What an optimizer does before an event of its own."""


@dataclass
class Span:
    """Something that took time.

    Attributes:
        name: An event, a handler, or what the engine or an optimizer did before the next event.
        began: Seconds since the iteration began.
        seconds: How long it took, with what is inside of it.
        inside: What happened meanwhile, in order.
    """

    name: str
    began: float = 0.0
    seconds: float = 0.0
    inside: list["Span"] = field(default_factory=list)

    def flat(self, depth: int = 0) -> Iterator[tuple[int, "Span"]]:
        """Yield it and what is inside of it, in order, with their depths."""
        yield depth, self
        for span in self.inside:
            yield from span.flat(depth + 1)


class Trace:
    """One iteration as an indented timeline, by ``str()``: the next one in which an optimizer steps or skips.

    Made by :meth:`ice_engine.hooks.HookRegistry.trace`. Until an optimizer does, it shows the last iteration; so it
    does after a run in which none did. What follows the last iteration of an epoch or a run, such as validation, is in
    it, too. Times are those of the host: work that a GPU has still to do is in the span that waits for it.

    Attributes:
        done: Whether it has recorded what it was made for.
        iteration: What it shows, with all that happened inside; None before the first iteration.

    .. versionadded:: 0.1.0
    """

    def __init__(self, engine: Engine, name_of: Callable[[Entry], str]) -> None:
        self.done = False
        self.iteration: Span | None = None
        self._engine, self._name_of = engine, name_of
        self._open: list[Span] = []  # the iteration, and what is going on inside of it
        self._zero = 0.0
        self._stepped = False
        self._fire_untraced = engine._fire_event  # noqa: SLF001 - every event goes through it
        engine._fire_event = self._fire  # type: ignore[method-assign,assignment] # noqa: SLF001
        # An optimizer's events fire only if somebody listens. Nobody does on GRADIENTS_READY: it costs two passes more.
        self._listened = step_events(engine)
        self._mark: dict[str, Any] = {}
        for event in self._listened:
            entries(engine)[event] = [*entries(engine).get(event, ()), (self._note_step, (), self._mark)]

    @classmethod
    def of(cls, engine: Engine, name_of: Callable[[Entry], str]) -> "Trace":
        """Return the trace that *engine* is recording already, or a new one.

        Args:
            engine: The engine to watch.
            name_of: What to call a handler.
        """
        present = getattr(vars(engine).get("_fire_event"), "__self__", None)
        return present if isinstance(present, cls) else cls(engine, name_of)

    def __str__(self) -> str:
        if self.iteration is None:
            return "no iteration was recorded yet; run the engine"
        lines = [f"{'at ms':>10}{'took ms':>10}"]
        for depth, span in self.iteration.flat():
            lines.append(f"{span.began * 1e3:10.3f}{span.seconds * 1e3:10.3f}  {'  ' * depth}{span.name}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Trace of {self.iteration.name if self.iteration else 'no iteration'}>"

    # -- recording ----------------------------------------------------------------------------------------

    def _fire(self, event: Any, *args: Any, **kwargs: Any) -> None:
        outermost = len(self._open) <= 1
        if outermost and event in (Events.EPOCH_STARTED, Events.GET_BATCH_STARTED):
            self._end(enough=self._stepped or not self._listened)
        if outermost and event == Events.GET_BATCH_STARTED and not self.done:
            self._begin()
        if not self._open:
            self._fire_untraced(event, *args, **kwargs)
            return
        self._note_gap(event)
        with self._span(event_name(event)):
            self._fire_timed(event, *args, **kwargs)
        if outermost and event in (Events.TERMINATE, Events.COMPLETED):
            self._end(enough=True)

    def _begin(self) -> None:
        state = self._engine.state
        self.iteration = Span(f"iteration {state.iteration + 1}, epoch {state.epoch}")
        self._open, self._stepped, self._zero = [self.iteration], False, time.perf_counter()

    def _end(self, *, enough: bool) -> None:
        if not self._open:
            return
        whole = self._open.pop()
        whole.seconds = whole.inside[-1].began + whole.inside[-1].seconds
        # An exception may have cut it short.
        if enough and any(span.name == Events.ITERATION_COMPLETED.name for span in whole.inside):
            self._finish()

    def _fire_timed(self, event: Any, *args: Any, **kwargs: Any) -> None:
        handlers = entries(self._engine)
        plain = handlers.get(event, [])

        def restore() -> None:
            # Once Ignite iterates over the timed list; whoever adds or removes handlers must find the plain one.
            if handlers.get(event) is timed:
                handlers[event] = plain

        timed = [(self._timed(entry, restore), *entry[1:]) for entry in plain]
        if timed:
            handlers[event] = timed
        self._fire_untraced(event, *args, **kwargs)

    def _timed(self, entry: Entry, restore: Callable[[], None]) -> Callable[..., Any]:
        function, _, mark = entry
        name, around = self._name_of(entry), filtered(function)

        def timed(*args: Any, **kwargs: Any) -> None:
            restore()
            if mark is self._mark:
                self._note_step()
            elif around is None:
                with self._span(name):
                    function(*args, **kwargs)
            elif around.passes(self._engine, self._engine.state.get_event_attrib_value(around.event)):
                with self._span(name):
                    around.handler(*args, **kwargs)

        return timed

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        span = Span(name, self._now())
        self._open[-1].inside.append(span)
        self._open.append(span)
        try:
            yield
        finally:
            self._open.pop()
            span.seconds = self._now() - span.began

    def _note_gap(self, event: Any) -> None:
        """Show what happened since the event before, where it is known what that is."""
        around, name = self._open[-1], event_name(event)
        before = around.inside[-1] if around.inside else Span("", around.began)
        what = None
        if (before.name, name) == ("GET_BATCH_STARTED", "GET_BATCH_COMPLETED"):
            what = "next(data)"
        elif (before.name, name) == ("ITERATION_STARTED", "ITERATION_COMPLETED"):
            what = own_name(self._engine._process_function)  # noqa: SLF001
        elif event in self._listened:
            optimizer = next(name.removesuffix(f"_{kind}") for kind in _BETWEEN if name.endswith(kind))
            what = f"{optimizer.lower()}: {_BETWEEN[name.removeprefix(f'{optimizer}_')]}"
        if what is not None:
            began = before.began + before.seconds
            around.inside.append(Span(what, began, self._now() - began))

    def _now(self) -> float:
        return time.perf_counter() - self._zero

    def _note_step(self, *_: Any, **__: Any) -> None:
        self._stepped = True

    def _finish(self) -> None:
        self.done = True
        if vars(self._engine).get("_fire_event") == self._fire:
            del self._engine._fire_event  # noqa: SLF001
        handlers = entries(self._engine)
        for event in self._listened:
            handlers[event] = [entry for entry in handlers[event] if entry[2] is not self._mark]
