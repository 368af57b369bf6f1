"""The loss scale of a GradScaler, which several optimizers may use; alone reads it."""

import weakref
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch

from ice_engine.errors import ArgumentTypeError


class ScaleUser(Protocol):
    """An optimizer's window, whose losses are multiplied with the scale.

    Attributes:
        goes_on: Whether somebody will close it if it is open.
        elsewhere: Whether, when it was last closed, another one was open on another rank.
    """

    goes_on: Callable[[], bool]
    elsewhere: bool


class _Known(NamedTuple):
    tensor: torch.Tensor
    version: int  # of the tensor, when it was read
    scale: float
    growth: int  # steps without overflow since the scale changed


class SharedScale:
    """A GradScaler as seen by the optimizers that use it: adapts once a round, when none of their windows is open.

    A window whose gradients are of two scales would be wrong, and torch's ``update()`` is called once for all.

    Attributes:
        overflowed: Whether one that was closed while others are open overflowed; None if none was.
        windows: Those that a loss of this scale has entered and that are not closed.
        users: All that it was given to.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler = weakref.ref(scaler)
        self.overflowed: bool | None = None
        self._known: _Known | None = None
        self.windows: weakref.WeakSet[ScaleUser] = weakref.WeakSet()
        self.users: weakref.WeakSet[ScaleUser] = weakref.WeakSet()

    def scale(self) -> float:
        """Return the scale; read from the device, for which the host waits, only where it may have changed."""
        scaler = cast("torch.amp.GradScaler", self._scaler())
        tensor = scale_tensor(scaler)
        if tensor is None:
            return scaler.get_scale()
        known = self._known_of(tensor)
        if known is None:
            state = scaler.state_dict()
            known = self._known = _Known(tensor, version(tensor), state["scale"], state["_growth_tracker"])
        return known.scale

    def _known_of(self, tensor: torch.Tensor | None) -> "_Known | None":
        """Return what was read of *tensor*, if nobody has written it since."""
        known = self._known
        still = known is not None and known.tensor is tensor and known.version == version(known.tensor)
        return known if still else None

    def _adapt(self, scaler: torch.amp.GradScaler, *, overflowed: bool) -> None:
        known, self._known = self._known_of(scale_tensor(scaler)), None
        scaler.update()
        if known is not None and not overflowed and known.growth + 1 != scaler.get_growth_interval():
            self._known = known._replace(version=version(known.tensor), growth=known.growth + 1)

    def close(self, window: ScaleUser, overflowed: bool | None) -> None:
        """Note that *window* is closed and whether it overflowed; adapt the scale if it was the last one."""
        self.windows.discard(window)
        if overflowed is not None:
            self.overflowed = bool(self.overflowed) or overflowed
        scaler = self._scaler()
        if window.elsewhere or self.open_beside(window) or self.overflowed is None or scaler is None:
            return
        # torch looks for infinities itself, in unscale_(); ours looked in the same pass that makes the window's mean.
        device = scaler._device  # noqa: SLF001 - has no public name
        found_inf = torch.full((), float(self.overflowed), dtype=torch.float32, device=device)
        found = {found_inf.device: found_inf}
        scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = found  # noqa: SLF001 - no public way to tell it
        if scale_tensor(scaler) is None:
            scaler.scale(found_inf)  # makes what is updated: a window that was loaded may end without a loss
        self._adapt(scaler, overflowed=self.overflowed)
        self.overflowed = None

    def open_beside(self, window: ScaleUser) -> bool:
        """Whether another window than *window* is open; one that a failed run left open is none."""
        return any(other is not window and other.goes_on() for other in self.windows)


_SHARED: weakref.WeakKeyDictionary[torch.amp.GradScaler, SharedScale] = weakref.WeakKeyDictionary()


def shared(scaler: torch.amp.GradScaler) -> SharedScale:
    """Return what the optimizers that use *scaler* have in common, one object for one scaler."""
    found = _SHARED.get(scaler)
    if found is None:
        found = _SHARED[scaler] = SharedScale(scaler)
    return found


def scale_tensor(scaler: torch.amp.GradScaler) -> torch.Tensor | None:
    """Return the scale itself, for whose number the host would have to wait; a scaler that is switched off has none."""
    return getattr(scaler, "_scale", None)


def version(tensor: torch.Tensor) -> int:
    """Return how often *tensor* was written to."""
    return tensor._version  # noqa: SLF001 - has no public name


def check_scaler(scaler: torch.amp.GradScaler | None) -> torch.amp.GradScaler | None:
    """Return *scaler* if it is a GradScaler or None.

    Raises:
        ArgumentTypeError: If it is anything else.
    """
    if scaler is None or isinstance(scaler, torch.amp.GradScaler):
        return scaler
    message = (
        f"grad_scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}; "
        "such as torch.amp.GradScaler('cuda')"
    )
    raise ArgumentTypeError(message)
