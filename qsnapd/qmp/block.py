"""Commands as types: disks, nodes and the jobs on them (qapi/block-core.json)."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from qsnapd.qmp.commands import Command, Count, Each, QapiStruct, Sentence
from qsnapd.qmp.migration import Measured

ClusterSize = Annotated[int, Field(gt=0, lt=1 << 32)]


def _from_the_lowest_up(struct: type[QapiStruct], below: str, value: object) -> object:
    """Parse what is nested in itself; pydantic alone goes no deeper than 255."""
    nested: list[dict[str, object]] = []
    while isinstance(value, dict):
        nested.append(value)
        value = value.get(below)
    for each in reversed(nested):
        value = struct.model_validate({**each, below: value})
    return value


class FormatSpecific(QapiStruct):
    """ImageInfoSpecific."""

    data: dict[str, Any] = Field(default_factory=dict)


class ImageInfo(QapiStruct):
    """ImageInfo: one image and, nested, those below it."""

    filename: str
    format: str
    virtual_size_bytes: Count = Field(alias="virtual-size")
    actual_size_bytes: Count | None = Field(alias="actual-size", default=None)
    cluster_size_bytes: ClusterSize | None = Field(alias="cluster-size", default=None)
    backing_image: "ImageInfo | None" = None
    format_specific: FormatSpecific | None = None

    @field_validator("backing_image", mode="before")
    @classmethod
    def _however_deep(cls, value: object) -> object:
        return _from_the_lowest_up(cls, "backing-image", value)


class CacheInfo(QapiStruct):
    writeback: bool = True
    direct: bool = False
    no_flush: bool = False


class BitmapInfo(QapiStruct):
    """BlockDirtyInfo."""

    name: str = ""
    granularity_bytes: ClusterSize = Field(alias="granularity")
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
    dirty_bitmaps: Each[tuple[BitmapInfo, ...]] = ()
    active: bool = True
    """QEMU >= 10.0 tells; older ones leave it out."""


class BlockInfo(QapiStruct):
    """BlockInfo of `query-block`: one device with its medium."""

    device: str = ""
    qdev: str | None = None
    removable: bool = False
    inserted: NodeInfo | None = None


class QueryBlock(Command[list[BlockInfo]]):
    """Takes time squared in the depth of chains; cubed, where files were handed over."""

    name = "query-block"
    timeout_s = 60.0
    reply = Each[list[BlockInfo]]


class QueryNamedBlockNodes(Command[list[NodeInfo]]):
    """Without the nested backing images, which cost time squared in the chain's depth."""

    name = "query-named-block-nodes"
    timeout_s = 60.0
    reply = Each[list[NodeInfo]]
    flat: bool = True


class JobInfo(QapiStruct):
    """JobInfo of `query-jobs`."""

    id: str
    type: str
    status: str
    error: Sentence | None = None
    done_bytes: Measured = Field(alias="current-progress", default=0)
    total_bytes: Measured = Field(alias="total-progress", default=0)


class QueryJobs(Command[list[JobInfo]]):
    name = "query-jobs"
    reply = Each[list[JobInfo]]


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
    """block-commit; of an active layer it becomes ready, then wants `job-complete`."""

    name = "block-commit"
    timeout_s = 60.0
    job_id: str
    device: str
    """The node that is written to."""
    base_node: str
    top_node: str | None = None
    """By default the active layer."""
    backing_file: str | None = None
    """What the image over the top is to call the one below it; not for the active layer."""
    auto_dismiss: bool = False
    auto_finalize: bool = True


class BlockStream(Command[None]):
    """block-stream: fills a node with what lies between it and the base."""

    name = "block-stream"
    timeout_s = 60.0
    job_id: str
    device: str
    base_node: str | None = None
    """None: with all that lies below."""
    backing_file: str | None = None
    auto_dismiss: bool = False
    auto_finalize: bool = True


class JobFinalize(Command[None]):
    name = "job-finalize"
    timeout_s = 60.0
    id: str


class JobCancel(Command[None]):
    name = "job-cancel"
    timeout_s = 60.0
    id: str


class FlushNode(Command[str]):
    """QMP has no command for it; the one of the human monitor answers nothing if it is done."""

    name = "human-monitor-command"
    reply = str
    timeout_s = 120.0
    node: str

    def arguments(self) -> dict[str, object]:
        return {"command-line": f'qemu-io "{self.node}" flush'}


class NodeStats(QapiStruct):
    """BlockStats, for its node names: one node and, nested, those below it."""

    node_name: str | None = None
    qdev: str | None = None
    device: str = ""
    parent: "NodeStats | None" = None
    """The node below, as QEMU calls it: that of the file."""
    backing: "NodeStats | None" = None

    @field_validator("backing", mode="before")
    @classmethod
    def _however_deep(cls, value: object) -> object:
        return _from_the_lowest_up(cls, "backing", value)


class QueryNodeStats(Command[list[NodeStats]]):
    """Each device's chain by names of nodes; quick however deep the chains are."""

    name = "query-blockstats"
    reply = Each[list[NodeStats]]


class JobComplete(Command[None]):
    name = "job-complete"
    timeout_s = 60.0
    id: str


class JobDismiss(Command[None]):
    name = "job-dismiss"
    id: str
