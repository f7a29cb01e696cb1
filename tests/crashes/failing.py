"""One sync of a job fails, as Linux lets it: once, and the next one says that all is well."""

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from unittest import mock

from qsnapd.errors import Effect, QsnapError
from qsnapd.image import files
from qsnapd.store.renaming import finish_renaming
from tests.crashes.judge import mended
from tests.crashes.scene import Scene
from tests.crashes.work import Work
from tests.real.cases import VM

PASSING = (".state.json", ".made.json", ".current", ".leases.json", ".disks")
"""Records of no consequence, and a folder that stays."""
UNTOUCHED = (Effect.NONE, Effect.ROLLED_BACK)


@dataclass
class FailingSync:
    """Fails the sync of this number, counted from 1."""

    number: int
    count: int = 0
    failed: str | None = None
    """What could not be synced."""
    believed: bool = False
    """That file was synced once more, and nobody failed."""
    _inode: int | None = None
    _held: int | None = None
    """Keeps the inode from being another file's."""

    def close(self) -> None:
        if self._held is not None:
            os.close(self._held)

    def __call__(self, fd: int | IO[bytes]) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        self.count += 1
        status = os.fstat(number)
        if self.count == self.number:
            self.failed = os.readlink(f"/proc/self/fd/{number}")
            if stat.S_ISREG(status.st_mode):
                self._inode, self._held = status.st_ino, os.dup(number)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.believed |= status.st_ino == self._inode


class Warnings(logging.Handler):
    """Hears what qsnapd complains of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def listening() -> Iterator[list[str]]:
    handler, logger = Warnings(), logging.getLogger("qsnapd")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield handler.said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@dataclass
class Swept:
    """What came of one job, with each of its syncs failing in turn."""

    undone: list[str] = field(default_factory=list)
    """What could not be synced, and then all was as before."""
    done: list[str] = field(default_factory=list)
    """The same, and it was done all the same, with a warning; or later."""
    complaints: list[str] = field(default_factory=list)


async def fail_next(scene: Scene, work: Work, number: int, swept: Swept) -> bool | None:
    """Do *work* with one sync failing; return whether all is as before, None: none has failed."""
    before, there, records = scene.outcome(), _there(scene), scene.store.snapshots()
    supervisor, error = scene.rig.supervisors[VM], None
    files._failed.clear()  # as after a restart
    with (
        listening() as said,
        closing(FailingSync(number)) as sync,
        mock.patch.multiple(os, fsync=sync, fdatasync=sync),
    ):
        try:
            await work.act(scene)
        except QsnapError as exc:
            error = exc
        in_the_way = await mended(supervisor)
        is_believed = sync.believed
        if in_the_way is not None:
            files._failed.clear()
            finish_renaming(scene.store)
            await supervisor.mender.mend_before_job()
            in_the_way = await mended(supervisor)
    if sync.failed is None:
        swept.complaints += [f"without a failure: {error}"] if error else []
        return None
    now = scene.outcome()
    is_same = now == before and scene.store.snapshots() == records
    found = [in_the_way] if in_the_way else []
    if is_believed:
        found.append("it was synced once more, and that was believed")
    if error is None and now not in (before, *work.ends(before)):
        found.append(f"it is said to be done, and there is {now}")
    if error is None and not is_same and not said:
        found.append("it is done, and nobody has complained")
    if error is not None:
        found += _not_true(error.effect, is_same=is_same, left=_there(scene) - there)
    swept.complaints += [f"{Path(sync.failed).name} ({number}): {error}: {c}" for c in found]
    (swept.undone if is_same else swept.done).append(Path(sync.failed).name)
    return is_same


def _not_true(effect: Effect, *, is_same: bool, left: set[Path]) -> Iterator[str]:
    """What an error says of what it has left, and is not so."""
    if is_same and left:
        yield f"{', '.join(sorted(map(str, left)))} is left"
    if is_same and effect is Effect.PARTIAL:
        yield f"all is as before, but the effect is {effect}"
    if not is_same and effect in UNTOUCHED:
        yield f"it is not as before, but the effect is {effect}"


def _there(scene: Scene) -> set[Path]:
    """All that lies about, but for what comes and goes."""
    roots = (scene.folder, scene.vm.folder)
    found = {path for root in roots for path in root.rglob("*")}
    return {path for path in found if path.suffix != ".new" and path.name not in PASSING}
