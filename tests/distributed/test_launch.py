"""The launcher itself: what every rank returned, or why it did not, and never a hang."""

import os
import time

import pytest
import torch.distributed as dist

from tests.distributed.launch import RanksFailed, launch, watch

pytestmark = [pytest.mark.distributed, pytest.mark.soak]


def number(factor):
    return dist.get_rank() * factor


def fail_on_rank_1():
    if dist.get_rank() == 1:
        message = "no data"
        raise ValueError(message)
    dist.barrier()


def hang():
    time.sleep(100)


def die_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(7)
    return "alive"


def test_values_come_in_the_order_of_ranks():
    assert launch(number, 3, 10) == [0, 10, 20]


def test_a_rank_that_raises_is_shown_with_its_traceback():
    with pytest.raises(RanksFailed, match=r"(?s)rank 1, exit code 1.*in fail_on_rank_1.*ValueError: no data"):
        launch(fail_on_rank_1, 2)


def test_ranks_that_hang_show_where_and_end():
    with pytest.raises(RanksFailed, match=r"(?s)rank 0.*in hang.*rank 1.*in hang"):
        launch(hang, 2, timeout=15)


def test_a_rank_that_dies_is_told_from_one_that_returns():
    outcomes = watch(die_on_rank_1, 2)

    assert [o.value for o in outcomes] == ["alive", None]
    assert [o.exitcode for o in outcomes] == [0, 7]
