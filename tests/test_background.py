"""The thread that writes: order, boundaries, errors, forks, and the end of the interpreter."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from ice_engine.appending import AppendedFile
from ice_engine.background import Background
from ice_engine.errors import LedgerError, WriteError


class Paper(AppendedFile):
    """A file with a line for each call."""

    def __init__(self, path):
        super().__init__(path)
        self.path = path
        self.threads = set()

    def line(self, text):
        self.threads.add(threading.current_thread())
        self.add(f"{text}\n".encode())


@pytest.fixture
def paper(tmp_path):
    return Paper(tmp_path / "paper.txt")


@pytest.fixture
def background(paper):
    background = Background(paper, "the paper")
    background.start()
    yield background
    background.close()


def test_calls_are_made_in_their_order_in_one_thread_of_its_own(background, paper):
    for i in range(10_000):
        background.put((paper.line, i))
    background.flush()
    assert paper.path.read_text().split() == [str(i) for i in range(10_000)]
    assert len(paper.threads) == 1
    assert paper.threads != {threading.current_thread()}


def test_what_several_threads_put_keeps_the_order_of_each(background, paper):
    def put(name):
        for i in range(2000):
            background.put((paper.line, f"{name}{i}"))

    threads = [threading.Thread(target=put, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    background.flush()
    written = paper.path.read_text().split()
    assert len(written) == 6000
    for name in "abc":
        assert [line for line in written if line[0] == name] == [f"{name}{i}" for i in range(2000)]


def test_what_was_put_is_written_without_a_flush(background, paper):
    seen = threading.Event()
    background.put((paper.line, "soon"))
    background.put((seen.set,))
    assert seen.wait(30)


def test_closing_writes_what_is_left_and_ends_the_thread(paper):
    background = Background(paper, "the paper")
    background.start()
    for i in range(100):
        background.put((paper.line, i))
    background.close()
    background.close()  # a second time nothing happens
    assert len(paper.path.read_text().split()) == 100
    with pytest.raises(ValueError, match="closed file"):
        paper._file.write(b"more")
    assert not any(thread.name == "ice_engine: the paper" for thread in threading.enumerate())


def test_before_it_is_started_nothing_is_written_and_nothing_waits(paper):
    background = Background(paper, "the paper")
    background.put((paper.line, "later"))
    background.flush()
    assert paper.path.read_text() == ""
    background.start()
    background.close()
    assert paper.path.read_text() == "later\n"


def test_an_error_is_raised_at_the_next_put_and_at_every_flush_and_nothing_more_is_written(background, paper, caplog):
    def fail():
        raise OSError(28, "No space left on device")

    background.put((paper.line, "before"))
    background.put((fail,))
    background.put((paper.line, "behind"))
    with pytest.raises(WriteError, match=r"the paper cannot be written: .*No space left on device.*resume from the"):
        background.flush()
    with pytest.raises(WriteError, match="No space left"):
        background.put((paper.line, "later"))
    with pytest.raises(OSError, match="No space left"):
        background.flush()
    background.close()
    assert paper.path.read_text() == "before\n"
    assert [record.getMessage() for record in caplog.records] == [
        "the paper cannot be written: [Errno 28] No space left on device"
    ]


def test_an_error_that_explains_itself_is_raised_as_it_is(background):
    def fail():
        message = "this is no ledger"
        raise LedgerError(message)

    background.put((fail,))
    with pytest.raises(LedgerError, match=r"^this is no ledger$"):
        background.flush()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_an_error():
    paper = Paper(Path("/dev/full"))
    background = Background(paper, "the paper")
    background.start()
    background.put((paper.line, "too much"))
    with pytest.raises(WriteError, match="No space left on device"):
        background.flush()
    background.close()


PROGRAM = """
    import os, sys
    from pathlib import Path
    from ice_engine.appending import AppendedFile
    from ice_engine.background import Background

    paper = AppendedFile(Path(sys.argv[1]))
    background = Background(paper, "the paper")
    background.start()
"""


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_fork_writes_nothing_and_waits_for_nothing(tmp_path):
    done = run(
        """
        background.put((paper.add, b"of the parent\\n"))
        child = os.fork()
        background.put((paper.add, b"of the child\\n" if child == 0 else b"of the parent, later\\n"))
        background.flush()
        background.close()
        if child:
            _, status = os.waitpid(child, 0)
            sys.exit(status)
        """,
        str(tmp_path / "paper.txt"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "paper.txt").read_text() == "of the parent\nof the parent, later\n"
