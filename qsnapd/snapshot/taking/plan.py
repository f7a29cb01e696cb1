"""From a request and a situation to a plan, or to a refusal; pure, nothing is touched."""

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from qsnapd.errors import BadRequest, Blocked, SnapshotExists, WrongState
from qsnapd.model.names import check_name
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Consistency, Strategy
from qsnapd.model.state import State
from qsnapd.snapshot.taking.plan_disks import DisksPlan, plan_disks
from qsnapd.snapshot.taking.plan_request import check_request
from qsnapd.snapshot.taking.saves import UNLIMITED_BYTES_PER_S
from qsnapd.snapshot.taking.saving_plan import SavingPlan, plan_saving
from qsnapd.snapshot.taking.situation import Situation
from qsnapd.vm.provisions import NO_PROVISIONS, Provisions

PRECOPY_LIMIT_RAMS = 2


def plan_checkpoint(
    request: CreateRequest,
    now: Situation,
    *,
    provisions: Provisions = NO_PROVISIONS,
    holds: bool = False,
) -> CheckpointPlan:
    """Decide everything about the snapshot that *request* asks for.

    *holds*: a guest that ran is not to run afterwards.
    Raises:
      SnapshotExists, WrongState, Blocked, CapabilityMissing, BadRequest, AgentAbsent: why it
        cannot be.
    """
    requested_at = datetime.now(UTC)
    name = request.name or check_name(requested_at.strftime("%Y%m%dT%H%M%S.%fZ"))
    check_request(request, now.directory.parent)
    if request.keep_metadata and name in now.snapshots:
        raise SnapshotExists(
            f"VM {now.vm} already has a snapshot {name!r}: choose another name or delete that one"
        )
    _refuse_by_state(request, now)
    _refuse_blocked(request, now)
    token = secrets.token_hex(4)
    ids = _unused_ids(now.fdset_ids, 1 + len(now.disks))
    disks = plan_disks(request, now.disks, name, token, ids[1:])
    if request.disk_only and not disks.pivots:
        raise BadRequest(
            "disk-only snapshots require at least one disk to be selected for snapshot"
        )
    saving = None if request.disk_only else plan_saving(request, now)
    memory_file, memory_partial = _memory_files(request, now.directory, name, token)
    agent = _agent(request, now, provisions)
    stands = not now.running or bool(disks.manual)
    return CheckpointPlan(
        token=token,
        vm=now.vm,
        name=name,
        parent=now.current,
        description=request.description,
        labels=request.labels,
        requested_at=requested_at,
        strategy=saving.strategy if saving else None,
        image_format=saving.image_format if saving else None,
        was_running=now.running,
        # What the guest did after its state was saved would be lost.
        holds=holds or (request.halt and (stands or saving is not None)),
        reason=now.condition.name,
        capabilities=saving.capabilities if saving else {},
        capabilities_before=saving.capabilities_before if saving else {},
        parameters=saving.parameters if saving else {},
        parameters_before=saving.parameters_before if saving else {},
        memory_file=str(memory_file) if saving else None,
        memory_partial=str(memory_partial) if saving else None,
        memory_fdset_id=ids[0] if saving and saving.by_fdset else None,
        drained=saving is not None and saving.drained,
        cancellable=saving is None or saving.cancellable,
        nodes_can_be_activated="blockdev-set-active" in now.commands,
        ram_bytes=now.ram_bytes,
        precopy_limit_s=request.precopy_limit_s,
        precopy_limit_bytes=request.precopy_limit_bytes or PRECOPY_LIMIT_RAMS * now.ram_bytes,
        on_limit=request.on_limit,
        hash_memory=request.hash_memory,
        pivots=disks.pivots,
        left_out=disks.left_out,
        consistency=_consistency(saves=saving is not None, agent=agent, stands=stands),
        keeps_metadata=request.keep_metadata,
        halts=request.halt,
        agent=agent,
        freeze_limit_s=provisions.freeze_limit_s,
        manual=disks.manual,
        hook=provisions.hook if disks.manual else (),
        hold_limit_s=request.hold_limit_s or provisions.hold_limit_s,
        notes=tuple(_notes(request, now, disks, saving)),
    )


def _memory_files(
    request: CreateRequest, directory: Path, name: str, token: str
) -> tuple[Path, Path]:
    """Where the memory image will be, and where until it is complete."""
    if request.memory_file is None:
        return directory / name / "memory.img", directory / f".{name}.partial" / "memory.img"
    file = Path(request.memory_file)
    return file, file.with_name(f"{file.name}.{token}.partial")


def _agent(request: CreateRequest, now: Situation, provisions: Provisions) -> str | None:
    """Who is asked to freeze the file systems; nobody if the guest stands still anyway."""
    if not request.quiesce or not now.running:
        return None
    return str(provisions.require_agent(now.vm).path)


def _consistency(*, saves: bool, agent: str | None, stands: bool) -> Consistency:
    if saves:
        return Consistency.MEMORY
    if agent is not None:
        return Consistency.AGENT
    return Consistency.PAUSED if stands else Consistency.CRASH


def _notes(
    request: CreateRequest, now: Situation, disks: DisksPlan, saving: SavingPlan | None
) -> Iterator[str]:
    if request.quiesce and not now.running:
        yield f"VM {now.vm} is paused: it counts as quiesced, and the guest agent was not asked"
    for disk in disks.left_out:
        if disk.target in disks.manual:
            yield (
                f"disk {disk.target}, {disk.frozen}, is left to its storage's own snapshot: put "
                "it back to that before the VM is put back to this one"
            )
        elif not request.disk_only:
            yield (
                f"disk {disk.target} is left out: it will be newer than the guest's memory when "
                "the VM is put back to this snapshot, which therefore takes --force"
            )
    is_limited = now.bandwidth_bytes_per_s != UNLIMITED_BYTES_PER_S
    if saving is not None and saving.strategy is Strategy.BACKGROUND and is_limited:
        yield (
            "QEMU saves in the background as fast as it can: the configured bandwidth is not kept "
            "to"
        )
    if not request.keep_metadata:
        yield "no snapshot is listed of it: there is no metadata, as was asked for"


def _refuse_by_state(request: CreateRequest, now: Situation) -> None:
    state = now.condition.state
    if now.status in ("inmigrate", "prelaunch"):
        raise WrongState(
            f"VM {now.vm} has not started yet (QEMU says {now.status!r}): start it first"
        )
    if now.status == "postmigrate" and not request.disk_only:
        raise WrongState(
            f"VM {now.vm} stands still after an earlier save, and QEMU saves such a VM only "
            f"once: resume it first (qsnapctl resume {now.vm})"
        )
    if now.status == "postmigrate" and not all(disk.active for disk in now.disks):
        raise WrongState(
            f"VM {now.vm} stands still after an earlier save, and QEMU has let go of its disks: "
            f"resume it first (qsnapctl resume {now.vm})"
        )
    if now.status == "suspended":
        raise WrongState(
            f"VM {now.vm} sleeps: qemu doesn't support taking snapshots of PMSUSPENDED guests. "
            "Wake it up first"
        )
    if state not in (State.RUNNING, State.PAUSED) or now.status in (
        "shutdown",
        "guest-panicked",
        "internal-error",
    ):
        raise WrongState(
            f"VM {now.vm} is {now.condition.text} (QEMU says {now.status!r}): only a running or "
            "paused VM can be checkpointed"
        )


def _refuse_blocked(request: CreateRequest, now: Situation) -> None:
    if now.migration.active:
        raise Blocked(
            f"VM {now.vm}: another migration is under way (QEMU says {now.migration.status!r})"
        )
    if now.migration.blocked_reasons and not request.disk_only:
        raise Blocked(
            f"VM {now.vm} cannot be saved, QEMU says: "
            + "; ".join(now.migration.blocked_reasons)
            + ". A disk-only snapshot can be taken"
        )
    if now.jobs:
        jobs = ", ".join(f"{job.id} ({job.type}, {job.status})" for job in now.jobs)
        raise Blocked(f"VM {now.vm}: block jobs are running: {jobs}. Wait for them or cancel them")


def _unused_ids(used: frozenset[int], count: int) -> list[int]:
    start = max(used, default=-1) + 1
    return list(range(start, start + count))
