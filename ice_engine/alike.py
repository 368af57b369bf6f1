"""What must be alike on all ranks of an engine, and the errors where it is not."""

import json
import math
import zlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ice_engine.distributed.rounds import Kind, Rounds, Row
from ice_engine.errors import RankError
from ice_engine.member import Member, syncs_of
from ice_engine.names import few


def check_facts(rounds: Rounds, facts: dict[str, Any], doing: str, free: Collection[str] = ()) -> dict[str, list[Any]]:
    """Compare *facts* over ranks, all but the *free* ones, at *doing*, and return those of all.

    Raises:
        RankError: Naming the first that differs.
    """
    told = [json.loads(text) for text in rounds.texts(json.dumps(facts), doing)]
    keys = sorted({key for facts in told for key in facts})
    found = {key: [facts.get(key) for facts in told] for key in keys}
    for key, values in found.items():
        if key not in free and any(value != values[0] for value in values):
            message = (
                f"{key} differs between ranks: {_by_rank(values)}. Configure and load every rank alike, and change "
                "what a run goes by on all ranks or from values reduced over all"
            )
            raise RankError(message)
    return found


def check_copies(rounds: Rounds, members: Sequence[Member], doing: str) -> None:
    """Refuse models that are not the same on all ranks, but for rounding; some entries stand for each parameter.

    Raises:
        RankError: Naming the first parameter that differs.
    """
    own = {
        f"parameter {name!r} of the model of {_named([m for m in members if m.sync is sync])}": entries
        for sync in syncs_of(members)
        for name, entries in sync.samples().items()
    }
    text = json.dumps(own)
    if len({*rounds.texts(str(zlib.crc32(text.encode())), doing)}) == 1:
        return
    told: list[dict[str, list[float]]] = [json.loads(each) for each in rounds.texts(text, doing)]
    for key in sorted({key for each in told for key in each}):
        values = [each.get(key, []) for each in told]
        if not all(_near(value, values[0]) for value in values):
            message = (
                f"{key} differs between ranks: it has {_by_rank(values)}. DistributedDataParallel makes all alike when "
                "it is made, and never again: load a state on every rank, or before DistributedDataParallel is made"
            )
            raise RankError(message)


def _named(members: Sequence[Member]) -> str:
    return f"optimizer{'s' if len(members) > 1 else ''} {few([member.name for member in members])}"


def _near(some: Sequence[float], others: Sequence[float]) -> bool:
    return len(some) == len(others) and all(
        math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(some, others, strict=True)
    )


def check_lengths(lengths: Sequence[int | None], members: Sequence[Member]) -> None:
    """Refuse epochs of *lengths* that differ, where the forward needs all ranks.

    Raises:
        RankError: If they do; with each rank's.
    """
    if len(set(lengths)) > 1 and any(m.sync.together for m in members):
        message = (
            f"epoch_length differs: {_by_rank(lengths)}; the model needs all ranks in every forward. Give all the same "
            "number of micro-batches: a DistributedSampler with drop_last=True, or run(..., epoch_length=n)"
        )
        raise RankError(message)


def check_gate(rows: Sequence[Row], members: Sequence[Member], epoch: int) -> None:
    """Refuse a gate that lacks a rank which the forward needs.

    Raises:
        RankError: Naming the first that is at the end of its data.
    """
    done = [r for r, row in enumerate(rows) if row[0] in {Kind.EPOCH_LAST, Kind.EPOCH_END}]
    going = any(row[0] in {Kind.GATE, Kind.UPDATE} for row in rows)
    if done and going and any(m.sync.together for m in members):
        message = (
            f"rank {done[0]} is at the end of its data in epoch {epoch}, others are not; the "
            "model needs all ranks in every forward. Give all the same number of micro-batches"
        )
        raise RankError(message)


class CloseRow(NamedTuple):
    """What a rank says of a window that is to close.

    Attributes:
        member: Its optimizer, by number.
        full: Whether it has the micro-batches of a step here, or the epoch has no more.
        weight: Of its losses here.
        weighted: Whether they came with a weight; -1 if there are none.
        digest: Of the entries of the param groups.
        unit: In which its losses are weighed.
        micro_batches: It has here.
        leaving: Whether this rank is at the end of its data or its run.
        spoiled: Whether its run is over, after a loss that was not finite, which nobody would find out when it steps.
        beside: Whether another optimizer with the same GradScaler has an open window here.
    """

    member: float
    full: float
    weight: float
    weighted: float
    digest: float
    unit: float
    micro_batches: float
    leaving: float
    spoiled: float
    beside: float

    @classmethod
    def of(cls, row: Row) -> "CloseRow":
        """Return *row*, of a round, without its kind."""
        return cls(*row[1 : 1 + len(cls._fields)])


def check_update(indices: Sequence[int], members: Sequence[Member]) -> None:
    """Refuse ``update()`` of different optimizers, by number.

    Raises:
        RankError: On all ranks, with one of each.
    """
    called = [members[index].name for index in indices]
    if len({*called}) > 1:
        message = f"the ranks call update() of different optimizers: {few(called)}; call it on all alike"
        raise RankError(message)


def check_close(
    rows: Sequence[CloseRow],
    member: Member,
    members: Sequence[Member],
    rounds: Rounds,
    values: dict[str, dict[str, str]],
) -> None:
    """Refuse to close windows of different optimizers, partly weighted ones, or with *values* that differ.

    Raises:
        RankError: On all ranks, with what each says.
    """
    if len({row.member for row in rows}) > 1:
        said = "; ".join(f"rank {r}: {members[int(row.member)].name!r}" for r, row in enumerate(rows))
        message = f"the ranks close windows of different optimizers: {said}"
        raise RankError(message)
    if {row.weighted for row in rows} >= {0.0, 1.0}:
        told = [(r, row.weighted) for r, row in enumerate(rows) if row.weighted >= 0.0]
        said = ", ".join(f"rank {r} {'with' if weighted else 'without'}" for r, weighted in told)
        message = f"the losses of optimizer {member.name!r} came {said} weight=; pass it on every rank or on none"
        raise RankError(message)
    if len({row.digest for row in rows}) > 1:
        facts = {f"{key} of {group}": v for group, entries in values.items() for key, v in entries.items()}
        check_facts(rounds, facts, f"a step of {member.name!r}")


def _by_rank(values: Sequence[Any]) -> str:
    return ", ".join(f"{value} on rank {r}" for r, value in enumerate(values))
