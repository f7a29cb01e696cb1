"""States and reasons: libvirt's numbers and texts, and how QEMU's events change them."""

import pytest

from qsnapd.model.state import Condition, State
from qsnapd.qmp.transport import QmpEvent
from qsnapd.vm.condition import after_exit, from_status, lifecycle_event
from qsnapd.vm.tracker import Tracker


def event(name: str, at_s: float = 0.0, **data: object) -> QmpEvent:
    return QmpEvent(name, data, at_s)


def tracker_at(condition: Condition) -> tuple[Tracker, list[Condition]]:
    changes: list[Condition] = []
    tracker = Tracker(lambda _old, new: changes.append(new))
    tracker.become(condition)
    changes.clear()
    return tracker, changes


# --- libvirt's numbers and texts -----------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "number", "text"),
    [
        (State.NOSTATE, 0, "no state"),
        (State.RUNNING, 1, "running"),
        (State.BLOCKED, 2, "idle"),
        (State.PAUSED, 3, "paused"),
        (State.SHUTDOWN, 4, "in shutdown"),
        (State.SHUTOFF, 5, "shut off"),
        (State.CRASHED, 6, "crashed"),
        (State.PMSUSPENDED, 7, "pmsuspended"),
    ],
)
def test_states(state: State, number: int, text: str) -> None:
    assert (state.value, state.text) == (number, text)


@pytest.mark.parametrize(
    ("condition", "number", "text"),
    [
        (Condition.RUNNING_BOOTED, 1, "running (booted)"),
        (Condition.RUNNING_FROM_SNAPSHOT, 4, "running (from snapshot)"),
        (Condition.RUNNING_UNPAUSED, 5, "running (unpaused)"),
        (Condition.PAUSED_USER, 1, "paused (user)"),
        (Condition.PAUSED_MIGRATION, 2, "paused (migrating)"),
        (Condition.PAUSED_IOERROR, 5, "paused (I/O error)"),
        (Condition.PAUSED_WATCHDOG, 6, "paused (watchdog)"),
        (Condition.PAUSED_FROM_SNAPSHOT, 7, "paused (from snapshot)"),
        (Condition.PAUSED_SNAPSHOT, 9, "paused (creating snapshot)"),
        (Condition.PAUSED_STARTING_UP, 11, "paused (starting up)"),
        (Condition.SHUTDOWN_USER, 1, "in shutdown (user)"),
        (Condition.SHUTOFF_SHUTDOWN, 1, "shut off (shutdown)"),
        (Condition.SHUTOFF_CRASHED, 3, "shut off (crashed)"),
        (Condition.SHUTOFF_FROM_SNAPSHOT, 7, "shut off (from snapshot)"),
        (Condition.CRASHED_PANICKED, 1, "crashed (panicked)"),
    ],
)
def test_conditions(condition: Condition, number: int, text: str) -> None:
    assert (condition.reason_number, condition.text) == (number, text)


def test_no_two_conditions_have_the_same_numbers() -> None:
    pairs = [(condition.state, condition.reason_number) for condition in Condition]
    assert len(pairs) == len(set(pairs)) == len(Condition.__members__)


# --- from QEMU's words ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "remembered", "expected"),
    [
        ("running", None, Condition.RUNNING_UNKNOWN),
        ("running", Condition.RUNNING_BOOTED, Condition.RUNNING_BOOTED),
        ("paused", Condition.PAUSED_SNAPSHOT, Condition.PAUSED_SNAPSHOT),
        ("paused", Condition.RUNNING_BOOTED, Condition.PAUSED_UNKNOWN),
        ("running", Condition.PAUSED_SNAPSHOT, Condition.RUNNING_UNKNOWN),
        ("io-error", None, Condition.PAUSED_IOERROR),
        ("guest-panicked", None, Condition.CRASHED_PANICKED),
        ("shutdown", None, Condition.SHUTDOWN_UNKNOWN),
        ("a word of a later QEMU", None, Condition.PAUSED_UNKNOWN),
    ],
)
def test_from_status(status: str, remembered: Condition | None, expected: Condition) -> None:
    assert from_status(status, remembered) is expected


RUNNING, USER, SNAPSHOT = (
    Condition.RUNNING_BOOTED,
    Condition.PAUSED_USER,
    Condition.PAUSED_SNAPSHOT,
)


@pytest.mark.parametrize(
    ("now", "events", "expected"),
    [
        (RUNNING, [event("STOP")], Condition.PAUSED_UNKNOWN),
        (
            RUNNING,
            [event("BLOCK_IO_ERROR", action="stop"), event("STOP")],
            Condition.PAUSED_IOERROR,
        ),
        (RUNNING, [event("BLOCK_IO_ERROR", action="report"), event("STOP")], None),
        (RUNNING, [event("WATCHDOG", action="pause"), event("STOP")], Condition.PAUSED_WATCHDOG),
        (
            RUNNING,
            [event("WATCHDOG", action="pause"), event("STOP"), event("RESUME"), event("STOP")],
            Condition.PAUSED_UNKNOWN,
        ),
        (USER, [event("STOP")], USER),
        (USER, [event("RESUME")], Condition.RUNNING_UNPAUSED),
        (RUNNING, [event("RESUME")], RUNNING),
        (RUNNING, [event("GUEST_PANICKED", action="pause")], Condition.CRASHED_PANICKED),
        (RUNNING, [event("GUEST_PANICKED", action="run")], RUNNING),
        (Condition.CRASHED_PANICKED, [event("STOP")], Condition.CRASHED_PANICKED),
        (Condition.CRASHED_PANICKED, [event("RESET")], Condition.PAUSED_UNKNOWN),
        (RUNNING, [event("SHUTDOWN")], Condition.SHUTDOWN_USER),
        (RUNNING, [event("SUSPEND")], Condition.PMSUSPENDED_UNKNOWN),
        (Condition.PMSUSPENDED_UNKNOWN, [event("WAKEUP")], Condition.RUNNING_WAKEUP),
        (RUNNING, [event("NEWS_OF_A_LATER_QEMU")], RUNNING),
    ],
)
def test_events(now: Condition, events: list[QmpEvent], expected: Condition | None) -> None:
    tracker, _ = tracker_at(now)
    for each in events:
        tracker.on_event(each)
    assert tracker.condition is (expected or Condition.PAUSED_UNKNOWN)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (RUNNING, Condition.SHUTOFF_CRASHED),
        (USER, Condition.SHUTOFF_CRASHED),
        (Condition.SHUTDOWN_USER, Condition.SHUTOFF_SHUTDOWN),
        (Condition.SHUTOFF_FROM_SNAPSHOT, Condition.SHUTOFF_FROM_SNAPSHOT),
    ],
)
def test_the_process_has_ended(now: Condition, expected: Condition) -> None:
    assert after_exit(now) is expected


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        (RUNNING, SNAPSHOT, ("Suspended", "Paused")),
        (RUNNING, Condition.PAUSED_IOERROR, ("Suspended", "I/O Error")),
        (SNAPSHOT, Condition.RUNNING_UNPAUSED, ("Resumed", "Unpaused")),
        (SNAPSHOT, USER, None),
        (RUNNING, Condition.SHUTDOWN_USER, ("Shutdown", "Finished")),
        (RUNNING, Condition.SHUTOFF_CRASHED, ("Stopped", "Crashed")),
        (Condition.SHUTOFF_SHUTDOWN, Condition.RUNNING_BOOTED, ("Started", "Booted")),
        (
            Condition.SHUTOFF_FROM_SNAPSHOT,
            Condition.PAUSED_FROM_SNAPSHOT,
            ("Started", "Snapshot"),
        ),
        (RUNNING, Condition.CRASHED_PANICKED, ("Crashed", "Panicked")),
        (Condition.NOSTATE_UNKNOWN, RUNNING, None),
    ],
)
def test_lifecycle_events(
    old: Condition, new: Condition, texts: tuple[str, str] | None
) -> None:
    assert lifecycle_event(old, new) == texts


# --- why the guest stands still ------------------------------------------------------------


def test_a_stop_takes_up_the_reason_that_is_pending() -> None:
    tracker, changes = tracker_at(RUNNING)
    with tracker.pausing(USER):
        assert tracker.condition is RUNNING, "only the event changes anything"
        tracker.on_event(event("STOP"))
    with tracker.resuming(Condition.RUNNING_FROM_SNAPSHOT):
        tracker.on_event(event("RESUME"))
    assert changes == [USER, Condition.RUNNING_FROM_SNAPSHOT]


def test_what_qemu_announces_goes_before_what_we_intend() -> None:
    tracker, _ = tracker_at(RUNNING)
    with tracker.holding():
        tracker.on_event(event("BLOCK_IO_ERROR", action="stop"))
        tracker.on_event(event("STOP"))
    assert tracker.condition is Condition.PAUSED_IOERROR


def test_the_pause_window_is_measured_by_qemus_clock() -> None:
    tracker, _ = tracker_at(RUNNING)
    with tracker.holding() as window:
        assert not tracker.held_by_job
        tracker.on_event(event("STOP", 100.0))
        assert tracker.held_by_job
        assert tracker.condition is SNAPSHOT
        assert window.paused_ms == 0
        tracker.on_event(event("RESUME", 100.0125))
        assert not tracker.held_by_job
    assert window.paused_ms == 12.5
    tracker.on_event(event("STOP", 200.0))
    assert tracker.condition is Condition.PAUSED_UNKNOWN, "no longer because of us"
    assert window.paused_ms == 12.5


def test_events_that_come_twice_do_not_change_the_window() -> None:
    tracker, changes = tracker_at(RUNNING)
    with tracker.holding() as window:
        for name, at_s in (("STOP", 1.0), ("STOP", 1.0), ("RESUME", 1.5), ("RESUME", 1.5)):
            tracker.on_event(event(name, at_s))
    assert window.paused_ms == 500
    assert changes == [SNAPSHOT, Condition.RUNNING_UNPAUSED]


def test_attaching_knows_who_had_paused() -> None:
    tracker, _ = tracker_at(Condition.NOSTATE_UNKNOWN)
    tracker.on_attached("paused", USER)
    assert tracker.held_by_user
    tracker.on_attached("running", USER)
    assert not tracker.held_by_user
