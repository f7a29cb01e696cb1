"""Every kind of damage is found by its own code, and nothing else is."""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qsnapd.model.findings import Severity
from qsnapd.model.plan import JournalEntry, Launch, OverlayPlan, RevertPlan
from qsnapd.model.registration import LastSeen, Registration, SeenDisk
from qsnapd.model.snapshot import FileIdentity
from qsnapd.snapshot.checking.facts import Around, look_around
from qsnapd.snapshot.checking.live import Handed
from qsnapd.snapshot.moving import export, imported
from qsnapd.store.layout import Store
from qsnapd.store.registry import note_last_seen, register
from tests.real.damage import marked_corrupt, over, resized
from tests.unit.fsck_world import Change, World, codes, is_clean, make_world, qemu_img, with_nodes

TOKEN = "0123abcd"
LEFT = "base.after-left.qcow2"
"""The frozen image of a branch: nothing else lies over it."""
NOBODY_PID = 1 << 30


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = make_world(tmp_path)
    with world.damages:
        yield world


def copied(path: Path) -> None:
    """Put a copy in place of a file: the same content, another file."""
    aside = path.with_name(f"{path.name}.copy")
    aside.write_bytes(path.read_bytes())
    aside.rename(path)


def made_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def revert_entry(world: World, token: str = TOKEN, overlay: str = "gone.qcow2") -> JournalEntry:
    plan = RevertPlan(
        token=token,
        vm="vm1",
        name="s1",
        requested_at=datetime.now(UTC),
        to_running=True,
        launch=Launch(token=token, executable="/q", argv=("q",), cwd="/", uid=0, gid=0),
        loading=None,
        was_running=True,
        overlays=(
            OverlayPlan(
                target="vda",
                path=str(world.image(overlay)),
                partial=str(world.image(f"{overlay}.partial")),
                backing=str(world.image("base.qcow2")),
                backing_format="qcow2",
                virtual_size_bytes=1 << 20,
            ),
        ),
    )
    return JournalEntry(plan=plan, pid=0, start_time_ticks=0)


def imported_disks(world: World) -> None:
    folder = world.store.directory / ".disks" / "gone-0123abcd"
    folder.mkdir(parents=True)
    (folder / "disk-vda.qcow2").write_bytes(b"data")


def manifest_of(world: World, snapshot: str) -> Path:
    return world.folder(snapshot) / "snapshot.json"


def misplaced(world: World) -> None:
    world.edit("left", name="other")


def backing_format(world: World) -> None:
    """Let the overlay say that the qcow2 image below it is raw."""
    words = ("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", world.image("base.qcow2"))
    qemu_img(*words, world.image(LEFT))


def nonsense(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack(">I", 9))


def lease(world: World, snapshot: str, pid: int) -> None:
    stat = Path(f"/proc/{pid}/stat")
    ticks = int(stat.read_bytes().rpartition(b")")[2].split()[19]) if stat.exists() else 1
    world.store.leases.hold(snapshot, "web2", pid, ticks, mapped=True)


def clone_of(world: World, source: str, *, around: dict[str, frozenset[str]]) -> None:
    registration = Registration(
        name="vm1",
        qmp="/run/q",
        source=source,
        snapshot="s",
        created_at=datetime.now(UTC),
        overlays=world.chain("base.after-s2.qcow2"),
        files=(),
    )
    register(world.store, registration)
    world.around = Around(snapshots=around)


def clone_without_disk(world: World) -> None:
    """A clone that is shut off, and one of whose images is gone."""
    clone_of(world, "web", around={"web": frozenset({"s"})})
    gone = FileIdentity(path=str(world.image("gone.qcow2")), device=1, inode=2)
    chain = (*world.chain("base.after-s2.qcow2"), gone)
    machine = world.store.manifest("s1").machine
    disks = (SeenDisk(target="vda", chain=chain),)
    note_last_seen(world.store, LastSeen(machine=machine, disks=disks))
    world.live = None


def moved_on(world: World) -> None:
    """Somebody's own blockdev-snapshot."""
    world.overlay("mine.qcow2", "base.after-s2.qcow2")
    names = ("base.after-s2.qcow2", "base.after-s1.qcow2", "base.qcow2")
    world.live = world.running("mine.qcow2", *names)


def moved_on_unlisted(world: World) -> None:
    """A snapshot of ours of which no record was kept."""
    overlay = world.overlay("base.after-x.qcow2", "base.after-s2.qcow2")
    names = ("base.after-s2.qcow2", "base.after-s1.qcow2", "base.qcow2")
    world.live = world.running("base.after-x.qcow2", *names)
    world.store.made.add(world.chain(overlay.name, "base.after-s2.qcow2"))


def committed_away(world: World) -> None:
    """Somebody's own block-commit of an image in the middle: s2's frozen one is skipped."""
    qemu_img(
        *("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b"),
        *(world.image("base.qcow2"), world.image("base.after-s2.qcow2")),
    )
    world.live = world.running("base.after-s2.qcow2", "base.qcow2")


def mirrored(world: World) -> None:
    """Somebody's own drive-mirror to another place."""
    qemu_img("create", "-f", "qcow2", world.image("new.qcow2"), 1 << 20)
    world.live = world.running("new.qcow2")


def other_below(world: World) -> None:
    """QEMU has another image below the right one."""
    world.overlay("new.qcow2", "base.qcow2")
    world.live = world.running("base.after-s2.qcow2", "base.after-s1.qcow2", "new.qcow2")


def file_lost(world: World) -> None:
    assert world.live is not None
    vda, vdb = world.live.disks
    lost = vda.model_copy(update={"depth": vda.depth + 1})
    world.live = replace(world.live, disks=(lost, vdb))


def unplugged(world: World) -> None:
    assert world.live is not None
    world.live = replace(world.live, disks=world.live.disks[:1])


DAMAGE: dict[str, Change] = {
    # the store
    "manifest-unreadable": lambda w: manifest_of(w, "left").write_text("{"),
    "manifest-too-new": lambda w: w.edit("left", format=99),
    "manifest-missing": lambda w: manifest_of(w, "left").unlink(),
    "manifest-misplaced": misplaced,
    "deletion-unfinished": lambda w: w.edit("left", deleting=True),
    "parent-missing": lambda w: w.edit("left", parent="gone"),
    "parent-cycle": lambda w: w.edit("s1", parent="s2"),
    "current-unknown": lambda w: w.store.set_current("gone"),
    "partial-abandoned": lambda w: w.store.stage("begun"),
    "view-abandoned": lambda w: (w.store.directory / f".{TOKEN}.view").touch(),
    "job-unfinished": lambda w: w.store.restoring.write(revert_entry(w)),
    "renaming-unfinished": lambda w: (w.store.directory / ".renaming.json").touch(),
    "thaw-owed": lambda w: (w.store.directory / ".thaw-owed.json").touch(),
    "next-start-broken": lambda w: w.store.next_start.write(revert_entry(w)),
    "record-unreadable": lambda w: (w.store.directory / ".journal.json").write_text("{"),
    "leases-unreadable": lambda w: (w.store.directory / ".leases.json").write_text("{"),
    "lease-unknown": lambda w: lease(w, "gone", os.getpid()),
    "lease-stale": lambda w: lease(w, "gone", NOBODY_PID),
    "clone-source-gone": lambda w: clone_of(w, "web", around={"web": frozenset()}),
    "stranger": lambda w: (w.store.directory / "notes.txt").touch(),
    "disks-unused": imported_disks,
    # files
    "memory-missing": lambda w: w.memory("s1").unlink(),
    "memory-unreadable": lambda w: made_folder(w.memory("s1")),
    "memory-replaced": lambda w: copied(w.memory("s1")),
    "memory-size": lambda w: os.truncate(w.memory("s1"), 5),
    "image-missing": lambda w: w.image(LEFT).unlink(),
    "image-unreadable": lambda w: made_folder(w.image(LEFT)),
    "image-replaced": lambda w: copied(w.image(LEFT)),
    "image-header": lambda w: nonsense(w.image(LEFT)),
    "image-corrupt": lambda w: w.damages.enter_context(marked_corrupt(w.image(LEFT))),
    "image-format": lambda w: w.image(LEFT).write_bytes(b"x" * 512),
    "image-size": lambda w: w.damages.enter_context(resized(w.image("data.raw"), 512)),
    "backing-differs": lambda w: w.damages.enter_context(over(w.image(LEFT), None)),
    "backing-format": backing_format,
    "clone-disk-missing": clone_without_disk,
    "file-abandoned": lambda w: w.image(f"base.after-x.qcow2.{TOKEN}.partial").touch(),
    "overlay-unused": lambda w: w.overlay("base.after-left-2.qcow2", "base.after-left.qcow2"),
    # QEMU's block graph
    "frozen-in-use": lambda w: setattr(
        w, "live", w.running("base.after-s1.qcow2", "base.qcow2")
    ),
    "current-differs": lambda w: w.store.set_current("left"),
    "live-unknown": mirrored,
    "live-chain-cut": committed_away,
    "live-chain-differs": other_below,
    "live-foreign-layer": moved_on,
    "live-unlisted-layer": moved_on_unlisted,
    "live-file-lost": file_lost,
    "disk-gone": unplugged,
    "node-unused": lambda w: setattr(
        w, "live", with_nodes(w.live, (f"qsnapd-{TOKEN}-0", "/dev/fdset/7"))
    ),
    "descriptors-unused": lambda w: setattr(
        w, "live", replace(w.live, handed=(Handed(7, "/vms/x.qcow2"),)) if w.live else None
    ),
}
ALSO = {
    "live-chain-cut": {"backing-differs"},  # it is the same damage, seen from both sides
}


def test_whole_is_clean(world: World) -> None:
    assert world.findings() == ()
    world.live = None
    assert world.findings() == ()


@pytest.mark.parametrize("code", DAMAGE)
def test_damage_is_found_by_its_own_code(world: World, code: str) -> None:
    DAMAGE[code](world)
    findings = world.findings()
    found = codes(findings)
    assert code in found
    assert found - {code} <= ALSO.get(code, set())
    for finding in findings:
        assert finding.mend
        assert not finding.what.endswith(".")


def test_there_are_enough_kinds() -> None:
    assert len(DAMAGE) >= 25


@pytest.mark.parametrize(
    ("snapshot", "words"),
    [("base.qcow2", "s1, s2, left"), ("data.raw", "s1, s2"), ("base.after-s1.qcow2", "s2")],
)
def test_a_lost_image_is_told_once_with_all_that_need_it(
    world: World, snapshot: str, words: str
) -> None:
    world.live = None
    world.image(snapshot).unlink()
    [finding] = world.findings()
    assert finding.code == "image-missing"
    assert set(finding.what.rpartition(": ")[2].split(", ")) == set(words.split(", "))


def test_running_jobs_are_none_of_it(world: World) -> None:
    """What a job is about to end is no damage."""
    world.is_busy, world.live = True, None
    world.store.restoring.write(revert_entry(world))
    world.store.stage("begun")
    (world.store.directory / f".{TOKEN}.view").touch()
    world.image(f"base.after-x.s1-{TOKEN}.qcow2.partial").touch()
    assert world.findings() == ()


def test_other_vms_work_is_theirs(world: World) -> None:
    """They may have their images in the same folder."""
    world.image(f"base.after-x.qcow2.{TOKEN}.partial").touch()
    world.around = Around(tokens=frozenset({TOKEN}))
    assert world.findings() == ()
    world.around = Around()
    world.image(f"other.after-x.qcow2.{TOKEN}.partial").touch()
    world.image(f"base.notes.{TOKEN}.partial").write_text("not ours: it is no image")
    world.image("base.after-x.qcow2.partial").touch()
    [finding] = world.findings()
    assert finding.what.startswith(str(world.image(f"base.after-x.qcow2.{TOKEN}.partial")))


REPAIRED = (
    *("current-unknown", "partial-abandoned", "view-abandoned", "leases-unreadable"),
    *("lease-stale", "file-abandoned"),
)


@pytest.mark.parametrize("code", REPAIRED)
def test_what_is_safe_is_repaired_once(world: World, code: str) -> None:
    DAMAGE[code](world)
    [finding] = world.repaired()
    assert (finding.code, finding.repaired) == (code, True)
    assert world.findings() == ()
    assert world.repaired() == ()


@pytest.mark.parametrize("code", [code for code in DAMAGE if code not in REPAIRED])
def test_nothing_else_is_touched(world: World, code: str) -> None:
    DAMAGE[code](world)
    before = contents(world)
    assert not any(finding.repaired for finding in world.repaired())
    assert contents(world) == before


def contents(world: World) -> dict[str, tuple[int, bytes]]:
    files = (p for top in (world.images, world.store.directory) for p in top.rglob("*"))
    return {str(p): (p.stat().st_ino, p.read_bytes() if p.is_file() else b"") for p in files}


def test_repair_spares_what_this_daemon_may_have_begun(world: World) -> None:
    """E.g. an import that is under way."""
    world.before_s = 0
    world.image(f"base.after-x.qcow2.{TOKEN}.partial").touch()
    world.store.stage("begun")
    findings = world.repaired()
    assert codes(findings) == {"file-abandoned"}
    assert not is_clean(findings)
    assert world.store.partials() == ("begun",)
    assert world.image(f"base.after-x.qcow2.{TOKEN}.partial").exists()


def test_repair_spares_what_somebody_else_has_put_there(world: World) -> None:
    store = world.store
    mine = [
        store.stage("begun") / "mine",
        store.directory / ".mine.view",
        store.directory / ".export-mine" / "mine",
        store.directory / "mine",
        store.path("s1") / "mine",
        world.image("base.after-x.qcow2.mine.partial"),
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert "partial-abandoned" in codes(world.repaired())
    imported.remove_leftovers(store, 1e12)
    export.remove_leftovers(store, 1e12)
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    assert "partial-abandoned" in codes(world.repaired())


@pytest.mark.parametrize("whose", ["its own", "another VM's"])
def test_repair_spares_what_a_record_that_is_not_understood_may_tell_of(
    world: World, tmp_path: Path, whose: str
) -> None:
    """The guest may write to it by now."""
    overlay = world.image(f"base.after-x.qcow2.{TOKEN}.partial")
    overlay.touch()
    world.store.stage("begun")
    (world.store.directory / f".{TOKEN}.view").touch()
    with Store(tmp_path / "other") as others:
        other = others.vm("other")
        store = world.store if whose == "its own" else other
        (store.directory / ".journal.json").write_text('{"format": 99}')
        world.around = look_around([other])
        assert codes(world.repaired()) <= {"record-unreadable"}
    assert overlay.exists()
    assert world.store.partials() == ("begun",)


def test_repair_spares_what_the_guest_writes_to(world: World) -> None:
    assert world.live is not None
    name = f"base.after-x.qcow2.{TOKEN}.partial"
    world.overlay(name, "base.after-s2.qcow2")
    world.live = world.running(name, "base.after-s2.qcow2", "base.after-s1.qcow2", "base.qcow2")
    assert not any(finding.repaired for finding in world.repaired())
    assert world.image(name).exists()


def test_repair_removes_no_file_that_took_its_place(world: World) -> None:
    path = world.image(f"base.after-x.qcow2.{TOKEN}.partial")
    path.touch()
    facts = world.facts()
    path.unlink()
    path.symlink_to(world.image("base.qcow2"))
    assert [leftover.path for leftover in facts.leftovers] == [str(path)]
    assert world.repaired() == ()
    assert path.is_symlink()
    assert world.image("base.qcow2").exists()


def test_files_that_are_not_there_to_be_read(world: World) -> None:
    """A FIFO or a link where an image was: nothing waits, nothing is followed."""
    path = world.image(LEFT)
    path.unlink()
    os.mkfifo(path)
    [finding] = world.findings()
    assert finding.code == "image-unreadable"
    path.unlink()
    path.symlink_to("/etc/passwd")
    [finding] = world.findings()
    assert finding.code == "image-unreadable"


def test_vm_on_a_frozen_image_of_another(world: World, tmp_path: Path) -> None:
    """What `look_around` says of one VM's images is held against the other's disks."""
    (tmp_path / "other").mkdir()
    other = make_world(tmp_path / "other")
    around = look_around([world.store])
    assert around.snapshots == {"vm1": frozenset({"s1", "s2", "left"})}
    assert around.needed >= {(f.device, f.inode) for f in world.chain("base.qcow2", "data.raw")}
    other.around = around
    assert other.findings() == ()
    assert other.live is not None
    vda, vdb = other.live.disks
    chain = world.chain("base.qcow2")
    stranger = vda.model_copy(update={"target": "vdc", "chain": chain, "depth": 1})
    other.live = replace(other.live, disks=(vda, vdb, stranger))
    [finding] = other.findings()
    assert finding.code == "frozen-in-use"
    assert "of VM vm1" in finding.what


def test_worst_comes_first(world: World) -> None:
    (world.store.directory / "notes.txt").touch()
    world.edit("left", parent="gone")
    world.image(LEFT).unlink()
    order = [finding.severity for finding in world.findings()]
    assert order == [Severity.ERROR, Severity.WARNING, Severity.NOTE]


def test_disk_that_a_later_snapshot_left_out(world: World) -> None:
    """The nearest one before it tells where that disk goes on from."""
    disks = json.loads(manifest_of(world, "s2").read_text())["disks"]
    world.edit("s2", disks=disks[:1])
    data = ("data.after-s1.qcow2", "data.raw")
    names = ("base.after-s2.qcow2", "base.after-s1.qcow2", "base.qcow2")
    world.live = world.running(*names, data=data)
    assert world.findings() == ()
