"""Every error of ice_engine: one tree, and each one also the builtin that fits.

.. code-block:: text

    IceEngineError
    ├── ArgumentTypeError       TypeError     an argument has the wrong type
    ├── ArgumentValueError      ValueError    an argument has an impossible value
    ├── AttachError             RuntimeError  optimizer and engine do not go together (now)
    ├── BackwardError           RuntimeError  the loss cannot be differentiated, or not here
    ├── NoGradientsError        RuntimeError  a window closed and no parameter has a gradient
    ├── NonFiniteGradientError  ArithmeticError  infinite or NaN gradients, by policy or too often
    ├── ClosureError            RuntimeError  the wrapped optimizer needs a closure
    ├── ProcessorError
    │   ├── MissingKeyError     KeyError      a processor needs a key that is not there
    │   ├── UnknownKeyError     KeyError      a processor wrote a key that nobody reads
    │   ├── ProcessorReturnError TypeError    a processor returned something that is not a mapping
    │   ├── ProcessorValueError ValueError    a processor wrote an impossible value
    │   └── ProcessorDivergenceError RuntimeError  a processor writes other values on other ranks
    ├── RankError               RuntimeError  another rank raised, is gone, or does something else
    ├── ScheduleChangedError    ValueError    a resumed run would follow another schedule
    ├── HookError               ValueError    a hook's name or event is wrong
    │   └── HookSignatureError  TypeError     a hook cannot be called the way its event calls it
    ├── StateDictError          ValueError    a state dict does not fit
    │   └── NotConsolidatedError              a stub from a rank that holds no whole state
    ├── CheckpointError         RuntimeError  a checkpoint cannot be found or loaded
    ├── WriteError              OSError       what a run records cannot be written
    └── LedgerError             ValueError    a file is no ledger

    Preempted                   SystemExit    a run was asked to stop by a signal, and has saved; no error of anybody's

Messages say what, what was found, what was wanted, and the line that mends it.
"""

import sys
import warnings

_OURS = {"ice_engine", "ignite", "torch", "functools"}


class IceEngineError(Exception):
    """Base of every error raised by ice_engine."""


class IceEngineWarning(UserWarning):
    """Category of every warning issued by ice_engine."""


def warn(message: str) -> None:
    """Issue an :class:`IceEngineWarning` at the user's line, such as that of ``trainer.run()`` in a handler of ours."""
    level, frame = 2, sys._getframe(1)  # noqa: SLF001 - warnings count frames and have no other way before Python 3.12
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, IceEngineWarning, stacklevel=level)


class ArgumentTypeError(IceEngineError, TypeError):
    """An argument has the wrong type."""


class ArgumentValueError(IceEngineError, ValueError):
    """An argument has the right type and an impossible value."""


class AttachError(IceEngineError, RuntimeError):
    """An optimizer and an engine do not go together, or not now."""


class BackwardError(IceEngineError, RuntimeError):
    """A loss cannot be differentiated, or not at this point of the run."""


class NoGradientsError(IceEngineError, RuntimeError):
    """A window closed and none of the optimizer's parameters has a gradient."""


class NonFiniteGradientError(IceEngineError, ArithmeticError):
    """Gradients are infinite or NaN, and the policy says stop."""


class ClosureError(IceEngineError, RuntimeError):
    """The wrapped optimizer needs a closure, which a window cannot give it."""


class ProcessorError(IceEngineError):
    """Base of what a processor can do wrong."""


class _KeyError(KeyError):
    def __str__(self) -> str:
        # KeyError prints repr(message), with quotes and escaped newlines.
        return str(self.args[0]) if self.args else ""


class MissingKeyError(ProcessorError, _KeyError):
    """A processor needs a key that its mapping does not have."""


class UnknownKeyError(ProcessorError, _KeyError):
    """A processor wrote a key that is not an entry of the param group."""


class ProcessorReturnError(ProcessorError, TypeError):
    """A processor returned something that is not a mapping."""


class ProcessorValueError(ProcessorError, ValueError):
    """A processor wrote a value that the optimizer cannot use."""


class ProcessorDivergenceError(ProcessorError, RuntimeError):
    """A processor writes different values on different ranks."""


class RankError(IceEngineError, RuntimeError):
    """Another rank raised, does not answer any more, or does something that does not go with what this one does."""


class ScheduleChangedError(IceEngineError, ValueError):
    """A resumed run would follow another schedule than the one it was saved with, and nothing says which holds."""


class HookError(IceEngineError, ValueError):
    """A hook's name or event is wrong."""


class HookSignatureError(HookError, TypeError):
    """A hook cannot be called the way its event calls it."""


class StateDictError(IceEngineError, ValueError):
    """A state dict does not fit the object it is loaded into."""


class NotConsolidatedError(StateDictError):
    """A state dict is the stub of a rank that does not hold the whole state."""


class CheckpointError(IceEngineError, RuntimeError):
    """A checkpoint cannot be found or loaded."""


class Preempted(SystemExit):
    """A signal asked the run to stop; it saved, and the process ends with exit code 75.

    That is ``EX_TEMPFAIL``, "try again later": a batch system can tell it from a failure, and start the run again.
    """

    def __init__(self) -> None:
        super().__init__(75)


class WriteError(IceEngineError, OSError):
    """What a run records cannot be written."""


class LedgerError(IceEngineError, ValueError):
    """A file is no ledger, or is damaged inside."""
