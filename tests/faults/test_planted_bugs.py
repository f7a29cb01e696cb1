"""The sweeps find bugs: classic ones, planted one at a time."""

import pytest
import trio

from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.migration import MigrationStats
from qsnapd.snapshot import undo
from qsnapd.snapshot.taking import create, settling
from tests.faults.scene import Case
from tests.faults.sweeps import cancel_sweep

STOPPED = Case("10.0.2", Strategy.STOPPED)
BACKGROUND = Case("10.0.2", Strategy.BACKGROUND)


async def forget(*_arguments: object) -> None:
    await trio.lowlevel.checkpoint()


def test_a_guest_left_paused_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (settling, undo):
        monkeypatch.setattr(module, "give_back_run_state", forget)
    found = cancel_sweep(STOPPED)
    assert any("status: was running, is paused" in complaint for complaint in found)


def test_an_undo_that_is_cancelled_too_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unshielded:
        """trio, but nothing is shielded."""

        @staticmethod
        def move_on_after(_seconds: float, *, shield: bool) -> trio.CancelScope:
            return trio.CancelScope()

        def __getattr__(self, name: str) -> object:
            return getattr(trio, name)

    monkeypatch.setattr(create, "trio", Unshielded())
    assert any("the journal still has an entry" in complaint for complaint in cancel_sweep(STOPPED))


def test_a_node_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "_remove_node", forget)
    assert any("nodes: was" in complaint for complaint in cancel_sweep(STOPPED))


def test_disks_left_on_their_overlays_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "_unpivot", forget)
    assert any("disks: was" in complaint for complaint in cancel_sweep(STOPPED))


def test_a_guest_let_go_before_it_was_captured_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cont` as soon as the status is "active": memory and disks of two instants."""
    monkeypatch.setattr(MigrationStats, "saved_pages", 1)
    assert any("memory of tick" in complaint for complaint in cancel_sweep(BACKGROUND))
