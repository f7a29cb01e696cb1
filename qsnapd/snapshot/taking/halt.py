"""Ending a VM whose snapshot was taken with that wish: there is nothing to wait for any more."""

from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.state import Condition
from qsnapd.snapshot.restoring.switch import end_qemu
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.launcher import Launcher


async def end_vm(vm: AttachedVm, launcher: Launcher | None) -> None:
    """End the VM's QEMU without shutting its guest down; it is gone on return.

    On success: the VM is shut off, "from snapshot". *launcher* knows where its disks are now,
    and does not start it again by itself.
    Raises: VmError: it does not end.
    """
    with vm.tracker.ending(Condition.SHUTOFF_FROM_SNAPSHOT):
        if launcher is not None:
            await launcher.follow(vm)
            await launcher.keep_off()
        await end_qemu(vm)


def where_disks_are(plan: CheckpointPlan) -> tuple[str, ...]:
    """What whoever starts the VM the next time has to know."""
    disks = [f"{pivot.target} is {pivot.overlay.path}" for pivot in plan.pivots]
    if not disks:
        return ()
    return (
        f"VM {plan.vm} was ended. Whoever starts it must start it on the newest images of its "
        f"disks: {', '.join(disks)}",
    )
