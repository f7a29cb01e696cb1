"""The order of the tests: what fails soonest and means most comes first."""

import io
import signal
from pathlib import Path

import hypothesis
import pytest
from rich.console import Console

from tests.tallies import show, sum_up

# How long an example may take depends on what else this machine does.
hypothesis.settings.register_profile("gate", deadline=None)
hypothesis.settings.load_profile("gate")

# A shell that starts us in the background lets us, and all that we start, ignore this.
signal.signal(signal.SIGINT, signal.default_int_handler)

GATE = ("test_gate.py", "test_layers.py")
FOLDERS = ("unit", "fuzz", "real", "faults", "system", "crashes", "attacks", "soak", "bench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(item.path))


def place(path: Path) -> tuple[bool, int]:
    folder = path.parent.name
    return path.name not in GATE, FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = ("passed", "failed")
    reports = [report for how in ended for report in terminalreporter.getreports(how)]
    sums, text = sum_up(reports), io.StringIO()
    if sums.tables:
        show(sums, Console(file=text, width=100))
        terminalreporter.section("what was counted")
        terminalreporter.write(text.getvalue())
