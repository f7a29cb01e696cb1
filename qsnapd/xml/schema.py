"""libvirt's own schema, where it is installed (Debian: in libvirt0)."""

from pathlib import Path

from lxml import etree

from qsnapd.errors import BadRequest
from qsnapd.xml.reading import parse

SCHEMA = Path("/usr/share/libvirt/schemas/domainsnapshot.rng")


def validate(data: bytes, schema: Path = SCHEMA) -> bool:
    """Hold the XML against libvirt's schema; returns whether that is there.

    Raises: BadRequest: it does not fit, and where; or it is no XML at all.
    """
    root = parse(data)
    if not schema.exists():
        return False
    try:
        grammar = etree.RelaxNG(file=str(schema))
    except etree.RelaxNGParseError as exc:
        raise BadRequest(f"libvirt's schema {schema} cannot be used: {exc}") from exc
    if not grammar.validate(root):
        # libxml2 ends with the outermost element: what comes first is nearest to the cause
        causes = dict.fromkeys(
            f"line {e.line}: {e.message}" if e.line else e.message for e in grammar.error_log
        )
        raise BadRequest(f"the XML does not fit libvirt's schema {schema}: {'; '.join(causes)}")
    return True
