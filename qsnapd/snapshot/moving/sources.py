"""Where an exported snapshot comes from: a folder, or a tar stream. Neither is trusted.

All of it blocks, in a thread of trio's, and stops when its caller is cancelled.
"""

import errno
import os
import select
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import trio
from pydantic import ValidationError

from qsnapd.errors import ImageInvalid, ManifestInvalid, StoreError, TargetRefused
from qsnapd.image.sparse import Content, SparseWriter, Tick, copy_sparse
from qsnapd.image.tar_reader import Member, TarReader
from qsnapd.model.parsing import load_object, require_format
from qsnapd.model.snapshot import MANIFEST_FORMAT
from qsnapd.model.transfer import EXPORT_FORMAT, EXPORT_NAME, Export, ExportedFile

STALL_LIMIT_S = 3600.0
"""How long whoever writes the stream may do nothing."""
_LOOK_EVERY_MS = 200
_TEXT_LIMIT_BYTES = 16 << 20
_DRAIN_LIMIT_BYTES = 1 << 20
"""Archives are padded; who writes one into a pipe wants to get rid of all of it."""

Create = Callable[[str], int]
"""Makes the new file that is to hold a file of the export; the descriptor is its to close."""


class Source(Protocol):
    """One export. First its description is read, then its files."""

    def read_export(self) -> Export:
        """Raises: ManifestInvalid, ManifestTooNew, ImageInvalid, StoreError."""

    def copy(self, files: Mapping[str, ExportedFile], create: Create, tick: Tick) -> None:
        """Copy *files* and nothing else; each holds what was announced.

        Raises: ImageInvalid: one is missing, or not what the description says. StoreError.
        """


class Folder:
    """An export in a folder, which its owner may change at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read_export(self) -> Export:
        path = self._path / EXPORT_NAME
        try:
            with open(_open(path), "rb") as file:
                return parse_export(file.read(_TEXT_LIMIT_BYTES), str(path))
        except ImageInvalid as exc:
            raise ManifestInvalid(str(exc)) from exc
        except OSError as exc:
            raise ManifestInvalid(f"{path} cannot be read: {exc.strerror}") from exc

    def copy(self, files: Mapping[str, ExportedFile], create: Create, tick: Tick) -> None:
        for name, file in files.items():
            path = self._path / name
            fd = _open(path)
            try:
                _require_size(name, os.fstat(fd).st_size, file)
                _require_same(name, copy_sparse(fd, create(name), file.size_bytes, tick), file)
            except OSError as exc:
                raise StoreError(f"cannot copy {path}: {exc.strerror}") from exc
            finally:
                os.close(fd)


def _open(path: Path) -> int:
    """Open a plain file, and nothing that one could wait for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageInvalid(f"{path} cannot be opened: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageInvalid(f"{path} is not a plain file")
    return fd


class Stream:
    """An export in a tar stream that a client's descriptor leads to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._may_wait = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._reader = TarReader(self._read)
        self._members = self._reader.members()

    def read_export(self) -> Export:
        member = self._next()
        if member is None or _plain(member.name) != EXPORT_NAME:
            name = "nothing" if member is None else repr(member.name)
            raise ImageInvalid(f"the tar stream begins with {name}, not with {EXPORT_NAME}")
        if member.size_bytes > _TEXT_LIMIT_BYTES:
            raise ManifestInvalid(f"{EXPORT_NAME} is too long")
        text = bytearray(member.size_bytes)
        for offset, piece in self._reader.data(member):
            text[offset : offset + len(piece)] = piece
        return parse_export(bytes(text), f"{EXPORT_NAME} in the tar stream")

    def copy(self, files: Mapping[str, ExportedFile], create: Create, tick: Tick) -> None:
        missing = dict(files)
        while (member := self._next()) is not None:
            name = _plain(member.name)
            if (file := missing.pop(name, None)) is None:
                raise ImageInvalid(
                    f"the tar stream holds {member.name!r}, which {EXPORT_NAME} does not name"
                )
            _require_size(name, member.size_bytes, file)
            writer = SparseWriter(create(name), tick)
            try:
                for offset, piece in self._reader.data(member):
                    writer.write(offset, piece)
                _require_same(name, writer.finish(file.size_bytes), file)
            except OSError as exc:
                raise StoreError(f"cannot write {name}: {exc.strerror}") from exc
        if missing:
            raise ImageInvalid(f"the tar stream lacks {', '.join(missing)}")
        self._read(_DRAIN_LIMIT_BYTES)

    def _next(self) -> Member | None:
        return next(self._members, None)

    def _read(self, count: int) -> bytes:
        return b"".join(self._pieces(count))

    def _pieces(self, count: int) -> Iterator[bytes]:
        """Up to *count* bytes, fewer at the end of the stream.

        The descriptor is the client's: it is waited for in small steps, and its flags, which
        the client's own processes share, are left alone.
        """
        waited_ms = 0
        while count:
            trio.from_thread.check_cancelled()
            if not self._poll.poll(_LOOK_EVERY_MS):
                waited_ms += _LOOK_EVERY_MS
                if waited_ms > STALL_LIMIT_S * 1000:
                    raise StoreError(f"nothing has come for {STALL_LIMIT_S:g} s")
                continue
            try:
                piece = self._read_now(count)
            except BlockingIOError:  # somebody else has read it meanwhile
                continue
            except OSError as exc:
                raise StoreError(f"cannot read the tar stream: {exc.strerror}") from exc
            waited_ms = 0
            if not piece:
                return
            count -= len(piece)
            yield piece


    def _read_now(self, count: int) -> bytes:
        """Read without waiting, where the kernel can do that. Raises: BlockingIOError, OSError."""
        if self._may_wait:
            buffer = bytearray(count)
            try:
                done = os.preadv(self._descriptor, [buffer], -1, os.RWF_NOWAIT)
                return bytes(memoryview(buffer)[:done])
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self._may_wait = False
        return os.read(self._descriptor, count)


def require_readable(descriptor: int) -> None:
    """Refuse a descriptor that no stream comes from. Raises: TargetRefused."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise TargetRefused("the descriptor that was sent along is a directory's")
    if os.isatty(descriptor):
        raise TargetRefused("a tar stream is not read from a terminal: name a file, or use a pipe")


def parse_export(text: bytes, where: str) -> Export:
    """Understand `export.json`. Raises: ManifestTooNew; ManifestInvalid: and which field."""
    parsed = load_object(text, where)
    require_format(parsed, "export", EXPORT_FORMAT, where)
    snapshot = parsed.get("snapshot")
    known = snapshot if isinstance(snapshot, dict) else {}
    require_format(known, "format", MANIFEST_FORMAT, where)
    try:
        return Export.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ManifestInvalid(f"{where} cannot be used: field {field!r}: {first['msg']}") from exc


def _plain(name: str) -> str:
    """The name as `tar -C FOLDER .` writes it, too."""
    return name.removeprefix("./")


def _require_size(name: str, size_bytes: int, file: ExportedFile) -> None:
    if size_bytes != file.size_bytes:
        raise ImageInvalid(
            f"{name} has {size_bytes} bytes, {EXPORT_NAME} announces {file.size_bytes}"
        )


def _require_same(name: str, content: Content, file: ExportedFile) -> None:
    if content.sha256 != file.sha256:
        raise ImageInvalid(
            f"{name} is not what was exported: its SHA-256 is {content.sha256}, "
            f"{EXPORT_NAME} announces {file.sha256}"
        )
