"""What is measured, and where it is written down."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO


@dataclass(frozen=True)
class Subject:
    """One way to take a checkpoint."""

    name: str
    strategy: str | None = None
    """None: by the bare script."""
    hashed: bool = False


FLOOR = Subject("floor")
BACKGROUND = Subject("background", "background")
STRATEGIES = (BACKGROUND, Subject("precopy", "precopy"), Subject("stopped", "stopped"))
QSNAPCTL = Subject("qsnapctl list")
HASHED = Subject("background, hashed", "background", hashed=True)


@dataclass(frozen=True)
class Measurement:
    """One number."""

    qemu: str
    subject: str
    round: int
    measure: str
    """What `value` is, its unit at the end."""
    value: float
    ram_mib: int | None = None
    """The VM's RAM, where that is what is varied."""
    clones: int | None = None
    """How many of them there were."""


@dataclass(frozen=True)
class Notebook:
    """Where everything is written down."""

    tell: Callable[[str], None]
    """For whoever watches the bench."""
    log: IO[bytes]
    """For the daemons' logs."""
    measurements: list[Measurement] = field(default_factory=list)
