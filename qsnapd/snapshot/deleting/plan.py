"""What deleting a snapshot does to each of its disks, and every reason not to; pure.

Below S's frozen image F and the images right over it ("users") it comes down to this: nobody
over it, F goes; one, that is merged into F, so that the older name survives; several, what F
holds is copied into each of them, and F goes. Only what qsnapd has made ever goes.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qsnapd.errors import Blocked, WrongState
from qsnapd.model.deletion import DeletePlan, Merge
from qsnapd.model.snapshot import FileIdentity, Manifest
from qsnapd.snapshot.deleting.graph import Graph, GraphImage
from qsnapd.vm.identity import key_of
from qsnapd.vm.live_chain import LiveDisk
from qsnapd.vm.proc import FileKey


@dataclass(frozen=True)
class Scene:
    """All that the decision depends on."""

    vm: str
    snapshots: Mapping[str, Manifest]
    current: str | None
    graph: Graph
    live: tuple[LiveDisk, ...] | None
    """None: the VM does not run."""
    pid: int = 0
    start_time_ticks: int = 0
    read_only: Mapping[FileKey, str] = field(default_factory=dict)
    """Images that the running VM has open for reading alone, and the targets of those disks."""

    def live_disk(self, key: FileKey) -> tuple[LiveDisk, int] | None:
        """The running VM's disk that has this image, and how far down."""
        for disk in self.live or ():
            if (depth := disk.find(key)) is not None:
                return disk, depth
        return None

    def is_written_to(self, key: FileKey) -> bool:
        """Whether the VM writes to this image, or did when it last ran."""
        where = self.live_disk(key)
        return where[1] == 0 if where is not None else key in self.graph.last_on

    def frozen_by(self, key: FileKey, but: str) -> list[str]:
        """Other snapshots that show this very image, also those that only were forgotten."""
        listed = (
            name
            for name, manifest in self.snapshots.items()
            if name != but and any(key_of(disk.frozen) == key for disk in manifest.disks)
        )
        forgotten = (f"{name} (forgotten)" for name in self.graph.forgotten.get(key, ()))
        return sorted((*listed, *forgotten))

    def left_out_by(self, key: FileKey, but: str) -> list[str]:
        """Other snapshots whose disks go on from this very image when they are restored."""
        return sorted(
            name
            for name, manifest in self.snapshots.items()
            if name != but and any(key_of(disk.frozen) == key for disk in manifest.left_out)
        )


def plan_deletion(name: str, scene: Scene) -> DeletePlan:
    """Decide for each disk of the snapshot; looks up file identities.

    Raises: WrongState, Blocked: why it cannot be deleted now, with the way out.
    """
    manifest = scene.snapshots[name]
    _refuse_unknown(manifest, scene)
    merges: list[Merge] = []
    doomed: list[FileIdentity] = []
    notes: list[str] = []
    for disk in manifest.disks:
        frozen = key_of(disk.frozen)
        assert frozen is not None, "the graph has it"
        decision = _Decision(name, disk.target, frozen, scene)
        merges += decision.merges
        doomed += decision.doomed
        notes += decision.notes
    _refuse_read_only(merges, doomed, scene)
    return DeletePlan(
        token=secrets.token_hex(4),
        vm=scene.vm,
        name=name,
        parent=manifest.parent,
        manifest=manifest,
        was_current=scene.current == name,
        pid=scene.pid,
        start_time_ticks=scene.start_time_ticks,
        merges=tuple(merges),
        doomed=tuple(doomed),
        memory=_memory(manifest, scene),
        notes=tuple(notes),
    )


def _refuse_unknown(manifest: Manifest, scene: Scene) -> None:
    if scene.graph.problems:
        raise Blocked(
            f"snapshot {manifest.name} of VM {scene.vm} is not deleted, because not all is known "
            "of what may need its images:\n"
            + "\n".join(dict.fromkeys(scene.graph.problems))
            + f"\nqsnapctl snapshot-fsck {scene.vm} tells more; snapshot-delete --metadata forgets "
            "a snapshot and leaves its files alone"
        )


def _refuse_read_only(
    merges: Sequence[Merge], doomed: Sequence[FileIdentity], scene: Scene
) -> None:
    files = [image.file for merge in merges for image in (merge.lower, merge.upper)]
    for file in (*files, *doomed):
        target = scene.read_only.get((file.device, file.inode))
        if target is not None:
            raise Blocked(
                f"VM {scene.vm} has {file.path} as its read-only disk {target}, or below it, too: "
                "detach that first"
            )


def _memory(manifest: Manifest, scene: Scene) -> FileIdentity | None:
    """The memory image that is to go, if it is not in the snapshot's folder."""
    memory = manifest.memory
    if memory is None or memory.file is None or memory.file.path != memory.path:
        return None
    shared = any(
        other.memory is not None and other.memory.path == memory.path
        for name, other in scene.snapshots.items()
        if name != manifest.name
    )
    return None if shared else memory.file


class _Decision:
    """Of one disk."""

    def __init__(self, snapshot: str, target: str, frozen: FileKey, scene: Scene) -> None:
        self._snapshot = snapshot
        self._target = target
        self._scene = scene
        self._graph = scene.graph
        self.merges: list[Merge] = []
        self.doomed: list[FileIdentity] = []
        self.notes: list[str] = []
        self._decide(self._graph.images[frozen])

    def _decide(self, lower: GraphImage) -> None:
        key = lower.image.key
        if others := self._scene.frozen_by(key, self._snapshot):
            self.notes.append(
                f"disk {self._target}: {lower.image.path} stays as it is, it is also the image of "
                f"{', '.join(others)}"
            )
            return
        self._refuse_clones(lower)
        users = self._graph.users(key)
        if self._scene.is_written_to(key):
            if users:
                verb = "was last seen writing" if self._scene.live is None else "writes"
                raise Blocked(
                    f"disk {self._target}: VM {self._scene.vm} {verb} to {lower.image.path}, which "
                    f"the snapshot {self._snapshot} has frozen: it was started on the wrong image, "
                    f"and what lies over that, {users[0].image.path}, must not be merged into it"
                )
            return
        if not users:
            self._drop(lower)
        elif len(users) > 1 or self._keeps_its_name(users[0], lower):
            self._spread(lower, users)
        else:
            self._commit(lower, users[0])

    def _keeps_its_name(self, upper: GraphImage, lower: GraphImage) -> bool:
        """Whether somebody will look for *upper* under its name, and it cannot be told."""
        key = upper.image.key
        if key in self._graph.starts_on:
            return True
        # The newest image of a VM that is shut off, or of a disk that it has not got now.
        is_tip = not self._graph.users(key) and not self._scene.frozen_by(key, self._snapshot)
        return self._scene.live_disk(key) is None and is_tip and lower.image.made

    def _drop(self, image: GraphImage) -> None:
        """Let an image go that nobody lies over, and those below that were there for it alone."""
        going: GraphImage | None = image
        while going is not None and self._is_ours_alone(going):
            self.doomed.append(going.image.file)
            below = going.backing and self._graph.images[going.backing]
            if not below or len(self._graph.users(below.image.key)) > 1:
                return
            going = below
        if going is image:
            self._left(image)

    def _is_ours_alone(self, image: GraphImage) -> bool:
        key = image.image.key
        return (
            image.image.made
            and not self._scene.frozen_by(key, self._snapshot)
            and key not in self._graph.others
            and not self._scene.left_out_by(key, self._snapshot)
            and self._scene.live_disk(key) is None
            and key not in self._graph.starts_on
            and key not in self._graph.last_on
        )

    def _left(self, image: GraphImage) -> None:
        if not image.image.made:
            self.notes.append(
                f"disk {self._target}: {image.image.path} is left where it is: qsnapd has not "
                "made it"
            )

    def _spread(self, lower: GraphImage, users: Sequence[GraphImage]) -> None:
        """Copy an image into all that lie over it."""
        if not lower.image.made:
            self.notes.append(
                f"disk {self._target}: {lower.image.path} stays below "
                f"{', '.join(user.image.path for user in users)}: qsnapd has not made it"
            )
            return
        if who := self._scene.left_out_by(lower.image.key, self._snapshot):
            self.notes.append(
                f"disk {self._target}: {lower.image.path} stays, {', '.join(who)} left that disk "
                "out, on this image"
            )
            return
        if lower.has_strange_backing:
            raise Blocked(
                f"disk {self._target}: {lower.image.path} lies over something that is no file, so "
                "that nothing can be put in its place"
            )
        below = self._graph.images[lower.backing].image if lower.backing else None
        for user in users:
            self.merges.append(
                Merge(
                    target=self._target,
                    kind="stream",
                    lower=lower.image,
                    upper=user.image,
                    below=below,
                    size_bytes=lower.allocated_bytes,
                )
            )
        self.doomed.append(lower.image.file)

    def _commit(self, lower: GraphImage, upper: GraphImage) -> None:
        """Merge an image into the one below it."""
        key = upper.image.key
        self._refuse_clones(upper)
        above = self._graph.users(key)
        where = self._scene.live_disk(key)
        if self._scene.is_written_to(key) and above:
            raise Blocked(
                f"disk {self._target}: VM {self._scene.vm} writes to {upper.image.path}, or did "
                "when it was last seen, and "
                f"{above[0].image.path} lies over it: that is damaged. Nothing was touched"
            )
        if upper.virtual_size_bytes < lower.virtual_size_bytes:
            raise Blocked(
                f"disk {self._target}: {upper.image.path} is a disk of {upper.virtual_size_bytes} "
                f"bytes and {lower.image.path} a larger one: merging would change the size that "
                "the guest sees"
            )
        if lower.is_device and upper.virtual_size_bytes > lower.virtual_size_bytes:
            raise Blocked(
                f"disk {self._target}: what was written later belongs to a disk of "
                f"{upper.virtual_size_bytes} bytes, and the device {lower.image.path} has room for "
                f"{lower.virtual_size_bytes}: make that larger first"
            )
        self.merges.append(
            Merge(
                target=self._target,
                kind="commit",
                lower=lower.image,
                upper=upper.image,
                above=tuple(image.image for image in above),
                was_active=where is not None and where[1] == 0,
                size_bytes=upper.allocated_bytes,
            )
        )
        if upper.image.made:
            self.doomed.append(upper.image.file)
        else:
            self._left(upper)
        if where is not None and where[1] == 0 and where[0].bitmaps:
            self.notes.append(
                f"disk {self._target}: the dirty bitmaps of {upper.image.path} go with it "
                f"({', '.join(where[0].bitmaps)}); {lower.image.path} has those it had, which note "
                "what is merged: for others the next backup has to be a full one"
            )

    def _refuse_clones(self, image: GraphImage) -> None:
        vms = sorted(self._graph.others.get(image.image.key, ()))
        if vms:
            raise WrongState(
                f"snapshot {self._snapshot} of VM {self._scene.vm} is in use: the disk "
                f"{self._target} of VM {', '.join(vms)} lies over {image.image.path}. Undefine "
                "that VM, or delete its snapshots, first"
            )


def affected(plan: DeletePlan, snapshots: Mapping[str, Manifest]) -> Iterator[str]:
    """The snapshots whose images or manifests change, the deleted one first."""
    yield plan.name
    keys = {image.key for merge in plan.merges for image in (merge.lower, merge.upper)}
    for name, manifest in snapshots.items():
        chains = (file.path for disk in manifest.disks for file in disk.chain)
        if name != plan.name and (
            manifest.parent == plan.name or not keys.isdisjoint(map(key_of, chains))
        ):
            yield name
