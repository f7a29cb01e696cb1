"""A VM with two disks and three snapshots, made by hand of real qcow2 files, to be damaged.

    base.qcow2 <- base.after-s1.qcow2 <- base.after-s2.qcow2 <- (the VM)
                                      s1 (base), s2 (after-s1); left: another branch over base
    data.raw   <- data.after-s1.qcow2 <- data.after-s2.qcow2 <- (the VM)
"""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qsnapd.image.files import identity
from qsnapd.model.findings import Finding, Severity
from qsnapd.model.snapshot import (
    DiskLayer,
    ImageFormat,
    Manifest,
    MemoryImage,
    RamBlock,
    Strategy,
)
from qsnapd.snapshot.checking.facts import Around, Facts, gather
from qsnapd.snapshot.checking.fsck import judge
from qsnapd.snapshot.checking.live import Live, Node
from qsnapd.snapshot.checking.repair import repair
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.disks import Disk
from tests.parts import qemu_versions
from tests.unit.crafted_images import PAGE, RAM, WHOLE, stream
from tests.unit.situations import disk
from tests.unit.test_store import manifest as plain_manifest

QEMU_IMG = str(qemu_versions()[-1].img)
DISK_BYTES = 1 << 20
MEMORY = stream(*WHOLE)
RAM_BYTES = 4 * PAGE
LATER_S = 4e9
"""A daemon that began then has begun nothing that lies there."""
Change = Callable[["World"], object]


def qemu_img(*words: object) -> None:
    subprocess.run([QEMU_IMG, *map(str, words)], check=True, capture_output=True)


@dataclass
class World:
    """All of it; `broken` by a test."""

    store: VmStore
    images: Path
    live: Live | None = None
    around: Around = field(default_factory=Around)
    before_s: float = LATER_S
    is_busy: bool = False
    damages: ExitStack = field(default_factory=ExitStack)
    """What is to be damaged for as long as the test runs."""

    def image(self, name: str) -> Path:
        return self.images / name

    def folder(self, snapshot: str) -> Path:
        return self.store.path(snapshot)

    def memory(self, snapshot: str) -> Path:
        return self.folder(snapshot) / "memory.img"

    def edit(self, snapshot: str, **changes: Any) -> None:  # noqa: ANN401
        """Let a manifest say something else."""
        path = self.folder(snapshot) / "snapshot.json"
        whole = json.loads(path.read_text())
        whole.update(changes)
        path.write_text(json.dumps(whole))

    def chain(self, *names: str) -> tuple[Any, ...]:
        return tuple(identity(self.image(name)) for name in names)

    def running(self, *names: str, data: tuple[str, ...] | None = None) -> Live:
        """Let the VM run with this chain of images for vda."""
        vdb = data or ("data.after-s2.qcow2", "data.after-s1.qcow2", "data.raw")
        disks = (self._disk("vda", names), self._disk("vdb", vdb))
        return Live(disks=disks, in_chains=frozenset(map(str, map(self.image, (*names, *vdb)))))

    def _disk(self, target: str, names: tuple[str, ...]) -> Disk:
        return disk(target, str(self.image(names[0])), chain=self.chain(*names), depth=len(names))

    def facts(self) -> Facts:
        return gather(
            self.store,
            before_s=self.before_s,
            around=self.around,
            live=self.live,
            is_busy=self.is_busy,
        )

    def findings(self) -> tuple[Finding, ...]:
        return judge(self.facts())

    def repaired(self) -> tuple[Finding, ...]:
        facts = self.facts()
        return repair(self.store, facts, judge(facts), before_s=self.before_s)

    def overlay(self, name: str, over: str, image_format: str = "qcow2") -> Path:
        path = self.image(name)
        qemu_img("create", "-f", "qcow2", "-F", image_format, "-b", self.image(over), path)
        return path


def layer(world: World, target: str, *names: str, overlay: str) -> DiskLayer:
    return DiskLayer(
        target=target,
        node="n",
        frozen=str(world.image(names[0])),
        frozen_format="raw" if names[0].endswith(".raw") else "qcow2",
        overlay=str(world.image(overlay)),
        virtual_size_bytes=DISK_BYTES,
        chain=world.chain(*names),
    )


def commit(world: World, name: str, parent: str | None, age: int, *disks: DiskLayer) -> Manifest:
    staged = world.store.stage(name) / "memory.img"
    staged.write_bytes(MEMORY)
    file = identity(staged).model_copy(update={"path": str(world.memory(name))})
    plain = plain_manifest(name, parent, age=age)
    ram = (RamBlock(id=RAM, size_bytes=RAM_BYTES),)
    manifest = plain.model_copy(
        update={
            "machine": plain.machine.model_copy(update={"ram_blocks": ram}),
            "strategy": Strategy.STOPPED,
            "image_format": ImageFormat.STREAM,
            "memory": MemoryImage(
                path=file.path,
                size_bytes=len(MEMORY),
                allocated_bytes=4096,
                sha256=hashlib.sha256(MEMORY).hexdigest(),
                file=file,
            ),
            "disks": disks,
        }
    )
    world.store.commit(name, manifest)
    return manifest


def make_world(folder: Path) -> World:
    """Make it, in order, the VM running."""
    images = folder / "vms"
    images.mkdir()
    world = World(Store(folder / "state").vm("vm1"), images)
    qemu_img("create", "-f", "qcow2", world.image("base.qcow2"), DISK_BYTES)
    world.image("data.raw").write_bytes(b"")
    os.truncate(world.image("data.raw"), DISK_BYTES)
    world.overlay("base.after-s1.qcow2", "base.qcow2")
    world.overlay("data.after-s1.qcow2", "data.raw", "raw")
    world.overlay("base.after-s2.qcow2", "base.after-s1.qcow2")
    world.overlay("data.after-s2.qcow2", "data.after-s1.qcow2")
    world.overlay("base.after-left.qcow2", "base.qcow2")
    commit(
        *(world, "s1", None, 1),
        layer(world, "vda", "base.qcow2", overlay="base.after-s1.qcow2"),
        layer(world, "vdb", "data.raw", overlay="data.after-s1.qcow2"),
    )
    below = ("base.after-s1.qcow2", "base.qcow2")
    data = ("data.after-s1.qcow2", "data.raw")
    commit(
        *(world, "s2", "s1", 2),
        layer(world, "vda", *below, overlay="base.after-s2.qcow2"),
        layer(world, "vdb", *data, overlay="data.after-s2.qcow2"),
    )
    branch = ("base.after-left.qcow2", "base.qcow2")
    commit(
        *(world, "left", "s1", 3),
        layer(world, "vda", *branch, overlay="base.after-left-2.qcow2"),
    )
    world.store.set_current("s2")
    world.live = world.running("base.after-s2.qcow2", *below)
    return world


def codes(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.code for finding in findings}


def is_clean(findings: tuple[Finding, ...]) -> bool:
    return all(f.repaired or f.severity is Severity.NOTE for f in findings)


def with_nodes(live: Live | None, *nodes: tuple[str, str]) -> Live:
    assert live is not None
    return replace(live, nodes=tuple(Node(*node) for node in nodes))
