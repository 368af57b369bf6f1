"""The names of a checkpoint's files: which files of a folder are its own, and which is the newest."""

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path


class _Varying:
    """A part of a file name that varies; formats to a mark that no file name has, whatever the format."""

    def __init__(self, name: str, expression: str) -> None:
        self.name = name
        self.expression = expression
        self.mark = f"\x00{name}\x00"

    def __format__(self, specification: str) -> str:
        return self.mark


@dataclass(frozen=True)
class Names:
    """How a checkpoint names its files.

    Args:
        pattern: Ignite's, a format string of the names below.
        prefix: ``filename_prefix``.
        name: Of what is saved.
        ext: Extension.
        score_name: ``score_name``.
        by_score: Whether files are ranked by a score, or by their number.
    """

    pattern: str
    prefix: str
    name: str
    ext: str
    score_name: str | None
    by_score: bool

    def file(self, step: object, score: object) -> str:
        """Return the name of a file."""
        return self.pattern.format(
            filename_prefix=self.prefix,
            ext=self.ext,
            name=self.name,
            score_name=self.score_name,
            score=score,
            global_step=step,
        )

    def found_in(self, folder: Path) -> list[tuple[float, str]]:
        """Return priority (NaN if the name has none) and name of the files of *folder* that are named so, newest last.

        A score of NaN is below all others.
        """
        step, score = _Varying("global_step", r"-?\d+"), _Varying("score", r"-?\d+(?:\.\d+)?|-?inf|nan")
        expression = re.escape(self.file(step, score if self.by_score else step))
        for varying in (step, score):
            expression = expression.replace(re.escape(varying.mark), f"(?P<{varying.name}>{varying.expression})", 1)
            expression = expression.replace(re.escape(varying.mark), f"(?:{varying.expression})")
        found = []
        for file in folder.iterdir() if folder.is_dir() else ():
            match = re.fullmatch(expression, file.name)
            if match is not None:
                priority = match.groupdict().get("score" if self.by_score else "global_step")
                number = math.nan if priority is None else float(priority.replace("nan", "-inf"))
                # Files of the same tick of the clock are told apart by their numbers.
                numbers = [int(digits) for digits in re.findall(r"\d+", file.name)]
                found.append(((_written(file), numbers), (number, file.name)))
        return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


def _written(file: Path) -> int:
    """Return when *file* was written; of a link that leads nowhere, when that was made."""
    for look in (file.stat, file.lstat):
        with contextlib.suppress(OSError):
            return look().st_mtime_ns
    return 0  # another process has removed it meanwhile
