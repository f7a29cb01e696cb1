"""What a VM's snapshots should be after a number of operations: a tree, and plain bytes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qsnapd.model.request import Descendants

Power = Literal["running", "paused", "off"]


@dataclass
class Taken:
    """One snapshot."""

    parent: str | None
    content: dict[str, bytes]
    """Of each disk, by target, when it was taken."""
    memory: bool
    power: Power


@dataclass
class GivenUp:
    """A disk of a state that was discarded: its data stays."""

    chain: list[Path]
    """Where it was, newest first. A deletion may have merged it into the image below."""
    content: bytes


@dataclass
class TreeModel:
    """All of one VM."""

    present: dict[str, bytearray]
    """What the VM's disks hold now."""
    snapshots: dict[str, Taken] = field(default_factory=dict)
    current: str | None = None
    power: Power = "running"
    stiff: bool = False
    """It stands still in a way in which QEMU saves nothing: saved already, or not yet begun."""
    given_up: list["GivenUp"] = field(default_factory=list)
    forgotten: set[Path] = field(default_factory=set)
    """Files of snapshots of which only the record was deleted."""

    def take(self, name: str, *, memory: bool) -> None:
        content = {target: bytes(disk) for target, disk in self.present.items()}
        self.snapshots[name] = Taken(self.current, content, memory, self.power)
        self.current = name
        if memory and self.power == "paused":
            self.stiff = True

    def revert(self, name: str, power: Power | None) -> None:
        taken = self.snapshots[name]
        self.present = {target: bytearray(disk) for target, disk in taken.content.items()}
        self.current = name
        self.power = power or (taken.power if taken.memory else "off")
        self.stiff = not taken.memory and self.power == "paused"

    def write(self, target: str, offset: int, data: bytes) -> None:
        self.present[target][offset : offset + len(data)] = data

    def rename(self, name: str, new_name: str) -> None:
        self.snapshots = {
            (new_name if n == name else n): taken for n, taken in self.snapshots.items()
        }
        for taken in self.snapshots.values():
            if taken.parent == name:
                taken.parent = new_name
        if self.current == name:
            self.current = new_name

    def meant(self, name: str, descendants: Descendants) -> set[str]:
        """The snapshots that a deletion removes."""
        below = set(self._below(name))
        return {
            Descendants.NONE: {name},
            Descendants.TOO: {name, *below},
            Descendants.ONLY: below,
        }[descendants]

    def delete(self, name: str, descendants: Descendants) -> None:
        gone = self.meant(name, descendants)
        parents = {n: taken.parent for n, taken in self.snapshots.items()}

        def standing(n: str | None) -> str | None:
            while n in gone:
                n = parents[n]
            return n

        self.current = standing(self.current)
        self.snapshots = {n: taken for n, taken in self.snapshots.items() if n not in gone}
        for taken in self.snapshots.values():
            taken.parent = standing(taken.parent)

    def _below(self, name: str) -> Iterator[str]:
        for n, taken in self.snapshots.items():
            if taken.parent == name:
                yield n
                yield from self._below(n)
