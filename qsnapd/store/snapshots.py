"""The snapshots of one VM. The invariant: one is there, complete, or it is not.

STATE_DIR/VM/NAME/snapshot.json    its presence is the snapshot's existence
STATE_DIR/VM/NAME/memory.img       unless the memory was put elsewhere
STATE_DIR/VM/.NAME.partial/        the same while it is being taken
STATE_DIR/VM/.journal.json         while a snapshot is being taken
STATE_DIR/VM/.restoring.json       while the VM is being put back to one
STATE_DIR/VM/.thaw-owed.json       while the guest's file systems may be frozen by us
STATE_DIR/VM/.next-start.json      how the VM is started next, if a revert left it shut off
STATE_DIR/VM/.current              the name of the current snapshot
STATE_DIR/VM/.leases.json          who runs on the snapshots' files
STATE_DIR/VM/.made.json            the disk images that qsnapd has made
STATE_DIR/VM/.deleting.json        while a snapshot is being deleted
STATE_DIR/VM/.renaming.json        while a snapshot is getting another name
STATE_DIR/VM/.NAME.removed/        a snapshot that is gone, but for some of its files
STATE_DIR/VM/.forgotten/           what snapshots were of which only the record was deleted
STATE_DIR/VM/.state.json           what the daemon knew of the VM when it last ran
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Lock

from qsnapd.errors import (
    Effect,
    ManifestInvalid,
    SnapshotExists,
    StoreError,
    UnknownSnapshot,
)
from qsnapd.faults import Point, reach_in_thread
from qsnapd.image.files import (
    NotLasting,
    create_lasting_directory,
    make_directory,
    open_new,
    replace_file,
    sync_directory,
)
from qsnapd.model.names import check_name, is_name
from qsnapd.model.snapshot import MANIFEST_FORMAT, Manifest
from qsnapd.store.deletions import DELETION_NAME, DeletionJournal
from qsnapd.store.journal import Journal
from qsnapd.store.leases import Leases
from qsnapd.store.made import Made
from qsnapd.store.manifests import MANIFEST_NAME, read_manifest, replace_manifest, write_manifest
from qsnapd.store.own_files import is_draft, is_of_a_snapshot
from qsnapd.store.shared_files import SharedFiles

_PARTIAL = ".partial"
_REMOVED = ".removed"
_FORGOTTEN = ".forgotten"
_log = logging.getLogger(__name__)

_Version = tuple[int, int, int]
"""What changes when a manifest is replaced: inode, size, time of change in ns."""


class VmStore:
    """What is stored of one VM; from `Store.vm`. Synchronous.

    Whatever only reads may be called from several threads at once, also while a job writes.
    The rest is called by the VM's one job. Every method may raise StoreError.
    """

    def __init__(self, vm: str, directory: Path) -> None:
        self.vm = vm
        self.directory = directory
        self.journal = Journal(directory / ".journal.json")
        """Of the job that takes a snapshot."""
        self.restoring = Journal(directory / ".restoring.json")
        """Of the job that starts the VM from one: it may take one on its way."""
        self.next_start = Journal(directory / ".next-start.json")
        """Of a VM that was left shut off: how it is to be started next."""
        self.deletion = DeletionJournal(directory / DELETION_NAME)
        """Of the job that deletes a snapshot."""
        self.leases = Leases(vm, directory)
        """Who runs on the snapshots' files."""
        self.made = Made(directory)
        """The disk images that qsnapd has made."""
        self._known = dict[str, tuple[_Version, Manifest | StoreError]]()
        self._files = SharedFiles()
        self._refreshing = Lock()

    # --- reading -------------------------------------------------------------------------

    def snapshots(self) -> dict[str, Manifest]:
        """All snapshots that can be read, by name; `problems` has the others."""
        return {n: m for n, m in self._look().items() if isinstance(m, Manifest)}

    def problems(self) -> dict[str, StoreError]:
        """What lies where a snapshot should and cannot be read, by name, and why."""
        return {n: e for n, e in self._look().items() if isinstance(e, StoreError)}

    def manifest(self, name: str) -> Manifest:
        """One snapshot.

        Raises: UnknownSnapshot. ManifestInvalid, ManifestTooNew: it is there, unreadable.
        """
        found = self._look().get(name)
        if found is None:
            raise UnknownSnapshot(f"VM {self.vm!r} has no snapshot {name!r}")
        if isinstance(found, StoreError):
            raise type(found)(str(found)) from found
        return found

    def path(self, name: str) -> Path:
        """The directory of the snapshot *name*, whether it exists or not."""
        return self.directory / check_name(name)

    def current(self) -> str | None:
        """The snapshot the VM's disks go on from, if there is one and it still exists."""
        name = self._read(".current")
        return name if is_name(name) and (self.path(name) / MANIFEST_NAME).exists() else None

    def current_as_written(self) -> str:
        """What `set_current` was given last, whether it exists or not; empty if nothing."""
        return self._read(".current")

    def recall_state(self) -> str | None:
        """What `remember_state` was given last, by whichever daemon."""
        return self._read(".state.json") or None

    # --- taking a snapshot ---------------------------------------------------------------

    def partial_path(self, name: str) -> Path:
        """Where the snapshot *name* is being made, if it is."""
        return self.directory / f".{check_name(name)}{_PARTIAL}"

    def partials(self) -> tuple[str, ...]:
        """Snapshots that were begun: one per running job, else what a crash has left."""
        with self._failing("read"), os.scandir(self.directory) as entries:
            folders = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        ours = (name for name in folders if name.startswith(".") and name.endswith(_PARTIAL))
        names = (name[1 : -len(_PARTIAL)] for name in ours)
        return tuple(sorted(filter(is_name, names)))

    def remove_drafts(self, before_s: float) -> None:
        """Remove drafts of records that are older than that: a disk that failed kept them."""
        with self._failing("tidy up"), os.scandir(self.directory) as entries:
            for entry in entries:
                is_ours = entry.name.startswith(".") and is_draft(entry.name)
                is_file = entry.is_file(follow_symlinks=False)
                if is_ours and is_file and entry.stat().st_ctime < before_s:
                    os.unlink(entry.path)

    def stage(self, name: str) -> Path:
        """Make the directory (0700) in which *name* grows until `commit`.

        Raises: SnapshotExists.
        """
        self._require_free(name)
        staging = self.partial_path(name)
        try:
            with self._failing("create"):
                create_lasting_directory(staging)
        except StoreError as exc:
            if isinstance(exc.__cause__, FileExistsError):
                raise StoreError(
                    f"{staging} is in the way: a snapshot of this name was begun and never ended"
                ) from exc
            raise
        return staging

    def unstage(self, name: str) -> bool:
        """Remove what `stage` made; durable, and no harm if nothing is there.

        Returns whether it is gone: what qsnapd has not put there stays, in its folder.
        """
        staging = self.partial_path(name)
        with self._failing("remove", Effect.PARTIAL):
            is_gone = not staging.exists() or _remove_own(staging)
            sync_directory(self.directory)
        return is_gone

    def commit(self, name: str, manifest: Manifest) -> None:
        """Make what is staged the snapshot *name*: all or nothing.

        Preconditions: every file of the snapshot is complete and synced, and *manifest* says
        where it will be, not where it is: `memory.img` moves from `partial_path` to `path`.
        On success: the snapshot exists, and survives a power failure.
        On failure: it does not exist; what is staged stands, to commit again or to unstage.
        Raises: SnapshotExists; StoreError.
        """
        if (manifest.vm, manifest.name) != (self.vm, name):
            raise ValueError(f"the manifest is not that of {self.vm}/{name}")
        staging, final = self.partial_path(name), self.path(name)
        with self._failing("write"):
            (staging / MANIFEST_NAME).unlink(missing_ok=True)  # of a commit that failed
            write_manifest(staging / MANIFEST_NAME, manifest)
            sync_directory(staging)
            reach_in_thread(Point.COMMIT_MANIFEST_WRITTEN)
            self._require_free(name)
            staging.rename(final)  # the commit point
        self._sync_at_last(name, self.directory)

    def uncommit(self, name: str) -> None:
        """Make the snapshot *name* what it was before `commit`: all or nothing, durable.

        Preconditions: the journal tells of it, and nobody has used it.
        """
        with self._failing("withdraw"):
            self.path(name).rename(self.partial_path(name))
            sync_directory(self.directory)

    # --- changing and removing -----------------------------------------------------------

    def replace(self, manifest: Manifest) -> None:
        """Put *manifest* in place of the snapshot's present one: all or nothing, durable.

        Raises: UnknownSnapshot; StoreError: with effect UNKNOWN, it may not survive a power
          failure.
        """
        path = self.path(manifest.name) / MANIFEST_NAME
        if not path.exists():
            raise UnknownSnapshot(f"VM {self.vm!r} has no snapshot {manifest.name!r}")
        manifest = manifest.model_copy(update={"format": MANIFEST_FORMAT})
        with self._failing("write"):
            replace_manifest(path, manifest)

    def remove(self, name: str) -> Path | None:
        """Make the snapshot *name* not exist, and remove what lay in its folder; idempotent.

        From the first step on it does not exist. What qsnapd has not put there stays, in a
        folder that is returned then.
        """
        final, removed = self.path(name), self.directory / f".{check_name(name)}{_REMOVED}"
        with self._failing("remove", Effect.PARTIAL):
            if final.exists():
                if removed.exists():  # of an earlier snapshot of this name
                    removed.rename(self._unused(f".{name}{_REMOVED}"))
                final.rename(removed)
                sync_directory(self.directory)
            if removed.exists() and not _remove_own(removed):
                return removed
        return None

    def forget(self, name: str, token: str) -> Path:
        """Make the snapshot *name* not exist, and keep all its files; returns where they are."""
        above = self.directory / _FORGOTTEN
        kept = above / f"{check_name(name)}-{token}"
        with self._failing("move"):
            make_directory(above)
            self.path(name).rename(kept)
        self._sync_at_last(name, above, self.directory)
        return kept

    def forgotten(self) -> tuple[Path, ...]:
        """The folders that `forget` has made and nobody has taken in again."""
        with self._failing("read"):
            above = self.directory / _FORGOTTEN
            return tuple(sorted(above.iterdir())) if above.exists() else ()

    def drop_forgotten(self, folder: Path) -> None:
        """Remove what `forget` has kept, if *folder* is that: the snapshot is there again.

        What qsnapd has not put there stays, and what cannot be removed.
        """
        if folder.parent != self.directory / _FORGOTTEN:
            return
        try:
            _remove_own(folder)
        except OSError as exc:
            _log.warning("VM %s: %s is of no use any more: %s", self.vm, folder, exc.strerror)

    def _unused(self, name: str) -> Path:
        numbered = (self.directory / f"{name}.{number}" for number in count(1))
        return next(path for path in numbered if not path.exists())

    def set_current(self, name: str | None) -> None:
        """Make *name* the current snapshot, or none; durable on return."""
        with self._failing("write"):
            replace_file(self.directory / ".current", name or "")

    def remember_state(self, text: str) -> None:
        """Keep *text* for the next daemon. Survives a crash of this one, not of the host."""
        path = self.directory / ".state.json"
        draft = path.with_name(".state.json.new")
        with self._failing("write"):
            draft.unlink(missing_ok=True)
            with open(open_new(draft), "w", encoding="utf-8") as file:
                file.write(text)
            draft.rename(path)

    # --- below ---------------------------------------------------------------------------

    def _look(self) -> dict[str, Manifest | StoreError]:
        """Bring what is known up to date: one stat per snapshot, reading what has changed."""
        with self._refreshing, self._failing("read"):
            known = dict[str, tuple[_Version, Manifest | StoreError]]()
            with os.scandir(self.directory) as entries:
                names = sorted(e.name for e in entries if e.name[0] != "." and e.is_dir())
            for name in names:
                path = self.directory / name / MANIFEST_NAME
                version = _version(path)
                before = self._known.get(name)
                if before and before[0] == version:
                    known[name] = before
                else:
                    known[name] = version, self._read_one(name, path)
            self._known = known
            return {name: what for name, (_, what) in known.items()}

    def _read_one(self, name: str, path: Path) -> Manifest | StoreError:
        try:
            manifest = self._files.shared_by(read_manifest(path))
        except StoreError as exc:
            return exc
        except FileNotFoundError:
            return ManifestInvalid(f"{path} is missing: {path.parent} is not a snapshot")
        except OSError as exc:
            return StoreError(f"cannot read {path}: {exc.strerror}")
        if (manifest.vm, manifest.name) != (self.vm, name):
            return ManifestInvalid(
                f"{path} is that of snapshot {manifest.name!r} of VM {manifest.vm!r}"
            )
        return manifest

    def _require_free(self, name: str) -> None:
        # lexists: rename() would also replace an empty directory
        if os.path.lexists(self.path(name)):
            raise SnapshotExists(f"VM {self.vm!r} already has a snapshot {name!r}")

    def _read(self, file_name: str) -> str:
        try:
            with self._failing("read"):
                return (self.directory / file_name).read_text("utf-8", "replace")
        except StoreError as exc:
            if isinstance(exc.__cause__, FileNotFoundError):
                return ""
            raise

    def _sync_at_last(self, name: str, *directories: Path) -> None:
        """Sync what has just been renamed: it is done, and too late to call it a failure."""
        for directory in directories:
            try:
                sync_directory(directory)
            except OSError as exc:
                _log.warning(
                    "what was done to snapshot %s of VM %s may not survive a power failure: %s",
                    name, self.vm, exc.strerror,
                )  # fmt: skip

    @contextmanager
    def _failing(self, verb: str, effect: Effect = Effect.NONE) -> Iterator[None]:
        try:
            yield
        except NotLasting as exc:
            raise StoreError(
                f"cannot {verb} {exc.filename} for good: {exc.strerror}", effect=Effect.UNKNOWN
            ) from exc
        except OSError as exc:
            where = exc.filename or self.directory
            raise StoreError(f"cannot {verb} {where}: {exc.strerror}", effect=effect) from exc


def _remove_own(folder: Path) -> bool:
    """Remove a snapshot's folder; False if it stays, for what others have put there."""
    for path in folder.iterdir():
        if is_of_a_snapshot(path.name):
            path.unlink()
    try:
        folder.rmdir()
    except OSError:
        return False
    sync_directory(folder.parent)
    return True


def _version(path: Path) -> _Version:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_ctime_ns)
