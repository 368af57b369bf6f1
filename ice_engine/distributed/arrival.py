"""Where all ranks first meet, before a group is made, which waits in C and names nobody: will each of them come?"""

import datetime
import time

from ice_engine.distributed.suspects import Suspects
from ice_engine.distributed.training_thread import training_thread
from ice_engine.distributed.watch import Watch, here, others
from ice_engine.distributed.world import PATIENCE, listed
from ice_engine.errors import RankError

_LOOK = datetime.timedelta(seconds=4)  # between two looks at who is here
_ABSENT = 300.0  # seconds after which a rank without an optimizer counts as lost; it may be preparing its data


def meet(watch: Watch) -> None:
    """Wait until every rank is here.

    Raises:
        RankError: If a rank does not come.
    """
    watch.arrive()
    training_thread.note()
    place = f"{here().place}, where all ranks meet for the first time"
    begin, suspects = time.monotonic(), Suspects(in_round=True)
    try:
        while missing := watch.missing(_LOOK):
            _look(watch, missing, suspects, time.monotonic() - begin, place)
        _look(watch, [], suspects, 0.0, place)  # who was here first may have given up
    except RankError as error:
        watch.raised(error)
        raise


def _look(watch: Watch, missing: list[int], suspects: Suspects, waited: float, place: str) -> None:
    fates = {r: fate for r in others() if (fate := watch.fate(r)) in {"is stopped", "is gone"}}
    if "is stopped" not in fates.values() and (notes := watch.notes()):
        raised = "; ".join(f"rank {r} raised {note}" for r, note in notes.items())
        message = f"{raised}. The others wait at {place}"
        raise RankError(message)
    patience = PATIENCE.total_seconds()
    lost = [r for r in missing if waited > (patience if watch.knows(r) else _ABSENT)]
    if lost:
        message = (
            f"{listed(lost)} did not come to {place}, in {waited:.0f} s. Attach the optimizer on every "
            "rank, or on none; look for the first error in the output of that rank"
        )
        raise RankError(message)
    answers = watch.ask(missing) if missing and not fates else {}
    # One that has not made an optimizer yet is silent, too.
    silent = {r: watch.fate(r) for r, answer in answers.items() if answer is None and watch.knows(r)}
    suspects.look(answers, fates | silent, waited, place)
