"""A run that is asked to stop saves where it is and ends with an exit code of its own; another one goes on."""

import faulthandler
import os
import signal

import pytest
import torch
from ignite.engine import Events

import ice_engine as ice
from tests.forked import python
from tests.test_checkpoint import Run, assert_equal, names

PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from ignite.engine import Events
from tests.test_checkpoint import Run

torch.set_num_threads(1)
run = Run(Path(sys.argv[1]))
run.checkpoint.attach(run.trainer)
times = int(sys.argv[3])

def be_taken_away():
    run.checkpoint.last_checkpoint  # waits until it is written
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))

run.trainer.add_event_handler(Events.ITERATION_STARTED(once=8), be_taken_away)
run.trainer.add_event_handler(Events.COMPLETED, lambda: print("completed"))
run.train(max_epochs=4)
print("after the run")
"""

FORKS = """
import multiprocessing, sys, time
from pathlib import Path
from ignite.engine import Events
from tests.test_checkpoint import Run

context = multiprocessing.get_context("fork")
run = Run(Path(sys.argv[1]))

def fork():
    with context.Pool(2) as pool:
        print(pool.map(abs, [-1, -2]))
    for wait in (0.0, 0.2):
        child = context.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(wait)
        child.terminate()
        child.join()
        print(child.exitcode)

run.trainer.add_event_handler(Events.EPOCH_COMPLETED, fork)
run.train(max_epochs=1)
"""


def taken_away(folder, name, times=1):
    return python("-c", PROGRAM, str(folder), name, str(times))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_lets_the_run_save_and_end_and_another_one_goes_on(tmp_path, name):
    done = taken_away(tmp_path / "run", name)
    assert done.returncode == 75, done.stderr
    assert done.stdout == ""
    assert f"{name}: the run saves and ends" in done.stderr
    assert names(tmp_path / "run") == ["checkpoint_8.pt"]  # inside a window
    whole = Run(tmp_path / "whole").train(max_epochs=4)
    again = Run(tmp_path / "run")
    again.checkpoint.resume(again.trainer)
    again.train(max_epochs=4)
    assert_equal(again.everything(), whole.everything())


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    done = taken_away(tmp_path, "SIGTERM", 2)
    assert done.returncode == -signal.SIGTERM
    assert names(tmp_path) == ["checkpoint_5.pt"]


def test_signals_are_given_back_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path)
    seen = []
    run.trainer.add_event_handler(Events.EPOCH_STARTED, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    run.train(max_epochs=1)
    assert seen[0] != before
    assert signal.getsignal(signal.SIGTERM) == before
    failing = Run(tmp_path)
    failing.trainer.logger.disabled = True

    def fail():
        raise ZeroDivisionError

    failing.trainer.add_event_handler(Events.ITERATION_STARTED, fail)
    with pytest.raises(ZeroDivisionError):
        failing.train(max_epochs=1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_at_an_epochs_last_micro_batch_its_handlers_still_run(tmp_path):
    run = Run(tmp_path)
    ended = []
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: os.kill(os.getpid(), signal.SIGUSR1))
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: ended.append(engine.state.epoch))
    with pytest.raises(ice.Preempted) as told:
        run.train(max_epochs=4)
    assert told.value.code == 75
    assert ended == [1]
    assert names(tmp_path) == ["checkpoint_5.pt"]
    again = Run(tmp_path)
    again.checkpoint.resume(again.trainer)
    assert again.trainer.state.epoch == 1


def test_no_signals_are_taken_where_none_are_asked_for(tmp_path):
    run = Run(tmp_path, signals=())
    before = signal.getsignal(signal.SIGTERM)
    run.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda: torch._assert(signal.getsignal(signal.SIGTERM) == before, "taken")
    )
    run.train(max_epochs=1)


def test_a_save_at_a_signal_is_numbered_as_the_others(tmp_path):
    run = Run(tmp_path, n_saved=1)
    run.checkpoint.attach(run.trainer, run.optimizer.events.OPTIMIZER_STEP_COMPLETED)
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=8), lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(ice.Preempted):
        run.train(max_epochs=4)
    assert names(tmp_path) == ["checkpoint_4.pt"]  # once more, for it is a micro-batch later
    again = Run(tmp_path)
    again.checkpoint.resume(again.trainer)
    assert (again.trainer.state.iteration, again.optimizer.clocks["step"]) == (8, 4)


def test_a_run_that_is_at_its_end_is_not_to_be_run_again(tmp_path):
    run = Run(tmp_path)
    completed = []
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), lambda: os.kill(os.getpid(), signal.SIGTERM))
    run.trainer.add_event_handler(Events.COMPLETED, lambda engine: completed.append(engine.state.iteration))
    run.checkpoint.attach(run.trainer)
    run.train(max_epochs=2)
    assert completed == [10]
    assert names(tmp_path) == ["checkpoint_10.pt"]


def test_processes_that_a_run_forks_end_when_they_are_told(tmp_path):
    done = python("-c", FORKS, str(tmp_path), timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["[1, 2]", f"{-signal.SIGTERM}", f"{-signal.SIGTERM}", ""]
    assert "the run saves and ends" not in done.stderr


def test_a_signal_that_another_library_handles_in_c_is_left_alone(tmp_path):
    with (tmp_path / "stacks.txt").open("w+") as stacks:
        faulthandler.register(signal.SIGUSR1, stacks)
        try:
            run = Run(tmp_path)
            run.trainer.add_event_handler(Events.ITERATION_STARTED, lambda: os.kill(os.getpid(), signal.SIGUSR1))
            run.train(max_epochs=1)
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            faulthandler.unregister(signal.SIGUSR1)
        stacks.seek(0)
        assert stacks.read().count("most recent call first") >= 6
