"""Everything a plan depends on, read before anything is touched."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsnapd.model.state import Condition
from qsnapd.qmp.block import JobInfo, QueryJobs
from qsnapd.qmp.commands import QueryFdsets, QueryStatus
from qsnapd.qmp.migration import (
    MigrationInfo,
    QueryMigrate,
    QueryMigrateCapabilities,
    QueryMigrateParameters,
)
from qsnapd.snapshot.taking.saves import UNLIMITED_BYTES_PER_S
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import Disk, read_disks

UNKNOWN_BACKGROUND = "this QEMU does not know background-snapshot (it came with 6.0)"


@dataclass(frozen=True)
class Situation:
    """One look at a VM, its QEMU and its place in the store."""

    vm: str
    condition: Condition
    status: str
    running: bool
    at_least_10: bool
    commands: frozenset[str]
    capabilities: Mapping[str, bool]
    background_refusal: str | None
    """Why QEMU does not save in the background on this host; None: as far as known, it does."""
    parameters: Mapping[str, Any]
    migration: MigrationInfo
    jobs: tuple[JobInfo, ...]
    fdset_ids: frozenset[int]
    disks: tuple[Disk, ...]
    ram_bytes: int
    snapshots: frozenset[str]
    current: str | None
    directory: Path
    """The VM's folder in the store."""
    bandwidth_bytes_per_s: int = UNLIMITED_BYTES_PER_S
    """What a save may write, as far as QEMU keeps to it."""


async def look(
    vm: AttachedVm,
    *,
    snapshots: frozenset[str],
    current: str | None,
    directory: Path,
    background_refusal: str | None = None,
    bandwidth_bytes_per_s: int = UNLIMITED_BYTES_PER_S,
) -> Situation:
    """Ask QEMU for all of it; nothing changes.

    *background_refusal* cannot be asked for: QEMU looks for the host's userfaultfd only when
    the capability is set, and says so then.
    """
    session = vm.session
    status = await session.execute(QueryStatus())
    entries = await session.execute(QueryMigrateCapabilities())
    capabilities = {entry.capability: entry.state for entry in entries}
    return Situation(
        vm=vm.name,
        condition=vm.tracker.condition,
        status=status.status,
        running=status.running,
        at_least_10=vm.at_least_10,
        commands=vm.commands,
        capabilities=capabilities,
        background_refusal=(
            background_refusal if "background-snapshot" in capabilities else UNKNOWN_BACKGROUND
        ),
        parameters=await session.execute(QueryMigrateParameters()),
        migration=await session.execute(QueryMigrate()),
        jobs=tuple(await session.execute(QueryJobs())),
        fdset_ids=frozenset(s.fdset_id for s in await session.execute(QueryFdsets())),
        disks=await read_disks(session, vm.identity.pid),
        ram_bytes=vm.ram_bytes,
        snapshots=snapshots,
        current=current,
        directory=directory,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
    )
