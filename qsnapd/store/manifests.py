"""Reading and writing `snapshot.json`: what is not understood to the last field is refused."""

from pathlib import Path

from qsnapd.image.files import replace_file, write_new
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
    """Create *path*, readable for its owner alone, its content synced. Raises: OSError."""
    write_new(path, manifest.model_dump_json(indent=1) + "\n")


def replace_manifest(path: Path, manifest: Manifest) -> None:
    """Put *manifest* in place of the one at *path*. Raises: as `replace_file`."""
    replace_file(path, manifest.model_dump_json(indent=1) + "\n")
