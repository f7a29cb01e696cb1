"""XPath expressions over XML of our own."""

from typing import Any

from lxml import etree

from qsnapd.errors import BadRequest
from qsnapd.xml.escaping import attribute, escaped
from qsnapd.xml.reading import Element
from qsnapd.xml.writing import as_text


def select(xml: str, expression: str, *, wrapped: bool = False) -> list[str]:
    """What *expression* finds in *xml*, each piece as virsh prints it.

    *wrapped*: one piece, a `<nodes>` with all of it. A number, a truth or a string is told as
    it is. Raises: BadRequest: it is no XPath expression.
    """
    root = etree.fromstring(xml, etree.XMLParser(remove_blank_text=True))
    try:
        found: Any = root.getroottree().xpath(expression, namespaces=_namespaces(root))
    except etree.XPathError as exc:
        raise BadRequest(f"Incorrect xpath '{expression}': {exc}") from exc
    if isinstance(found, bool):
        return [str(found).lower()]
    if not isinstance(found, list):
        return [f"{found:g}" if isinstance(found, float) else str(found)]
    pieces = [_piece(node) for node in found]
    if not wrapped:
        return pieces
    if any(isinstance(node, etree._Element) for node in found):
        lines = [f"  {line}\n" for piece in pieces for line in piece.splitlines()]
        return [f"<nodes>\n{''.join(lines)}</nodes>"]
    return [f"<nodes>{''.join(pieces)}</nodes>"]


def _namespaces(root: Element) -> dict[str, str]:
    """So that an expression can use the prefixes that the XML uses, wherever."""
    return {prefix: uri for node in root.iter() for prefix, uri in node.nsmap.items() if prefix}


def _piece(node: object) -> str:
    if isinstance(node, etree._Element):
        return as_text(node).rstrip("\n")
    if (name := getattr(node, "attrname", None)) is not None:
        return attribute(str(name), str(node)).replace("'", '"')
    return escaped(str(node))
