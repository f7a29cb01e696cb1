"""What the daemon leaves for a VM's own service: taken once, believed only from the right user."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import pytest

from qsnapd.errors import StoreError
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import FileIdentity
from qsnapd.store.pending import Deadline, NewestDisk, Pending, PendingPlan

ME = os.geteuid()


def plan(token: str = "1", until: Deadline | None = None) -> PendingPlan:
    launch = Launch(
        token=token, executable="/bin/qemu", argv=("qemu",), cwd="/", uid=ME, gid=os.getegid()
    )
    return PendingPlan(vm="web", launch=launch, until=until)


@pytest.fixture
def pending(tmp_path: Path) -> Pending:
    return Pending.of(tmp_path / "pending", "web")


def test_is_taken_once(pending: Pending) -> None:
    assert pending.take() is None
    pending.put(plan("1"))
    pending.put(plan("2"))
    assert pending.read() == plan("2")
    assert pending.take() == plan("2")
    assert pending.take() is None
    assert pending.read() is None


def test_only_one_of_many_gets_it(pending: Pending) -> None:
    taken: list[PendingPlan | None] = []
    together = Barrier(8)

    def take() -> None:
        together.wait()
        taken.append(pending.take())

    for _ in range(20):
        pending.put(plan())
        threads = [Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found is None for found in taken) == [False] + 7 * [True]
        taken.clear()


def test_what_was_not_run_is_pending_again(pending: Pending) -> None:
    pending.put(plan())
    assert pending.take() == plan()
    pending.put_back()
    assert pending.take() == plan()
    pending.put(plan("newer"))
    pending.put_back()
    assert pending.take() == plan("newer")


def test_withdrawn(pending: Pending) -> None:
    pending.withdraw()
    pending.put(plan())
    pending.withdraw()
    assert pending.take() is None


def test_is_void_after_its_time_or_a_reboot(pending: Pending) -> None:
    held = plan(until=Deadline.after(60))
    pending.put(held)
    assert pending.take() == held
    another_boot = Deadline.after(60).model_copy(update={"boot_id": "another"})
    for until in (Deadline.after(-1), another_boot):
        pending.put(plan(until=until))
        assert pending.read() is None
        assert pending.take() is None
        assert not (pending.folder.path / "plan.json").exists()


def test_lasts_for_whoever_opens_it_anew(pending: Pending, tmp_path: Path) -> None:
    pending.put(plan())
    assert Pending.of(tmp_path / "pending", "web").take() == plan()
    assert (tmp_path / "pending").stat().st_mode & 0o777 == 0o711
    assert pending.folder.path.stat().st_mode & 0o777 == 0o700


def garbage(path: Path) -> None:
    path.write_text("{}")


def writable_by_others(path: Path) -> None:
    path.chmod(0o666)


def a_link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (garbage, "not understood"),
        (writable_by_others, "is believed"),
        (a_link, "symbolic links"),
        (a_directory, "Is a directory"),
    ],
)
def test_what_is_not_ours_is_not_run(
    pending: Pending, spoil: Callable[[Path], None], words: str
) -> None:
    pending.put(plan())
    spoil(pending.folder.path / "plan.json")
    with pytest.raises(StoreError, match=words):
        pending.take()
    assert os.path.lexists(pending.folder.path / "plan.json")


def test_says_where_it_cannot_be_left(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write in .*/file/web: Not a directory"):
        Pending.of(tmp_path / "file", "web").put(plan())


def test_newest_disks(pending: Pending) -> None:
    assert pending.newest_disks() == ()
    image = FileIdentity(path="/img", device=1, inode=2)
    disks = [NewestDisk(target="vda", chain=(image,))]
    pending.note(disks, uid=ME, gid=os.getegid())
    written = (pending.folder.path / "disks.json").stat().st_ino
    pending.note(disks, uid=ME, gid=os.getegid())
    assert pending.newest_disks() == tuple(disks)
    assert (pending.folder.path / "disks.json").stat().st_ino == written


def test_a_disk_without_an_image_is_not_understood(pending: Pending) -> None:
    image = FileIdentity(path="/img", device=1, inode=2)
    pending.note([NewestDisk(target="vda", chain=(image,))], uid=ME, gid=os.getegid())
    noted = pending.folder.path / "disks.json"
    text = json.loads(noted.read_text())
    text["disks"][0]["chain"] = []
    noted.write_text(json.dumps(text))
    with pytest.raises(StoreError, match="is not understood"):
        pending.newest_disks()
