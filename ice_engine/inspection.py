"""What a checkpoint holds, whether it is whole, and how it differs from another; tensors stay on the disk."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ice_engine import bitwise, checkpoint_file
from ice_engine.distributed.parts import Parts
from ice_engine.errors import CheckpointError
from ice_engine.names import few

_CLOCK = re.compile(r"(?:(?P<of>.+)\.)?ice_engine\.clocks\.(?P<entry>\w+)")
_POSITION = re.compile(r"ice_engine\.positions\.(?P<of>\d+)\.(?P<entry>epoch|in_epoch)")
_TRAINER = re.compile(r"(?P<of>[^.]+)\.(?P<entry>iteration|epoch_length|max_epochs)")
_GROUP = re.compile(r"(?P<of>(?:.+\.)?param_groups\.\d+)\.(?P<entry>\w+)(?P<rest>\.\d+)?")
_STATE = re.compile(r"(?P<of>(?:.+\.)?)state\.(?P<number>\d+)\.(?P<entry>.+)")
_NAMES = {"params", "param_names"}  # of a group: as many as it has parameters
_SUFFIXES = {".pt", ".pth", ".ckpt"}
_SHOWN = 20
_WIDTH = 40


@dataclass(frozen=True)
class Contents:
    """A checkpoint that was found whole.

    Attributes:
        path: Its file or folder.
        size: In bytes.
        seal: What says that it is whole.
        values: Plain data, and tensors of which nothing is read but shape and type, by the path of their keys.
        tensor: Reads one of the tensors.
    """

    path: Path
    size: int
    seal: str
    values: Mapping[str, Any]
    tensor: Callable[[str], torch.Tensor]

    def __str__(self) -> str:
        text = [f"{self.path}: {self.size:,} bytes, {self.seal}", *self._clocks(), "", *self._entries()]
        groups = self._matching(_GROUP)
        text += ["", "param groups:"] if groups else []
        for of, entries in groups.items():
            number = sum(key.startswith(f"{of}.param_names.") for key in self.values)
            number = number or sum(key.startswith(f"{of}.params.") for key in self.values)
            plain = [f"{name} {value}" for name, value in entries.items() if name not in _NAMES]
            text.append(f"  {of}: {', '.join(plain)}; {_count(number, 'parameter')}")
        return "\n".join(text)

    def _clocks(self) -> list[str]:
        """Say where the run was."""
        text = []
        for pattern in (_CLOCK, _TRAINER):
            for of, entries in self._matching(pattern).items():
                told = ", ".join(f"{name} {value}" for name, value in entries.items())
                text.append(f"  {of or 'optimizer'}: {told}")
        positions = self._matching(_POSITION)
        if positions:
            first = positions["0"]
            where = "inside" if first["in_epoch"] else "at the end of"
            text.append(f"  run: {where} epoch {first['epoch']}, on {_count(len(positions), 'rank')}")
        return text

    def _matching(self, pattern: re.Pattern[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for key, value in self.values.items():
            match = pattern.fullmatch(key)
            if match is not None and not isinstance(value, torch.Tensor):
                entries, name = found.setdefault(match["of"] or "", {}), match["entry"]
                rest = pattern.groupindex.get("rest") and match["rest"]  # one of several, such as of betas
                entries[name] = (*entries.get(name, ()), value) if rest else value
        return found

    def _entries(self) -> list[str]:
        rows: dict[str, list[int]] = {}
        for key, value in self.values.items():
            row = rows.setdefault(key.partition(".")[0], [0, 0, 0, 0])
            if isinstance(value, torch.Tensor):
                entries = bitwise.entries(value)
                size = sum(part.numel() * part.element_size() for part in (entries, *bitwise.places(value)))
                row[:3] = row[0] + 1, row[1] + entries.numel(), row[2] + size
            else:
                row[3] += 1
        cells = [["entry", "tensors", "elements", "bytes", "other values"]]
        cells += [[name, *(f"{number:,}" for number in row)] for name, row in rows.items()]
        return _table(cells, str.rjust)


def inspect(path: str | Path) -> Contents:
    """Look into a checkpoint: a file of :class:`Checkpoint <ice_engine.checkpoint.Checkpoint>` or of ``torch.save``.

    Every byte is compared with its digest first. Tensors are mapped, not read: memory holds the plain data alone.

    Args:
        path: A file; or a folder of :func:`save_sharded <ice_engine.sharded.save_sharded>`.

    Returns:
        What is in it; ``print`` shows it.

    Raises:
        CheckpointError: If it is damaged, of a newer version, or can only be read by running what it holds.
        FileNotFoundError: If it is not there.

    Examples:
        >>> torch.save({"model": torch.nn.Linear(2, 1).state_dict()}, "linear.pt")
        >>> found = inspect("linear.pt")
        >>> found.values["model.weight"].shape
        torch.Size([1, 2])

    .. versionadded:: 0.1.0
    """
    path = Path(path).expanduser()
    if not path.exists():
        message = f"{path} is not there"
        raise FileNotFoundError(message)
    try:
        return _sharded(path) if path.is_dir() else _file(path)
    except CheckpointError as error:
        message = f"{path}: {error}"
        raise CheckpointError(message) from error
    except RecursionError as error:
        message = f"{path}: it is nested too deeply, or holds itself"
        raise CheckpointError(message) from error


def files_in(folder: Path) -> list[tuple[Path, str | None]]:
    """Return the checkpoints of *folder* that are files of their own, newest first, and what is wrong with each."""
    files = [file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file()]
    files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return [(file, checkpoint_file.damage(file)) for file in files]


def _file(path: Path) -> Contents:
    if (problem := checkpoint_file.damage(path)) is not None:
        raise CheckpointError(problem)
    version = checkpoint_file.version(path)
    values = dict(_leaves(checkpoint_file.read(path, mapped=True)))
    seal = f"whole by its sha256, format {version}" if version else "whole by its entries' CRC, not ice_engine's"
    values = _by_name(values)
    return Contents(path, path.stat().st_size, seal, values, values.__getitem__)


def _by_name(values: dict[str, Any]) -> dict[str, Any]:
    """Return *values* with the state of a parameter under its name, where the optimizer says it, not its number."""
    names: dict[tuple[str, str], str] = {}
    for key, number in values.items():
        of, among, place = key.rpartition(".params.")
        name = values.get(f"{of}.param_names.{place}")
        if among and isinstance(name, str):
            names[of.rpartition("param_groups.")[0], str(number)] = name
    if len({(of, name) for (of, _), name in names.items()}) < len(names):
        return values

    def renamed(key: str) -> str:
        match = _STATE.fullmatch(key)
        name = match and names.get((match["of"], match["number"]))
        return f"{match['of']}state.{name}.{match['entry']}" if match and name else key

    return {renamed(key): value for key, value in values.items()}


def _sharded(folder: Path) -> Contents:
    parts = Parts(folder)
    values: dict[str, Any] = {}
    for key in parts.keys:
        found = parts.tensor(key)
        if found is None:
            values |= _leaves(parts.read({key: None})[key], key)
        else:
            values[key] = torch.empty(found[0], dtype=found[1], device="meta")

    def tensor(key: str) -> torch.Tensor:
        like: torch.Tensor = values[key]
        if like.device.type == "meta":
            like = torch.empty_like(like, device="cpu")
            parts.read({key: like})
        return like

    size = sum(file.stat().st_size for file in folder.iterdir())
    return Contents(folder, size, f"whole by its manifest's sha256s, in {len(parts.files)} files", values, tensor)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what is no container, by the keys that lead to it."""
    within = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else None
    )
    if within is None:
        yield path, value
    else:
        for key, item in within:
            yield from _leaves(item, f"{path}.{key}" if path else str(key))


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        paths: Of the two.
        same: How many values are the same, to the bit.
        changed: What differs, by key: a line each.
        only: The keys that only the first and only the second has.
    """

    paths: tuple[Path, Path]
    same: int
    changed: Mapping[str, str]
    only: tuple[list[str], list[str]]

    @property
    def is_none(self) -> bool:
        """Whether both hold the same."""
        return not (self.changed or any(self.only))

    def __str__(self) -> str:
        same, first, second = _count(self.same, "value"), *self.paths
        if self.is_none:
            return f"{first} and {second} hold the same, {same}, to the bit"
        text = [f"{first} and {second}: {same} the same, {len(self.changed)} different"]
        text += _table([[f"  {key}", told] for key, told in list(self.changed.items())[:_SHOWN]], str.ljust)
        more = len(self.changed) - _SHOWN
        text += [f"  and {more} more"] if more > 0 else []
        text += [f"only in {path}: {few(keys)}" for path, keys in zip(self.paths, self.only, strict=True) if keys]
        return "\n".join(text)


def difference(first: Contents, second: Contents) -> Difference:
    """Compare two checkpoints, tensor by tensor; NaN is the same as NaN.

    Args:
        first: From :func:`inspect`.
        second: Another one, sharded or not.

    Returns:
        What differs; ``print`` shows it.
    """
    both = [key for key in first.values if key in second.values]
    told = {key: _told(first, second, key) for key in both}
    changed = {key: text for key, text in told.items() if text is not None}
    only = (
        [key for key in first.values if key not in second.values],
        [key for key in second.values if key not in first.values],
    )
    return Difference((first.path, second.path), len(both) - len(changed), changed, only)


def _told(first: Contents, second: Contents, key: str) -> str | None:
    """Say how the values under *key* differ; None if they do not."""
    a, b = first.values[key], second.values[key]
    kinds = [_kind(value) for value in (a, b)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} -> {kinds[1]}"
    if not isinstance(a, torch.Tensor):
        return None if a == b or (a != a and b != b) else f"{_short(a)} -> {_short(b)}"  # noqa: PLR0124 - NaN alone is not itself
    return bitwise.difference(first.tensor(key), second.tensor(key))


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "a value"
    layout = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
    return f"{str(value.dtype).removeprefix('torch.')}{layout} {(*value.shape,)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _table(cells: list[list[str]], align: Callable[[str, int], str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(align, row[1:], widths[1:])]).rstrip() for row in cells]
