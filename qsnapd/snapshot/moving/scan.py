"""Looking through a folder for snapshots: manifests of a store, kept copies, exports.

The folder may be anybody's. It is gone down step by step, by descriptors and without following
a link; what is found is only text until `adopt` has held it against the files.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from qsnapd.errors import ManifestInvalid, ManifestTooNew, TargetRefused
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import EXPORT_NAME, MEMORY_NAME, Export
from qsnapd.snapshot.moving.sources import parse_export
from qsnapd.store.manifests import MANIFEST_NAME
from qsnapd.store.tree import in_order

DEPTH_LIMIT = 4
"""Below the folder: STATE_DIR/VM/.forgotten/NAME is three down."""
ENTRIES_LIMIT = 100_000
FOUND_LIMIT = 10_000
FORGOTTEN_NAME = ".forgotten"
"""In a VM's part of a store: the folders of snapshots of which the metadata was deleted."""
_TEXT_LIMIT_BYTES = 16 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Found:
    """A description of a snapshot."""

    root: Path
    parts: tuple[str, ...]
    """Folders below that one."""
    file_name: str
    what: Manifest | Export | str
    """Or why it is not understood."""

    @property
    def path(self) -> Path:
        return self.folder / self.file_name

    @property
    def folder(self) -> Path:
        return self.root.joinpath(*self.parts)

    @property
    def manifest(self) -> Manifest | None:
        if isinstance(self.what, Export):
            return self.what.snapshot
        return self.what if isinstance(self.what, Manifest) else None


def look_through(root: Path) -> tuple[Found, ...]:
    """Find all descriptions below *root*, parents before children. Blocks.

    What a deletion of metadata has kept comes last: if its images hold something else by now,
    whoever they belong to has been taken in before.
    Raises: TargetRefused: it is no folder that can be read, or too much lies there.
    """
    try:
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise TargetRefused(f"cannot look into {root}: {exc.strerror}") from exc
    try:
        found = list(_walk(root, top))
    finally:
        os.close(top)
    return _ordered(found)


def open_memory(found: Found) -> int | None:
    """Open the memory image that lies beside a manifest, for the caller to close. Blocks."""
    manifest = found.manifest
    if manifest is None or manifest.memory is None or found.file_name != MANIFEST_NAME:
        return None
    try:
        with ExitStack() as folders:
            folder = _descend(found, folders)
            descriptor = os.open(MEMORY_NAME, _FILE, dir_fd=folder)
    except OSError:
        return None  # it is where the manifest says, then
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def current_in(folder: Path) -> str | None:
    """Which snapshot was current in what was a VM's part of a store. Blocks."""
    with suppress(OSError, UnicodeDecodeError):
        descriptor = os.open(folder / ".current", _FILE)
        with open(descriptor, encoding="utf-8") as file:
            return file.read(1024) or None
    return None


def _descend(found: Found, folders: ExitStack) -> int:
    folder = os.open(found.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    folders.callback(os.close, folder)
    for part in found.parts:
        folder = os.open(part, _FOLDER, dir_fd=folder)
        folders.callback(os.close, folder)
    return folder


def _walk(root: Path, top: int) -> Iterator[Found]:
    pending: list[tuple[str, ...]] = [()]
    entries = 0
    while pending:
        parts = pending.pop()
        with ExitStack() as folders:
            try:
                folder = top
                for part in parts:
                    folder = os.open(part, _FOLDER, dir_fd=folder)
                    folders.callback(os.close, folder)
                names = sorted(os.listdir(folder))
            except OSError:
                continue  # gone, or not for us: there is no snapshot to be had from it
            entries += len(names)
            if entries > ENTRIES_LIMIT:
                raise TargetRefused(
                    f"{root} holds more than {ENTRIES_LIMIT} files: name a folder further down"
                )
            for name in names:
                if name.endswith(".json") and not name.startswith("."):
                    if (what := _read(folder, name, root.joinpath(*parts, name))) is not None:
                        yield Found(root, parts, name, what)
                elif len(parts) < DEPTH_LIMIT and _is_gone_into(folder, name):
                    pending.append((*parts, name))


def _is_gone_into(folder: int, name: str) -> bool:
    if name.startswith(".") and name != FORGOTTEN_NAME:
        return False
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode)


def _read(folder: int, name: str, path: Path) -> Manifest | Export | str | None:
    """What a file describes; None if it is something else altogether."""
    try:
        descriptor = os.open(name, _FILE, dir_fd=folder)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            text = file.read(_TEXT_LIMIT_BYTES)
    except OSError as exc:
        return f"it cannot be read: {exc.strerror}" if name == MANIFEST_NAME else None
    try:
        if name == EXPORT_NAME:
            return parse_export(text, str(path))
        return parse_manifest(text, str(path))
    except (ManifestInvalid, ManifestTooNew) as exc:
        return str(exc) if name in (MANIFEST_NAME, EXPORT_NAME) else None


def _ordered(found: list[Found]) -> tuple[Found, ...]:
    """Parents before children; of several of one name the newest first."""
    newest = sorted(found, key=_age, reverse=True)
    manifests = {f.manifest.name: f.manifest for f in reversed(newest) if f.manifest is not None}
    places = {name: place for place, (name, _) in enumerate(in_order(manifests))}
    if len(found) > FOUND_LIMIT:
        raise TargetRefused(f"there are more than {FOUND_LIMIT} snapshots: name a folder of fewer")
    last = len(places)

    def place(each: Found) -> tuple[bool, int]:
        kept = FORGOTTEN_NAME in each.path.parts
        return kept, places[each.manifest.name] if each.manifest is not None else last

    return tuple(sorted(newest, key=place))


def _age(found: Found) -> float:
    return found.manifest.created_at.timestamp() if found.manifest is not None else 0.0
