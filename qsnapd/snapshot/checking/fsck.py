"""Holding a VM's snapshots, their files and its QEMU's block graph against each other.

Facts are gathered (`fsck_facts`, `fsck_live`), judged by pure functions (`fsck_store`,
`fsck_files`, `fsck_graph`), and, if that is asked for, mended where it is safe (`fsck_repair`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import trio

from qsnapd.errors import VmError
from qsnapd.model.findings import Finding, Severity, StoreCheck
from qsnapd.snapshot.checking.facts import Around, Facts, gather, look_around
from qsnapd.snapshot.checking.files import UNUSED, judge_files
from qsnapd.snapshot.checking.graph import judge_graph
from qsnapd.snapshot.checking.live import Live, look_live
from qsnapd.snapshot.checking.repair import repair
from qsnapd.snapshot.checking.store import judge_store
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import SLOW
from qsnapd.vm.attached import AttachedVm

_ORDER = list(Severity)
_LOOKS = 3
"""How often it is looked again because snapshots have changed meanwhile."""


class Examination:
    """Looks at one VM's snapshots; may be used again."""

    def __init__(
        self,
        store: VmStore,
        *,
        vm: AttachedVm | None,
        others: Sequence[VmStore],
        before_s: float,
        job: Callable[[], object],
    ) -> None:
        """*others*: all other VMs'. *before_s*: when this daemon began. *job* returns what is
        changing the VM now, or has last; False if nothing is and ever was."""
        self._store = store
        self._vm = vm
        self._others = others
        self._before_s = before_s
        self._job = job

    async def check(self, *, is_busy: bool, repairs: bool = False) -> StoreCheck:
        """Find all that does not fit; *repairs*: and mend what is safe to mend.

        Touches nothing else, and may be called while a job runs on the VM (*is_busy*): then
        less is looked at. Preconditions of a repair: none runs, and none begins meanwhile.
        Cancellation: at any time. Raises: StoreError.
        """
        skipped: list[str] = []
        before = self._job()
        live = await self._look_live(skipped, is_busy=is_busy)
        around = await trio.to_thread.run_sync(look_around, self._others, limiter=SLOW)
        facts = await trio.to_thread.run_sync(
            partial(self._gather, around, live, is_busy=is_busy), limiter=SLOW
        )
        if not is_busy and self._job() != before:
            skipped.append("the VM's disks and unfinished work: a job began or ended meanwhile")
            facts = replace(facts, live=None, is_busy=True)
        findings = judge(facts)
        if repairs:
            mend = partial(repair, self._store, facts, findings, before_s=self._before_s)
            findings = await trio.to_thread.run_sync(mend)
        return StoreCheck(
            vm=self._store.vm,
            clean=all(f.repaired or f.severity is Severity.NOTE for f in findings),
            findings=findings,
            skipped=tuple(skipped),
        )

    async def _look_live(self, skipped: list[str], *, is_busy: bool) -> Live | None:
        what = "the VM's disks, and files that only it may use"
        if self._vm is None:
            skipped.append(f"{what}: its QEMU is not attached")
            return None
        if is_busy:
            skipped.append(f"{what}, and unfinished work: a job is running on it")
            return None
        try:
            live = await look_live(self._vm.session, self._vm.identity.pid)
        except VmError as exc:
            skipped.append(f"{what}: {exc}")
            return None
        if live.jobs:
            skipped.append(f"{what}: QEMU is busy with block jobs: {', '.join(live.jobs)}")
            return None
        return live

    def _gather(self, around: Around, live: Live | None, *, is_busy: bool) -> Facts:
        look = partial(gather, self._store, before_s=self._before_s, around=around)
        for _ in range(_LOOKS):
            facts = look(live=live, is_busy=is_busy)
            if self._store.snapshots() == facts.manifests:
                break  # else a deletion may have removed what they named
        return facts


def judge(facts: Facts) -> tuple[Finding, ...]:
    """All findings, the worst first; pure."""
    graph = tuple(judge_graph(facts))
    files = tuple(judge_files(facts))
    if any(finding.severity is not Severity.NOTE for finding in graph):
        # What a VM does not use that runs on the wrong images is not what nobody needs.
        files = tuple(finding for finding in files if finding.code != UNUSED)
    found = (*judge_store(facts), *files, *graph)
    return tuple(sorted(found, key=lambda finding: _ORDER.index(finding.severity)))
