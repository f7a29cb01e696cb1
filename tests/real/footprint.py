"""What a job leaves behind: all that an undone or refused one must leave as it was."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import Vm
from tests.monitor import Monitor

OF_THE_DAEMON = frozenset({".lock", ".state.json", ".state.json.new", ".current"})
"""Files of the store that come and go whatever jobs do."""


@dataclass(frozen=True)
class Footprint:
    """One look at a VM and at the files around it; compare two."""

    status: str
    chains: Mapping[str, tuple[str, ...]]
    """Per device: its node, then the files below it, active layer first."""
    bitmaps: Mapping[str, tuple[str, ...]]
    """Per device: the dirty bitmaps that record."""
    nodes: frozenset[str]
    fdsets: tuple[Any, ...]
    capabilities: Mapping[str, bool]
    parameters: Mapping[str, Any]
    block_jobs: tuple[Any, ...]
    files: frozenset[Path]
    """Below the VM's folder and the state directory."""
    opened: frozenset[str]
    """Files that QEMU holds open, removed ones too."""


async def look(vm: Vm, state_dir: Path) -> Footprint:
    """Take the footprint of *vm*, past qsnapd."""
    async with vm.monitor() as monitor:
        return await look_through(monitor, vm, state_dir)


async def look_through(monitor: Monitor, vm: Vm, state_dir: Path) -> Footprint:
    """Do the same with a monitor that is already open."""
    media = {
        device["device"] or device["qdev"]: device["inserted"]
        for device in await monitor.execute("query-block")
        if "inserted" in device
    }
    capabilities = await monitor.execute("query-migrate-capabilities")
    return Footprint(
        status=(await monitor.execute("query-status"))["status"],
        chains={
            name: (medium["node-name"], *_files_of(medium["image"]))
            for name, medium in media.items()
        },
        bitmaps={
            name: tuple(b["name"] for b in medium.get("dirty-bitmaps", ()) if b["recording"])
            for name, medium in media.items()
        },
        nodes=frozenset(
            node["node-name"] for node in await monitor.execute("query-named-block-nodes")
        ),
        fdsets=tuple(await monitor.execute("query-fdsets")),
        capabilities={entry["capability"]: entry["state"] for entry in capabilities},
        parameters=await monitor.execute("query-migrate-parameters"),
        block_jobs=tuple(await monitor.execute("query-jobs")),
        files=files(vm, state_dir),
        opened=frozenset(_opened_by(vm.pid)),
    )


def files(vm: Vm, state_dir: Path) -> frozenset[Path]:
    """All files and folders around *vm*, but for those of the daemon itself."""
    found = [*vm.folder.rglob("*"), *state_dir.rglob("*")]
    return frozenset(path for path in found if path.name not in OF_THE_DAEMON)


def _files_of(image: dict[str, Any]) -> Iterator[str]:
    layer: dict[str, Any] | None = image
    while layer is not None:
        yield layer["filename"]
        layer = layer.get("backing-image")


def _opened_by(pid: int) -> Iterator[str]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("/") and not target.startswith("/dev/"):
                yield target
