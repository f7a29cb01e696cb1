"""Building XML that libvirt's schema accepts, laid out as libvirt does it."""

import re

from lxml import etree

from qsnapd.xml.escaping import attribute, escaped, plain
from qsnapd.xml.reading import Element

_TARGET = re.compile(r"(fd|hd|sd|vd|xvd|ubd)[a-zA-Z0-9_]+")
"""libvirt's names of disks."""


def is_target(name: str) -> bool:
    """Whether libvirt would call a disk that."""
    return _TARGET.fullmatch(name) is not None


def add(parent: Element, tag: str, words: str | None = None, **attributes: str | None) -> Element:
    """Append an element; attributes that are None are left out."""
    element = etree.SubElement(parent, tag)
    for name, value in attributes.items():
        if value is not None:
            element.set(name, plain(value))
    if words is not None:
        element.text = plain(words)
    return element


def add_source(parent: Element, path: str) -> None:
    """Append the `<source>` of a file, or of what lies where devices are."""
    add(parent, "source", **{"dev" if is_device(path) else "file": path})


def is_device(path: str) -> bool:
    """By its place alone: the file may be gone, or on another host."""
    return path.startswith("/dev/")


def as_text(element: Element) -> str:
    """The lines of what was built here, in single quotes and indented by two."""
    return "".join(f"{line}\n" for line in _lines(element))


def _lines(element: Element) -> list[str]:
    name = etree.QName(element)
    above = element.getparent()
    new = {k: v for k, v in element.nsmap.items() if above is None or above.nsmap.get(k) != v}
    tag = f"{element.prefix}:{name.localname}" if element.prefix else name.localname
    start = "".join(
        [tag]
        + [attribute(f"xmlns:{prefix}", uri) for prefix, uri in new.items()]
        + [attribute(str(key), str(value)) for key, value in element.attrib.items()]
    )
    if len(element):
        inside = [f"  {line}" for child in element for line in _lines(child)]
        return [f"<{start}>", *inside, f"</{tag}>"]
    return [f"<{start}>{escaped(element.text)}</{tag}>" if element.text else f"<{start}/>"]
