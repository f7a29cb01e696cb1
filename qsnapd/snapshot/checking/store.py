"""What is wrong with the records of a VM's snapshots; pure, over the facts."""

import re
from collections.abc import Iterator

from qsnapd.model.findings import Finding, Severity
from qsnapd.model.plan import Restore
from qsnapd.snapshot.checking.facts import Facts, abandoned_partials, abandoned_views
from qsnapd.snapshot.moving.imported import DISKS_NAME
from qsnapd.store.leases import LEASES_NAME
from qsnapd.store.owed_thaw import OWED_THAW_NAME
from qsnapd.store.own_files import (
    is_draft,
    is_of_a_snapshot,
    is_of_a_vm,
    is_staged_export,
)
from qsnapd.store.renaming import RENAMING_NAME
from qsnapd.store.tree import parents

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

DAMAGED_SUFFIX = ".damaged"
"""Of a manifest that was of no use, when another has taken its place."""
_REMOVED = re.compile(r"\..+\.removed(\.\d+)?")
"""Folders of snapshots that are gone, with what was not qsnapd's in them."""
_PARTIAL = ".partial"


def judge_store(facts: Facts) -> Iterator[Finding]:
    """Yield what does not fit within the store."""
    yield from _judge_manifests(facts)
    yield from _judge_tree(facts)
    yield from _judge_current(facts)
    if not facts.is_busy:
        yield from _judge_unfinished(facts)
    yield from _judge_records(facts)
    yield from _judge_strangers(facts)


def _judge_manifests(facts: Facts) -> Iterator[Finding]:
    back = (
        f"bring a copy of it back: qsnapctl snapshot-import {facts.vm} --metadata FILE, from an "
        "earlier snapshot-export --metadata or a backup"
    )
    mends = {
        "manifest-too-new": "run the version of qsnapd that wrote it, or a newer one",
        "manifest-misplaced": "rename its folder to the name in it, in the folder of its VM",
    }
    for broken in facts.broken:
        mend = mends.get(broken.code, back)
        what = f"{broken.words}: snapshot {broken.name} is not listed"
        yield Finding(code=broken.code, severity=ERROR, what=what, mend=mend)
    deleting = {name for name, manifest in facts.manifests.items() if manifest.deleting}
    if facts.deletion is not None:
        deleting.add(facts.deletion.name)
    for name in sorted(deleting if not facts.is_busy else ()):
        yield Finding(
            code="deletion-unfinished",
            severity=ERROR,
            what=f"deleting snapshot {name} was begun and never ended: it cannot be restored",
            mend=f"qsnapctl snapshot-delete {facts.vm} {name} again",
        )


def _judge_tree(facts: Facts) -> Iterator[Finding]:
    found = parents(facts.manifests)
    for name, manifest in facts.manifests.items():
        parent = manifest.parent
        if parent is None or found[name] is not None:
            continue
        if parent in facts.manifests:
            yield Finding(
                code="parent-cycle",
                severity=WARNING,
                what=f"snapshot {name} comes from {parent}, which comes from {name} itself; it is "
                "listed as a root",
                mend=f"qsnapctl snapshot-edit {facts.vm} {name}, and mend its <parent>",
            )
        elif parent not in facts.entries:
            yield Finding(
                code="parent-missing",
                severity=WARNING,
                what=f"snapshot {name} comes from {parent}, which there is no record of; it is "
                "listed as a root, and restores like any other",
                mend=f"qsnapctl snapshot-import {facts.vm} --metadata FILE, or --scan DIRECTORY, "
                f"brings {parent} back",
            )


def _judge_current(facts: Facts) -> Iterator[Finding]:
    current = facts.current
    if not current or current in facts.manifests or current in facts.entries:
        return
    yield Finding(
        code="current-unknown",
        severity=WARNING,
        what=f"the current snapshot is to be {current!r}, which does not exist: the next one "
        "would be a root",
        mend=f"qsnapctl snapshot-current {facts.vm} NAME, or snapshot-fsck {facts.vm} --repair to "
        "have none",
    )


def _judge_unfinished(facts: Facts) -> Iterator[Finding]:
    for what, entry in (("taking", facts.checkpoint), ("the revert to", facts.restoring)):
        if entry is not None:
            yield Finding(
                code="job-unfinished",
                severity=WARNING,
                what=f"{what} snapshot {entry.plan.name} was begun and is not ended",
                mend="it is finished or undone as soon as the VM's QEMU answers, or has ended; "
                f"qsnapctl dominfo {facts.vm} says what is in the way",
            )
    if RENAMING_NAME in facts.entries:
        yield Finding(
            code="renaming-unfinished",
            severity=WARNING,
            what=f"renaming a snapshot was begun and is not ended ({facts.directory})",
            mend="it is ended before the next change of a snapshot's record, or when qsnapd "
            "starts; its log says what is in the way",
        )
    if OWED_THAW_NAME in facts.entries:
        yield Finding(
            code="thaw-owed",
            severity=WARNING,
            what="the guest's file systems were frozen, and it is not known that they were thawed",
            mend=f"qsnapctl domfsthaw {facts.vm}; qsnapd goes on trying by itself",
        )
    for partial in abandoned_partials(facts):
        yield Finding(
            code="partial-abandoned",
            severity=WARNING,
            what=f"{facts.directory}/.{partial.name}{_PARTIAL} was begun by a former daemon and "
            "belongs to no job: no snapshot of that name can be taken",
            mend=_repair(facts),
        )
    for name in abandoned_views(facts):
        yield Finding(
            code="view-abandoned",
            severity=WARNING,
            what=f"{facts.directory}/{name} is needed by a lazy restore for some milliseconds, "
            "and belongs to none",
            mend=_repair(facts),
        )
    plan = facts.next_start.plan if facts.next_start is not None else None
    lost = [
        overlay.path
        for overlay in (plan.overlays if isinstance(plan, Restore) else ())
        if (file := facts.files.get(overlay.path)) is not None and file.missing
    ]
    if plan is not None and lost:
        yield Finding(
            code="next-start-broken",
            severity=ERROR,
            what=f"VM {facts.vm} is to be started from snapshot {plan.name} on {', '.join(lost)}, "
            "which is missing",
            mend=f"qsnapctl snapshot-revert {facts.vm} {plan.name} makes it anew",
        )


def _judge_records(facts: Facts) -> Iterator[Finding]:
    for path, words in facts.unreadable:
        if path.endswith(LEASES_NAME):
            yield Finding(
                code="leases-unreadable", severity=WARNING, what=words, mend=_repair(facts)
            )
            continue
        yield Finding(
            code="record-unreadable",
            severity=ERROR,
            what=words,
            mend=f"run the version of qsnapd that wrote it; if that is gone too, move {path} "
            "away, and see that the guest runs and which images it runs on",
        )
    for lease, is_true in facts.leases:
        if lease.snapshot in facts.entries or facts.registration is not None:
            continue
        if is_true:
            yield Finding(
                code="lease-unknown",
                severity=WARNING,
                what=f"VM {lease.holder}, pid {lease.pid}, runs on files of snapshot "
                f"{lease.snapshot}, which there is no record of",
                mend="leave its files where they are until that VM has ended",
            )
        else:
            yield Finding(
                code="lease-stale",
                severity=NOTE,
                what=f"it is still written down that VM {lease.holder} runs on snapshot "
                f"{lease.snapshot}: both are gone",
                mend=_repair(facts),
            )
    clone = facts.registration
    if clone is not None and clone.snapshot not in facts.around.snapshots.get(clone.source, ()):
        yield Finding(
            code="clone-source-gone",
            severity=WARNING,
            what=f"VM {facts.vm} was made of snapshot {clone.snapshot} of VM {clone.source}, which "
            "there is no record of: nothing keeps the images it lies over",
            mend=f"qsnapctl snapshot-import {clone.source} --metadata FILE brings it back",
        )


def _judge_strangers(facts: Facts) -> Iterator[Finding]:
    begun = {f".{partial.name}{_PARTIAL}" for partial in facts.partials}
    for name in sorted(facts.entries - facts.inside.keys() - begun):
        # What an export has left, the next daemon removes.
        if is_of_a_vm(name) or is_draft(name) or is_staged_export(name):
            continue
        what = "is nothing that qsnapd knows"
        if _REMOVED.fullmatch(name):
            what = "holds what somebody else had put beside a snapshot that was deleted"
        elif name.endswith(DAMAGED_SUFFIX):
            what = "was the record of a snapshot, of no use, in whose place another was put"
        yield _stranger(f"{facts.directory}/{name}", what)
    for name, inside in facts.inside.items():
        if name not in facts.manifests:
            continue
        for other in sorted(inside):
            if not is_of_a_snapshot(other) and not is_draft(other):
                path = f"{facts.directory}/{name}/{other}"
                yield _stranger(path, "is nothing that qsnapd knows")
    kept = (*facts.manifests.values(), *facts.forgotten)
    used = {file.path for m in kept for disk in m.disks for file in disk.chain}
    for name in sorted(facts.disk_folders):
        folder = f"{facts.directory}/{DISKS_NAME}/{name}"
        being_made = any(name.startswith(f"{partial.name}-") for partial in facts.partials)
        if not being_made and not any(path.startswith(f"{folder}/") for path in used):
            yield Finding(
                code="disks-unused",
                severity=WARNING,
                what=f"{folder} holds the disks of an imported snapshot, which there is no "
                "record of",
                mend=f"qsnapctl snapshot-import {facts.vm} --metadata FILE, if its manifest was "
                "kept; else remove the folder, once no other VM lies over it",
            )


def _stranger(path: str, what: str) -> Finding:
    return Finding(
        code="stranger",
        severity=NOTE,
        what=f"{path} {what}",
        mend="move it elsewhere, if it is of use",
    )


def _repair(facts: Facts) -> str:
    return f"qsnapctl snapshot-fsck {facts.vm} --repair removes it"
