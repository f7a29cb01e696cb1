"""The real parts that tests, demo and bench work with: two QEMUs, and guests to run in them.

`make prepare` puts them under .cache (see __main__.py); after that nothing here needs the
network. Only the standard library is used, so that it also runs before there is a .venv.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("QSNAPD_CACHE", ROOT / ".cache"))

SYSTEM_QEMU = "7.2"
"""What Debian 12 has; unpacked under .cache where it is not installed."""
BACKPORTS_QEMU = "10.0"


class PartMissing(Exception):
    """Something that `make prepare` provides is not there."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is missing: run `make prepare` first")


@dataclass(frozen=True)
class Qemu:
    """One QEMU, started by plain path like any other program."""

    version: str
    """Major and minor, e.g. "7.2"."""
    system: Path
    img: Path

    def __str__(self) -> str:
        return self.version


@cache
def qemu_versions() -> tuple[Qemu, ...]:
    """Return the QEMUs to test with, oldest first.

    Raises:
      PartMissing: one of them is not there.
    """
    return tuple(find_qemu(version) for version in (SYSTEM_QEMU, BACKPORTS_QEMU))


def find_qemu(version: str) -> Qemu:
    """Return QEMU *version*, unpacked or installed.

    Raises:
      PartMissing: it is neither.
    """
    for prefix in (qemu_folder(version) / "usr" / "bin", Path("/usr/bin")):
        system = prefix / "qemu-system-x86_64"
        if read_qemu_version(system) == version:
            return Qemu(version, system, _existing(prefix / "qemu-img"))
    raise PartMissing(f"QEMU {version}")


def kernel() -> Path:
    """Return the Linux kernel of the slots guest."""
    return _existing(CACHE / "guests" / "vmlinuz")


def initrd() -> Path:
    """Return the initial RAM disk of the slots guest: busybox, drivers and slots.c."""
    return _existing(CACHE / "guests" / "initrd")


def agent_initrd() -> Path:
    """Return the initial RAM disk of the agent guest: busybox, drivers and qemu-ga."""
    return _existing(CACHE / "guests-agent" / "initrd")


def pages_boot_image() -> Path:
    """Return the raw disk image the pages guest boots from."""
    return _existing(CACHE / "guests" / "pages.img")


def microvm_firmware() -> Path:
    """Return a BIOS for the machine type microvm, for either QEMU.

    That of Debian 12 does not boot from a disk there.
    """
    prefix = find_qemu(BACKPORTS_QEMU).system.parents[1]
    return _existing(prefix / "share" / "seabios" / "bios-microvm.bin")


def libvirt_schema() -> Path:
    """Return libvirt's own schema of a snapshot's XML."""
    return _existing(libvirt_folder() / "usr/share/libvirt/schemas/domainsnapshot.rng")


def libvirt_folder() -> Path:
    """Return where libvirt's library package is unpacked, if it is."""
    return CACHE / "libvirt"


def qemu_folder(version: str) -> Path:
    """Return where QEMU *version* is unpacked, if it is."""
    return CACHE / f"qemu-{version}"


def read_qemu_version(system: Path) -> str | None:
    """Ask the program *system* for its major and minor version; None if it does not run."""
    try:
        answer = subprocess.run([system, "-version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    found = re.match(r"QEMU emulator version (\d+\.\d+)\.", answer.stdout)
    return found[1] if found else None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise PartMissing(str(path))
    return path
