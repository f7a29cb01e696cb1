"""Which disk image lies over which: all that is known of one VM's files, and who needs them.

Pure; `graph_reading` finds it out. An image is known by device and inode.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qsnapd.model.deletion import Image
from qsnapd.vm.proc import FileKey


@dataclass(frozen=True)
class GraphImage:
    """One image file and what its header says of others."""

    image: Image
    virtual_size_bytes: int
    allocated_bytes: int
    is_device: bool
    backing: FileKey | None
    """The image below it, if that is a file that was found."""
    has_strange_backing: bool = False
    """It lies over something that is not a file that was found."""


@dataclass
class Graph:
    """All images that were found."""

    images: dict[FileKey, GraphImage] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What could not be read or does not fit together, one sentence each."""
    others: dict[FileKey, set[str]] = field(default_factory=dict)
    """Which other VMs need an image."""
    starts_on: set[FileKey] = field(default_factory=set)
    """What the VM, which is shut off, is to be started on: these have to keep their names."""
    last_on: set[FileKey] = field(default_factory=set)
    """What the VM, which is shut off, was last seen on, unless it is to be started elsewhere."""
    forgotten: dict[FileKey, set[str]] = field(default_factory=dict)
    """Which snapshots show an image that are not listed, but can be taken in again."""

    def users(self, key: FileKey) -> tuple[GraphImage, ...]:
        """The images that lie right over this one."""
        return tuple(image for image in self.images.values() if image.backing == key)

    def chain(self, key: FileKey | None) -> tuple[FileKey, ...]:
        """An image and all below it, newest first; as far as they were found."""
        found: list[FileKey] = []
        while key is not None and key in self.images and key not in found:
            found.append(key)
            key = self.images[key].backing
        return tuple(found)

    def need(self, key: FileKey, vm: str) -> None:
        """Note that another VM needs this image and all below it."""
        for image in self.chain(key):
            self.others.setdefault(image, set()).add(vm)


Frozen = Mapping[FileKey, tuple[str, ...]]
"""Which snapshots have an image as that of one of their disks."""
