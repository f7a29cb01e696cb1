"""`qsnapd reconcile --resume-only`: after a daemon has died, let its guests run again.

For `ExecStopPost=`: it does only what cannot wait for the next start.
"""

import logging
from pathlib import Path

import trio

from qsnapd import faults
from qsnapd.config import Config
from qsnapd.daemon.remembered import recall
from qsnapd.errors import QsnapError
from qsnapd.model.plan import CheckpointPlan, JournalEntry, RevertPlan
from qsnapd.patience import Patience
from qsnapd.qmp.bridge import open_bridge
from qsnapd.qmp.commands import QueryStatus
from qsnapd.snapshot.deleting.recovery import release_guest
from qsnapd.snapshot.recovery import rescue_left, resume_reverted
from qsnapd.snapshot.restoring.revert import is_same
from qsnapd.snapshot.taking.committing import is_committed
from qsnapd.snapshot.taking.settling import give_back_run_state, settle_migration
from qsnapd.snapshot.taking.thaw import thaw_owed
from qsnapd.snapshot.undo import end_merges_back
from qsnapd.store.layout import Store
from qsnapd.store.owed_thaw import read_owed_thaw
from qsnapd.store.registry import read_registration
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm, attach
from qsnapd.vm.tracker import Tracker

VM_LIMIT_S = 60.0

_log = logging.getLogger(__name__)


async def reconcile(config: Config) -> int:
    """Resume every guest that a dead daemon's job held; returns how many could not be.

    The journals stay: the next start finishes or undoes the jobs.
    Raises: StoreError: a daemon is running, or the state directory cannot be used.
    """
    failures = 0
    faults.plant_from_environment()
    with Store(config.daemon.state_dir) as store:
        for name in await in_thread(store.names):
            try:
                with trio.fail_after(VM_LIMIT_S):
                    if qmp := await in_thread(_monitor, config, store.vm(name)):
                        await _resume(name, qmp, store.vm(name))
            except (QsnapError, trio.TooSlowError) as exc:
                failures += 1
                _log.error("VM %s: %s", name, exc or "no answer in time")
    return failures


def _monitor(config: Config, store: VmStore) -> Path | None:
    """Of a VM of the configuration or of a clone; None for what nobody looks after any more."""
    if store.vm in config.vm:
        return config.vm[store.vm].qmp
    registration = read_registration(store)
    return Path(registration.qmp) if registration is not None else None


async def _resume(name: str, qmp: Path, store: VmStore) -> None:
    checkpoint = await in_thread(store.journal.read)
    revert = await in_thread(store.restoring.read)
    owed = await in_thread(read_owed_thaw, store)
    deletion = await in_thread(store.deletion.read)
    if checkpoint is None and revert is None and owed is None and deletion is None:
        return
    if done := await rescue_left(store):  # before anything is asked: it would not answer
        _log.warning("VM %s: %s", name, done)
    async with open_bridge(qmp, name=name) as (bridge, sock):
        tracker = Tracker(lambda old, new: None)
        vm = await attach(name, bridge, sock, tracker)
        status = await vm.session.execute(QueryStatus())
        tracker.on_attached(status.status, recall(store, vm.identity))
        if not status.running and (checkpoint is not None or revert is not None):
            await _resume_guest(name, vm, store, checkpoint, revert)
        elif checkpoint is not None and _may_freeze(checkpoint):
            await _resume_guest(name, vm, store, checkpoint, None)
        if checkpoint is not None and is_same(vm, checkpoint):
            await end_merges_back(vm.session, checkpoint)
        await release_guest(vm, store)
        done = await thaw_owed(vm, store, None)
        if done is not None:
            _log.warning("VM %s: %s", name, done)


def _may_freeze(checkpoint: JournalEntry) -> bool:
    """Whether the guest may stand still though QEMU says that it runs."""
    return isinstance(checkpoint.plan, CheckpointPlan) and checkpoint.plan.drained


async def _resume_guest(
    name: str,
    vm: AttachedVm,
    store: VmStore,
    checkpoint: JournalEntry | None,
    revert: JournalEntry | None,
) -> None:
    if checkpoint is not None and is_same(vm, checkpoint):
        plan = checkpoint.plan
        assert isinstance(plan, CheckpointPlan)
        if not await in_thread(is_committed, plan, store):
            await settle_migration(vm, plan, Patience())
        await give_back_run_state(vm, plan)
    if revert is not None and isinstance(revert.plan, RevertPlan):
        await resume_reverted(vm, revert, store)
    _log.warning("VM %s: an unfinished job holds its guest no more", name)
