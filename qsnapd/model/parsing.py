"""A manifest out of its JSON: what is not understood to the last field is refused."""

import json
from typing import Any

from pydantic import ValidationError

from qsnapd.errors import ManifestInvalid, ManifestTooNew
from qsnapd.model.snapshot import MANIFEST_FORMAT, Manifest


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Read the manifest that *text*, found at *where*, is the whole of.

    Raises: ManifestTooNew: a newer qsnapd wrote it. ManifestInvalid: it is damaged, or has a
    field that nobody knows; the message names *where* and the field.
    """
    require_format(load_object(text, where), "format", MANIFEST_FORMAT, where)
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        cause = "is unknown" if first["type"] == "extra_forbidden" else f": {first['msg']}"
        raise ManifestInvalid(f"{where} cannot be used: field {field!r} {cause}") from exc


def load_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object that *text* is; empty if it is something else. Raises: ManifestInvalid."""
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ManifestInvalid(f"{where} is damaged: it is not valid JSON") from exc
    return parsed if isinstance(parsed, dict) else {}


def require_format(parsed: dict[str, Any], key: str, newest: int, where: str) -> None:
    """Refuse what is newer, before anything else is looked at: it may look in any way.

    Raises: ManifestTooNew. ManifestInvalid: *parsed* does not tell.
    """
    number = parsed.get(key)
    if type(number) is not int or number < 1:
        raise ManifestInvalid(f"{where} is damaged: it does not tell its format")
    if number > newest:
        raise ManifestTooNew(
            f"{where} has format {number}, this qsnapd reads up to {newest}: a newer version "
            "wrote it"
        )
