"""What a daemon leaves to the next about a QEMU process, also if it is damaged."""

import os
from pathlib import Path

import pytest

from qsnapd.daemon.remembered import recall, remember
from qsnapd.model.state import Condition
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.identity import ProcessIdentity

ME = ProcessIdentity(pid=os.getpid(), start_time_ticks=7, uid=0)


@pytest.fixture
def store(tmp_path: Path) -> VmStore:
    return Store(tmp_path / "state").vm("vm1")


def test_of_the_same_process_alone(store: VmStore) -> None:
    assert recall(store, ME) is None
    remember(store, ME, Condition.PAUSED_SNAPSHOT)
    assert recall(store, ME) is Condition.PAUSED_SNAPSHOT
    assert recall(store, ProcessIdentity(pid=ME.pid, start_time_ticks=8, uid=0)) is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[]",
        '{"pid": %d, "start_time_ticks": 7, "condition": ["PAUSED_USER"]}',
        '{"pid": %d, "start_time_ticks": 7, "condition": "NO_SUCH"}',
        '{"pid": %d, "start_time_ticks": 7}',
        '{"pid": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_understood_is_not_known(store: VmStore, text: str) -> None:
    store.remember_state(text.replace("%d", str(ME.pid)))
    assert recall(store, ME) is None
