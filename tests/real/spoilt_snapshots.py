"""Everything that makes a restore impossible or doubtful, and what must be said of it."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsnapd.errors import (
    Blocked,
    ImageInvalid,
    ManifestInvalid,
    ManifestTooNew,
    QsnapError,
    SnapshotDiffers,
    UnknownSnapshot,
)
from qsnapd.model.snapshot import Manifest
from tests.harness import Vm
from tests.parts import Qemu
from tests.real.cases import VM
from tests.real.damage import (
    VIRTUAL_SIZE,
    Spoilt,
    edited,
    emptied_folder,
    field,
    marked_corrupt,
    missing,
    over,
    replaced,
    resized,
    spoilt_block,
    spoilt_page,
    written,
)
from tests.rig import Rig

MIB = 1 << 20
NAME = b"\x06pc.ram"


@dataclass(frozen=True)
class Scene:
    """A VM with two snapshots, the second one's disks being overlays of the first one's."""

    qemu: Qemu
    vm: Vm
    rig: Rig
    folder: Path
    first: Manifest
    second: Manifest

    def manifest_path(self) -> Path:
        return self.folder / VM / self.second.name / "snapshot.json"

    def memory(self) -> Path:
        assert self.second.memory is not None
        return Path(self.second.memory.path)

    def image(self, target: str, depth: int = 0) -> Path:
        """Return an image of the second snapshot, 0 being its frozen one."""
        [disk] = [disk for disk in self.second.disks if disk.target == target]
        return Path(disk.chain[depth].path)

    def other_image(self) -> Path:
        """Return an image that has nothing to do with it."""
        path = self.folder / "other.qcow2"
        shutil.copyfile(self.image("vda", 1), path)
        return path

    def told(self, change: Callable[[dict[str, Any]], object]) -> Spoilt:
        """Let the manifest say something else."""
        return edited(self.manifest_path(), change)

    def machine(self, **values: object) -> Spoilt:
        return self.told(lambda tree: tree["machine"].update(values))

    def process(self, **values: object) -> Spoilt:
        return self.told(lambda tree: tree["machine"]["process"].update(values))

    def with_words(self, *words: str) -> Spoilt:
        """Let the command line have had more words."""
        return self.told(lambda tree: tree["machine"]["process"]["argv"].extend(words))

    def in_words(self, old: str, new: str) -> Spoilt:
        def change(tree: dict[str, Any]) -> None:
            argv = tree["machine"]["process"]["argv"]
            argv[:] = [word.replace(old, new) for word in argv]

        return self.told(change)


@dataclass(frozen=True)
class Case:
    """One thing that is wrong, and what must be said of it."""

    spoil: Callable[[Scene], Spoilt]
    error: type[QsnapError]
    words: str
    """A regular expression."""

    def is_said(self, text: str) -> bool:
        return re.search(self.words, text) is not None


FILES: Mapping[str, Case] = {
    "memory cut short": Case(
        lambda s: resized(s.memory(), -4096), ImageInvalid, "bytes, it was saved with"
    ),
    "memory too long": Case(
        lambda s: resized(s.memory(), 4096), ImageInvalid, "bytes, it was saved with"
    ),
    "memory's head": Case(
        lambda s: written(s.memory(), (0, bytes(4096))), ImageInvalid, "QEMU|memory image"
    ),
    "memory's end": Case(
        lambda s: written(s.memory(), (-4096, bytes(4096))),
        ImageInvalid,
        "the end of the image|QEMU's ending",
    ),
    "memory missing": Case(lambda s: missing(s.memory()), ImageInvalid, "cannot be opened"),
    "memory is a folder": Case(
        lambda s: emptied_folder(s.memory()), ImageInvalid, "bytes, it was saved with"
    ),
    "memory of something else": Case(
        lambda s: replaced(s.memory(), s.image("vda", 1)), ImageInvalid, "it was saved with"
    ),
    "a page of memory": Case(
        lambda s: spoilt_page(s.second),
        ImageInvalid,
        "should be in the memory image, but is not|unknown flags|outside of its RAM block",
    ),
    "a RAM block of another name": Case(
        lambda s: spoilt_block(s.second, b"\x06pc.rax"),
        ImageInvalid,
        "lacks the RAM block 'pc.ram'|unknown RAM block",
    ),
    "a RAM block of another size": Case(
        lambda s: spoilt_block(s.second, NAME + (32 * MIB).to_bytes(8, "big")),
        ImageInvalid,
        "RAM block|size of RAM|bytes in the VM",
    ),
    "a copy in a frozen image's place": Case(
        lambda s: replaced(s.image("vda")), ImageInvalid, "vda: .* is another file"
    ),
    "a frozen image missing": Case(
        lambda s: missing(s.image("vda")), ImageInvalid, "vda: .* is missing"
    ),
    "a copy in a base's place": Case(
        lambda s: replaced(s.image("vda", 1)), ImageInvalid, "vda: .* is another file"
    ),
    "a base missing": Case(
        lambda s: missing(s.image("sda", 1)), ImageInvalid, "sda: .*disk1.raw is missing"
    ),
    "a frozen image's header": Case(
        lambda s: written(s.image("vda"), (0, bytes(4))), SnapshotDiffers, "vda: .*qcow2"
    ),
    "a frozen image marked as corrupt": Case(
        lambda s: marked_corrupt(s.image("vda")), SnapshotDiffers, "vda: .*(as corrupt|corrupt)"
    ),
    "a base marked as corrupt": Case(
        lambda s: marked_corrupt(s.image("vda", 1)), SnapshotDiffers, "vda: .*disk0.*corrupt"
    ),
    "a disk of another size": Case(
        lambda s: written(s.image("vda"), field(VIRTUAL_SIZE, 32 * MIB)),
        SnapshotDiffers,
        f"is a disk of {32 * MIB} bytes now, it was one of {64 * MIB}",
    ),
    "swapped backing files": Case(
        lambda s: over(s.image("vda"), s.other_image()),
        SnapshotDiffers,
        "is an overlay over .*other.qcow2 now, it was one over .*disk0.qcow2",
    ),
    "the other disk's backing file": Case(
        lambda s: over(s.image("vda"), s.image("sda")),
        SnapshotDiffers,
        "vda: .* is an overlay over .*disk1.* now",
    ),
    "no backing file any more": Case(
        lambda s: over(s.image("vda"), None), SnapshotDiffers, "is no longer an overlay over"
    ),
    "a base that has got a backing file": Case(
        lambda s: over(s.image("vda", 1), s.other_image()),
        SnapshotDiffers,
        "is an overlay over .*other.qcow2 now, it was none",
    ),
    "the snapshot's folder missing": Case(
        lambda s: missing(s.manifest_path().parent), UnknownSnapshot, "no snapshot 'second'"
    ),
}


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree.pop(key)


def block_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = tree["machine"]["ram_blocks"]
    return next(block for block in blocks if block["id"] == name)


MANIFEST: Mapping[str, Case] = {
    "no JSON": Case(
        lambda s: written(s.manifest_path(), (0, b"]")), ManifestInvalid, "not valid JSON"
    ),
    "newer": Case(
        lambda s: s.told(lambda tree: tree.update(format=99)), ManifestTooNew, "newer version"
    ),
    "a field nobody knows": Case(
        lambda s: s.told(lambda tree: tree.update(mood=1)), ManifestInvalid, "'mood' is unknown"
    ),
    "no machine": Case(lambda s: s.told(without("machine")), ManifestInvalid, "'machine'"),
    "a negative size": Case(
        lambda s: s.machine(ram_bytes=-1), ManifestInvalid, "'machine.ram_bytes'"
    ),
    "another VM's": Case(
        lambda s: s.told(lambda tree: tree.update(vm="vm2")), ManifestInvalid, "of VM 'vm2'"
    ),
    "memory of no strategy": Case(
        lambda s: s.told(lambda tree: tree.update(strategy=None)),
        ImageInvalid,
        "does not say how it was saved",
    ),
    "a RAM block that was never saved": Case(
        lambda s: s.told(
            lambda tree: tree["machine"]["ram_blocks"].append({"id": "x", "size_bytes": 4096})
        ),
        ImageInvalid,
        "lacks the RAM block 'x'",
    ),
    "a RAM block of another size": Case(
        lambda s: s.told(lambda tree: block_of(tree, "pc.ram").update(size_bytes=96 * MIB)),
        ImageInvalid,
        "bytes in the memory image and .* bytes in the VM",
    ),
    "another size of RAM": Case(
        lambda s: s.machine(ram_bytes=96 * MIB),
        SnapshotDiffers,
        rf"(?s)RAM: the command line asks for {64 * MIB}; it was {96 * MIB} bytes \(cannot.*"
        f"the memory image has {64 * MIB}",
    ),
    "a command line with more RAM": Case(
        lambda s: s.with_words("-m", "1.5G"), SnapshotDiffers, "command line asks for 1610612736"
    ),
    "a command line with less RAM": Case(
        lambda s: s.with_words("-m", "size=32M"), SnapshotDiffers, "asks for 33554432"
    ),
    "an inherited descriptor": Case(
        lambda s: s.with_words("-netdev", "tap,id=n,fd=9"), Blocked, "descriptor was passed"
    ),
    "disks that are thrown away": Case(
        lambda s: s.with_words("-snapshot"), Blocked, "writes of this VM are thrown away"
    ),
    "a disk that the command line does not name": Case(
        lambda s: s.in_words(str(s.image("vda", 1)), str(s.other_image())),
        Blocked,
        "vda: .* names none of its",
    ),
}


@contextmanager
def script(folder: Path, text: str, bits: int = 0o755) -> Iterator[Path]:
    """Make a program that is no QEMU."""
    path = folder / "program"
    path.write_text(text)
    path.chmod(bits)
    try:
        yield path
    finally:
        path.unlink()


@contextmanager
def run_on(s: Scene, text: str, bits: int = 0o755) -> Iterator[None]:
    with script(s.folder, text, bits) as path, s.process(exe=str(path)):
        yield


HOST: Mapping[str, Case] = {
    "no QEMU": Case(
        lambda s: s.process(exe="/no/such/qemu"),
        SnapshotDiffers,
        r"QEMU: /no/such/qemu: No such file or directory.*\(cannot be forced\)",
    ),
    "a QEMU that may not be run": Case(
        lambda s: run_on(s, "#!/bin/sh\n", 0o600), SnapshotDiffers, "QEMU: .*Permission denied"
    ),
    "a program that is no QEMU": Case(
        lambda s: run_on(s, "#!/bin/sh\necho I am a teapot >&2\nexit 1\n"),
        SnapshotDiffers,
        "QEMU: .* does not start: QEMU says: I am a teapot",
    ),
    "a program that says nothing": Case(
        lambda s: run_on(s, "#!/bin/sh\n"), SnapshotDiffers, "says: nothing, exit status 0"
    ),
    "an older QEMU": Case(
        lambda s: s.told(lambda tree: tree.update(qemu_version="99.1.0")),
        SnapshotDiffers,
        r"QEMU: \d+\.\d+\.\d+, and an older one seldom .*; it was 99.1.0\n--force goes on",
    ),
    "a machine that is not known": Case(
        lambda s: s.machine(type="pc-i440fx-99.9"),
        SnapshotDiffers,
        r"machine: this QEMU has no such type; it was pc-i440fx-99.9 \(cannot be forced\)",
    ),
    "a CPU that is not known": Case(
        lambda s: s.with_words("-cpu", "Abacus"), SnapshotDiffers, "find CPU model 'Abacus'"
    ),
    "a CPU without something": Case(
        lambda s: s.told(lambda tree: tree["machine"]["cpu_features"].append("teleport")),
        SnapshotDiffers,
        r"CPU: the guest would lose teleport; .*\n--force goes on",
    ),
    "another CPU": Case(
        lambda s: s.machine(cpu="Abacus-x86_64-cpu"),
        SnapshotDiffers,
        "CPU: qemu64-x86_64-cpu; it was Abacus-x86_64-cpu",
    ),
    "a CPU that must have everything": Case(
        lambda s: s.with_words("-cpu", "Skylake-Client,enforce"),
        SnapshotDiffers,
        "(?s)does not start: .*features",
    ),
    "an accelerator that is not known": Case(
        lambda s: s.in_words("tcg", "abacus"), SnapshotDiffers, "(?i)accel.*abacus"
    ),
    "a kernel that is gone": Case(
        lambda s: s.with_words("-kernel", "/no/such/kernel"),
        SnapshotDiffers,
        "-kernel, QEMU reads this: /no/such/kernel: No such file",
    ),
    "a CD that is gone": Case(
        lambda s: s.with_words("-drive", "file=/no/such.iso,media=cdrom,if=none"),
        SnapshotDiffers,
        "-drive, QEMU reads this: /no/such.iso: No such file",
    ),
    "a folder for RAM that is gone": Case(
        lambda s: s.with_words("-object", "memory-backend-file,id=r,size=4M,mem-path=/no/such/m"),
        SnapshotDiffers,
        "-object, QEMU keeps RAM in this: /no/such: No such file",
    ),
    "a socket whose folder is gone": Case(
        lambda s: s.with_words("-chardev", "socket,id=c,path=/no/such/socket,server=on,wait=off"),
        SnapshotDiffers,
        "-chardev, QEMU listens at this: /no/such: No such file",
    ),
    "a monitor whose folder is gone": Case(
        lambda s: s.with_words("-qmp", "unix:/no/such/qmp,server,nowait"),
        SnapshotDiffers,
        "-qmp, QEMU listens at this: /no/such: No such file",
    ),
    "a socket that nobody made": Case(
        lambda s: s.with_words("-chardev", "socket,id=tpm,path=/no/such/swtpm"),
        SnapshotDiffers,
        "-chardev, QEMU connects to this: /no/such/swtpm: No such file",
    ),
    "a log whose folder is gone": Case(
        lambda s: s.with_words("-D", "/no/such/log"), SnapshotDiffers, "-D, QEMU writes this"
    ),
    "a pidfile that is a folder": Case(
        lambda s: emptied_folder(s.vm.folder / "pid"), SnapshotDiffers, "-pidfile"
    ),
    "firmware that is gone": Case(
        lambda s: s.with_words("-bios", "/no/such/bios"), SnapshotDiffers, "-bios, QEMU reads"
    ),
}
