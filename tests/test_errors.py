"""The tree of errors, as its docstring draws it."""

import inspect
import pickle

import pytest

from ice_engine import errors
from ice_engine.errors import IceEngineError, IceEngineWarning

BUILTIN = {
    "ArgumentTypeError": TypeError,
    "ArgumentValueError": ValueError,
    "AttachError": RuntimeError,
    "RankError": RuntimeError,
    "BackwardError": RuntimeError,
    "NoGradientsError": RuntimeError,
    "NonFiniteGradientError": ArithmeticError,
    "ClosureError": RuntimeError,
    "MissingKeyError": KeyError,
    "UnknownKeyError": KeyError,
    "ProcessorReturnError": TypeError,
    "ProcessorValueError": ValueError,
    "ProcessorDivergenceError": RuntimeError,
    "ScheduleChangedError": ValueError,
    "HookError": ValueError,
    "HookSignatureError": TypeError,
    "StateDictError": ValueError,
    "NotConsolidatedError": ValueError,
    "CheckpointError": RuntimeError,
    "WriteError": OSError,
    "LedgerError": ValueError,
}
CLASSES = {
    name: error
    for name, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, Exception) and not issubclass(error, Warning) and not name.startswith("_")
}
KEY_ERRORS = [error for error in CLASSES.values() if issubclass(error, KeyError)]


@pytest.mark.parametrize("error", CLASSES.values(), ids=CLASSES.keys())
def test_every_error_is_in_the_tree_and_in_its_picture(error):
    assert issubclass(error, IceEngineError)
    assert f" {error.__name__} " in f"{errors.__doc__} ".replace("\n", " ")


def test_every_error_but_the_two_bases_is_also_the_builtin_that_fits():
    assert CLASSES.keys() - BUILTIN.keys() == {"IceEngineError", "ProcessorError"}
    for name, builtin in BUILTIN.items():
        assert issubclass(CLASSES[name], builtin), name


def test_key_errors_print_their_message_without_quotes_and_with_line_breaks():
    assert len(KEY_ERRORS) >= 2
    for error in KEY_ERRORS:
        assert str(error("group 'head' lacks\nlr")) == "group 'head' lacks\nlr"
        assert str(error()) == ""


@pytest.mark.parametrize("error", CLASSES.values(), ids=CLASSES.keys())
def test_errors_survive_the_way_between_processes(error):
    restored = pickle.loads(pickle.dumps(error("what, found, wanted")))  # noqa: S301 - our own bytes
    assert type(restored) is error
    assert str(restored) == "what, found, wanted"


def test_warnings_have_a_category_of_their_own():
    assert issubclass(IceEngineWarning, UserWarning)
