"""XML from strangers: bounded, without entities, and nothing in it is passed over in silence.

Every complaint is a BadRequest that names the line.
"""

from collections.abc import Iterable
from typing import Never

from lxml import etree

from qsnapd.errors import BadRequest

ROOT = "domainsnapshot"
LIMIT_BYTES = 4 << 20
DEPTH_LIMIT = 64

Element = etree._Element


def parse(data: bytes) -> Element:
    """Return the root, which is `<domainsnapshot>`; comments are gone.

    Raises: BadRequest: it is no XML in UTF-8, too large, too deep, or has a document type.
    """
    if len(data) > LIMIT_BYTES:
        raise BadRequest(f"the XML is longer than {LIMIT_BYTES} bytes")
    try:
        data.decode("utf-8")
        root = etree.fromstring(data, _parser())
    except UnicodeDecodeError as exc:
        raise BadRequest(f"the XML is not UTF-8: byte {exc.start} cannot be read") from exc
    except etree.XMLSyntaxError as exc:
        raise BadRequest(f"the XML cannot be parsed: {exc.msg}") from exc
    if root.getroottree().docinfo.doctype:
        raise BadRequest("the XML has a document type: neither that nor entities are accepted")
    if root.tag != ROOT:
        refuse(root, f"unexpected root element <{name_of(root)}>, expecting <{ROOT}>")
    _check_depth(root)
    return root


def _parser() -> etree.XMLParser:
    return etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        load_dtd=False,
        no_network=True,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )


def _check_depth(root: Element) -> None:
    depth = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        depth += 1 if event == "start" else -1
        if depth > DEPTH_LIMIT:
            refuse(element, f"elements are nested more than {DEPTH_LIMIT} deep")


def name_of(element: Element) -> str:
    return str(element.tag)


def refuse(element: Element, what: str) -> Never:
    """Raise BadRequest with the line of *element*."""
    raise BadRequest(f"line {element.sourceline}: {what}")


def children(element: Element, known: Iterable[str]) -> dict[str, Element]:
    """The elements within *element*, by name; each may be there once, nothing else may be."""
    found: dict[str, Element] = {}
    for child in items(element, known):
        if child.tag in found:
            refuse(child, f"<{name_of(element)}> has a second <{name_of(child)}>")
        found[name_of(child)] = child
    return found


def items(element: Element, known: Iterable[str]) -> list[Element]:
    """The elements within *element* in their order, which all have a name that is *known*."""
    known = tuple(known)
    stray = (element.text or "") + "".join(child.tail or "" for child in element)
    if stray.strip():
        refuse(element, f"<{name_of(element)}> holds text: {stray.strip()[:40]!r}")
    for child in element:
        if child.tag not in known:
            refuse(child, f"unknown element <{name_of(child)}> in <{name_of(element)}>")
    return list(element)


def attributes(element: Element, known: Iterable[str]) -> dict[str, str]:
    """The attributes of *element*, which are all *known*."""
    known = tuple(known)
    found = {str(name): str(value) for name, value in element.attrib.items()}
    for name in found:
        if name not in known:
            refuse(element, f"unknown attribute {name!r} of <{name_of(element)}>")
    return found


def text(element: Element) -> str:
    """What *element* says; it holds nothing else."""
    attributes(element, ())
    if len(element):
        refuse(element[0], f"<{name_of(element)}> holds an element, it should hold text")
    return element.text or ""


def only_attributes(element: Element, known: Iterable[str]) -> dict[str, str]:
    """The attributes of an *element* that holds nothing."""
    children(element, ())
    return attributes(element, known)
