"""Many VMs that one daemon watches, and what it says of them meanwhile."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import trio

from tests.harness import Guest, Vm, open_vm
from tests.parts import Qemu
from tests.soak.calling import Call

STARTED_AT_ONCE = 4
ASK_AGAIN_S = 0.05


@asynccontextmanager
async def open_crowd(qemu: Qemu, guests: dict[str, Guest]) -> AsyncIterator[dict[str, Vm]]:
    """Hold VMs of 16 MiB with these guests for the block, by the same names."""
    places = trio.CapacityLimiter(STARTED_AT_ONCE)
    vms: dict[str, Vm] = {}
    async with AsyncExitStack() as stack:

        async def start(name: str, guest: Guest) -> None:
            async with places:
                vms[name] = await stack.enter_async_context(open_vm(qemu, guest, memory_mib=16))

        async with trio.open_nursery() as nursery:
            for name, guest in guests.items():
                nursery.start_soon(start, name, guest)
        yield {name: vms[name] for name in guests}


@dataclass
class Phases:
    """Which phase each job is in, by the daemon's events; all of them, in their order."""

    now: dict[str, str] = field(default_factory=dict)
    most_saving: int = 0
    """How many saved their memory at the same time, at most."""
    follows: trio.Event = field(default_factory=trio.Event)
    changed: trio.Event = field(default_factory=trio.Event)

    async def follow(self, control: Path) -> None:
        """Until cancelled; nothing is missed from `follows` on."""
        call = {
            "method": "io.qsnapd.Subscribe",
            "parameters": {"kinds": ["job"]},
            "more": True,
        }
        async with await trio.open_unix_socket(control) as stream:
            await stream.send_all(json.dumps(call).encode() + b"\0")
            buffer = b""
            while chunk := await stream.receive_some():
                *frames, buffer = (buffer + chunk).split(b"\0")
                for frame in frames:
                    event = json.loads(frame)["parameters"]["event"]
                    if event is None:
                        self.follows.set()
                    else:
                        self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        assert not event["lost"], "too slow to tell"
        self.now[event["vm"]] = event["event"]
        saving = sum(phase == "saving" for phase in self.now.values())
        self.most_saving = max(self.most_saving, saving)
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, vm: str, phase: str) -> None:
        """The caller has a deadline."""
        while self.now.get(vm) != phase:
            await self.changed.wait()


@dataclass
class Answers:
    """How long the daemon takes to answer, asked again and again."""

    after_s: list[float] = field(default_factory=list)

    async def ask(self, call: Call, vm: str) -> None:
        """Until cancelled."""
        while True:
            for method, parameters in (("ListVms", {}), ("GetVm", {"vm": vm})):
                begin_s = monotonic()
                await call(method, **parameters)
                self.after_s.append(monotonic() - begin_s)
            await trio.sleep(ASK_AGAIN_S)
