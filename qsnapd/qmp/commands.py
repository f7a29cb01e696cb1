"""Commands as types: run state, identity, descriptors, QOM.

Strict in what is sent, liberal in what is accepted: QEMU may add members in any release.
QAPI's names hide the units; ours do not.
"""

from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qsnapd.qmp.words import in_long_words

ReplyT = TypeVar("ReplyT", covariant=True)
Items = TypeVar("Items")

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
"""Of bytes, or a number that something is known by."""
Sentence = Annotated[str, AfterValidator(in_long_words)]
"""For people to read."""
Each = Annotated[Items, Field(fail_fast=True)]
"""Many of something; what is wrong with one of them is told, whatever is with the others."""


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class QapiStruct(BaseModel):
    """A QAPI struct that QEMU sends."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=_kebab,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


class Command(QapiStruct, Generic[ReplyT]):
    """Arguments of one QMP command; `ReplyT` is what QEMU returns."""

    model_config = ConfigDict(extra="forbid")
    name: ClassVar[str]
    reply: ClassVar[Any] = None
    """What the reply is parsed as; None where QEMU returns an empty object."""
    timeout_s: ClassVar[float] = 10.0

    def arguments(self) -> dict[str, object]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusInfo(QapiStruct):
    """qapi/run-state.json, StatusInfo."""

    status: str
    running: bool


class QueryStatus(Command[StatusInfo]):
    name = "query-status"
    reply = StatusInfo


class Stop(Command[None]):
    """qapi/misc.json, stop: returns once the disks are drained and flushed."""

    name = "stop"
    timeout_s = 60.0


class Cont(Command[None]):
    """qapi/misc.json, cont."""

    name = "cont"
    timeout_s = 30.0


class Quit(Command[None]):
    name = "quit"


class VersionTriple(QapiStruct):
    major: Count
    minor: Count
    micro: Count


class VersionInfo(QapiStruct):
    """qapi/control.json, VersionInfo."""

    qemu: VersionTriple
    package: str

    @property
    def text(self) -> str:
        return f"{self.qemu.major}.{self.qemu.minor}.{self.qemu.micro}"


class QueryVersion(Command[VersionInfo]):
    name = "query-version"
    reply = VersionInfo


class CommandInfo(QapiStruct):
    name: str


class QueryCommands(Command[list[CommandInfo]]):
    name = "query-commands"
    reply = Each[list[CommandInfo]]


class UuidInfo(QapiStruct):
    uuid: str = Field(alias="UUID")


class QueryUuid(Command[UuidInfo]):
    name = "query-uuid"
    reply = UuidInfo


class CpuInfo(QapiStruct):
    cpu_index: int
    qom_path: str | None = None


class QueryCpusFast(Command[list[CpuInfo]]):
    name = "query-cpus-fast"
    reply = Each[list[CpuInfo]]


class CpuModel(QapiStruct):
    name: str
    props: dict[str, Any] = Field(default_factory=dict)


class CpuModelExpansion(QapiStruct):
    """CpuModelExpansionInfo."""

    model: CpuModel


class QueryCpuModelExpansion(Command[CpuModelExpansion]):
    """query-cpu-model-expansion: what a CPU of that model would be in this very QEMU."""

    name = "query-cpu-model-expansion"
    reply = CpuModelExpansion
    type: str
    model: dict[str, Any]


class MachineInfo(QapiStruct):
    """qapi/machine.json, MachineInfo."""

    name: str
    alias: str | None = None


class QueryMachines(Command[list[MachineInfo]]):
    name = "query-machines"
    reply = Each[list[MachineInfo]]


class MemorySizeSummary(QapiStruct):
    """qapi/machine.json, MemoryInfo; bytes."""

    base_bytes: Count = Field(alias="base-memory")
    plugged_bytes: Count = Field(alias="plugged-memory", default=0)


class QueryMemorySizeSummary(Command[MemorySizeSummary]):
    name = "query-memory-size-summary"
    reply = MemorySizeSummary


class MemdevInfo(QapiStruct):
    """qapi/machine.json, Memdev."""

    id: str | None = None
    size_bytes: Count = Field(alias="size")


class QueryMemdev(Command[list[MemdevInfo]]):
    name = "query-memdev"
    reply = Each[list[MemdevInfo]]


class QomGet(Command[Any]):
    """qapi/qom.json, qom-get: the type of the reply is the property's."""

    name = "qom-get"
    reply = Any
    path: str
    property: str


class QomGetText(Command[str]):
    """The same of a property that is a string."""

    name = "qom-get"
    reply = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=1000)]
    path: str
    property: str


class FeatureWord(QapiStruct):
    """X86CPUFeatureWordInfo: a set of features, by their bits."""

    features: int = 0


class QomGetFeatures(Command[list[FeatureWord]]):
    """The same of a property that is a list of feature words."""

    name = "qom-get"
    reply = Each[list[FeatureWord]]
    path: str
    property: str


class FdInfo(QapiStruct):
    fd: Count
    opaque: str | None = None


class FdsetInfo(QapiStruct):
    """qapi/misc.json, FdsetInfo."""

    fdset_id: Count
    fds: Each[list[FdInfo]]


class QueryFdsets(Command[list[FdsetInfo]]):
    name = "query-fdsets"
    reply = Each[list[FdsetInfo]]


class AddFdInfo(QapiStruct):
    fdset_id: Count
    fd: Count


class AddFd(Command[AddFdInfo]):
    """qapi/misc.json, add-fd; the descriptor goes along."""

    name = "add-fd"
    reply = AddFdInfo
    fdset_id: int
    opaque: str | None = None


class RemoveFd(Command[None]):
    name = "remove-fd"
    fdset_id: int


class GetFd(Command[None]):
    """qapi/misc.json, getfd; the descriptor goes along and is closed by its use."""

    name = "getfd"
    fdname: str


class CloseFd(Command[None]):
    name = "closefd"
    fdname: str
