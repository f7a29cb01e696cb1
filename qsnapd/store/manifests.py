"""Reading and writing `snapshot.json`: what is not understood to the last field is refused."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qsnapd.errors import ManifestInvalid, ManifestTooNew
from qsnapd.model.snapshot import MANIFEST_FORMAT, Manifest

MANIFEST_NAME = "snapshot.json"
_LIMIT_BYTES = 16 << 20


def read_manifest(path: Path) -> Manifest:
    """Read the manifest *path*.

    Raises: ManifestTooNew: a newer qsnapd wrote it. ManifestInvalid: it is damaged, or has a
    field that nobody knows; the message names file and field. OSError.
    """
    with path.open("rb") as file:
        text = file.read(_LIMIT_BYTES)
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ManifestInvalid(f"{path} is damaged: it is not valid JSON") from exc
    # Before anything else: a newer format may look in any way.
    number = parsed.get("format") if isinstance(parsed, dict) else None
    if type(number) is not int or number < 1:
        raise ManifestInvalid(f"{path} is damaged: it does not tell its format")
    if number > MANIFEST_FORMAT:
        raise ManifestTooNew(
            f"{path} has format {number}, this qsnapd reads up to {MANIFEST_FORMAT}: "
            "a newer version wrote it"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        cause = "is unknown" if first["type"] == "extra_forbidden" else f": {first['msg']}"
        raise ManifestInvalid(f"{path} cannot be used: field {field!r} {cause}") from exc


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Create *path*, readable for its owner alone, durable on return. Raises: OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
