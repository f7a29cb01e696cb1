"""The programs that building and testing call: installed ones, else unpacked under .cache.

With root (or a sudo that asks for no password) what is missing is installed by apt-get.
Without, it is unpacked into .cache/tools, which serves as well.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.parts import CACHE, SYSTEM_QEMU, PartMissing, find_qemu
from tests.parts.debian import PrivateApt, multiarch, run

TOOLS = CACHE / "tools"

PROGRAMS = {
    "gcc": ("gcc", "cpp-12", "gcc-12", "libgcc-12-dev", "libc6-dev", "linux-libc-dev"),
    "ld": ("binutils", "binutils-x86-64-linux-gnu"),
    "systemd-analyze": ("systemd",),
    "mke2fs": ("e2fsprogs",),
    "e2fsck": ("e2fsprogs",),
}
"""What we call, and the packages that bring it; those also name what an unpacked program
looks for beside itself."""
ROOTS_PROGRAMS = {
    "mkfs.xfs": ("xfsprogs",),
    "mkfs.btrfs": ("btrfs-progs",),
}
"""The same for tests that only root can run: they mount file systems of their own."""


def command(name: str) -> list[str]:
    """Return how a command line that calls the program *name* begins.

    Raises:
      PartMissing: it is neither installed nor unpacked.
    """
    if name not in missing_programs():
        return [_find(name) or name]
    places = (TOOLS / folder / name for folder in ("usr/bin", "usr/sbin", "sbin"))
    program = next((place for place in places if place.exists()), None)
    if program is None:
        raise PartMissing(name)
    libraries = TOOLS / "usr/lib" / multiarch()
    folders = (libraries, libraries / "systemd", TOOLS / "lib" / multiarch())
    options = [f"--sysroot={TOOLS}", f"-B{TOOLS}/usr/bin"] if name == "gcc" else []
    search = f"LD_LIBRARY_PATH={':'.join(map(str, folders))}"
    return ["env", search, str(program), *options]


def missing_programs() -> list[str]:
    missing = [name for name in _programs() if _find(name) is None]
    if "gcc" not in missing and not Path("/usr/include/stdio.h").exists():
        missing.append("gcc")  # a compiler without libc6-dev is none
    return missing


def _programs() -> dict[str, tuple[str, ...]]:
    return PROGRAMS if os.geteuid() else PROGRAMS | ROOTS_PROGRAMS


def _find(name: str) -> str | None:
    # a user's PATH may lack the folders of the administrator's programs
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def missing_packages() -> list[str]:
    """Return the Debian packages that `make prepare` needs and this machine lacks."""
    packages = [package for name in missing_programs() for package in _programs()[name]]
    if importlib.util.find_spec("ensurepip") is None:
        packages.append("python3-venv")
    try:
        find_qemu(SYSTEM_QEMU)
    except PartMissing:
        packages += ["qemu-system-x86", "qemu-utils"]
    return packages


def install_packages() -> None:
    """Install what is missing, if this user may install packages; else do nothing."""
    packages = missing_packages()
    if not packages:
        return
    if os.geteuid() and not _sudo_works():
        return
    print(f"installing {' '.join(packages)} ...", flush=True)
    become_root = ["sudo", "-n"] if os.geteuid() else []
    apt_get = [*become_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    run(*apt_get, "update")
    run(*apt_get, "install", "--yes", "--no-install-recommends", *packages)


def _sudo_works() -> bool:
    if shutil.which("sudo") is None:
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0


def unpack_tools(apt: PrivateApt) -> None:
    """Unpack the programs that are missing."""
    partial = TOOLS.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    packages = [package for name in missing_programs() for package in _programs()[name]]
    apt.unpack_with_dependencies(packages, partial)
    shutil.rmtree(TOOLS, ignore_errors=True)
    partial.rename(TOOLS)


def make_venv(folder: Path) -> None:
    """Create a virtual environment with pip in it, also where Debian's python3-venv lacks."""
    if importlib.util.find_spec("ensurepip") is not None:
        run(sys.executable, "-m", "venv", str(folder))
        return
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    unpacked = CACHE / "pip"
    apt = PrivateApt(CACHE / "apt")
    apt.unpack_alone(["python3-pip-whl"], unpacked)
    apt.close()
    [wheel] = unpacked.glob("usr/share/python-wheels/pip-*.whl")
    # a wheel is a zip file that Python can run from
    run(str(folder / "bin/python"), str(wheel / "pip"), "install", "--quiet", "pip")
    shutil.rmtree(unpacked)
