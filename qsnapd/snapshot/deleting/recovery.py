"""What to do about a deletion that a former daemon, or a failed attempt, has left unfinished.

Once all is copied it is finished, which takes a moment. Else it is broken off, so that the VM
is free for other jobs, and begun again as a job of its own.
"""

from qsnapd.model.deletion import DeletePlan
from qsnapd.model.job import JobKind
from qsnapd.snapshot.deleting.delete import Deletion
from qsnapd.snapshot.deleting.live import LiveMerges
from qsnapd.snapshot.deleting.plan import affected
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.start import Seat
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm


async def recover_deletion(
    seat: Seat, vm: AttachedVm | None, *, qemu_img: str
) -> tuple[str | None, str | None]:
    """Finish it, or break it off; returns that in words, and which snapshot to delete again.

    *vm*: the VM as it is attached now; None: its QEMU has ended.
    Idempotent: cut off anywhere, the next call goes on. (None, None) if there was nothing.
    Raises: VmError, StoreError, WrongState: the journal then stands for the next attempt.
    """
    plan = await in_thread(seat.store.deletion.read)
    if plan is None:
        return None, None
    job = Job(0, seat.name, JobKind.DELETE, plan.name, lambda job: None)
    deletion = Deletion(seat, job, lambda: (), qemu_img=qemu_img)
    names = await in_thread(_affected, plan, seat.store)
    with seat.store.leases.changing(names, f"deleting snapshot {plan.name} is being finished"):
        return await _finish_or_give_up(deletion, job, vm, plan)


def _affected(plan: DeletePlan, store: VmStore) -> frozenset[str]:
    return frozenset(affected(plan, store.snapshots()))


async def _finish_or_give_up(
    deletion: Deletion, job: Job, vm: AttachedVm | None, plan: DeletePlan
) -> tuple[str | None, str | None]:
    if plan.done or plan.switched:
        with job.shielded():
            await deletion.go_on(vm, plan)
        return f"finished deleting snapshot {plan.name}", None
    await deletion.give_up(vm, plan)
    return f"deleting snapshot {plan.name} was broken off, and begins again", plan.name


async def release_guest(vm: AttachedVm, store: VmStore) -> None:
    """Let no block job hold the guest's requests back; all else is left to `recover_deletion`.

    Raises: VmError, StoreError.
    """
    plan = await in_thread(store.deletion.read)
    if plan is None:
        return
    merges = LiveMerges(vm.session, plan.token)
    if plan.done:
        await merges.finalize()
    else:
        await merges.cancel()
