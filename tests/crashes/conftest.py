"""Tells in the end how often power has failed."""

import pytest

from tests.crashes.replay import REPLAYED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not REPLAYED:
        return
    terminalreporter.section("power failures")
    for replayed in REPLAYED:
        terminalreporter.write_line(str(replayed))
    steps = sum(replayed.steps for replayed in REPLAYED)
    states = sum(replayed.states for replayed in REPLAYED)
    done = sum(replayed.replayed for replayed in REPLAYED)
    wrong = sum(len(replayed.violations) for replayed in REPLAYED)
    terminalreporter.write_line(
        f"in all: {len(REPLAYED)} jobs, {steps} steps, {done} of {states} states replayed, "
        f"{wrong} violations"
    )
