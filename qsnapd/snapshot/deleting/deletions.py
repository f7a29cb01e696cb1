"""What a request to delete means: one snapshot or several, one after the other."""

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress

from qsnapd.errors import Effect, JobCancelled, QsnapError, StoreError
from qsnapd.model.request import DeleteRequest, Descendants
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.deleting.checks import refuse_cloned, require_nothing_unfinished
from qsnapd.snapshot.deleting.delete import Deletion, Others
from qsnapd.snapshot.deleting.finish import adopt_children, give_back_children
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.start import Seat
from qsnapd.store.snapshots import VmStore
from qsnapd.store.tree import descendants
from qsnapd.threads import in_thread


class Deletions:
    """Fulfils one request."""

    def __init__(
        self,
        seat: Seat,
        job: Job,
        others: Others,
        *,
        qemu_img: str,
        tell: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._seat = seat
        self._job = job
        self._others = others
        self._qemu_img = qemu_img
        self._tell = tell
        """Hears the name of each snapshot once it is gone."""
        self.deleted: list[str] = []
        """Those that are gone, in this order."""

    async def run(self, request: DeleteRequest) -> Manifest:
        """Delete what the request means; returns the manifest of the named one as it was.

        On failure or cancellation: those before the one that failed are gone (effect
          `partial`), for that one see `Deletion.run`.
        Raises: what `Deletion.run` raises.
        """
        store = self._seat.store
        manifest = await in_thread(store.manifest, request.name)
        names = await in_thread(order, store, request)
        await in_thread(require_nothing_unfinished, store)
        for name in names:
            await in_thread(self._refuse_used, store, name)
        done_bytes = 0
        for left, name in zip(range(len(names), 0, -1), names, strict=True):
            try:
                if request.metadata_only:
                    await in_thread(self._forget, store, name)
                else:
                    deletion = Deletion(
                        *(self._seat, self._job, self._others), qemu_img=self._qemu_img
                    )
                    deletion.before_bytes, deletion.to_come = done_bytes, left
                    await deletion.run(name)
                    done_bytes = self._job.progress.done_bytes
            except BaseException as exc:
                say_what_is_gone(
                    self._job, exc, name, self.deleted, names[len(self.deleted) :]
                )
                raise
            self.deleted.append(name)
            self._tell(name)
        return manifest

    def _refuse_used(self, store: VmStore, name: str) -> None:
        refuse_cloned(self._others(), store.vm, name)

    def _forget(self, store: VmStore, name: str) -> None:
        """Delete the record alone; its files stay, and it can be taken in again."""
        store.leases.require_unread(name)
        before, current = store.snapshots(), store.current()
        parent = store.manifest(name).parent
        try:
            adopt_children(store, name, parent)
            if current == name:
                store.set_current(parent)
            kept = store.forget(name, secrets.token_hex(4))
        except StoreError:
            with suppress(StoreError):
                give_back_children(store, name, before)
                store.set_current(current)
            raise
        store.leases.forget(name)
        self._job.notes += (f"what was in the folder of snapshot {name} is in {kept} now",)


def say_what_is_gone(
    job: Job, exc: BaseException, name: str, deleted: Sequence[str], left: Sequence[str]
) -> None:
    """Have job and error of the deletion of *name* tell of those before and after it."""
    if not deleted:
        return
    words = f"deleted so far: {', '.join(deleted)}; still there: {', '.join(left)}"
    if isinstance(exc, QsnapError) and not isinstance(exc, JobCancelled):
        exc.args = (f"snapshot {name}: {exc}. {words}",)
    if job.effect in (Effect.NONE, Effect.ROLLED_BACK):
        job.effect = Effect.PARTIAL
        job.outcome = words
    if isinstance(exc, QsnapError):
        exc.effect = job.effect


def order(store: VmStore, request: DeleteRequest) -> tuple[str, ...]:
    """The snapshots to delete, in the order that copies least.

    Branches that the VM has left go from their ends; the way to where it is goes from its
    root, so that each piece of data is moved once. Raises: StoreError.
    """
    manifests = store.snapshots()
    if request.descendants is Descendants.NONE:
        return (request.name,)
    found = (request.name, *descendants(manifests, request.name))
    chosen = set(found) - ({request.name} if request.descendants is Descendants.ONLY else set())
    line: list[str] = []
    name = store.current()
    while name is not None and name in manifests and name not in line:
        line.append(name)
        name = manifests[name].parent
    own = [name for name in reversed(line) if name in chosen]
    others = [name for name in reversed(found) if name in chosen and name not in own]
    return (*others, *own)
