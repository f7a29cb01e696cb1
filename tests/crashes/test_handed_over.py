"""What is left for a VM's own service: after a power failure it is the old or the new, whole."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qsnapd.model.base import Frozen
from qsnapd.store.handed import HandedFolder
from tests.crashes.medium import Medium
from tests.crashes.recorder import Recorder
from tests.crashes.stage import Stage
from tests.crashes.vault import Vault

NAME, TAKEN = "plan.json", "taken.json"


class Plan(Frozen):
    text: str


OLD, NEW = Plan(text="old"), Plan(text="new" * 3000)


@pytest.fixture
def folder(tmp_path: Path) -> HandedFolder:
    folder = HandedFolder(tmp_path / "pending" / "vm1")
    put(folder, OLD)
    return folder


def put(folder: HandedFolder, plan: Plan) -> None:
    folder.write(NAME, plan, uid=os.geteuid(), gid=os.getegid())


def states(
    folder: HandedFolder, work: Callable[[], object]
) -> Iterator[tuple[bool, Plan | None, Plan | None]]:
    """Yield whether *work* was done, and the plan and what was taken, at each power failure."""
    root = folder.path.parent
    recorder = Recorder(Vault(root.with_name("vault")), [root])
    with recorder.recording():
        work()
        steps = len(recorder.steps)
    medium, stage = Medium(recorder), Stage(recorder)
    for number, step in enumerate(recorder.steps[:steps], 1):
        medium.apply(step)
        for state in medium.states(str(number), 5):
            stage.set(state)
            plan, taken = folder.read(NAME, Plan), folder.read(TAKEN, Plan)
            yield number == steps, plan and plan[0], taken and taken[0]


def test_put(folder: HandedFolder) -> None:
    seen = {(is_done, plan) for is_done, plan, _ in states(folder, lambda: put(folder, NEW))}
    assert seen == {(False, OLD), (False, NEW), (True, NEW)}


def test_take(folder: HandedFolder) -> None:
    """One has it, and nobody loses it."""
    for is_done, plan, taken in states(folder, lambda: folder.rename(NAME, TAKEN)):
        assert (plan, taken) in ((OLD, None), (None, OLD))
        assert not is_done or taken == OLD


def test_withdraw(folder: HandedFolder) -> None:
    seen = {(is_done, plan) for is_done, plan, _ in states(folder, lambda: folder.remove(NAME))}
    assert seen == {(False, OLD), (False, None), (True, None)}


def test_first_of_all(tmp_path: Path) -> None:
    """The folders are made on the way."""
    (tmp_path / "state").mkdir()
    folder = HandedFolder(tmp_path / "state" / "pending" / "vm1")
    root = tmp_path / "state"
    recorder = Recorder(Vault(tmp_path / "vault"), [root])
    with recorder.recording():
        put(folder, NEW)
    medium, stage = Medium(recorder), Stage(recorder)
    for step in recorder.steps:
        medium.apply(step)
    for state in medium.states("all", 20):
        stage.set(state)
        found = folder.read(NAME, Plan)
        assert found is not None
        assert found[0] == NEW
