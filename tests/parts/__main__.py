"""Fetch and build what is missing; done in a moment when nothing is.

python -m tests.parts              all parts: QEMUs, kernel, guests, tools
python -m tests.parts venv FOLDER  a virtual environment, for what cannot run before it
"""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.guests.agent import PACKAGES_FOLDER, build_agent_guest, unpack_agent
from tests.guests.build import LINUX, build_guests
from tests.parts import (
    BACKPORTS_QEMU,
    CACHE,
    SYSTEM_QEMU,
    PartMissing,
    find_qemu,
    libvirt_folder,
)
from tests.parts.debian import CannotFetch, PrivateApt
from tests.parts.qemu import unpack_qemu
from tests.parts.tools import command, install_packages, make_venv, missing_programs, unpack_tools


def main(arguments: list[str]) -> int:
    CACHE.mkdir(exist_ok=True)
    try:
        match arguments:
            case []:
                prepare()
            case ["venv", folder]:
                install_packages()
                make_venv(Path(folder))
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except (CannotFetch, PartMissing) as problem:
        print(f"make prepare: {problem}", file=sys.stderr)
        return 1
    return 0


def prepare() -> None:
    """Make sure that all parts are there.

    On failure or when killed: what was complete stays, the rest is begun anew next time.
    """
    install_packages()
    if missing := missing_downloads():
        apt = PrivateApt(CACHE / "apt")
        for what, fetch in missing.items():
            print(f"fetching {what} ...", flush=True)
            fetch(apt)
        apt.close()
    if build_guests() | build_agent_guest():
        print("built the guests", flush=True)


def missing_downloads() -> dict[str, Callable[[PrivateApt], None]]:
    """Return what has to be fetched, and how."""
    missing: dict[str, Callable[[PrivateApt], None]] = {}
    for version, backports in ((SYSTEM_QEMU, False), (BACKPORTS_QEMU, True)):
        if not _present(find_qemu, version):
            missing[f"QEMU {version}"] = partial(unpack_qemu, version=version, backports=backports)
    if not LINUX.exists():
        missing["a kernel and busybox for the guest"] = unpack_linux
    if not PACKAGES_FOLDER.exists():
        missing["the guest agent"] = unpack_agent
    if not libvirt_folder().exists():
        missing["libvirt's schemas"] = unpack_libvirt
    if not all(_present(command, name) for name in missing_programs()):
        missing["compiler and tools"] = unpack_tools
    return missing


def unpack_linux(apt: PrivateApt) -> None:
    """Unpack what build_guests takes from Debian."""
    unfinished = LINUX.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    # the cloud kernel is the smallest, and has all that a guest of QEMU needs
    apt.unpack_alone([*apt.dependencies("linux-image-cloud-amd64"), "busybox-static"], unfinished)
    unfinished.rename(LINUX)


def unpack_libvirt(apt: PrivateApt) -> None:
    """Unpack the package of Debian's that has the schemas; nothing in it is ever run."""
    unfinished = libvirt_folder().with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    apt.unpack_alone(["libvirt0"], unfinished)
    unfinished.rename(libvirt_folder())


def _present(find: Callable[[str], object], name: str) -> bool:
    try:
        find(name)
    except PartMissing:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
