"""Starting a clone that was shut off: on its disks, as it last ran."""

import secrets
from datetime import UTC, datetime

from qsnapd.errors import Blocked, WrongState
from qsnapd.model.plan import Restore
from qsnapd.model.registration import LastSeen, Registration
from qsnapd.model.state import Condition
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.revert_plan import require_no_qemu
from qsnapd.snapshot.restoring.start import Seat, start
from qsnapd.snapshot.restoring.switch import hold_lease
from qsnapd.store.registry import read_last_seen
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.identity import is_still, key_of
from qsnapd.vm.launch import MovedDisk, Start, launch_of, read_command_line


async def boot_clone(seat: Seat, job: Job, registration: Registration, source: VmStore) -> None:
    """Start the clone; its guest boots from the newest image of each disk.

    *source* has the snapshot that it was made of.
    On failure: it is shut off as before, unless the failure is the last step's.
    Raises: WrongState: it runs, or was never seen running. Blocked: an image is not there.
      VmError: it does not start. StoreError: it runs, and *source* does not know of that.
    """
    if seat.attached is None:
        require_no_qemu(seat.name, seat.qmp)
    seen = await in_thread(read_last_seen, seat.store)
    if seat.attached is not None or seen is None:
        raise WrongState(
            f"VM {seat.name} is {seat.tracker.condition.state.text}, and there is nothing to start "
            "it from"
        )
    plan = await in_thread(_plan, seat, registration, seen)
    await seat.launcher.prepare(plan.launch)
    job.instruction = seat.launcher.instruction(plan.launch)
    vm = await start(seat, plan, job, made=(), shown_as=Condition.RUNNING_BOOTED)
    with job.shielded():
        await vm.ensure_running(Condition.RUNNING_BOOTED)
        await hold_lease(vm, plan, source)


def _plan(seat: Seat, registration: Registration, seen: LastSeen) -> Restore:
    for disk in seen.disks:
        if not disk.chain:
            raise Blocked(
                f"disk {disk.target}: its images could not be found from here when VM {seat.name} "
                "last ran"
            )
        for file in disk.chain:
            if not is_still(file):
                raise Blocked(
                    f"disk {disk.target}: {file.path} is missing or is another file than when VM "
                    f"{seat.name} last ran"
                )
    disks = [MovedDisk(disk.target, disk.chain, disk.chain[0].path) for disk in seen.disks]
    process = seen.machine.process
    line = read_command_line(process, seen.machine, disks, identify=key_of, parent=seat.parent)
    token = secrets.token_hex(4)
    return Restore(
        token=token,
        vm=seat.name,
        name=registration.snapshot,
        requested_at=datetime.now(UTC),
        to_running=True,
        launch=launch_of(process, line, start=Start.HALTED, token=token, identify=key_of),
        loading=None,
        overlays=(),
    )
