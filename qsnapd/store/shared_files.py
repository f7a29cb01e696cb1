"""One object for each image file, however many snapshots name it.

A chain of n snapshots names its images n²/2 times.
"""

from weakref import WeakValueDictionary

from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest


class SharedFiles:
    """The image files that manifests in memory name; forgets those that none does any more."""

    def __init__(self) -> None:
        self._known = WeakValueDictionary[tuple[str, int, int], FileIdentity]()

    def shared_by(self, manifest: Manifest) -> Manifest:
        """The same manifest, with what it names in common with others held once."""
        return manifest.model_copy(
            update={"disks": tuple(self._layer(disk) for disk in manifest.disks)}
        )

    def _layer(self, disk: DiskLayer) -> DiskLayer:
        return disk.model_copy(update={"chain": tuple(self._file(file) for file in disk.chain)})

    def _file(self, file: FileIdentity) -> FileIdentity:
        return self._known.setdefault((file.path, file.device, file.inode), file)
