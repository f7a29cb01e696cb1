"""What virsh's output looks like, and lines that change much the same each time."""

from typing import Any

from tests.system.virsh_session import Line

LINE = r"[^\n]*\n"
ROW = rf" \S{LINE}"
NAMES = r" Name {2,}Creation Time {2,}State\n-+\n"
PARENTS = r" Name {2,}Creation Time {2,}State {2,}Parent\n-+\n"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
VMS = r" Id {2,}Name {2,}State\n-+\n"
BOTH = "vda vdb"
XML = r"<domainsnapshot>(?s:.*)</domainsnapshot>\n?"


def created(words: str, name: str, *, origin: str = "", **more: Any) -> Line:  # noqa: ANN401
    """A checkpoint on top of the current snapshot, of both disks, the guest stopped."""
    expected = {"adds": name, "current": name, "moves": BOTH, "stops": True, "notes": True}
    says = rf"Domain snapshot {name} created{origin}\n"
    return Line(**{"words": words, "says": says, **expected, **more})


def disk_only(words: str, name: str, **more: Any) -> Line:  # noqa: ANN401
    """The same without memory: the guest never stops."""
    return created(words, name, **{"stops": False, **more})


def put_back(words: str, name: str, **more: Any) -> Line:  # noqa: ANN401
    """A revert: another QEMU goes on, with its disks on new overlays."""
    expected = {"current": name, "state": "running (from snapshot)", "moves": BOTH, "stops": True}
    says = rf"Domain snapshot {name} reverted\n(?:{LINE})*"
    return Line(words, says, **{"notes": True, **expected, **more})


RUNNING = "running (unpaused)"
