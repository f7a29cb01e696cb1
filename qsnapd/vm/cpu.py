"""Which CPU a QEMU shows to its guest, by QEMU's names.

Measured on 7.2 and 10.0, TCG and KVM: asking the first CPU for each of its 400 to 460 boolean
properties takes 200 ms; expanding its model takes 3 ms and tells the same, `-cpu ...,+x,-y`
included, but for what host or accelerator lack. `filtered-features` says whether they lack
something; if so, only what the expansion turns on is asked for, about 40 ms.
"""

from dataclasses import dataclass

from qsnapd.errors import CommandRefused
from qsnapd.qmp.commands import (
    QomGet,
    QomGetFeatures,
    QomGetText,
    QueryCpuModelExpansion,
    QueryCpusFast,
)
from qsnapd.qmp.session import QmpSession

_TYPE_SUFFIX = "-x86_64-cpu"
_NO_FEATURES = frozenset(
    {"check", "enforce", "hotplugged", "hotpluggable", "migratable", "realized"}
)
"""Switches of the CPU object that its guest cannot see. So are those that begin with "x-"."""
_ALIASES = frozenset({"i64", "xd", "pni", "pclmuldq", "ffxsr", "sse4.1", "sse4.2"})
"""Second names; others have "_" in place of "-"."""


@dataclass(frozen=True)
class Cpu:
    """The first CPU; they are all alike."""

    type: str
    """QEMU's type of it, e.g. "qemu64-x86_64-cpu"."""
    features: tuple[str, ...] | None
    """In order; None: this QEMU does not tell."""


async def read_cpu(session: QmpSession) -> Cpu | None:
    """Ask a QEMU, whose guest may be running; None if it has no CPU to look at."""
    cpus = await session.execute(QueryCpusFast())
    path = cpus[0].qom_path if cpus else None
    if path is None:
        return None
    type_ = await session.execute(QomGetText(path=path, property="type"))
    try:
        return Cpu(type_, await _features(session, path, type_))
    except CommandRefused:  # not an x86 CPU, or an older QEMU
        return Cpu(type_, None)


async def _features(session: QmpSession, path: str, type_: str) -> tuple[str, ...]:
    model = {"name": type_.removesuffix(_TYPE_SUFFIX)}
    expansion = await session.execute(QueryCpuModelExpansion(type="full", model=model))
    names = sorted(n for n, on in expansion.model.props.items() if on is True and _is_feature(n))
    filtered = await session.execute(QomGetFeatures(path=path, property="filtered-features"))
    if not any(word.features for word in filtered):
        return tuple(names)
    return tuple(
        [n for n in names if await session.execute(QomGet(path=path, property=n)) is True]
    )


def _is_feature(name: str) -> bool:
    return (
        name not in _NO_FEATURES
        and name not in _ALIASES
        and "_" not in name
        and not name.startswith("x-")
    )
