"""Starting a VM that a revert to a disk-only snapshot has left shut off."""

from qsnapd.errors import WrongState
from qsnapd.model.plan import RevertPlan
from qsnapd.model.snapshot import Manifest
from qsnapd.model.state import Condition
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.revert_plan import require_no_qemu
from qsnapd.snapshot.restoring.start import Seat, start
from qsnapd.snapshot.restoring.switch import hold_lease
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm


async def boot(seat: Seat, job: Job) -> Manifest:
    """Start the VM on the overlays that the revert has made for it.

    On success: it runs; the plan is used up. Returns the snapshot it goes on from, or what is
      still known of it if it was deleted meanwhile.
    On failure: it is shut off as before, and the plan stands.
    Raises: WrongState: it runs, or no revert has left such a plan. VmError.
      StoreError: it runs, and that could not be written down.
    """
    entry = await in_thread(seat.store.next_start.read)
    if seat.attached is None:
        require_no_qemu(seat.name, seat.qmp)
    if seat.attached is not None or entry is None or not isinstance(entry.plan, RevertPlan):
        raise WrongState(
            f"VM {seat.name} is {seat.tracker.condition.state.text}: only a VM that was left shut "
            "off by reverting to a snapshot without memory is started by qsnapd"
        )
    plan = entry.plan
    shown_as = Condition.RUNNING_FROM_SNAPSHOT
    await seat.launcher.prepare(plan.launch, lasting=True)
    job.instruction = seat.launcher.instruction(plan.launch)
    vm = await start(seat, plan, job, made=entry.made, shown_as=shown_as)
    with job.shielded():
        await vm.ensure_running(shown_as)
        manifest = (await in_thread(seat.store.snapshots)).get(plan.name)
        if manifest is not None:
            await hold_lease(vm, plan, seat.store)
        await in_thread(seat.store.next_start.clear)
    return manifest or _deleted(vm, plan)


def _deleted(vm: AttachedVm, plan: RevertPlan) -> Manifest:
    return Manifest(
        name=plan.name,
        vm=plan.vm,
        created_at=plan.requested_at,
        state="running",
        reason=vm.tracker.condition.name,
        strategy=None,
        image_format=None,
        paused_ms=0,
        total_ms=0,
        memory=None,
        disks=(),
        qemu_version=vm.version.text,
        machine=vm.machine(),
    )
