"""What is wrong with the files of a VM's snapshots; pure, over the facts."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from qsnapd.model.findings import Finding, Severity
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest
from qsnapd.snapshot.checking.disk import FileFact
from qsnapd.snapshot.checking.facts import Facts, abandoned_files
from qsnapd.snapshot.moving.scan import FORGOTTEN_NAME
from qsnapd.snapshot.taking.plan_disks import image_stem
from qsnapd.vm.proc import FileKey

ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

UNUSED = "overlay-unused"
_SECTOR_BYTES = 512


def judge_files(facts: Facts) -> Iterator[Finding]:
    """Yield what does not fit between the manifests and the files that they name."""
    for manifest in facts.manifests.values():
        yield from _judge_memory(facts, manifest)
    yield from _judge_images(facts)
    yield from _judge_frozen(facts)
    yield from _judge_links(facts)
    yield from _judge_clone(facts)
    yield from _judge_leftovers(facts)
    yield from _judge_unused(facts)


def _judge_memory(facts: Facts, manifest: Manifest) -> Iterator[Finding]:
    memory = manifest.memory
    if memory is None:
        return
    file = facts.files[memory.path]
    what = f"the memory image {memory.path} of snapshot {manifest.name}"
    if file.missing or file.problem:
        yield Finding(
            code="memory-missing" if file.missing else "memory-unreadable",
            severity=ERROR,
            what=f"{what} {_lost(file)}",
            mend=f"bring it back there; without it, qsnapctl snapshot-delete {facts.vm} "
            f"{manifest.name}",
        )
    elif memory.file is not None and file.key[1] != memory.file.inode:
        yield Finding(
            code="memory-replaced",
            severity=ERROR,
            what=f"{what} is another file than the one that was saved",
            mend=f"bring that one back. If this is a copy of it: {_anew(facts, manifest.name)}",
        )
    elif file.size_bytes != memory.size_bytes:
        yield Finding(
            code="memory-size",
            severity=ERROR,
            what=f"{what} has {file.size_bytes} bytes, it was saved with {memory.size_bytes}",
            mend=f"bring a copy of it back, or qsnapctl snapshot-delete {facts.vm} {manifest.name}",
        )


def _anew(facts: Facts, name: str) -> str:
    """How a snapshot gets to know its files anew."""
    return (
        f"qsnapctl snapshot-delete {facts.vm} {name} --metadata, then snapshot-import {facts.vm} "
        f"--scan {facts.directory}/{FORGOTTEN_NAME}"
    )


def _judge_images(facts: Facts) -> Iterator[Finding]:
    """Each image once, with all snapshots that need it."""
    needed: dict[tuple[str, int], list[str]] = {}
    for manifest in facts.manifests.values():
        for disk in manifest.disks:
            for image in disk.chain:
                needed.setdefault((image.path, image.inode), []).append(manifest.name)
    for (path, inode), names in needed.items():
        file = facts.files[path]
        whose = ", ".join(dict.fromkeys(names))
        if file.missing or file.problem:
            yield Finding(
                code="image-missing" if file.missing else "image-unreadable",
                severity=ERROR,
                what=f"{path} {_lost(file)}; needed by: {whose}",
                mend="bring it back there: snapshots of a disk are worth nothing without the "
                "images below",
            )
        elif not is_that(file, inode):
            yield Finding(
                code="image-replaced",
                severity=ERROR,
                what=f"{path} is another file than when the snapshots were taken that need it: "
                f"{whose}",
                mend=f"bring that one back. If this is an exact copy of it, for each of them: "
                f"{_anew(facts, 'NAME')}",
            )
        elif file.header_problem is not None:
            yield Finding(
                code="image-header",
                severity=ERROR,
                what=f"{path} is damaged: {file.header_problem}; needed by: {whose}",
                mend="bring a copy of it back",
            )
        elif file.header is not None and file.header.is_corrupt:
            yield Finding(
                code="image-corrupt",
                severity=ERROR,
                what=f"QEMU has found {path} damaged, and marked it; needed by: {whose}",
                mend=f"with no VM on it: qemu-img check -r all {path}",
            )


def _judge_frozen(facts: Facts) -> Iterator[Finding]:
    """What a manifest says of its newest images, and they of themselves."""
    seen = set[tuple[str, str, int]]()
    for manifest in facts.manifests.values():
        for disk in manifest.disks:
            file = _whole(facts, disk.chain[0]) if disk.chain else None
            said = (disk.frozen, disk.frozen_format, disk.virtual_size_bytes)
            if file is None or said in seen:
                continue
            seen.add(said)
            yield from _judge_one(manifest, disk, file)


def _judge_one(manifest: Manifest, disk: DiskLayer, file: FileFact) -> Iterator[Finding]:
    what = f"snapshot {manifest.name}, disk {disk.target}: {disk.frozen}"
    if disk.frozen_format == "qcow2" and file.header is None:
        yield Finding(
            code="image-format",
            severity=ERROR,
            what=f"{what} is no qcow2 image any more",
            mend="bring a copy of it back",
        )
        return
    size_bytes = virtual_size_bytes(file, disk.frozen_format)
    if size_bytes != disk.virtual_size_bytes:
        yield Finding(
            code="image-size",
            severity=ERROR,
            what=f"{what} is a disk of {size_bytes} bytes now, it was one of "
            f"{disk.virtual_size_bytes}",
            mend=f"somebody has resized it, and maybe written to it: bring a copy back, or "
            f"qemu-img resize -f {disk.frozen_format} {disk.frozen} {disk.virtual_size_bytes}",
        )


def _judge_links(facts: Facts) -> Iterator[Finding]:
    """Whether each image lies over the one that the manifests say."""
    formats = {
        disk.frozen: disk.frozen_format for m in facts.manifests.values() for disk in m.disks
    }
    seen = set[tuple[str, str | None]]()
    for manifest in facts.manifests.values():
        for disk in manifest.disks:
            below = (*disk.chain, None)
            for upper, lower in pairwise(below):
                assert upper is not None, "only the last one has none below"
                link = (upper.path, lower.path if lower else None)
                if link not in seen:
                    seen.add(link)
                    yield from _judge_link(facts, upper, lower, formats)


def _judge_link(
    facts: Facts, upper: FileIdentity, lower: FileIdentity | None, formats: dict[str, str]
) -> Iterator[Finding]:
    file = _whole(facts, upper)
    said = formats.get(upper.path)
    if file is None or (said is not None and file.is_qcow2 != (said == "qcow2")):
        return  # a raw image may hold anything; a qcow2 one that is none is told of elsewhere
    named = file.header.backing if file.header else None
    if lower is None:
        if named is not None:
            yield _wrong_link(upper, f"is an overlay over {named} now, it was none", '-b ""')
        return
    below = _whole(facts, lower)
    if below is None:
        return
    known = formats.get(lower.path)
    mend = f"-F {known or ('qcow2' if below.is_qcow2 else 'raw')} -b {lower.path}"
    if named is None or file.header is None:
        yield _wrong_link(upper, f"is no longer an overlay over {lower.path}", mend)
    elif file.backing_key != below.key:
        yield _wrong_link(
            upper, f"is an overlay over {named} now, it was one over {lower.path}", mend
        )
    elif known and file.header.backing_format not in (None, known):
        said = file.header.backing_format
        yield Finding(
            code="backing-format",
            severity=ERROR,
            what=f"{upper.path} says that {lower.path} below it is {said}, it is {known}",
            mend=f"with no VM on it: qemu-img rebase -u -f qcow2 {mend} {upper.path}",
        )


def _wrong_link(upper: FileIdentity, what: str, mend: str) -> Finding:
    return Finding(
        code="backing-differs",
        severity=ERROR,
        what=f"{upper.path} {what}",
        mend=f"if its content is unchanged, and with no VM on it: qemu-img rebase -u -f qcow2 "
        f"{mend} {upper.path}",
    )


def _judge_clone(facts: Facts) -> Iterator[Finding]:
    """What a clone lies over; while it runs, QEMU holds that open."""
    if facts.last_seen is None or facts.live is not None:
        return
    for disk in facts.last_seen.disks:
        for image in disk.chain:
            file = facts.files[image.path]
            if file.missing or not is_that(file, image.inode):
                yield Finding(
                    code="clone-disk-missing",
                    severity=ERROR,
                    what=f"disk {disk.target} of VM {facts.vm} needs {image.path}, which "
                    + ("is missing" if file.missing else "is another file by now"),
                    mend="bring it back there, or make the clone anew: qsnapctl undefine "
                    f"{facts.vm}, then snapshot-clone",
                )


def _judge_leftovers(facts: Facts) -> Iterator[Finding]:
    for leftover in abandoned_files(facts):
        yield Finding(
            code="file-abandoned",
            severity=WARNING,
            what=f"{leftover.path} was begun by a job that is not under way any more",
            mend=f"qsnapctl snapshot-fsck {facts.vm} --repair removes it, if it is older than the "
            "daemon; else remove it yourself",
        )


def _judge_unused(facts: Facts) -> Iterator[Finding]:
    """Overlays that nothing leads to; which are the VM's own, only its QEMU can tell."""
    if facts.live is None or facts.is_busy:
        return
    used: set[FileKey] = set(facts.around.needed)
    kept = (*facts.manifests.values(), *facts.forgotten)
    chains = [disk.chain for m in kept for disk in m.disks]
    chains += [disk.chain for disk in facts.live.disks]
    chains += [entry.made for entry in facts.journals()]
    if facts.registration is not None:
        chains.append(facts.registration.overlays)
    for image in (image for chain in chains for image in chain):
        file = facts.files.get(image.path)
        used.add(file.key if file is not None else (image.device, image.inode))
    overlays = {
        disk.overlay
        for m in facts.manifests.values()
        for disk in m.disks
        if disk.overlay is not None
    }
    targets = {disk.target for disk in facts.live.disks}
    unplugged = {
        image_stem(Path(disk.frozen))
        for m in facts.manifests.values()
        for disk in m.disks
        if disk.target not in targets
    }
    for path in sorted(overlays | {image.path for image in facts.made}):
        file = facts.files[path]
        is_lost = file.missing or file.problem or image_stem(Path(path)) in unplugged
        if not is_lost and file.key not in used:
            yield Finding(
                code=UNUSED,
                severity=NOTE,
                what=f"{path} holds a state of the VM that was given up: no snapshot lies over "
                "it, and the VM does not run on it",
                mend="remove it, if nobody needs that state",
            )


def _whole(facts: Facts, image: FileIdentity) -> FileFact | None:
    """The file, unless something worse was already said of it."""
    file = facts.files[image.path]
    lost = file.missing or file.problem or file.header_problem
    return None if lost or not is_that(file, image.inode) else file


def is_that(file: FileFact, inode: int) -> bool:
    """As `vm.identity.is_still`: by inode alone, and devices by their names."""
    return file.path.startswith("/dev/") if file.is_device else file.key[1] == inode


def virtual_size_bytes(file: FileFact, image_format: str) -> int:
    """What a guest would see."""
    if image_format == "qcow2" and file.header is not None:
        return file.header.virtual_size_bytes
    return -(-file.size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES


def _lost(file: FileFact) -> str:
    return "is missing" if file.missing else f"cannot be looked at: {file.problem}"
