"""What does not fit together between a VM's snapshots, their files and its QEMU."""

from enum import StrEnum

from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """A snapshot does not restore, or is being destroyed."""
    WARNING = "warning"
    """Something is not as it should be, and nothing is lost by it yet."""
    NOTE = "note"
    """Nothing is wrong; somebody may want to tidy up."""


class Finding(Frozen):
    """One thing that does not fit."""

    code: str
    """Stable, e.g. "image-missing"."""
    severity: Severity
    what: str
    """A sentence for people."""
    mend: str
    """What to do about it, with the command that does it."""
    repaired: bool = False
    """It was put right just now."""


class StoreCheck(Frozen):
    """Everything that was found."""

    vm: VmName
    clean: bool
    """Nothing is wrong: there are only notes, and what was repaired."""
    findings: tuple[Finding, ...]
    """The worst first."""
    skipped: tuple[str, ...]
    """What was not looked at, and why."""
