"""What qsnapd puts into its folders, by name: of what lies there it removes nothing else."""

import re

OF_A_VM = frozenset(
    {
        *(".journal.json", ".restoring.json", ".next-start.json"),
        *(".deleting.json", ".renaming.json", ".thaw-owed.json"),
        *(".made.json", ".leases.json", ".current", ".state.json"),
        *(".vm.json", ".last-seen.json", ".qemu.log"),
        *(".disks", ".forgotten"),
    }
)
"""Beside its snapshots."""
OF_A_SNAPSHOT = frozenset({"snapshot.json", "memory.img", ".import.json"})
_DRAFT = ".new"
_VIEW = re.compile(r"\.[0-9a-f]{8}\.view")
_STAGED_EXPORT = re.compile(r"\.export-[0-9a-f]{8}")


def is_of_a_vm(name: str) -> bool:
    """Whether a file of this name beside snapshots is surely qsnapd's."""
    return name in OF_A_VM or (name.startswith(".") and is_draft(name)) or is_view(name)


def is_of_a_snapshot(name: str) -> bool:
    """The same of one within a snapshot's folder."""
    return name in OF_A_SNAPSHOT or name in (".snapshot.json.new", "snapshot.new", ".import.new")


def is_draft(name: str) -> bool:
    """Whether it is of a record that is being replaced."""
    return name.endswith(_DRAFT)


def is_view(name: str) -> bool:
    """Whether it is the part of a memory image that a lazy restore loads."""
    return _VIEW.fullmatch(name) is not None


def is_staged_export(name: str) -> bool:
    """Whether it is a folder in which a tar stream is prepared."""
    return _STAGED_EXPORT.fullmatch(name) is not None
