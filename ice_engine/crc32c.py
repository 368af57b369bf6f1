"""The checksum of TensorBoard's records, many at once; TensorBoard's own goes byte by byte in Python.

A checksum is linear: that of some bytes is the exclusive or of what each of them gives where it stands, with zeros
behind it. So it is one look into a table for each byte, which numpy does at once, for all records that are as long.
"""

import collections
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed
_SPAN = 1024  # bytes looked up at once; the table has as many rows, a megabyte in all
_BEHIND = np.arange(_SPAN - 1, -1, -1)  # the last n: how many bytes are behind each of n
_MANY = 1024  # records looked up at once
_WIDTH = 4  # bytes of a checksum


def masked_crc32c(records: Sequence[bytes]) -> list[int]:
    """Return the checksum of each of *records* as TensorBoard has it: rotated, plus a constant."""
    found = [0] * len(records)
    alike = collections.defaultdict[int, list[int]](list)
    for place, record in enumerate(records):
        alike[len(record)].append(place)
    for length, places in alike.items():
        for begin in range(0, len(places), _MANY):
            some = places[begin : begin + _MANY]
            data = np.frombuffer(b"".join(records[place] for place in some), np.uint8).reshape(len(some), length)
            for place, checksum in zip(some, _masked(data).tolist(), strict=True):
                found[place] = checksum
    return found


def _masked(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """The same for rows of bytes."""
    number, length = data.shape
    register = np.full(number, 0xFFFFFFFF, "<u4")
    for begin in range(0, length, _SPAN):
        entered = data[:, begin : begin + _SPAN].copy()
        span = entered.shape[1]
        # What came before enters with the first bytes; of fewer, some of it is still to come.
        entered[:, :_WIDTH] ^= register.view(np.uint8).reshape(number, _WIDTH)[:, :span]
        left = register >> 8 * span if span < _WIDTH else np.uint32(0)
        register = (np.bitwise_xor.reduce(_table()[_BEHIND[-span:], entered], axis=1) ^ left).astype("<u4")
    crc = ~register
    return ((crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)).astype(np.uint32)


@functools.cache
def _table() -> npt.NDArray[np.uint32]:
    """Row n: what each byte gives with n zeros behind it."""
    table = np.empty((_SPAN, 256), np.uint32)
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, row >> 1 ^ _POLYNOMIAL, row >> 1).astype(np.uint32)
    table[0] = row
    for n in range(1, _SPAN):
        table[n] = table[0][table[n - 1] & 0xFF] ^ (table[n - 1] >> 8)
    return table
