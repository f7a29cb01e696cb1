"""Build the guests: assemble pages.S, compile slots.c, pack the initial RAM disk.

What comes out depends on the sources here and on the kernel and busybox packages, which
are unpacked under .cache/linux. Rebuilt whenever a source has changed.
"""

import hashlib
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.parts import CACHE
from tests.parts.debian import run
from tests.parts.tools import command

SOURCES = Path(__file__).parent
OUTPUT = CACHE / "guests"
LINUX = CACHE / "linux"
"""Where the kernel and busybox packages are unpacked."""

DRIVERS = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "virtio_console"),
    *("sd_mod", "ata_piix"),
)
"""Without their dependencies, in the order in which they are to be loaded."""

PAGES_IMAGE_BYTES = 1 << 20
"""The firmware refuses to boot from a disk smaller than one cylinder."""


def build_guests() -> bool:
    """Bring .cache/guests up to date; return whether there was anything to do."""
    stamp = OUTPUT / "built-from"
    names = ("build.py", "pages.S", "slots.c", "init")
    [kernel] = LINUX.glob("boot/vmlinuz-*")
    sources = (kernel.name.encode(), *((SOURCES / name).read_bytes() for name in names))
    key = hashlib.sha256(b"".join(sources)).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        return False
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    _assemble_pages(OUTPUT / "pages.img")
    _compile_slots(OUTPUT / "slots")
    shutil.copy(kernel, OUTPUT / "vmlinuz")
    (OUTPUT / "initrd").write_bytes(_initrd(OUTPUT / "slots"))
    stamp.write_text(key)
    return True


def _assemble_pages(image: Path) -> None:
    part = image.with_suffix(".o")
    run(*command("gcc"), "-m32", "-c", str(SOURCES / "pages.S"), "-o", str(part))
    # 0x7c00 is where a BIOS loads a boot sector
    layout = ("-m", "elf_i386", "-Ttext=0x7c00", "--oformat=binary")
    run(*command("ld"), *layout, str(part), "-o", str(image))
    part.unlink()
    if image.stat().st_size != 512:
        raise ValueError(f"pages.S must be one boot sector, not {image.stat().st_size} bytes")
    with image.open("r+b") as file:
        file.truncate(PAGES_IMAGE_BYTES)


def _compile_slots(program: Path) -> None:
    warnings = ("-Wall", "-Wextra", "-Werror")
    options = ("-std=gnu11", "-O2", "-static", "-pthread", "-s")
    run(*command("gcc"), *options, *warnings, str(SOURCES / "slots.c"), "-o", str(program))


def _initrd(slots: Path) -> bytes:
    modules = load_order(DRIVERS)
    archive = Cpio()
    for folder in ("bin", "dev", "proc", "sys", "modules"):
        archive.add(folder, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, (SOURCES / "init").read_bytes())
    archive.add("bin/busybox", 0o100755, (LINUX / "bin/busybox").read_bytes())
    archive.add("bin/slots", 0o100755, slots.read_bytes())
    for name, path in modules.items():
        archive.add(f"modules/{name}.ko", 0o100644, path.read_bytes())
    archive.add("modules/order", 0o100644, "".join(f"{m}\n" for m in modules).encode())
    return archive.finish()


def load_order(wanted: Iterable[str]) -> dict[str, Path]:
    """Return the kernel modules *wanted* and all they need, each after what it needs."""
    files = {path.stem.replace("-", "_"): path for path in LINUX.glob("lib/modules/**/*.ko")}
    order: dict[str, Path] = {}

    def visit(name: str) -> None:
        if name in order:
            return
        # a module says in its own text what it needs; modules.dep only exists once installed
        depends = re.search(rb"\0depends=([^\0]*)\0", files[name].read_bytes())
        for needed in depends[1].decode().split(",") if depends else ():
            if needed:
                visit(needed.replace("-", "_"))
        order[name] = files[name]

    for name in wanted:
        visit(name)
    return order


class Cpio:
    """A cpio archive in memory, in the "newc" form that the kernel unpacks as its first root.

    Written here rather than by cpio(1), which could make the console's node only as root.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._entries = 0

    def add(
        self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        """Append one file, folder or device; *mode* holds its type as in stat(2)."""
        self._entries += 1
        encoded = name.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._entries, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        self._bytes += b"070701" + b"".join(b"%08X" % field for field in fields)
        for part in (encoded, content):
            self._bytes += part
            self._bytes += bytes(-len(self._bytes) % 4)

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._bytes)
