"""RAM in files that outlive their QEMU: the next one must find nothing of the last one's there.

QEMU takes RAM to be zeros when it loads a mapped-ram image, and passes over pages of zeros.
In a shared file these would go on holding what they held in the state that was left. (A stream
names its zero pages, and a guest's writes to RAM that is not shared never reach the file.)
"""

import os
import stat
from collections.abc import Sequence

from qsnapd.errors import Blocked
from qsnapd.image.files import write_all
from qsnapd.image.punch import punch_hole
from qsnapd.vm.argv import Fields, Option

_ZEROS = bytes(1 << 20)


def kept_ram_files(options: Sequence[Option], cwd: str) -> list[str]:
    """Return the files that RAM of a command line is shared in; pure.

    Raises: Blocked: only a part of a file is RAM, and nobody knows whose the rest is.
    """
    found = []
    for option in options:
        if option.name != "object":
            continue
        try:
            fields = Fields.parse(option.value or "", first_key="qom-type")
        except ValueError:  # JSON in QEMU's dialect
            continue
        path = fields.get("mem-path")
        if path and fields.is_on("share") and not fields.is_on("readonly"):
            if "offset" in fields:
                raise Blocked(
                    f"{option}: the RAM is a part of its file (offset=), and cannot be emptied "
                    "for the snapshot's; take snapshots as --image-format stream"
                )
            found.append(os.path.normpath(os.path.join(cwd, path)))
    return found


def require_emptiable(path: str, uid: int) -> None:
    """Return if `empty_file` may do its work; touches nothing. Blocks. Raises: Blocked."""
    descriptor = _open_plain(path, uid)
    if descriptor is not None:
        os.close(descriptor)


def empty_file(path: str, uid: int) -> None:
    """Make all of a file zeros and leave it its size. Blocks.

    Preconditions: it held the RAM of a QEMU that has ended, and ran as *uid*. Only a file of
    that user's is touched: the path is that user's word, and we may be root.
    A file that does not exist is QEMU's to make; in a folder it makes a new one each time.
    Raises: Blocked: it cannot be done; loading into it would mix two states.
    """
    descriptor = _open_plain(path, uid)
    if descriptor is None:
        return
    try:
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes and not punch_hole(descriptor, 0, size_bytes):
            for offset in range(0, size_bytes, len(_ZEROS)):
                write_all(descriptor, _ZEROS[: size_bytes - offset], offset)
    except OSError as exc:
        raise Blocked(_words(path, exc.strerror)) from exc
    finally:
        os.close(descriptor)


def _open_plain(path: str, uid: int) -> int | None:
    """Open a plain file of *uid*'s for writing; None if it is a folder or not there.

    What it is, is looked at before it is opened: to open a device may do something.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise Blocked(_words(path, exc.strerror)) from exc
    try:
        status = os.fstat(place)
        if stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise Blocked(_words(path, "it is no plain file"))
        if uid not in (0, status.st_uid):
            raise Blocked(_words(path, f"it is not of user {uid}, who QEMU runs as"))
        return os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise Blocked(_words(path, exc.strerror)) from exc
    finally:
        os.close(place)


def _words(path: str, why: str | None) -> str:
    return f"{path} holds the VM's RAM and cannot be emptied for the snapshot's: {why}"
