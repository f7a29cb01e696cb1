"""What a verification of a snapshot has found."""

from enum import StrEnum

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName


class Outcome(StrEnum):
    """How one check ended."""

    SOUND = "sound"
    WRONG = "wrong"
    UNCHECKED = "unchecked"
    """It could not be checked; `detail` says why. That is no proof of anything."""


class Check(Frozen):
    """One thing that was looked at."""

    what: str
    """E.g. "memory image" or "disk vda"."""
    outcome: Outcome
    detail: str
    """A sentence for people."""


class Verification(Frozen):
    """Everything that was looked at, in order."""

    vm: VmName
    snapshot: SnapshotName
    deep: bool
    sound: bool
    """Nothing is wrong."""
    checks: tuple[Check, ...]
