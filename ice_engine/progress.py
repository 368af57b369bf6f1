"""Ignite's progress bar, which can count the optimizer's steps."""

from collections.abc import Callable
from typing import Any

from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar as IgnitesProgressBar
from ignite.handlers.base_logger import BaseLogger

from ice_engine.errors import ArgumentValueError
from ice_engine.of_engine import optimizers_of


class ProgressBar(IgnitesProgressBar):
    """Ignite's own, with the same arguments, which counts steps if it is attached to an optimizer's step event.

    A bar of steps spans the whole run, and its total is how many steps the run will have: those so far, and one for
    each window to come. On events of Ignite it is Ignite's bar, with one bar per epoch.

    Examples:
        >>> import torch
        >>> from ignite.engine import Engine
        >>> import ice_engine as ice
        >>> weight = torch.nn.Parameter(torch.ones(()))
        >>> optimizer = ice.Optimizer(torch.optim.SGD([weight], lr=0.1), accumulation_steps=2)
        >>> trainer = Engine(lambda engine, batch: optimizer.backward(weight * batch))
        >>> _ = optimizer.attach(trainer)
        >>> ice.ProgressBar(disable=None).attach(trainer, event_name=optimizer.event("STEP_COMPLETED"))

    .. versionadded:: 0.1.0
    """

    _optimizer: Any = None

    def attach(  # type: ignore[override] # noqa: PLR0917 - they are Ignite's
        self,
        engine: Engine,
        metric_names: str | list[str] | None = None,
        output_transform: Callable[..., Any] | None = None,
        event_name: Any = Events.ITERATION_COMPLETED,
        closing_event_name: Any = None,
        state_attributes: list[str] | None = None,
    ) -> None:
        """Show progress on *engine*.

        Args:
            engine: The engine to watch.
            metric_names: Metrics to show, or ``"all"``.
            output_transform: From the engine's output to what is shown of it.
            event_name: What it counts, such as ``optimizer.event("STEP_COMPLETED")``, with a filter or without.
            closing_event_name: Where the bar ends; if left out, ``EPOCH_COMPLETED``, or ``COMPLETED`` for steps.
            state_attributes: Attributes of ``engine.state`` to show.

        Raises:
            ArgumentValueError: If a bar of steps would not span the run.
            ValueError: Ignite's, if the engine has no such event, or it comes after the closing one.
        """
        optimizer = next((o for o in optimizers_of(engine) if event_name in [*o.events]), None)
        if optimizer is None:
            closing = Events.EPOCH_COMPLETED if closing_event_name is None else closing_event_name
            super().attach(engine, metric_names, output_transform, event_name, closing, state_attributes)
            return
        _check_events(optimizer, event_name, closing_event_name)
        self._optimizer = optimizer
        handler = self._create_output_handler(
            self.tqdm_kwargs.get("desc", "Step"),
            metric_names,
            output_transform,
            closing_event_name=Events.COMPLETED,
            state_attributes=state_attributes,
        )

        def total(event: Any, _: Engine) -> int | None:
            if event != event_name:
                return 1  # it closes once
            left = optimizer.steps_left
            return None if left is None else optimizer.clocks["step"] + left

        handler.get_max_number_events = total  # type: ignore[method-assign,assignment]
        BaseLogger.attach(self, engine, handler, event_name)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _reset(self, pbar_total: int | None) -> None:
        super()._reset(pbar_total)
        if self._optimizer is not None:  # the time that is left follows from the steps since here, not since the first
            self.pbar.initial = self.pbar.n = self._optimizer.clocks["step"]  # type: ignore[attr-defined]


def _check_events(optimizer: Any, event: Any, closing: Any) -> None:
    if event != optimizer.event("STEP_COMPLETED"):
        message = f"a bar of steps counts {optimizer.event('STEP_COMPLETED').name}, got event_name={event.name}"
        raise ArgumentValueError(message)
    if closing not in (None, Events.COMPLETED):
        message = (
            f"a bar of steps spans the run, as a window may go on in the next epoch; got closing_event_name="
            f"{closing.name}: leave it out, or count iterations and show the step beside them: "
            f"bar.attach(engine, state_attributes=['{optimizer.name}_step'])"
        )
        raise ArgumentValueError(message)
