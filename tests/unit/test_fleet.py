"""Clones in the store and in the fleet: who has a name, and what is left of it afterwards."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from qsnapd.daemon.fleet import Fleet
from qsnapd.errors import (
    ManifestInvalid,
    StoreError,
    TargetRefused,
    UnknownVm,
    VmExists,
    WrongState,
)
from qsnapd.image.files import identity
from qsnapd.model.registration import Registration
from qsnapd.store.layout import Store
from qsnapd.store.registry import (
    REGISTRATION_NAME,
    read_registration,
    register,
    remove_made,
)
from qsnapd.vm.identity import ProcessIdentity
from qsnapd.vm.proc import start_time_ticks
from qsnapd.vm.spawn import Spawn


def registration(folder: Path, name: str = "two", source: str = "vm1") -> Registration:
    """One whose files are there."""
    disk, log, pipe = folder / "disk", folder / "log", folder / "pipe"
    for path in (disk, log):
        path.touch()
    if not pipe.exists():
        os.mkfifo(pipe)
    return Registration(
        name=name,
        qmp=str(folder / f"qmp.{name}"),
        source=source,
        snapshot="s",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        overlays=(identity(disk),),
        files=(identity(log), identity(pipe)),
    )


def test_what_is_registered_is_read_again(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        assert read_registration(store.vm("two")) is None
        register(store.vm("two"), registration(tmp_path))
    with Store(tmp_path / "state") as store:
        assert store.names() == ("two",)
        assert read_registration(store.vm("two")) == registration(tmp_path)
        (store.vm("two").directory / REGISTRATION_NAME).write_text('{"format": 2}')
        with pytest.raises(ManifestInvalid, match="another version of qsnapd"):
            read_registration(store.vm("two"))


def test_only_what_was_made_is_removed(tmp_path: Path) -> None:
    made = registration(tmp_path)
    assert remove_made(made, storage=False) == (str(tmp_path / "pipe"),)
    replaced = tmp_path / "log"
    (tmp_path / "other").touch()
    (tmp_path / "other").rename(replaced)
    assert remove_made(made, storage=True) == (str(tmp_path / "disk"),)
    assert replaced.exists()
    assert remove_made(made, storage=True) == ()
    later = tmp_path / "later"
    later.touch()
    images = [identity(later)]
    assert remove_made(made, storage=False, images=images) == ()
    assert remove_made(made, storage=True, images=images) == (str(later),)


def test_no_trace_is_left_of_a_forgotten_vm(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert not store.is_used("two")
        directory = store.vm("two").directory
        assert not store.is_used("two")
        (directory / ".state.json").touch()
        (directory / ".disks").mkdir()
        assert store.is_used("two")
        (directory / "snapshot").mkdir()
        (directory / "snapshot" / "snapshot.json").touch()
        with pytest.raises(StoreError, match="holds files of snapshots"):
            store.forget("two")
        assert (directory / ".state.json").exists()
        (directory / "snapshot" / "snapshot.json").unlink()
        store.forget("two")
        store.forget("two")
        assert not directory.exists()
        assert store.names() == ()
        assert store.vm("two").directory.exists(), "a new one may come"


def test_what_is_of_somebody_else_keeps_a_vm_from_being_forgotten(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        directory = store.vm("two").directory
        (directory / ".made.json").touch()
        (directory / "mine").touch()
        with pytest.raises(StoreError, match=r"has not put there \(mine\): move that away"):
            store.forget("two")
        assert sorted(os.listdir(directory)) == [".made.json", "mine"]


def test_a_draft_is_no_trace(tmp_path: Path) -> None:
    """Of a journal that was never written to its end, when the host lost power."""
    with Store(tmp_path) as store:
        (store.vm("two").directory / ".restoring.new").touch()
        assert not store.is_used("two")
        store.forget("two")
        assert not store.vm("two").path("x").parent.joinpath(".restoring.new").exists()


def test_folders_that_no_vm_can_have_are_none(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for name in ("two", "-odd", "a ", ".hidden", "long" * 50):
            (tmp_path / name).mkdir()
        assert store.names() == ("two",)


@asynccontextmanager
async def open_fleet(state: Path, made_of: dict[str, str]) -> AsyncIterator[tuple[Fleet, Store]]:
    """One with vm1 in the configuration. *made_of*: what clones are started like."""

    def clone_launcher(source: str, clone: str) -> Spawn:
        made_of[clone] = source
        return Spawn()

    async with trio.open_nursery() as watching:
        with Store(state) as store:
            fleet = Fleet(
                store, print, watching, qemu_img="qemu-img", clone_launcher=clone_launcher
            )
            fleet.add("vm1", state / "vm1.qmp", Spawn(), configured=True)
            yield fleet, store
        watching.cancel_scope.cancel()


async def test_a_clone_is_started_like_what_it_was_made_of_at_first(tmp_path: Path) -> None:
    made_of: dict[str, str] = {}
    async with open_fleet(tmp_path / "state", made_of) as (fleet, store):
        # Opened by name, so each but the last before what it was made of.
        for name, source in (("a", "b"), ("b", "c"), ("c", "vm1"), ("x", "y"), ("y", "x")):
            register(store.vm(name), registration(tmp_path, name, source))
        register(store.vm("of"), registration(tmp_path, "of", "broken"))
        (store.vm("broken").directory / REGISTRATION_NAME).write_text("{}")
        await fleet.open_clones()
        assert set(fleet) == {"vm1", "a", "b", "c", "of", "x", "y"}
        assert [made_of[name] for name in "abc"] == ["vm1"] * 3
        assert made_of["of"] == "broken"


async def test_the_monitor_of_a_vm_that_is_shut_off_is_its_own(tmp_path: Path) -> None:
    async with open_fleet(tmp_path / "state", {}) as (fleet, _):
        (tmp_path / "link").symlink_to(tmp_path / "state")
        with pytest.raises(TargetRefused, match="is the monitor of VM vm1"):
            fleet.require_own_monitor("two", tmp_path / "link" / "vm1.qmp")
        fleet.require_own_monitor("two", tmp_path / "vm1.qmp")


async def test_what_is_in_use_is_not_undefined(tmp_path: Path) -> None:
    async with open_fleet(tmp_path / "state", {}) as (fleet, store):
        made = registration(tmp_path)
        register(store.vm("two"), made)
        await fleet.open_clones()
        with pytest.raises(UnknownVm, match="should be its snapshot s"):
            fleet.store_of_source(made)

        store.vm("two").stage("s")
        with pytest.raises(WrongState, match=r"getting a snapshot right now \(s\)"):
            await fleet.undefine("two", remove_storage=True)
        store.vm("two").unstage("s")

        pid = os.getpid()  # "its" QEMU, whose socket somebody has removed
        store.vm("vm1").leases.hold("s", "two", pid, start_time_ticks(pid), mapped=False)
        assert fleet.store_of_source(made) is store.vm("vm1")
        with pytest.raises(WrongState, match=f"runs, as process {pid}"):
            await fleet.undefine("two", remove_storage=True)
        store.vm("vm1").leases.release("two", pid)

        (store.vm("two").directory / ".half").mkdir()
        (store.vm("two").directory / ".half" / "memory.img").touch()
        with pytest.raises(StoreError, match="holds files of snapshots"):
            await fleet.undefine("two", remove_storage=True)
        assert [identity(Path(file.path)) for file in made.overlays] == list(made.overlays)
        assert "two" in fleet
        (store.vm("two").directory / ".half" / "memory.img").unlink()
        assert len(await fleet.undefine("two", remove_storage=True)) == 3


async def test_a_fleet_across_daemons(tmp_path: Path) -> None:
    async with trio.open_nursery() as watching:
        with Store(tmp_path / "state") as store:
            register(store.vm("two"), registration(tmp_path))
            register(store.vm("three"), registration(tmp_path, "three", source="two"))
            register(store.vm("vm2"), registration(tmp_path, "vm2"))
            (store.vm("broken").directory / REGISTRATION_NAME).write_text("{}")
            made_of: dict[str, str] = {}

            def clone_launcher(source: str, clone: str) -> Spawn:
                made_of[clone] = source
                return Spawn()

            fleet = Fleet(
                store, print, watching, qemu_img="qemu-img", clone_launcher=clone_launcher
            )
            for name in ("vm1", "vm2"):
                fleet.add(name, tmp_path / name, Spawn(), configured=True)
            await fleet.open_clones()
            assert set(fleet) == {"vm1", "vm2", "two", "three"}
            assert fleet["vm2"].qmp == tmp_path / "vm2", "the configuration wins"
            assert fleet["two"].qmp == tmp_path / "qmp.two"
            assert made_of["two"] == "vm1"

            for name, words in (("vm1", "already"), ("broken", "files of a former VM")):
                with pytest.raises(VmExists, match=words), fleet.reserved(name):
                    pass
            with fleet.reserved("new"), pytest.raises(VmExists), fleet.reserved("new"):
                pass
            with pytest.raises(WrongState, match="configuration file"):
                await fleet.undefine("vm1", remove_storage=True)
            with pytest.raises(WrongState, match="clones were made of it: three"):
                await fleet.undefine("two", remove_storage=True)
            await fleet.undefine("three", remove_storage=False)
            removed = await fleet.undefine("two", remove_storage=True)
            assert {Path(path).name for path in removed} == {"disk", "log"}
            with pytest.raises(UnknownVm, match="there are: vm1, vm2"):
                fleet.find("two")
            assert not (tmp_path / "state" / "two").exists()
        watching.cancel_scope.cancel()


@dataclass
class Attached:
    """As much of a VM as it is found by."""

    uuid: str
    identity: ProcessIdentity


async def test_a_vm_is_found_by_name_uuid_and_process(tmp_path: Path) -> None:
    async with open_fleet(tmp_path / "state", {}) as (fleet, _):
        for name, uuid, pid in (("vm1", "AB-1", 7), ("9", "ab-2", 8), ("twin", "ab-2", 9)):
            if name not in fleet:
                fleet.add(name, tmp_path / f"{name}.qmp", Spawn(), configured=True)
            vm = Attached(uuid, ProcessIdentity(pid=pid, start_time_ticks=0, uid=0))
            fleet[name].attached = vm  # type: ignore[assignment]
        assert fleet.find("vm1") is fleet.find("ab-1") is fleet.find("AB-1") is fleet.find("7")
        assert fleet.find("9").name == "9", "a name comes before an id"
        with pytest.raises(UnknownVm, match="UUID of several VMs: 9, twin"):
            fleet.find("ab-2")
        with pytest.raises(UnknownVm, match="there are: 9, twin, vm1"):
            fleet.find("10")
        fleet["vm1"].attached = None
        with pytest.raises(UnknownVm):
            fleet.find("ab-1")
