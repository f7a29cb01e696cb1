"""Points for planting faults: listed, each of them somewhere in the code, each striking once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from click.testing import CliRunner

from qsnapd import faults
from qsnapd.cli.daemon import cli
from qsnapd.errors import ConfigError
from qsnapd.faults import Action, PlantedFault, Point

PACKAGE = Path(faults.__file__).parent


@pytest.fixture(autouse=True)
def nothing_stays_planted() -> Iterator[None]:
    yield
    faults.plant({})


def test_what_the_variable_says() -> None:
    assert faults.parse("1:kill") == {Point.CREATE_PLANNED: Action.KILL}
    assert faults.parse("12:error,41:hang") == {
        Point.CAPTURE_STOPPED: Action.ERROR,
        Point.UNDO_GUEST_RUNS: Action.HANG,
    }


@pytest.mark.parametrize("text", ["1", "x:kill", "1:explode", "9999:kill", "1:kill:2"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="qsnapd faults"):
        faults.parse(text)


def test_every_point_is_one_in_the_code() -> None:
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    unused = [point.name for point in Point if f"Point.{point.name}" not in code]
    assert unused == []


def test_the_points_are_listed() -> None:
    lines = CliRunner().invoke(cli, ["faults"]).output.splitlines()
    assert len(lines) == len(Point)
    assert lines[0].split()[:2] == ["1", "create-planned"]
    assert lines[0].endswith("the journal has the plan; nothing is made")


async def test_nothing_happens_where_nothing_is_planted() -> None:
    faults.plant({Point.COMMITTED: Action.ERROR})
    await faults.reach(Point.SETTLED)
    faults.reach_in_thread(Point.SETTLED)


async def test_an_error_strikes_once() -> None:
    faults.plant({Point.COMMITTED: Action.ERROR})
    with pytest.raises(PlantedFault, match="point 29: the snapshot exists"):
        await faults.reach(Point.COMMITTED)
    await faults.reach(Point.COMMITTED)


async def test_what_hangs_can_only_be_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    faults.plant({Point.COMMITTED: Action.HANG})
    with trio.move_on_after(1000) as patience:
        await faults.reach(Point.COMMITTED)
    assert patience.cancelled_caught


def test_a_thread_that_hangs() -> None:
    faults.plant({Point.COMMITTED: Action.HANG})
    thread = threading.Thread(
        target=faults.reach_in_thread, args=(Point.COMMITTED,), daemon=True
    )
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()


def test_kill_is_sigkill_and_said_before() -> None:
    code = """if True:
        import logging
        from qsnapd import faults
        logging.basicConfig()
        faults.plant_from_environment()
        faults.reach_in_thread(faults.Point.COMMITTED)
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, faults.VARIABLE: "29:kill"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert "strikes: kill at point 29, COMMITTED" in done.stderr


def test_stop_lasts_until_sigcont() -> None:
    code = """if True:
        from qsnapd import faults
        faults.plant_from_environment()
        faults.reach_in_thread(faults.Point.COMMITTED)
    """
    environment = {**os.environ, faults.VARIABLE: "29:stop"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0
