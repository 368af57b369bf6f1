"""Files that are being written: no two writers share one; what killed writers left goes, a living one's stays."""

import subprocess
import sys

from ice_engine import checkpoint_file
from tests.forked import python
from tests.test_checkpoint import names

WAITS = """
import sys, pathlib, torch
from ice_engine import checkpoint_file, part_file

with part_file.part_of(pathlib.Path(sys.argv[1])) as part:
    torch.save({"from": "there"}, part)
    print(part.name, flush=True)
    sys.stdin.readline()
    part.replace(sys.argv[1])
"""

WITHOUT_LOCKS = """
import sys
sys.modules["fcntl"] = None  # as on Windows
from pathlib import Path
import ice_engine
from ice_engine import checkpoint_file

checkpoint_file.write(Path(sys.argv[1]), {"from": "there"})
"""


def process(file):
    command = [sys.executable, "-c", WAITS, str(file)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_process_was_writing_is_removed_by_the_next_writer_and_a_living_ones_is_not(tmp_path):
    (tmp_path / "mine.part").write_text("of somebody else")
    killed, lives = (process(tmp_path / f"checkpoint_{i}.pt") for i in (1, 3))
    try:
        orphan, part = (writer.stdout.readline().strip() for writer in (killed, lives))
        killed.kill()
        killed.wait(60)
        assert names(tmp_path) == sorted([orphan, part, "mine.part"])
        checkpoint_file.write(tmp_path / "checkpoint_3.pt", {"from": "here"})
        assert names(tmp_path) == sorted([part, "checkpoint_3.pt", "mine.part"])
        assert checkpoint_file.read(tmp_path / "checkpoint_3.pt") == {"from": "here"}
        lives.communicate("\n", timeout=60)
        assert lives.returncode == 0
    finally:
        for writer in (killed, lives):
            writer.kill()
            writer.communicate()
    assert names(tmp_path) == ["checkpoint_3.pt", "mine.part"]
    assert checkpoint_file.read(tmp_path / "checkpoint_3.pt") == {"from": "there"}


def test_a_link_that_waits_where_a_file_is_written_leads_nowhere(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("data")
    for name in ("checkpoint_1.pt.part", "checkpoint_1.pt.0123abcd.part"):
        (tmp_path / name).symlink_to(victim)
    checkpoint_file.write(tmp_path / "checkpoint_1.pt", {})
    assert victim.read_text() == "data"


def test_where_the_system_has_no_locks_files_are_written_and_what_others_left_stays(tmp_path):
    (tmp_path / "checkpoint_1.pt.0123abcd.part").write_text("left")
    done = python("-c", WITHOUT_LOCKS, str(tmp_path / "checkpoint_1.pt"))
    assert done.returncode == 0, done.stderr
    assert checkpoint_file.read(tmp_path / "checkpoint_1.pt") == {"from": "there"}
    assert names(tmp_path) == ["checkpoint_1.pt", "checkpoint_1.pt.0123abcd.part"]
