"""Deleting what retention does not keep, one snapshot after the other."""

from collections.abc import Callable
from datetime import UTC, datetime

from qsnapd.errors import Effect, QsnapError, RequestError, StoreFull, WrongState
from qsnapd.model.request import PruneRequest
from qsnapd.model.retention import Pruned, Refusal
from qsnapd.snapshot.deleting.checks import (
    refuse_cloned,
    refuse_mapped,
    require_nothing_unfinished,
)
from qsnapd.snapshot.deleting.delete import Deletion, Others
from qsnapd.snapshot.deleting.deletions import say_what_is_gone
from qsnapd.snapshot.deleting.retention import choose
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.start import Seat
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread


class Pruning:
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
        self.job = job
        self._others = others
        self._qemu_img = qemu_img
        self._tell = tell
        """Hears the name of each snapshot once it is gone."""
        self._done_bytes = 0
        self.pruned = Pruned()
        """What has come of it so far."""

    async def run(self, request: PruneRequest) -> None:
        """Delete what the request does not keep.

        Preconditions: no other job changes this VM; the caller sees to that.
        On success: all of it is gone, but for those whose deletion was refused: with nothing
          of them touched they are in `pruned`, with the reason.
        On failure or cancellation: those before the one that failed are gone (effect
          `partial`), for that one see `Deletion.run`.
        Raises: what `Deletion.run` raises, if more was wrong than that it was refused.
        """
        store = self._seat.store
        names = await in_thread(_chosen, store, request)
        await in_thread(require_nothing_unfinished, store)
        for number, name in enumerate(names):
            self.job.snapshot = name
            try:
                await self._delete_unless_refused(store, name, to_come=len(names) - number)
            except BaseException as exc:
                say_what_is_gone(self.job, exc, name, self.pruned.deleted, names[number:])
                raise
        self.job.snapshot = None

    async def _delete_unless_refused(self, store: VmStore, name: str, *, to_come: int) -> None:
        deletion = Deletion(*(self._seat, self.job, self._others), qemu_img=self._qemu_img)
        deletion.before_bytes, deletion.to_come = self._done_bytes, to_come
        try:
            await in_thread(lambda: refuse_cloned(self._others(), store.vm, name))
            await deletion.run(name)
        except QsnapError as exc:
            if not _is_refusal(exc):
                raise
            refused = (*self.pruned.refused, Refusal(name=name, why=str(exc)))
            self.pruned = self.pruned.model_copy(update={"refused": refused})
            return
        self._done_bytes = self.job.progress.done_bytes
        self.pruned = self.pruned.model_copy(update={"deleted": (*self.pruned.deleted, name)})
        self._tell(name)


def foresee(store: VmStore, others: Others, request: PruneRequest) -> Pruned:
    """What would be deleted, and what is in use. Touches nothing. Blocks.

    QEMU is not asked, nor any image looked at: a deletion may be refused all the same.
    Raises: StoreError.
    """
    manifests, other_stores = store.snapshots(), others()
    deleted: list[str] = []
    refused: list[Refusal] = []
    for name in _chosen(store, request):
        try:
            refuse_cloned(other_stores, store.vm, name)
            refuse_mapped(store, manifests[name], manifests)
            deleted.append(name)
        except WrongState as exc:
            refused.append(Refusal(name=name, why=str(exc)))
    return Pruned(deleted=tuple(deleted), refused=tuple(refused))


def _chosen(store: VmStore, request: PruneRequest) -> tuple[str, ...]:
    return choose(store.snapshots(), store.current(), request, datetime.now(UTC))


def _is_refusal(error: QsnapError) -> bool:
    """Whether a deletion failed before it touched anything, for a reason of its own."""
    return isinstance(error, RequestError | StoreFull) and error.effect is Effect.NONE
