"""What `qemu-img` says of a frozen image and those below it: are they what was recorded?

Run as the VM's user, never as root: an image belongs to whom it belongs, and may name any
file below itself.
"""

import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import trio
from pydantic import Field, TypeAdapter, ValidationError

from qsnapd.errors import ImageInvalid, StoreError
from qsnapd.model.snapshot import DiskLayer, Process
from qsnapd.qmp.commands import QapiStruct
from qsnapd.vm.identity import key_of, plain_name

INFO_LIMIT_S = 60.0
CHECK_LIMIT_S = 3600.0
_LEAKED = 3
"""qemu-img check: nothing is wrong but that some space is lost."""
_CANNOT_CHECK = 63
"""qemu-img check: the format has nothing to check."""


class ImageLink(QapiStruct):
    """ImageInfo of `qemu-img info --backing-chain`: one of a list, newest first."""

    filename: str
    format: str
    virtual_size_bytes: int = Field(alias="virtual-size")
    format_specific: dict[str, Any] | None = None

    @property
    def corrupt(self) -> bool:
        """Marked so by QEMU, when it met something impossible."""
        data = (self.format_specific or {}).get("data", {})
        return isinstance(data, dict) and data.get("corrupt") is True


_links: TypeAdapter[list[ImageLink]] = TypeAdapter(list[ImageLink])


async def read_chain(disk: DiskLayer, process: Process, *, qemu_img: str) -> list[ImageLink]:
    """Read the headers of a disk's frozen image and of all below it, newest first.

    Works while QEMU has them open. Raises: ImageInvalid: qemu-img cannot. StoreError.
    """
    words = [*("info", "-U", "--backing-chain", "--output=json"), *_image(disk)]
    code, output, complaint = await _run(qemu_img, words, process, INFO_LIMIT_S)
    if code != 0:
        raise ImageInvalid(f"disk {disk.target}: {complaint}")
    try:
        return _links.validate_json(output)
    except ValidationError as exc:
        raise StoreError(f"qemu-img info says of {disk.frozen} what is not understood") from exc


def wrong_with_chain(disk: DiskLayer, found: Sequence[ImageLink]) -> list[str]:
    """What is not as recorded, one sentence each. Looks at file identities."""
    wrong = []
    size_bytes = found[0].virtual_size_bytes
    if size_bytes != disk.virtual_size_bytes:
        wrong.append(
            f"disk {disk.target}: {disk.frozen} is a disk of {size_bytes} bytes now, it was one "
            f"of {disk.virtual_size_bytes}"
        )
    if found[0].format != disk.frozen_format:
        wrong.append(
            f"disk {disk.target}: {disk.frozen} is {found[0].format} now, it was "
            f"{disk.frozen_format}"
        )
    wrong += (
        f"disk {disk.target}: QEMU has marked {link.filename} as corrupt"
        for link in found
        if link.corrupt
    )
    for depth, (link, file) in enumerate(zip(found, disk.chain, strict=False)):
        if key_of(plain_name(link.filename)) != key_of(file.path):
            above = disk.chain[depth - 1].path
            wrong.append(
                f"disk {disk.target}: {above} is an overlay over {link.filename} now, it was one "
                f"over {file.path}"
            )
            return wrong
    if len(found) < len(disk.chain):
        above, missing = disk.chain[len(found) - 1].path, disk.chain[len(found)].path
        wrong.append(f"disk {disk.target}: {above} is no longer an overlay over {missing}")
    elif len(found) > len(disk.chain):
        below = found[len(disk.chain)].filename
        wrong.append(
            f"disk {disk.target}: {disk.chain[-1].path} is an overlay over {below} now, it was none"
        )
    return wrong


async def check_image(disk: DiskLayer, process: Process, *, qemu_img: str) -> str | None:
    """Let qemu-img check the frozen image's own tables; what is wrong with it, or None.

    Space that is merely lost is nothing wrong. Raises: StoreError: qemu-img cannot be run.
    """
    words = [*("check", "-U", "--output=json"), *_image(disk)]
    code, output, complaint = await _run(qemu_img, words, process, CHECK_LIMIT_S)
    if code in (0, _LEAKED, _CANNOT_CHECK):
        return None
    try:
        counts = json.loads(output)
        found = f"{counts['corruptions']} corruptions"
    except (ValueError, KeyError, TypeError):
        found = complaint or f"qemu-img check ended with status {code}"
    return f"disk {disk.target}: {disk.frozen} is damaged: {found}"


async def blank_like(path: str, descriptor: int, process: Process, *, qemu_img: str) -> None:
    """Make of an empty file a blank qcow2 disk of the size of the one at *path*.

    Raises: ImageInvalid, StoreError: qemu-img cannot.
    """
    code, output, complaint = await _run(
        qemu_img, ("info", "-U", "--output=json", "--", path), process, INFO_LIMIT_S
    )
    if code != 0:
        raise ImageInvalid(complaint)
    size_bytes = ImageLink.model_validate_json(output).virtual_size_bytes
    target = f"/proc/{os.getpid()}/fd/{descriptor}"
    words = ("create", "-q", "-f", "qcow2", "--", target, str(size_bytes))
    code, _, complaint = await _run(qemu_img, words, None, INFO_LIMIT_S)
    if code != 0:
        raise StoreError(f"qemu-img could not make a blank disk: {complaint}")


def _image(disk: DiskLayer) -> list[str]:
    return ["-f", disk.frozen_format, "--", disk.frozen]


async def _run(
    qemu_img: str, words: Sequence[str], process: Process | None, limit_s: float
) -> tuple[int, bytes, str]:
    """Run qemu-img, as *process*'s user if given; its status, output and complaint."""
    ids: dict[str, Any] = {}
    if process is not None and os.geteuid() == 0:
        ids = {"user": process.uid, "group": process.gid, "extra_groups": process.groups}
    try:
        with trio.fail_after(limit_s):
            ended = await trio.run_process(
                [qemu_img, *words],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                **ids,
            )
    except trio.TooSlowError:
        raise StoreError(f"qemu-img did not end within {limit_s:g} s") from None
    except OSError as exc:
        raise StoreError(
            f"cannot run {exc.filename or qemu_img}"
            + (f" as user {process.uid}" if process else "")
            + f": {exc.strerror} (qemu-img comes with qemu-utils; the config may name another)"
        ) from exc
    complaint = ended.stderr.decode(errors="replace").strip().removeprefix("qemu-img: ")
    return ended.returncode, ended.stdout, complaint
