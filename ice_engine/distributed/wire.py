"""Tensors and text from one rank to another, over our own gloo group: bytes, never pickles.

Both sides know what comes, so both cut it into the same messages: a large tensor into chunks, straight out of one
memory into the other; many small ones into one message, as a message costs more than its bytes.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from ice_engine.distributed.world import own_group

_CHUNK = 16 * 2**20  # bytes of a message at most: what a sender needs beside what it sends
_SMALL = 64 * 2**10  # bytes up to which tensors share a message


def send(text: str, tensors: Sequence[torch.Tensor], rank: int) -> None:
    """Send *text* and then *tensors*, which may be changed when this returns.

    Args:
        text: Tells the other side which tensors come.
        tensors: On any device, of any layout in memory.
        rank: To whom.
    """
    data = bytearray(text.encode())
    dist.send(torch.tensor([len(data)], device="cpu"), rank, group=own_group())
    dist.send(torch.frombuffer(data, dtype=torch.uint8), rank, group=own_group())
    for batch in _batches(tensors):
        # Over the CPU, whatever device they are on; a chunk at a time.
        if len(batch) == 1:
            for chunk in torch.split(_bytes(batch[0].contiguous()), _CHUNK):
                dist.send(chunk.cpu(), rank, group=own_group())
        else:
            dist.send(torch.cat([_bytes(t.contiguous()).cpu() for t in batch]), rank, group=own_group())


def receive_text(rank: int) -> str:
    """Return the text that *rank* sends."""
    length = torch.zeros(1, dtype=torch.int64, device="cpu")
    dist.recv(length, rank, group=own_group())
    data = bytearray(int(length))
    dist.recv(torch.frombuffer(data, dtype=torch.uint8), rank, group=own_group())
    return data.decode()


def receive_all(expected: Iterable[tuple[int, Sequence[torch.Tensor]]]) -> None:
    """Fill tensors with what other ranks send, a message of each in turn, so that none waits long for the first.

    Args:
        expected: Pairs of a rank and what it sends to, on the CPU; views are written through.
    """
    streams = deque(_receive(rank, tensors) for rank, tensors in expected)
    while streams:
        stream = streams.popleft()
        if next(stream, None) is not None:
            streams.append(stream)


def _receive(rank: int, tensors: Sequence[torch.Tensor]) -> Iterator[int]:
    for batch in _batches(tensors):
        if len(batch) == 1:
            (tensor,) = batch
            memory = (
                tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
            )
            for chunk in torch.split(_bytes(memory), _CHUNK):
                dist.recv(chunk, rank, group=own_group())
                yield rank
            if memory is not tensor:
                tensor.copy_(memory)
        else:
            data = torch.empty(sum(map(_size, batch)), dtype=torch.uint8, device="cpu")
            dist.recv(data, rank, group=own_group())
            for tensor, part in zip(batch, torch.split(data, [*map(_size, batch)]), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # cloned: at an address of its dtype
            yield rank


def _batches(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for tensor in tensors:
        if _size(tensor) > _SMALL:
            yield [tensor]
        elif _size(tensor):
            batch.append(tensor)
            if len(batch) * _SMALL >= _CHUNK:
                yield batch
                batch = []
    if batch:
        yield batch


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
