"""What may be relied on at a moment, whatever happens then."""

import re
from dataclasses import dataclass

_TOKEN = re.compile("-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Outcome:
    """What has come of a job, once all is mended."""

    names: frozenset[str]
    """The snapshots that are listed, as `usual` calls them."""
    current: str | None
    marks: frozenset[str] = frozenset()
    """Whatever else can be there or not, by the scene's names."""

    def plus(self, *names: str, current: str | None, marks: tuple[str, ...] = ()) -> "Outcome":
        return Outcome(self.names | set(names), current, self.marks | set(marks))

    def minus(self, *names: str, current: str | None) -> "Outcome":
        return Outcome(self.names - set(names), current, self.marks)

    def __str__(self) -> str:
        words = f"{{{', '.join(sorted(self.names))}}}, current {self.current}"
        return f"{words}, with {', '.join(sorted(self.marks))}" if self.marks else words


@dataclass(frozen=True)
class Promise:
    """What holds if the power fails now."""

    outcomes: frozenset[Outcome]
    """One of these it will be."""
    guest: tuple[bytes, ...]
    """What the guest knows to be on its disks."""
    unsure: tuple[bytes, ...]
    """The same with what it has written, and does not know to be there yet."""


def usual(name: str) -> str:
    """The name of a snapshot without the token that a revert gives to what it leaves."""
    return _TOKEN.sub("-token", name)
