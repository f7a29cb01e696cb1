"""The files of a job that was cut off go, whatever the host calls its disks by now."""

import os
from pathlib import Path

import pytest

from qsnapd.image.files import identity
from qsnapd.model.plan import CheckpointPlan, JournalEntry
from qsnapd.model.request import CreateRequest
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.snapshot.undo import remove_files
from tests.unit.situations import situation


def entry_in(folder: Path) -> JournalEntry:
    """Return the journal of a job whose overlays are all in *folder*, and are there."""
    plan = plan_checkpoint(CreateRequest(name="s1", disk_only=True), situation())
    pivots = []
    for pivot in plan.pivots:
        path = folder / Path(pivot.overlay.path).name
        partial = f"{path}.{plan.token}.partial"
        overlay = pivot.overlay.model_copy(update={"path": str(path), "partial": partial})
        pivots.append(pivot.model_copy(update={"overlay": overlay}))
        path.write_text("overlay")
    assert pivots
    plan = plan.model_copy(update={"pivots": tuple(pivots)})
    made = tuple(identity(path) for path in sorted(folder.iterdir()))
    return JournalEntry(plan=plan, pid=1, start_time_ticks=1, made=made)


def test_after_a_reboot_with_other_device_numbers(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    made = [file.model_copy(update={"device": file.device + 1}) for file in entry.made]
    remove_files(entry.model_copy(update={"made": tuple(made)}))
    assert not list(tmp_path.iterdir())


def test_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when they are gone already: whoever has removed them may not have come to it."""
    entry = entry_in(tmp_path)
    for _ in range(2):
        synced: list[str] = []
        monkeypatch.setattr(
            os, "fsync", lambda fd, to=synced: to.append(os.readlink(f"/proc/self/fd/{fd}"))
        )
        remove_files(entry)
        assert synced == [str(tmp_path)]


def test_another_file_in_the_place_of_ours_stays(tmp_path: Path) -> None:
    entry = entry_in(tmp_path)
    assert isinstance(entry.plan, CheckpointPlan)
    path = Path(entry.plan.pivots[0].overlay.path)
    path.rename(tmp_path / "aside")
    path.write_text("mine")
    remove_files(entry)
    assert path.read_text() == "mine"
