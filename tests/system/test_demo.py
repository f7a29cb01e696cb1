"""The demo as a newcomer sees it: on a terminal, to its end or to a Ctrl-C."""

import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from tests.parts import ROOT

DEMO_LIMIT_S = 240.0
END_LIMIT_S = 60.0
CTRL_C = b"\x03"


class Screen:
    """A terminal with the demo on it."""

    def __init__(self, stream: trio.lowlevel.FdStream, process: trio.Process) -> None:
        self._stream = stream
        self.process = process
        self.text = ""
        """All that has been shown so far."""

    async def wait_for(self, text: str) -> None:
        while text not in self.text:
            self.text += await self._read()

    async def wait_end(self) -> int:
        """Wait until the demo has ended, and return its exit status."""
        try:
            while True:
                self.text += await self._read()
        except trio.BrokenResourceError:  # how a terminal says that nobody is left
            return await self.process.wait()

    async def press(self, keys: bytes) -> None:
        await self._stream.send_all(keys)

    async def _read(self) -> str:
        return (await self._stream.receive_some()).decode(errors="replace")


@asynccontextmanager
async def open_demo() -> AsyncIterator[Screen]:
    """Run the demo on a terminal of its own for the block."""
    ours, theirs = os.openpty()
    start = partial(
        trio.run_process,
        # the terminal must be the demo's own for Ctrl-C to reach it
        ["setsid", "--ctty", sys.executable, "-m", "tests.demo"],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        check=False,
    )
    with trio.fail_after(DEMO_LIMIT_S):
        async with trio.lowlevel.FdStream(ours) as stream, trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(start)
            os.close(theirs)
            yield Screen(stream, process)


def left_behind(shown: str) -> list[str]:
    """Return the demo's files that still exist, and its processes that still run."""
    found = re.search(r"--config (\S+)/qsnapd/qsnapd.toml", shown)
    assert found is not None, shown
    folder = Path(found[1])
    processes = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, folder)]
    return [str(path) for path in [*folder.glob("**"), *processes]]


def _mentions(cmdline: Path, folder: Path) -> bool:
    try:
        return os.fsencode(folder) in cmdline.read_bytes()
    except OSError:  # it ended meanwhile
        return False


async def test_the_demo_shows_what_qsnapd_is_for() -> None:
    async with open_demo() as screen:
        status = await screen.wait_end()
    shown = screen.text
    assert status == 0, shown
    for words in (
        "$ qsnapctl snapshot-create-as demo live",
        "Domain snapshot live created",
        "Domain snapshot still created",
        "strategy stopped",
        "live\r\n  |\r\n  +- still",
        "Domain snapshot live reverted",
        "running (from snapshot)",
        "complaints: none",
    ):
        assert words in shown
    assert re.search(r"live  saving.*\d+%", shown), "no progress was shown"
    # which of the two --live means depends on what this host lets this user do
    assert re.search(r"strategy (background|precopy): the guest was paused for \d+\.\d ms", shown)
    assert not left_behind(shown)


async def test_ctrl_c_leaves_nothing_behind() -> None:
    async with open_demo() as screen:
        await screen.wait_for("saving")  # in the midst of the live checkpoint
        await screen.press(CTRL_C)
        with trio.fail_after(END_LIMIT_S):
            assert await screen.wait_end() != 0
    assert "interrupted by SIGINT" in screen.text
    assert not left_behind(screen.text)
