"""Words as XML writes them, quoted like libvirt's; light enough for every command line."""

import re

_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML can hold."""
_TEXT = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"}
_ATTRIBUTE = {**_TEXT, "'": "&apos;", '"': "&quot;", "\n": "&#10;", "\t": "&#9;"}
_IN_TEXT, _IN_ATTRIBUTE = str.maketrans(_TEXT), str.maketrans(_ATTRIBUTE)


def plain(words: str) -> str:
    """*words* as far as XML can hold them."""
    return _UNWRITABLE.sub("\ufffd", words)


def escaped(words: str) -> str:
    """*words* as the text of an element."""
    return plain(words).translate(_IN_TEXT)


def attribute(name: str, value: str | None) -> str:
    """An attribute with the blank before it; nothing if it is None."""
    return "" if value is None else f" {name}='{plain(value).translate(_IN_ATTRIBUTE)}'"
