"""Deleting a snapshot: what was written after it is merged into what it had frozen.

The VM goes on as it is, and every other snapshot shows what it showed, at every instant. First
all that has to be copied is copied, for all disks; that can be broken off. Then the block graph
is switched, manifests and names follow (`delete_finish`), and that is always brought to its end.
"""

import logging
from collections.abc import Callable, Collection, Sequence

import trio

from qsnapd.errors import Effect, QsnapError, SessionLost, VmError, WrongState
from qsnapd.faults import Point
from qsnapd.model.deletion import DeletePlan, Merge
from qsnapd.model.job import Phase, Progress
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.deleting.checks import (
    refuse_by_state,
    refuse_mapped,
    refuse_newer,
    refuse_open,
    require_nothing_unfinished,
    require_room,
)
from qsnapd.snapshot.deleting.finish import (
    mark,
    remove_snapshot,
    settle_images,
)
from qsnapd.snapshot.deleting.graph_reading import read_graph
from qsnapd.snapshot.deleting.live import LiveMerges, let_go_of
from qsnapd.snapshot.deleting.offline import below_of, lies_over, merge_images, put_onto, sync
from qsnapd.snapshot.deleting.plan import Scene, affected, plan_deletion
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.revert_plan import require_no_qemu
from qsnapd.snapshot.restoring.start import Seat
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import is_still, key_of
from qsnapd.vm.live_chain import LiveDisk, read_live, read_read_only

TRIES = 3
"""How often the block graph is switched before QEMU's refusal is taken for final."""

_log = logging.getLogger(__name__)

Others = Callable[[], Sequence[VmStore]]
"""Returns the parts of the store that belong to other VMs. Blocks."""


class Deletion:
    """Deletes one snapshot of one VM; used once."""

    def __init__(self, seat: Seat, job: Job, others: Others, *, qemu_img: str) -> None:
        self._seat = seat
        self._store = seat.store
        self._job = job
        self._others = others
        self._qemu_img = qemu_img
        self._has_committed = False
        self._parts: dict[int, float] = {}
        self.before_bytes = 0
        """Copied by the deletions before this one, if it is one of several."""
        self.to_come = 1
        """How many there are to go, this one included."""

    async def run(self, name: str) -> Manifest:
        """Delete the snapshot; returns its manifest as it was.

        Preconditions: no other job changes this VM; the caller sees to that.
        On success: it is not listed; its children are its parent's; current is its parent, if it
          was. Of its files those are gone that qsnapd has made and nothing needs.
        On failure or cancellation before the switch: VM and all other snapshots are as before.
          The snapshot is as well, unless data had begun to go into its image: then it stays
          listed, as being deleted, and deleting it again goes on (effect `partial`).
        Raises: UnknownSnapshot, WrongState, Blocked: refused, nothing was touched. StoreFull,
          StoreError, VmError.
        """
        manifest = await in_thread(self._store.manifest, name)
        vm = self._seat.attached
        await in_thread(require_nothing_unfinished, self._store)
        plan, scene = await self._plan(vm, name)
        changes = set(affected(plan, scene.snapshots))
        with self._store.leases.changing(changes, f"snapshot {name} is being deleted"):
            # Again: what a clone that was just made needs is seen now, or it is not begun.
            plan, scene = await self._plan(vm, name)
            if not changes.issuperset(affected(plan, scene.snapshots)):
                raise WrongState(f"the images of VM {self._seat.name} have changed: try again")
            await self._refuse(vm, scene, plan, manifest)
            self._job.notes += plan.notes
            await self._delete(vm, plan, was_marked=manifest.deleting)
        return manifest

    async def give_up(self, vm: AttachedVm | None, plan: DeletePlan) -> None:
        """End what runs of an unfinished deletion that is not to be switched. Idempotent.

        On success: VM and other snapshots are as before, and the journal is clear.
        Raises: VmError, StoreError.
        """
        if vm is not None:
            await LiveMerges(vm.session, plan.token).cancel()
        await in_thread(_settle_streams, self._store, plan)
        await in_thread(self._store.deletion.clear)

    async def go_on(self, vm: AttachedVm | None, plan: DeletePlan) -> None:
        """Finish a deletion that began to switch and came not to its end. Not to be cancelled.

        Raises: VmError, StoreError: the journal stands.
        """
        if not plan.done:
            if vm is not None:
                await LiveMerges(vm.session, plan.token).cancel()
            plan = await self._merge(vm, plan)
        await self.finish(vm, plan)

    # --- before --------------------------------------------------------------------------

    async def _plan(self, vm: AttachedVm | None, name: str) -> tuple[DeletePlan, Scene]:
        scene = await self._look(vm)
        return await in_thread(plan_deletion, name, scene), scene

    async def _look(self, vm: AttachedVm | None) -> Scene:
        store = self._store
        if vm is None:
            require_no_qemu(self._seat.name, self._seat.qmp)
        live = await read_live(vm.session, vm.identity.pid) if vm else None
        read_only = await read_read_only(vm.session, vm.identity.pid) if vm else {}
        graph = await in_thread(lambda: read_graph(store, self._others(), live))
        return Scene(
            vm=store.vm,
            snapshots=await in_thread(store.snapshots),
            current=await in_thread(store.current),
            graph=graph,
            live=live,
            pid=vm.identity.pid if vm else 0,
            start_time_ticks=vm.identity.start_time_ticks if vm else 0,
            read_only=read_only,
        )

    async def _refuse(
        self, vm: AttachedVm | None, scene: Scene, plan: DeletePlan, manifest: Manifest
    ) -> None:
        await in_thread(refuse_mapped, self._store, manifest, scene.snapshots)
        await in_thread(refuse_open, plan, scene)
        await in_thread(refuse_newer, plan, scene)
        if vm is not None and any(scene.live_disk(merge.upper.key) for merge in plan.merges):
            await refuse_by_state(vm)
        await in_thread(require_room, plan, scene)

    # --- copying -------------------------------------------------------------------------

    async def _delete(self, vm: AttachedVm | None, plan: DeletePlan, *, was_marked: bool) -> None:
        store = self._store
        await self._write(plan)
        try:
            await self._job.reach(Point.DELETE_PLANNED)
            if plan.commits:
                await in_thread(lambda: mark(store, plan.name, deleting=True))
            await self._job.reach(Point.DELETE_MARKED)
            self._job.enter(Phase.MERGING)
            plan = await self._merge(vm, plan)
            for number in range(len(plan.merges)):
                self._tell(plan, number, 1.0)
        except BaseException as exc:
            patience = self._job.patience
            with (
                trio.move_on_after(patience.limit_s, shield=True) as undoing,
                patience.extending(undoing),
            ):
                await self._break_off(vm, plan, exc, was_marked=was_marked)
            raise
        with self._job.shielded():
            await self.finish(vm, plan)

    async def _merge(self, vm: AttachedVm | None, plan: DeletePlan) -> DeletePlan:
        """Copy all that is not copied yet; returns the plan that says so, as the journal does.

        Jobs in QEMU stand pending on return: whoever calls this lets them switch.
        """
        disks = await read_live(vm.session, vm.identity.pid) if vm else ()
        live: dict[int, Merge] = {}
        for number, merge in enumerate(plan.merges):
            if merge.done:
                continue
            if any(disk.find(merge.upper.key) is not None for disk in disks):
                live[number] = merge
            else:
                plan = await self._merge_offline(plan, number)
        if vm is not None and live:
            merges = LiveMerges(vm.session, plan.token)
            try:
                await merges.start(live, disks)
                await self._job.reach(Point.DELETE_MERGING)
                await merges.come_to_rest(lambda n, part: self._tell(plan, n, part))
            finally:
                self._has_committed |= merges.commits
            await self._job.reach(Point.DELETE_AT_REST)
            plan = _done(plan, live)
            with trio.CancelScope(shield=True):
                await self._write(plan)
            await self._job.reach(Point.DELETE_COPIED)
        return plan

    async def _merge_offline(self, plan: DeletePlan, number: int) -> DeletePlan:
        merge = plan.merges[number]
        self._tell(plan, number, 0.0)
        self._has_committed |= merge.kind == "commit"
        with self._job.patience.suspended():
            await merge_images(merge, qemu_img=self._qemu_img)
        self._tell(plan, number, 1.0)
        plan = _done(plan, (number,))
        with trio.CancelScope(shield=True):
            await self._write(plan)
            if merge.kind == "stream":
                await in_thread(
                    lambda: settle_images(self._store, [merge], but=plan.name)
                )
        return plan

    async def _read(self) -> DeletePlan | None:
        return await in_thread(self._store.deletion.read)

    async def _write(self, plan: DeletePlan) -> None:
        await in_thread(self._store.deletion.write, plan)

    def _tell(self, plan: DeletePlan, number: int, part: float) -> None:
        self._parts[number] = part
        total_bytes = sum(max(1, merge.size_bytes) for merge in plan.merges)
        done_bytes = sum(
            int(max(1, plan.merges[n].size_bytes) * min(1.0, part))
            for n, part in self._parts.items()
        )
        self._job.report(
            Progress(
                done_bytes=self.before_bytes + done_bytes,
                total_bytes=self.before_bytes + total_bytes * self.to_come,
            )
        )

    async def _break_off(
        self,
        vm: AttachedVm | None,
        plan: DeletePlan,
        cause: BaseException,
        *,
        was_marked: bool,
    ) -> None:
        """Leave VM and other snapshots as they were; the journal stays if that fails."""
        self._job.enter(Phase.UNDOING)
        self._set_effect(cause, Effect.UNKNOWN)
        plan = await self._read() or plan
        if isinstance(cause, SessionLost):
            return  # QEMU may be gone or not: whoever finds out goes on
        if plan.merges and plan.done:
            return  # it is noted that it may be switched: it has to be
        try:
            await self.give_up(vm, plan)
            if plan.commits and not self._has_committed and not was_marked:
                await in_thread(
                    lambda: mark(self._store, plan.name, deleting=False)
                )
        except QsnapError as exc:
            _log.error("VM %s: breaking off deleting %s: %s", plan.vm, plan.name, exc)
            return
        if not self._has_committed and not was_marked:
            self._set_effect(cause, Effect.ROLLED_BACK)
            return
        self._set_effect(cause, Effect.PARTIAL)
        self._job.outcome = _half_deleted(plan)
        if isinstance(cause, QsnapError):
            cause.args = (f"{cause}. {_half_deleted(plan)}",)

    def _set_effect(self, cause: BaseException, effect: Effect) -> None:
        self._job.effect = effect
        if isinstance(cause, QsnapError):
            cause.effect = effect

    # --- switching and after -------------------------------------------------------------

    async def finish(self, vm: AttachedVm | None, plan: DeletePlan) -> None:
        """Make everything agree with what was merged. Not to be cancelled: the caller shields it.

        Preconditions: the journal has *plan*, and all of its merges are done.
        On failure: the journal stands; whoever finds it goes on here.
        Raises: VmError, StoreError.
        """
        self._job.effect = Effect.UNKNOWN
        self._job.enter(Phase.FINISHING)
        store = self._store
        try:
            disks: tuple[LiveDisk, ...] = ()
            if vm is not None:
                plan, disks = await self._switch(vm, plan)
            await self._job.reach(Point.DELETE_SWITCHED)
            await self._name_below(plan, disks)
            await self._job.reach(Point.DELETE_NAMED)
            await in_thread(
                lambda: settle_images(store, plan.merges, but=plan.name)
            )
            await self._job.reach(Point.DELETE_RECORDED)
            notes = await in_thread(
                lambda: remove_snapshot(store, plan, is_vouched_for=vm is not None)
            )
        except QsnapError as exc:
            exc.effect = Effect.UNKNOWN
            raise
        self._job.notes += tuple(note for note in notes if note not in self._job.notes)
        self._job.effect = Effect.NONE

    async def _switch(
        self, vm: AttachedVm, plan: DeletePlan
    ) -> tuple[DeletePlan, tuple[LiveDisk, ...]]:
        """Have QEMU use the merged images; returns the disks as they are then.

        Raises: VmError.
        """
        nodes = await self._nodes_to_go(vm, plan)
        complaints: list[str] = []
        for _ in range(TRIES):
            complaints = await LiveMerges(vm.session, plan.token).finalize()
            disks = await read_live(vm.session, vm.identity.pid)
            again = [n for n, merge in enumerate(plan.merges) if _is_used(merge, disks)]
            if not again:
                paths = [merge.source.path for merge in plan.merges]
                await let_go_of(vm.session, nodes, paths)
                return plan, disks
            # The guest has gone on writing to what was merged already.
            plan = _done(plan, again, done=False).model_copy(update={"switched": True})
            await self._write(plan)
            plan = await self._merge(vm, plan)
        raise VmError(
            f"QEMU does not use the merged images: {'; '.join(complaints) or 'no reason is given'}"
        )

    async def _nodes_to_go(self, vm: AttachedVm, plan: DeletePlan) -> list[str]:
        sources = {merge.source.key for merge in plan.merges}
        return [
            layer.node
            for disk in await read_live(vm.session, vm.identity.pid)
            for layer in disk.layers
            if layer.key in sources
        ]

    async def _name_below(self, plan: DeletePlan, disks: Sequence[LiveDisk]) -> None:
        """Have all images lie over the right ones by their headers, on stable storage."""
        in_use = {layer.key for disk in disks for layer in disk.layers}
        for merge in plan.merges:
            images = merge.above if merge.kind == "commit" else (merge.upper,)
            gone = merge.source
            below = merge.lower if merge.kind == "commit" else merge.below
            for image in images:
                if not await in_thread(is_still, image.file):
                    continue
                is_used = key_of(image.path) in in_use
                if not is_used and await in_thread(lies_over, image, gone):
                    await put_onto(image, below, qemu_img=self._qemu_img)
                else:  # a QEMU has rewritten it, which it does not sync
                    await sync(image)


def _settle_streams(store: VmStore, plan: DeletePlan) -> None:
    """Where an image has come to lie over another, manifests say so; idempotent."""
    merges = [
        merge
        for merge in plan.merges
        if merge.kind == "stream"
        and is_still(merge.upper.file)
        and below_of(merge.upper) == (key_of(merge.below.path) if merge.below else None)
    ]
    settle_images(store, merges, but=plan.name)


def _is_used(merge: Merge, disks: Sequence[LiveDisk]) -> bool:
    """Whether the running VM's disks lie over what was to go."""
    for disk in disks:
        upper, lower = disk.find(merge.upper.key), disk.find(merge.lower.key)
        if merge.kind == "commit" and upper is not None:
            return True
        if merge.kind == "stream" and upper is not None and lower == upper + 1:
            return True
    return False


def _done(plan: DeletePlan, numbers: Collection[int], *, done: bool = True) -> DeletePlan:
    merges = tuple(
        merge.model_copy(update={"done": done}) if n in numbers else merge
        for n, merge in enumerate(plan.merges)
    )
    return plan.model_copy(update={"merges": merges})


def _half_deleted(plan: DeletePlan) -> str:
    return (
        f"Snapshot {plan.name} stays listed as being deleted, and cannot be restored any more; the "
        f"VM and all other snapshots are whole. snapshot-delete {plan.vm} {plan.name} finishes it"
    )
