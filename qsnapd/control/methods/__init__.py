"""The calls of interface io.qsnapd: one class per method, its fields the parameters.

The docstrings of the classes are the comments of the interface text.
"""

from qsnapd.control.methods.base import Method
from qsnapd.control.methods.clones import CloneSnapshot, UndefineVm
from qsnapd.control.methods.deletions import DeleteSnapshot, PruneSnapshots
from qsnapd.control.methods.filesystems import (
    FreezeFilesystems,
    ListFilesystems,
    ThawFilesystems,
)
from qsnapd.control.methods.jobs import (
    AbortJob,
    GetJob,
    Subscribe,
)
from qsnapd.control.methods.metadata import (
    CopySnapshot,
    RedefineSnapshot,
    RenameSnapshot,
    SetCurrentSnapshot,
)
from qsnapd.control.methods.restores import (
    DescribeLaunch,
    RevertSnapshot,
    StartVm,
)
from qsnapd.control.methods.snapshots import (
    CreateSnapshot,
    GetCurrentSnapshot,
    GetSnapshot,
    ListSnapshots,
)
from qsnapd.control.methods.transfers import (
    ExportSnapshot,
    ImportSnapshot,
)
from qsnapd.control.methods.upkeep import (
    CheckStore,
    ImportMetadata,
    RepairStore,
    ScanSnapshots,
)
from qsnapd.control.methods.verification import (
    VerifySnapshot,
)
from qsnapd.control.methods.vms import (
    GetVm,
    ListDisks,
    ListVms,
    Resume,
    Suspend,
)

METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        ListVms,
        GetVm,
        ListDisks,
        Suspend,
        Resume,
        FreezeFilesystems,
        ThawFilesystems,
        ListFilesystems,
        CreateSnapshot,
        RevertSnapshot,
        DeleteSnapshot,
        PruneSnapshots,
        DescribeLaunch,
        CloneSnapshot,
        UndefineVm,
        StartVm,
        ListSnapshots,
        GetSnapshot,
        GetCurrentSnapshot,
        SetCurrentSnapshot,
        RenameSnapshot,
        CopySnapshot,
        RedefineSnapshot,
        VerifySnapshot,
        ExportSnapshot,
        ImportSnapshot,
        ImportMetadata,
        ScanSnapshots,
        CheckStore,
        RepairStore,
        GetJob,
        AbortJob,
        Subscribe,
    )
}
