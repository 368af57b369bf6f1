"""Whether a rank that is in a collective gets on there: by what its processors did since it was asked before."""

import dataclasses
import threading

import pytest

from ice_engine.distributed.training_thread import training_thread
from ice_engine.distributed.watch import Answer, here

AT = Answer("train.py:12 in evaluate", "barrier", at=100.0, thread=7.0, process=9.0)


@pytest.mark.parametrize(
    ("thread", "process", "waits"),
    [
        (0.0, 0.01, True),  # asleep in gloo
        (0.0066, 0.0066, False),  # 66 collectives in 4 s, one after the other in one line
        (0.0, 2.5, False),  # gloo's threads move what one collective is about
        (4.0, 4.0, True),  # spins until the device has done what never comes, as in NCCL's barrier
    ],
)
def test_a_rank_waits_in_a_collective_if_it_sleeps_or_spins_there(thread, process, waits):
    now = dataclasses.replace(AT, at=AT.at + 4.0, thread=AT.thread + thread, process=AT.process + process)

    assert now.waits_since(AT) is waits
    assert not now.waits_since(None)
    assert not dataclasses.replace(now, place="train.py:13 in evaluate").waits_since(AT)


def test_processor_time_of_the_thread_that_trains_is_told():
    before = here()
    while here().thread - before.thread < 0.01:
        sum(range(10_000))

    assert here().at > before.at
    assert here().process - before.process >= 0.01


def test_who_asks_is_told_of_the_thread_that_trains_until_it_ends_and_then_of_the_main_one():
    noted, over = threading.Event(), threading.Event()

    def train():
        training_thread.note()
        while here().thread < 0.01:
            sum(range(10_000))
        noted.set()
        over.wait()

    thread = threading.Thread(target=train)
    thread.start()
    noted.wait()
    while_it_trains = here()
    over.set()
    thread.join()

    assert while_it_trains.place.startswith("threading.py:")  # where it waits, called by train()
    assert while_it_trains.thread >= 0.01
    assert here().place.startswith("test_watch.py:")
