"""QEMU's command line as a list of options, and an option's value as a flat table.

Reading and writing are exact opposites: what nobody changed is written as it was read.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qsnapd.errors import Blocked

_WITHOUT_VALUE = (
    "h help version S s snapshot daemonize preconfig nodefaults no-user-config enable-kvm "
    "only-migratable mem-prealloc audio-help usb nographic full-screen portrait win2k-hack "
    "no-acpi no-hpet no-fd-bootchk no-reboot no-shutdown singlestep async-teardown "
    "enable-sync-profile semihosting old-param xen-attach xen-domid-restrict "
    "perfmap jitdump"  # since QEMU 8.0
)
WITHOUT_VALUE = frozenset(_WITHOUT_VALUE.split())
"""Every other option is followed by its value: a name missing here swallows the next word."""

DEPTH_LIMIT = 255
"""How deep a value may be nested: deeper than any chain of images that qsnapd works with."""
_LONGEST_INDEX_DIGITS = 9

# One "key=value" up to a lone comma; a comma within the value is written twice.
_PART = re.compile(r"((?:[^,]|,,)*)(?:,|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """`-name value`, `-name`, or a bare word: the image of the first disk, without a name."""

    name: str
    value: str | None = None
    dashes: str = field(default="-", compare=False)

    @property
    def words(self) -> tuple[str, ...]:
        name = (f"{self.dashes}{self.name}",) if self.name else ()
        return name if self.value is None else (*name, self.value)

    def __str__(self) -> str:
        """As a person would quote it in a sentence."""
        return " ".join(self.words)


def parse_options(words: Iterable[str]) -> list[Option]:
    """Read the words after the program's name, as QEMU splits them; `-x` and `--x` are one."""
    options = []
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("-"):
            options.append(Option("", word))
            continue
        dashes = "--" if word.startswith("--") else "-"
        name = word.removeprefix(dashes)
        value = None if name in WITHOUT_VALUE else next(remaining, None)
        options.append(Option(name, value, dashes))
    return options


def words_of(options: Sequence[Option]) -> tuple[str, ...]:
    return tuple(word for option in options for word in option.words)


def escaped(value: str) -> str:
    """*value* as it must be written within `key=value,...`."""
    return value.replace(",", ",,")


class NotUnderstood(Blocked, ValueError):
    """A value that QEMU may read, and qsnapd cannot."""


class Fields(dict[str, Any]):
    """An option's value by dotted key ("file.filename"), whatever way it was spelled.

    Values are strings, or what JSON has, if `is_json`.
    """

    def __init__(self, values: Mapping[str, Any], *, is_json: bool = False) -> None:
        super().__init__(values)
        self.is_json = is_json

    @classmethod
    def parse(cls, text: str, *, first_key: str | None = None) -> "Fields":
        """Read `{...}` or `key=value,...`; *first_key* is implied by a first part without "=".

        Raises: NotUnderstood: JSON that is none, or not as QEMU wants it; or nested too deep.
        """
        if text.startswith("{"):
            flat = dict[str, Any]()
            try:
                _flatten(json.loads(text), "", flat)
            except (ValueError, RecursionError) as exc:
                raise NotUnderstood(f"{text[:100]}: qsnapd cannot read this JSON: {exc}") from exc
            _require_shallow(text, flat)
            if _says_one_thing_twice(flat):
                raise NotUnderstood(f"{text[:100]}: says one thing twice")
            return cls(flat, is_json=True)
        values = dict[str, str]()
        for number, match in enumerate(_PART.finditer(text)):
            part = match[1]
            if not part:
                continue
            key, equals, value = part.partition("=")
            if not equals:  # "snapshot" alone means "snapshot=on"
                key, value = (first_key, part) if first_key and number == 0 else (part, "on")
            values[key] = value.replace(",,", ",")
        _require_shallow(text, values)
        return cls(values)

    def __str__(self) -> str:
        if self.is_json:
            return json.dumps(_nested(self), ensure_ascii=False)
        return ",".join(f"{key}={escaped(str(value))}" for key, value in self.items())

    def is_on(self, key: str) -> bool:
        return self.get(key) in (True, "on", "yes", "true", "y")

    def drop(self, key: str) -> None:
        """Remove *key* and everything below it."""
        for found in [k for k in self if k == key or k.startswith(f"{key}.")]:
            del self[found]

    def rename(self, key: str, new: str) -> None:
        if key in self:
            self[new] = self.pop(key)


def _flatten(tree: Any, prefix: str, flat: dict[str, Any]) -> None:  # noqa: ANN401 -- any JSON
    """Put what is in *tree* into *flat*, by dotted key."""
    children: Iterable[tuple[Any, Any]]
    match tree:
        case dict() if tree or not prefix:
            children = tree.items()
        case list() if tree:
            children = enumerate(tree)
        case _:
            flat[prefix.removesuffix(".")] = tree
            return
    for key, child in children:
        _flatten(child, f"{prefix}{key}.", flat)


def _require_shallow(text: str, flat: Iterable[str]) -> None:
    if any(key.count(".") > DEPTH_LIMIT for key in flat):
        raise NotUnderstood(f"{text[:100]}: is nested more than {DEPTH_LIMIT} deep")


def _says_one_thing_twice(flat: Iterable[str]) -> bool:
    """Whether a key has a value, and others below it."""
    paths = sorted(key.split(".") for key in flat)
    return any(below[: len(path)] == path for path, below in pairwise(paths))


def _nested(flat: Mapping[str, Any]) -> Any:  # noqa: ANN401 -- any JSON
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return _with_lists(tree)


def _with_lists(tree: Any) -> Any:  # noqa: ANN401 -- any JSON
    # QEMU's own rule: what has only numbers for keys is a list.
    if not isinstance(tree, dict):
        return tree
    if tree and all(key.isdecimal() and len(key) <= _LONGEST_INDEX_DIGITS for key in tree):
        return [_with_lists(tree[key]) for key in sorted(tree, key=int)]
    return {key: _with_lists(value) for key, value in tree.items()}
