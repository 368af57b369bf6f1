"""Schedules: how ``lr``, or any other entry of a param group, changes along the run.

Each factory returns a :class:`~ice_engine.processors.schedule.Schedule`: a processor that reads the entry's initial
value and a clock, and writes the entry. They combine: ``a * b`` applies ``a`` to what ``b`` gives,
``a.then(b, at=100)`` changes over, and ``a.clamp(min=..., max=...)`` limits.

Examples:
    >>> import ice_engine as ice
    >>> plan = ice.schedules.warmup(steps=4) * ice.schedules.cosine(total=100)
    >>> plan
    warmup(steps=4) * cosine(total=100)
    >>> plan({"step": 50, "initial_lr": 0.2})
    {'step': 50, 'initial_lr': 0.2, 'lr': 0.1}

As plain data, for configuration files and checkpoints, they are ``plan.spec``, and
:func:`~ice_engine.processors.spec.from_spec` makes them again.
"""

from ice_engine.processors.cycles import cyclic, cyclic_anneal
from ice_engine.processors.decays import cosine, linear, polynomial
from ice_engine.processors.endless import exponential, inverse, inverse_sqrt, step
from ice_engine.processors.functions import function, multiplicative
from ice_engine.processors.one_cycle import one_cycle, one_cycle_momentum
from ice_engine.processors.plateau import plateau
from ice_engine.processors.ramps import constant, warmup
from ice_engine.processors.restarts import cosine_restarts, hard_restarts
from ice_engine.processors.scaling import batch_scaling, layer_decay
from ice_engine.processors.schedule import Schedule
from ice_engine.processors.spec import from_spec
from ice_engine.processors.stable import flat_cosine, trapezoid, wsd
from ice_engine.processors.swa import swa

__all__ = [
    "Schedule",
    "batch_scaling",
    "constant",
    "cosine",
    "cosine_restarts",
    "cyclic",
    "cyclic_anneal",
    "exponential",
    "flat_cosine",
    "from_spec",
    "function",
    "hard_restarts",
    "inverse",
    "inverse_sqrt",
    "layer_decay",
    "linear",
    "multiplicative",
    "one_cycle",
    "one_cycle_momentum",
    "plateau",
    "polynomial",
    "step",
    "swa",
    "trapezoid",
    "warmup",
    "wsd",
]
