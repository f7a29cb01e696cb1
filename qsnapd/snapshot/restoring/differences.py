"""What differs between a snapshot and the host it is to be restored on: pure comparisons.

A difference that only makes a failure likely can be forced; one with which QEMU is certain to
fail, or the guest to destroy its disks, cannot.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from qsnapd.model.snapshot import Machine, Manifest
from qsnapd.vm.argv import Fields, Option
from qsnapd.vm.probe import Probe

_RAM_STEP_BYTES = 8192
"""QEMU rounds the size of RAM up to this."""
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)([BKMGTPE]?)", re.IGNORECASE)
_SHIFTS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_DEFAULT_BLOCKS = frozenset({"pc.ram", "microvm.ram"})
_PLUGGED = ("pc-dimm", "nvdimm", "virtio-mem", "virtio-pmem", "cxl-type3")
_SHOWN_FEATURES = 12


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was."""

    what: str
    then: str
    now: str
    can_be_forced: bool

    def __str__(self) -> str:
        forced = "" if self.can_be_forced else " (cannot be forced)"
        then = f"; it was {self.then}" if self.then else ""
        return f"{self.what}: {self.now}{then}{forced}"


def compare_qemu(manifest: Manifest, probe: Probe) -> Iterator[Difference | str]:
    """Compare versions and capabilities; strings are notes: true, and no reason to stop."""
    now, then = probe.version.text, manifest.qemu_version
    if _numbers(now) < _numbers(then):
        yield Difference(
            "QEMU", then, f"{now}, and an older one seldom loads what a newer one saved", True
        )
    elif _numbers(now) > _numbers(then):
        yield f"QEMU is {now} now, it was {then}"
    elif probe.version.package != manifest.qemu_package:
        yield (
            f"QEMU {now} is of package {probe.version.package or 'unknown'} now, it was of "
            f"{manifest.qemu_package or 'unknown'}"
        )
    if manifest.image_format == "mapped-ram" and "mapped-ram" not in probe.capabilities:
        yield Difference("memory image", "", "this QEMU does not know the format mapped-ram", False)


def compare_cpu(machine: Machine, probe: Probe) -> Iterator[Difference]:
    """Compare what the guest would be shown of the CPU; more than before does no harm."""
    if machine.cpu is not None and probe.cpu is not None and machine.cpu != probe.cpu:
        yield Difference("CPU", machine.cpu, probe.cpu, True)
    if machine.cpu_features is None or probe.cpu_features is None:
        return
    missing = sorted(set(machine.cpu_features) - set(probe.cpu_features))
    if missing:
        shown = ", ".join(missing[:_SHOWN_FEATURES])
        if len(missing) > _SHOWN_FEATURES:
            shown += f" and {len(missing) - _SHOWN_FEATURES} more"
        yield Difference("CPU", "a CPU with these", f"the guest would lose {shown}", True)


def compare_ram(machine: Machine, options: Sequence[Option]) -> Iterator[Difference]:
    """Compare the size of RAM by the command line, by the manifest and by the image."""
    asked_bytes = ram_bytes_of(options)
    if asked_bytes is not None:
        plugs = any(
            option.name == "device" and (option.value or "").startswith(_PLUGGED)
            for option in options
        )
        if asked_bytes > machine.ram_bytes or (asked_bytes < machine.ram_bytes and not plugs):
            yield Difference(
                "RAM", _bytes(machine.ram_bytes), f"the command line asks for {asked_bytes}", False
            )
    names = {*_DEFAULT_BLOCKS, *_backends(options)}
    main = [b for b in machine.ram_blocks if b.id.removeprefix("/objects/") in names]
    saved_bytes = sum(block.size_bytes for block in main)
    if main and saved_bytes != machine.ram_bytes:
        yield Difference(
            "RAM", _bytes(machine.ram_bytes), f"the memory image has {saved_bytes}", False
        )


def ram_bytes_of(options: Sequence[Option]) -> int | None:
    """What -m asks for; None if it is not there or not understood."""
    for option in reversed(options):
        if option.name == "m":
            size = str(Fields.parse(option.value or "", first_key="size").get("size", ""))
            match = _SIZE.fullmatch(size)
            if match is None:
                return None
            number = int(Decimal(match[1]) * (1 << _SHIFTS[match[2].upper() or "M"]))
            return -(-number // _RAM_STEP_BYTES) * _RAM_STEP_BYTES
    return None


def _backends(options: Sequence[Option]) -> Iterator[str]:
    """Ids of all memory backends, those of plugged memory too."""
    for option in options:
        if option.name != "object":
            continue
        try:
            fields = Fields.parse(option.value or "", first_key="qom-type")
        except ValueError:
            continue
        if str(fields.get("qom-type", "")).startswith("memory-backend-"):
            yield str(fields.get("id"))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _bytes(number: int) -> str:
    return f"{number} bytes"
