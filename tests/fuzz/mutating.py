"""Spoiling documents: what comes out still looks like what went in, here and there.

Everything is decided by the `Random` that is given, so that both drivers, and whoever looks for
the cause later, get the same.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

SIZE_LIMIT_BYTES = 1 << 16
"""What is grown by repeating stays below that."""
DEEP = 20_000
"""Nested so deep, it is too deep for every recursion."""

Mutate = Callable[[bytes, Random], bytes]

_DEEP_MARK, _HUGE_MARK = "\ue000deep\ue000", "\ue000huge\ue000"
_NUMBERS = (
    *(0, 1, -1, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e300, float("inf"), float("-inf"), float("nan")),
)
_STRINGS = (
    *("", " ", "\0", "a\0b", "\n", "\ud800", "x\udcff", "\u202e", "\x1b[2J", "..", ".", "/", "//"),
    *("../../../etc/passwd", "/etc/../etc/passwd", "/etc/passwd", "a/b", "-rf", ".hidden", "~"),
    *("json:{}", 'json:{"filename":5}', "json:[", "fd:3", "/dev/fdset/1", "/dev/fdset/-1"),
    *("a" * 300, "ä" * 70, "9" * 5000, "." * 5000, "{" * 300, "%s%n", "running", "paused"),
)
_TIMES = (
    *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-02-30T00:00:00Z", "2026"),
    *("2026-01-02T03:04:05", "2026-01-02T03:04:05+23:59", "1969-12-31T23:59:59Z"),
)
_WIDTHS = (1, 2, 4, 8)


def anything(random: Random) -> Any:  # noqa: ANN401 -- any JSON
    """A value that nobody expects."""
    kind = random.randrange(8)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return [anything(random) for _ in range(random.randrange(3))]
    if kind == 2:
        return {random.choice(_STRINGS): anything(random) for _ in range(random.randrange(3))}
    if kind == 3:
        return random.choice((_DEEP_MARK, _HUGE_MARK))
    return random.choice(_NUMBERS if kind < 6 else _STRINGS)


def _alike(value: Any, random: Random) -> Any:  # noqa: ANN401 -- any JSON
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return random.choice(_NUMBERS)
        case str() if value[:2] == "20" and "T" in value:
            return random.choice(_TIMES)
        case str():
            return random.choice(_STRINGS)
    return anything(random)


def spoil_tree(tree: Any, random: Random) -> Any:  # noqa: ANN401 -- any JSON
    """Put something else in one place of a JSON value, or take it away; returns the new value."""
    places = list(_places(tree))
    if not places:
        return anything(random)
    holder, key = random.choice(places)
    value = holder[key]
    match random.randrange(8):
        case 6 | 7:
            holder[key] = _alike(value, random)
        case 0:
            del holder[key]
        case 1:
            holder[key] = anything(random)
        case 2:
            other, other_key = random.choice(places)
            holder[key] = json.loads(json.dumps(other[other_key]))
        case 3 if isinstance(holder, dict):
            holder[random.choice([*_STRINGS, *holder])] = value
        case 3:
            holder.insert(key, value)
        case 4 if isinstance(value, str):
            at = random.randrange(len(value) + 1)
            holder[key] = value[:at] + random.choice(_STRINGS) + value[at + random.randrange(3) :]
        case 4 if type(value) is int:
            holder[key] = value + random.choice((-1, 1, -value - 1, value, 1 << 40))
        case _:
            count = min(300, SIZE_LIMIT_BYTES // len(json.dumps(value)))
            holder[key] = random.choice(([value], {"x": value}, str(value), [value] * count))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401 -- any JSON
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        yield from _places(value)


def written(tree: Any) -> bytes:  # noqa: ANN401 -- any JSON
    """As JSON, what cannot be a Python value included."""
    text = json.dumps(tree).encode()
    deep = b"[" * DEEP + b"]" * DEEP
    for mark, instead in ((_DEEP_MARK, deep), (_HUGE_MARK, b"9" * 5000)):
        word = json.dumps(mark).encode()
        text = text.replace(word, instead, 1).replace(word, b"[]")
    return text


def spoil_json(data: bytes, random: Random) -> bytes:
    """Spoil a JSON document as a tree; one that is none as bytes."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return spoil_bytes(data, random)
    if random.randrange(8) == 0:
        return spoil_bytes(data, random)
    for _ in range(random.randrange(1, 4)):
        tree = spoil_tree(tree, random)
    return written(tree)


def spoil_bytes(data: bytes, random: Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Change, move, repeat or cut off some bytes; *tokens* mean something where they end up."""
    for _ in range(random.randrange(1, 4)):
        data = _spoil_once(data, random, tokens)
    return data


def spoil_text(*tokens: bytes) -> Mutate:
    """A `spoil_bytes` that knows some words of the language."""
    return lambda data, random: spoil_bytes(data, random, tokens)


def _spoil_once(data: bytes, random: Random, tokens: Sequence[bytes]) -> bytes:
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 4, 8, 64, 1000)))
    match random.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[end:]
        case 2:
            return data[:at] + random.randbytes(end - at) + data[end:]
        case 3:
            width = random.choice(_WIDTHS)
            number = random.choice([n for n in _NUMBERS if isinstance(n, int)])
            written_as = (number % (1 << 8 * width)).to_bytes(width, "big")
            return data[:at] + written_as + data[at + width :]
        case 4:
            room = max(1, SIZE_LIMIT_BYTES - len(data)) // max(1, end - at)
            return data[:at] + data[at:end] * min(room, random.choice((2, 3, 1000))) + data[end:]
        case 5 if tokens:
            return data[:at] + random.choice(tokens) + data[random.choice((at, end)) :]
    other = random.randrange(len(data) + 1)
    return data[:at] + data[other : other + end - at] + data[at:]


def is_text(tree: Any) -> bool:  # noqa: ANN401 -- any JSON
    """Whether all strings in *tree* can be written down; JSON knows others."""
    try:
        json.dumps(tree, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True
