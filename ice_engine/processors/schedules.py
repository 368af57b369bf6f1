"""Schedules: how ``lr``, or any other entry of a param group, changes along the run.

Each factory returns a :class:`Schedule`: a processor that reads the entry's initial value and a clock, and writes the
entry. They combine: ``a * b`` applies ``a`` to what ``b`` gives, ``a.then(b, at=100)`` changes over, and
``a.clamp(min=..., max=...)`` limits.

Examples:
    >>> import ice_engine as ice
    >>> plan = ice.schedules.warmup(steps=4) * ice.schedules.cosine(total=100)
    >>> plan
    warmup(steps=4) * cosine(total=100)
    >>> plan({"step": 50, "initial_lr": 0.2})
    {'step': 50, 'initial_lr': 0.2, 'lr': 0.1}
"""

from ice_engine.processors.decays import cosine, exponential, linear, polynomial, step
from ice_engine.processors.ramps import constant, warmup
from ice_engine.processors.schedule import Schedule

__all__ = ["Schedule", "constant", "cosine", "exponential", "linear", "polynomial", "step", "warmup"]
