"""Reading and writing `snapshot.json`: what is not understood to the last field is refused."""

import os
from pathlib import Path

from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import Manifest

MANIFEST_NAME = "snapshot.json"
_LIMIT_BYTES = 16 << 20


def read_manifest(path: Path) -> Manifest:
    """Read the manifest *path*.

    Raises: ManifestTooNew: a newer qsnapd wrote it. ManifestInvalid: it is damaged, or has a
    field that nobody knows; the message names file and field. OSError.
    """
    with path.open("rb") as file:
        return parse_manifest(file.read(_LIMIT_BYTES), str(path))


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Create *path*, readable for its owner alone, durable on return. Raises: OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
