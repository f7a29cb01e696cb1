"""Commands as types: disks, nodes and the jobs on them (qapi/block-core.json)."""

from typing import Any

from pydantic import Field

from qsnapd.qmp.commands import Command, QapiStruct


class ImageInfo(QapiStruct):
    """ImageInfo: one image and, nested, those below it."""

    filename: str
    format: str
    virtual_size_bytes: int = Field(alias="virtual-size")
    actual_size_bytes: int | None = Field(alias="actual-size", default=None)
    cluster_size_bytes: int | None = Field(alias="cluster-size", default=None)
    backing_image: "ImageInfo | None" = None
    format_specific: dict[str, Any] | None = None


class CacheInfo(QapiStruct):
    writeback: bool = True
    direct: bool = False
    no_flush: bool = False


class BitmapInfo(QapiStruct):
    """BlockDirtyInfo."""

    name: str = ""
    granularity_bytes: int = Field(alias="granularity")
    recording: bool = True
    busy: bool = False
    persistent: bool = False
    inconsistent: bool = False

    @property
    def carried_over(self) -> bool:
        """Whether a new overlay gets one of its own, as libvirt does it."""
        return self.persistent and self.recording and not self.inconsistent and bool(self.name)


class NodeInfo(QapiStruct):
    """BlockDeviceInfo: one node of the block graph."""

    node_name: str
    file: str
    driver: str = Field(alias="drv")
    read_only: bool = Field(alias="ro")
    image: ImageInfo
    cache: CacheInfo = CacheInfo()
    detect_zeroes: str = "off"
    dirty_bitmaps: tuple[BitmapInfo, ...] = ()
    active: bool = True
    """QEMU >= 10.0 tells; older ones leave it out."""


class BlockInfo(QapiStruct):
    """BlockInfo of `query-block`: one device with its medium."""

    device: str = ""
    qdev: str | None = None
    removable: bool = False
    inserted: NodeInfo | None = None


class QueryBlock(Command[list[BlockInfo]]):
    name = "query-block"
    reply = list[BlockInfo]


class QueryNamedBlockNodes(Command[list[NodeInfo]]):
    """Without the nested backing images, which cost time squared in the chain's depth."""

    name = "query-named-block-nodes"
    reply = list[NodeInfo]
    flat: bool = True


class JobInfo(QapiStruct):
    """JobInfo of `query-jobs`."""

    id: str
    type: str
    status: str
    error: str | None = None


class QueryJobs(Command[list[JobInfo]]):
    name = "query-jobs"
    reply = list[JobInfo]


class BlockdevAdd(Command[None]):
    """blockdev-add: the options are a BlockdevOptions tree, passed as it is."""

    name = "blockdev-add"
    options: dict[str, Any]

    def arguments(self) -> dict[str, object]:
        return dict(self.options)


class BlockdevDel(Command[None]):
    name = "blockdev-del"
    node_name: str


class BlockdevSetActive(Command[None]):
    """blockdev-set-active, since 10.0; without a node it means all of them."""

    name = "blockdev-set-active"
    active: bool


class Transaction(Command[None]):
    """transaction: all of the actions happen, or none."""

    name = "transaction"
    timeout_s = 30.0
    actions: list[dict[str, Any]]


class BlockCommit(Command[None]):
    """block-commit of an active layer: becomes ready, then wants `job-complete`."""

    name = "block-commit"
    job_id: str
    device: str
    base_node: str
    auto_dismiss: bool = False
    auto_finalize: bool = True


class JobComplete(Command[None]):
    name = "job-complete"
    id: str


class JobDismiss(Command[None]):
    name = "job-dismiss"
    id: str
