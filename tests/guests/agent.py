"""Build the "agent" guest: Debian's real qemu-ga in a small Linux, beside a mounted ext4.

Its first disk is to hold an ext4 file system; what runs in the guest is said in init.agent.
Built apart from the other guests, from the same kernel and busybox.
"""

import hashlib
import shutil
from pathlib import Path

from tests.guests.build import LINUX, SOURCES, Cpio, load_order
from tests.parts import CACHE
from tests.parts.debian import PrivateApt, multiarch

OUTPUT = CACHE / "guests-agent"
PACKAGES_FOLDER = CACHE / "agent"
"""Where the agent's packages are unpacked."""
PACKAGES = (
    *("qemu-guest-agent", "libc6", "libglib2.0-0", "libpcre2-8-0"),
    *("libudev1", "libnuma1", "liburing2"),
)
LIBRARIES = (
    *("libc.so.6", "libm.so.6", "libglib-2.0.so.0", "libgmodule-2.0.so.0", "libpcre2-8.so.0"),
    *("libudev.so.1", "libnuma.so.1", "liburing.so.2"),
)
LOADER = "ld-linux-x86-64.so.2"
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_console")


def unpack_agent(apt: PrivateApt) -> None:
    """Unpack the agent and its libraries; when killed, nothing is left under the final name."""
    partial = PACKAGES_FOLDER.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    apt.unpack_alone(PACKAGES, partial)
    partial.rename(PACKAGES_FOLDER)


def build_agent_guest() -> bool:
    """Bring .cache/guests-agent up to date; return whether there was anything to do."""
    stamp = OUTPUT / "built-from"
    sources = [Path(__file__), SOURCES / "init.agent", SOURCES / "hook.agent"]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        return False
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    (OUTPUT / "initrd").write_bytes(_initrd())
    stamp.write_text(key)
    return True


def _initrd() -> bytes:
    modules = load_order(DRIVERS)
    archive = Cpio()
    for folder in ("bin", "dev", "proc", "sys", "run", "mnt", "modules", "lib", "lib64"):
        archive.add(folder, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, (SOURCES / "init.agent").read_bytes())
    archive.add("bin/hook", 0o100755, (SOURCES / "hook.agent").read_bytes())
    archive.add("bin/busybox", 0o100755, (LINUX / "bin/busybox").read_bytes())
    archive.add("bin/qemu-ga", 0o100755, (PACKAGES_FOLDER / "usr/sbin/qemu-ga").read_bytes())
    archive.add(f"lib64/{LOADER}", 0o100755, _library(LOADER))
    for name in LIBRARIES:
        archive.add(f"lib/{name}", 0o100755, _library(name))
    for name, path in modules.items():
        archive.add(f"modules/{name}.ko", 0o100644, path.read_bytes())
    archive.add("modules/order", 0o100644, "".join(f"{m}\n" for m in modules).encode())
    return archive.finish()


def _library(name: str) -> bytes:
    for folder in ("lib", "usr/lib"):
        path = PACKAGES_FOLDER / folder / multiarch() / name
        if path.exists():
            return path.read_bytes()
    raise FileNotFoundError(f"{name} is in none of {', '.join(PACKAGES)}")
