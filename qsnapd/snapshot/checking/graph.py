"""Whether a running VM's disks are where its snapshots say; pure, over the facts."""

import re
from collections.abc import Iterator

from qsnapd.model.findings import Finding, Severity
from qsnapd.model.snapshot import DiskLayer, FileIdentity
from qsnapd.snapshot.checking.facts import Facts
from qsnapd.snapshot.checking.live import Live
from qsnapd.vm.disks import FDSET_PREFIX, Disk
from qsnapd.vm.proc import FileKey

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

_OUR_NODE = re.compile(r"qsnapd-[0-9a-f]{8}-\d+")


def judge_graph(facts: Facts) -> Iterator[Finding]:
    """Yield what does not fit between QEMU's block graph and the current snapshot."""
    live = facts.live
    if live is None:
        return
    frozen = _frozen(facts)
    elsewhere: list[tuple[Disk, str]] = []
    expected = _expected(facts)
    for disk in live.disks:
        if disk.left_out is not None or not disk.chain:
            continue
        if names := frozen.get(_key(disk.chain[0])):
            yield _written(facts, disk, names)
        elif whose := facts.around.frozen.get(_key(disk.chain[0])):
            yield _written_by_another(disk, whose)
        elif disk.target in expected:
            name, layer = expected[disk.target]
            place = _place(facts, disk, layer)
            if place is None or any(_key(i) in frozen for i in disk.chain[1:place]):
                elsewhere.append((disk, name))
            else:
                yield from _judge_chain(facts, disk, name, layer, place)
    yield from _judge_elsewhere(facts, elsewhere, expected, frozen)
    targets = {disk.target for disk in live.disks}
    for target, (name, layer) in expected.items():
        if target not in targets:
            yield Finding(
                code="disk-gone",
                severity=WARNING,
                what=f"snapshot {name} has a disk {target} ({layer.frozen}), and the VM has none "
                "of that name any more",
                mend="nothing, if it was unplugged: a revert brings it back as it was",
            )
    yield from _judge_left(live)


def goes_on_from(facts: Facts) -> str | None:
    """The snapshot that a running VM's disks go on from, if all of them agree; else None."""
    frozen = _frozen(facts)
    candidates: set[str] | None = None
    for disk in facts.live.disks if facts.live is not None else ():
        if disk.left_out is None and disk.chain:
            below = (frozen[_key(i)] for i in disk.chain[1:] if _key(i) in frozen)
            found = set(next(below, ()))
            candidates = found if candidates is None else candidates & found
    newest = sorted(candidates or (), key=lambda name: facts.manifests[name].created_at)
    return newest[-1] if newest else None


def _frozen(facts: Facts) -> dict[FileKey, list[str]]:
    """The snapshots that each frozen image belongs to."""
    found: dict[FileKey, list[str]] = {}
    for manifest in facts.manifests.values():
        for disk in manifest.disks:
            file = facts.files[disk.frozen]
            if not file.missing and not file.problem:
                found.setdefault(file.key, []).append(manifest.name)
    return found


def _expected(facts: Facts) -> dict[str, tuple[str, DiskLayer]]:
    """Each disk as the current snapshot has it, or the nearest before it that does."""
    expected: dict[str, tuple[str, DiskLayer]] = {}
    seen = set[str]()
    name: str | None = facts.current
    while name is not None and name in facts.manifests and name not in seen:
        seen.add(name)
        for disk in facts.manifests[name].disks:
            expected.setdefault(disk.target, (name, disk))
        name = facts.manifests[name].parent
    return expected


def _key(image: FileIdentity) -> FileKey:
    return image.device, image.inode


def _place(facts: Facts, disk: Disk, layer: DiskLayer) -> int | None:
    """At which depth of the live chain the frozen image lies."""
    file = facts.files[layer.frozen]
    for depth, image in enumerate(disk.chain):
        if (
            image.inode == layer.chain[0].inode
            if file.missing and layer.chain
            else _key(image) == file.key
        ):
            return depth
    return None


def _written(facts: Facts, disk: Disk, names: list[str]) -> Finding:
    overlays = [
        layer.overlay
        for name in names
        for layer in facts.manifests[name].disks
        if layer.frozen == disk.path and layer.overlay
    ]
    rest = f", not on {' or '.join(overlays)}" if overlays else ""
    return Finding(
        code="frozen-in-use",
        severity=ERROR,
        what=f"disk {disk.target} runs on {disk.path}, the frozen image of snapshot "
        f"{', '.join(names)}: what the guest writes destroys it",
        mend=f"shut the VM down now and start it on its newest image{rest}; if that was merged "
        f"into this one: qsnapctl snapshot-delete {facts.vm} {names[0]} --metadata",
    )


def _written_by_another(disk: Disk, whose: str) -> Finding:
    return Finding(
        code="frozen-in-use",
        severity=ERROR,
        what=f"disk {disk.target} runs on {disk.path}, the frozen image of snapshot {whose}: what "
        "the guest writes destroys it",
        mend="shut the VM down now, and give it a disk of its own: an overlay over that image "
        "(qemu-img create -b), or a clone",
    )


def _judge_chain(
    facts: Facts, disk: Disk, name: str, layer: DiskLayer, place: int
) -> Iterator[Finding]:
    if len(disk.chain) < disk.depth:
        yield Finding(
            code="live-file-lost",
            severity=ERROR,
            what=f"disk {disk.target}: QEMU has {disk.depth} images open, of which only "
            f"{len(disk.chain)} can be found by their names: one was removed or replaced",
            mend="do not shut the VM down before its disk was copied (drive-backup, or from "
            "within the guest): the lost image lives only as long as its QEMU",
        )
        return
    below, chain = disk.chain[place:], layer.chain
    if [_key(image) for image in below] != [_now(facts, image) for image in chain]:
        found = ", ".join(image.path for image in below)
        yield Finding(
            code="live-chain-differs",
            severity=ERROR,
            what=f"disk {disk.target}: below {layer.frozen} QEMU has other images than snapshot "
            f"{name} says: {found}",
            mend=f"qsnapctl snapshot-verify {facts.vm} {name}; somebody has merged or moved "
            "images below it",
        )
    above = [image for image in disk.chain[:place] if place > 1]
    foreign = [image.path for image in above if not _is_known(facts, image)]
    if foreign:
        yield Finding(
            code="live-foreign-layer",
            severity=WARNING,
            what=f"disk {disk.target}: somebody else has put {', '.join(foreign)} between the VM "
            f"and snapshot {name}",
            mend="nothing has to be done: the next snapshot goes on from there. Do not remove "
            "these files; block-commit merges them",
        )
    elif above:
        images = ", ".join(image.path for image in above)
        yield Finding(
            code="live-unlisted-layer",
            severity=NOTE,
            what=f"disk {disk.target}: {images} came after snapshot {name}, by snapshots that are "
            "not listed (--no-metadata, or deleted with --metadata)",
            mend="nothing has to be done: the next snapshot goes on from there",
        )


def _now(facts: Facts, image: FileIdentity) -> FileKey:
    file = facts.files[image.path]
    return (image.device, image.inode) if file.missing or file.problem else file.key


def _is_known(facts: Facts, image: FileIdentity) -> bool:
    keys = {_key(made) for made in facts.made}
    if facts.registration is not None:
        keys |= {_key(overlay) for overlay in facts.registration.overlays}
    paths = {disk.overlay for m in facts.manifests.values() for disk in m.disks}
    return _key(image) in keys or image.path in paths


def _judge_elsewhere(
    facts: Facts,
    elsewhere: list[tuple[Disk, str]],
    expected: dict[str, tuple[str, DiskLayer]],
    frozen: dict[FileKey, list[str]],
) -> Iterator[Finding]:
    """Disks that do not go on from where the current snapshot says."""
    others: dict[str, list[str]] = {}
    for disk, name in elsewhere:
        layer = expected[disk.target][1]
        found = next((frozen[_key(i)] for i in disk.chain if _key(i) in frozen), None)
        if disk.path == layer.overlay:
            yield Finding(
                code="live-chain-cut",
                severity=ERROR,
                what=f"disk {disk.target}: {disk.path} no longer lies over {layer.frozen}, the "
                f"frozen image of snapshot {name}: somebody has merged it into another",
                mend=f"the VM is whole; qsnapctl snapshot-delete {facts.vm} {name} --metadata "
                f"forgets the snapshot, if snapshot-verify {facts.vm} {name} says that it is lost",
            )
        elif found is not None:
            others.setdefault(found[0], []).append(disk.target)
        else:
            yield Finding(
                code="live-unknown",
                severity=WARNING,
                what=f"disk {disk.target} runs on {disk.path}, which lies over no image of any "
                f"snapshot: somebody has moved or merged it",
                mend="the snapshots can still be reverted to; the next one taken will be their "
                "child by name only",
            )
    for name, targets in others.items():
        yield Finding(
            code="current-differs",
            severity=WARNING,
            what=f"disk {', '.join(targets)}: the VM goes on from snapshot {name}, not from "
            f"{facts.current}, which is the current one",
            mend=f"qsnapctl snapshot-current {facts.vm} {name}",
        )


def _judge_left(live: Live) -> Iterator[Finding]:
    """What qsnapd has given to QEMU, and nothing uses."""
    unused = {
        node.name
        for node in live.nodes
        if _OUR_NODE.fullmatch(node.name) and node.file not in live.in_chains
    }
    for name in sorted(unused):
        yield Finding(
            code="node-unused",
            severity=NOTE,
            what=f"QEMU has a node {name} of qsnapd's that no disk uses",
            mend=f'it is gone when QEMU ends, or by QMP: blockdev-del {{"node-name": "{name}"}}',
        )
    files = {node.file for node in live.nodes}
    for handed in live.handed:
        if f"{FDSET_PREFIX}{handed.number}" not in files:
            yield Finding(
                code="descriptors-unused",
                severity=NOTE,
                what=f"QEMU holds descriptor set {handed.number} for {handed.path}, and nothing "
                "uses it",
                mend="it is gone when QEMU ends, or by QMP: remove-fd "
                f'{{"fdset-id": {handed.number}}}',
            )
