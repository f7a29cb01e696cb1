"""An option's value, changed member by member: what nobody changed stays word for word.

Unlike `argv.Fields`, this keeps members that are given more than once (`hostfwd=`), and
words alone, like the "nowait" of older QEMUs.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qsnapd.errors import Blocked
from qsnapd.vm.argv import Fields, Option, escaped

# One "key=value" up to a lone comma; a comma within the value is written twice.
_PART = re.compile(r"((?:[^,]|,,)+)(?:,|\Z)", re.DOTALL)


@dataclass
class _Member:
    key: str
    value: Any
    text: str | None
    """As it was read; None once it has changed."""
    implied: bool = False
    """The first part of an option that need not name its key."""

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        value = escaped(str(self.value))
        return value if self.implied and "=" not in value else f"{self.key}={value}"


class Members:
    """The members of one value, by dotted key, whatever way they were spelled."""

    def __init__(self, members: list[_Member], fields: Fields | None = None) -> None:
        self._members = members
        self._fields = fields
        """Only of a value in JSON; then there is at most one member of a key."""

    @classmethod
    def of(cls, option: Option, first_key: str | None = None) -> "Members":
        """Read an option's value. Raises: Blocked: JSON that only QEMU understands."""
        try:
            return cls.parse(option.value or "", first_key)
        except ValueError as exc:  # QEMU's JSON also knows 'single quotes'
            raise Blocked(f"{option}: qsnapd cannot read this JSON: {exc}") from None

    @classmethod
    def parse(cls, text: str, first_key: str | None = None) -> "Members":
        """Read `{...}` or `key=value,...`. Raises: ValueError: JSON that is none."""
        if text.startswith("{"):
            fields = Fields.parse(text)
            return cls([_Member(key, value, "") for key, value in fields.items()], fields)
        members = []
        for match in _PART.finditer(text):
            key, equals, value = match[1].partition("=")
            implied = not equals and first_key is not None and match.start() == 0
            if implied:
                key, value = first_key or "", match[1]
            members.append(
                _Member(
                    key, value.replace(",,", ",") if equals or implied else "on", match[1], implied
                )
            )
        return cls(members)

    def __str__(self) -> str:
        if self._fields is not None:
            values = {member.key: member.value for member in self._members}
            return str(Fields(values, is_json=True))
        return ",".join(map(str, self._members))

    def __contains__(self, key: str) -> bool:
        return any(member.key == key for member in self._members)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((member.key, member.value) for member in self._members)

    def get(self, key: str) -> str:
        """The value that counts, the last one; empty if there is none."""
        found = [member.value for member in self._members if member.key == key]
        return "" if not found or found[-1] is None else str(found[-1])

    def is_on(self, key: str) -> bool:
        return self.get(key) in ("on", "yes", "true", "y", "True")

    def set(self, key: str, value: str | bool | int) -> None:
        """Let *key* be there once; a new one comes last, a number in JSON stays one."""
        found = [member for member in self._members if member.key == key]
        self._members = [member for member in self._members if member not in found[1:]]
        if not found:
            self._members.append(_Member(key, None, None))
        member = found[0] if found else self._members[-1]
        member.text = None
        if self._fields is not None:
            was_number = type(member.value) is int
            member.value = int(value) if was_number and not isinstance(value, bool) else value
        else:
            member.value = ("off", "on")[value] if isinstance(value, bool) else value

    def drop(self, *keys: str) -> None:
        """Remove members, and everything below them."""
        self._members = [
            member
            for member in self._members
            if not any(member.key == key or member.key.startswith(f"{key}.") for key in keys)
        ]

    def keep(self, *keys: str) -> None:
        """Remove all others."""
        self._members = [member for member in self._members if member.key in keys]

    def rewrite(self, keys: str, change: Callable[[str], str]) -> None:
        """Give every member whose key matches the expression *keys* its changed value."""
        for member in self._members:
            if re.fullmatch(keys, member.key) and isinstance(member.value, str):
                new = change(member.value)
                if new != member.value:
                    member.value, member.text = new, None
