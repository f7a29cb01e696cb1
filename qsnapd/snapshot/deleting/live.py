"""Merging images in a running QEMU: all disks together, and nothing switched until all are ready.

Each job is left to stand, complete, until it is told to change the block graph ("pending"). By
then all it has copied is on stable storage. While one of an active layer is pending, QEMU holds
the guest's requests to that disk back: both images hold the same, and that is noted down before
any of them is switched. So whoever dies then, it is known which image is right.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import trio

from qsnapd.errors import CommandRefused, VmError
from qsnapd.model.deletion import Merge
from qsnapd.qmp.block import (
    BlockCommit,
    BlockdevDel,
    BlockStream,
    FlushNode,
    JobCancel,
    JobComplete,
    JobDismiss,
    JobFinalize,
    JobInfo,
    QueryJobs,
)
from qsnapd.qmp.commands import QueryFdsets, RemoveFd
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.live_chain import LiveDisk

LOOK_EVERY_S = 0.2
"""Backstop between looks at something that also sends events."""
LOOK_AGAIN_S = 0.02
"""The same at what takes a moment only."""
PENDING_LIMIT_S = 5.0
"""How long the guest's requests may be held back until all disks have come to rest."""
END_LIMIT_S = 60.0

_log = logging.getLogger(__name__)

Told = Callable[[int, float], None]
"""Hears how far a merge is: its number, and a part of one."""


class LiveMerges:
    """The block jobs of one deletion; made anew by whoever goes on with it."""

    def __init__(self, session: QmpSession, token: str) -> None:
        self._session = session
        self._prefix = f"qsnapd-{token}-"
        self._started: dict[str, str] = {}
        """The node that each job writes to."""
        self._active: set[str] = set()
        self.commits = False
        """Something may have been written into an image that a snapshot shows."""

    async def start(self, merges: Mapping[int, Merge], disks: Sequence[LiveDisk]) -> None:
        """Begin with all *merges*, given by their number in the plan.

        On failure: some run; `cancel` ends them.
        Raises: VmError.
        """
        for number, merge in merges.items():
            disk, depth = _place(merge, disks)
            name = f"{self._prefix}{number}"
            if merge.kind == "stream":
                await self._stream(name, merge, disk, depth)
            else:
                await self._commit(name, merge, disk, depth)

    async def start_back(self, number: int, overlay_node: str, node: str) -> None:
        """Begin to merge an active layer into the one right below it, by their names.

        Raises: CommandRefused.
        """
        name = f"{self._prefix}{number}"
        await self._session.execute(
            BlockCommit(job_id=name, device=overlay_node, base_node=node, auto_finalize=False)
        )
        self._started[name] = node
        self._active.add(name)

    async def _commit(self, name: str, merge: Merge, disk: LiveDisk, depth: int) -> None:
        active = disk.layers[0].node
        lower = disk.layers[depth + 1].node
        command = BlockCommit(job_id=name, device=active, base_node=lower, auto_finalize=False)
        if depth > 0:
            command = command.model_copy(
                update={"top_node": disk.layers[depth].node, "backing_file": merge.lower.path}
            )
        await self._begin(command, merge)
        self.commits = True
        self._started[name] = lower
        if depth == 0:
            self._active.add(name)

    async def _stream(self, name: str, merge: Merge, disk: LiveDisk, depth: int) -> None:
        upper = disk.layers[depth].node
        below = disk.layers[depth + 2] if merge.below else None
        command = BlockStream(
            job_id=name,
            device=upper,
            base_node=below.node if below else None,
            backing_file=merge.below.path if merge.below else None,
            auto_finalize=False,
        )
        await self._begin(command, merge)
        self._started[name] = upper

    async def _begin(self, command: BlockCommit | BlockStream, merge: Merge) -> None:
        try:
            await self._session.execute(command)
        except CommandRefused as exc:
            raise VmError(
                f"disk {merge.target}: {merge.source.path} cannot be merged into "
                f"{merge.destination.path}: {exc}. QEMU needs to be allowed to write to that one"
            ) from exc

    async def come_to_rest(self, told: Told = lambda number, part: None) -> None:
        """Wait until all that was started is pending, and what it has written is on disk.

        On failure or cancellation: `cancel` undoes it.
        Raises: VmError: a job failed, and why.
        """
        if not self._started:
            return
        with self._session.watch("JOB_STATUS_CHANGE") as events:
            while True:
                jobs = await self._jobs()
                for name, job in jobs.items():
                    part = job.done_bytes / job.total_bytes if job.total_bytes else 0.0
                    told(int(name.removeprefix(self._prefix)), part)
                if all(_is_ready(job) for job in jobs.values()):
                    break
                with trio.move_on_after(LOOK_EVERY_S):
                    await events.receive()
            for name in self._started.keys() - self._active:
                await self._flush(name)
            await self._complete(events)

    async def _complete(self, events: trio.MemoryReceiveChannel[object]) -> None:
        """Bring the active layers to rest: from here on guests' requests may be held back."""
        with trio.move_on_after(PENDING_LIMIT_S):
            for name in self._active:
                await self._session.execute(JobComplete(id=name))
            while any(job.status != "pending" for job in (await self._jobs()).values()):
                with trio.move_on_after(LOOK_AGAIN_S):
                    await events.receive()
            for name in self._active:
                await self._flush(name)
            return
        raise VmError(
            f"the guest writes faster than its disks can be merged: they did not come to rest "
            f"within {PENDING_LIMIT_S:g} s. Try again when it writes less"
        )

    async def _flush(self, name: str) -> None:
        complaint = await self._session.execute(FlushNode(node=self._started[name]))
        if complaint.strip():
            raise VmError(f"QEMU could not flush {self._started[name]}: {complaint.strip()}")

    async def _jobs(self) -> dict[str, JobInfo]:
        """The jobs that were started. Raises: VmError: one has ended, so it has failed."""
        found = await self._ours()
        for name in self._started:
            job = found.get(name)
            if job is None or job.status in ("aborting", "concluded", "null"):
                words = job.error if job is not None and job.error else "QEMU gives no reason"
                raise VmError(f"merging failed: {words}")
        return {name: found[name] for name in self._started}

    async def _ours(self) -> dict[str, JobInfo]:
        jobs = await self._session.execute(QueryJobs())
        return {job.id: job for job in jobs if job.id.startswith(self._prefix)}

    async def finalize(self) -> list[str]:
        """Let every job of this deletion that is pending switch, and end. Idempotent.

        Returns what went wrong with some of them, in QEMU's words.
        """
        complaints = []
        for name, job in (await self._ours()).items():
            command = JobFinalize(id=name) if job.status == "pending" else JobCancel(id=name)
            try:
                await self._session.execute(command)
            except CommandRefused as exc:
                complaints.append(str(exc))
        complaints += await self._end()
        return complaints

    async def cancel(self) -> None:
        """End every job of this deletion without a switch. Idempotent. Raises: VmError."""
        for name in await self._ours():
            with suppress(CommandRefused):  # it has just ended
                await self._session.execute(JobCancel(id=name))
        await self._end()

    async def _end(self) -> list[str]:
        """Wait until no job of ours is left; returns the errors they ended with."""
        complaints = []
        with (
            trio.move_on_after(END_LIMIT_S),
            self._session.watch("JOB_STATUS_CHANGE") as events,
        ):
            while jobs := await self._ours():
                for name, job in jobs.items():
                    if job.status == "concluded":
                        await self._session.execute(JobDismiss(id=name))
                        complaints += [job.error] if job.error else []
                with trio.move_on_after(LOOK_AGAIN_S):
                    await events.receive()
            self._started.clear()
            self._active.clear()
            return complaints
        raise VmError(f"QEMU does not end its block jobs within {END_LIMIT_S:g} s")


def _is_ready(job: JobInfo) -> bool:
    return job.status in ("ready", "pending")


def _place(merge: Merge, disks: Sequence[LiveDisk]) -> tuple[LiveDisk, int]:
    """The disk of a merge, and how far down the upper image is. Raises: VmError."""
    for disk in disks:
        depth = disk.find(merge.upper.key)
        if depth is not None and disk.find(merge.lower.key) == depth + 1:
            below = disk.layers[depth + 2].key if depth + 2 < len(disk.layers) else None
            if merge.kind == "commit" or below == (merge.below.key if merge.below else None):
                return disk, depth
    raise VmError(
        f"disk {merge.target}: {merge.upper.path} does not lie over {merge.lower.path} any more: "
        "somebody has changed the VM's disks meanwhile"
    )


async def let_go_of(session: QmpSession, nodes: Sequence[str], paths: Sequence[str]) -> None:
    """Have QEMU close images that are out of use: the nodes that it has kept, the descriptors.

    What is in use all the same stays, with a line in the log.
    """
    for node in nodes:
        try:
            await session.execute(BlockdevDel(node_name=node))
        except CommandRefused as exc:
            if exc.error_class != "GenericError" or "ailed to find" not in exc.desc:
                _log.debug("node %s stays: %s", node, exc)
    for fdset in await session.execute(QueryFdsets()):
        if any(fd.opaque in paths for fd in fdset.fds):
            with suppress(CommandRefused):
                await session.execute(RemoveFd(fdset_id=fdset.fdset_id))
