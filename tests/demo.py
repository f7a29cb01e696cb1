"""See qsnapd work: `make demo`, or python -m tests.demo.

A throwaway VM whose guest writes its disks, dirties its memory and checks both; the daemon
on it; then what a person would type. Everything is gone afterwards, also after Ctrl-C. The
exit status is 0 only if all of it was as it should be.
"""

import os
import shlex
import sys
import time
from datetime import datetime
from typing import Any

import trio

from tests.guests.slots import Okay, parse_okay
from tests.harness import Disk, FileWatch, Slots, Vm, open_vm
from tests.parts import PartMissing, qemu_versions
from tests.program import run_program
from tests.system.processes import COMMANDS, Daemon, open_daemon

VM = "demo"
RAM_MIB = 512
GUEST = Slots(memory_mib=128, dirty_mib_s=60, disk_pause_us=500)
DISKS = (Disk("qcow2"), Disk("raw", "scsi"))
COMMAND_LIMIT_S = 60.0
MIB = 1 << 20


class Wrong(Exception):
    """Something is not as it should be."""


class Diary:
    """What the guest has said on its serial port, and when."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._entries: list[tuple[float, str]] = []

    async def keep(self) -> None:
        """Write down every line as it comes; never returns."""
        with FileWatch(self._vm.serial_log) as watch:
            while True:
                new = self._vm.log_lines()[len(self._entries) :]
                self._entries += [(time.time(), line) for line in new]
                await watch.changed()

    def last_before(self, at_s: float) -> Okay:
        """Return the last sign of life that had been heard at that time."""
        heard = [parse_okay(line) for came_s, line in self._entries if came_s <= at_s]
        return [okay for okay in heard if okay is not None][-1]


class Demo:
    """One showing, on a VM and a daemon that others hold."""

    def __init__(self, vm: Vm, daemon: Daemon, diary: Diary) -> None:
        self._vm = vm
        self._daemon = daemon
        self._diary = diary

    async def show(self) -> None:
        """Show it, from the first look to the guest's last word. Raises: Wrong."""
        await self._daemon.wait_attached(VM)
        await self._type("list")

        say("A live checkpoint: memory and disks of one instant, and the guest goes on meanwhile.")
        await self._type("snapshot-create-as demo live 'while it was running' --live")
        live = await self._show_facts("live")
        await self._guest_works()

        say("A non-live one: the guest stands still until its memory is in the file.")
        await self._type("snapshot-create-as demo still")
        await self._show_facts("still")
        await self._guest_works()

        say("The second was taken on top of the first.")
        await self._type("snapshot-list demo --tree")
        parents = {s["name"]: s["parent"] for s in await self._ask("snapshot-list demo")}
        require(parents == {"live": None, "still": "live"}, f"the tree is wrong: {parents}")

        say("Back to the first: a new QEMU goes on from that instant.")
        checkpoint_at = datetime.fromisoformat(live["created_at"])
        at_checkpoint = self._diary.last_before(checkpoint_at.timestamp())
        await self._type("snapshot-revert demo live")
        await self._type("domstate demo --reason")
        print()
        current = await self._ask("snapshot-current demo")
        require(current["name"] == "live", f"the current snapshot is {current['name']}")
        await self._show_guest(at_checkpoint)

    async def _type(self, line: str) -> None:
        """Run `qsnapctl LINE` as if it had been typed here."""
        print(f"$ qsnapctl {line}", flush=True)
        argv = [str(COMMANDS / "qsnapctl"), *shlex.split(line)]
        environment = {**os.environ, "QSNAPD_SOCKET": str(self._daemon.control)}
        with trio.fail_after(COMMAND_LIMIT_S):
            # on our terminal, if there is one, so that it draws its progress there
            done = await trio.run_process(argv, stdin=None, env=environment, check=False)
        require(done.returncode == 0, f"qsnapctl {line} ended with {done.returncode}")

    async def _ask(self, line: str) -> Any:  # noqa: ANN401
        return await self._daemon.json(line)

    async def _guest_works(self) -> None:
        """Wait until the guest has gone on for a while."""
        wrote = self._vm.slots_report().ok_lines[-1].disk_writes + 1000
        await self._vm.wait_line(
            lambda line: (okay := parse_okay(line)) is not None and okay.disk_writes > wrote,
            since=len(self._vm.log_lines()),
        )

    async def _show_facts(self, name: str) -> dict[str, Any]:
        snapshot: dict[str, Any] = await self._ask(f"snapshot-info demo {name}")
        allocated_bytes = snapshot["memory"]["allocated_bytes"]
        print(
            f"    strategy {snapshot['strategy']}: the guest was paused for "
            f"{snapshot['paused_ms']:.1f} ms of {snapshot['total_ms'] / 1000:.1f} s\n"
            f"    {allocated_bytes / MIB:.0f} MiB on disk for {RAM_MIB} MiB of RAM\n"
        )
        require(0 < snapshot["paused_ms"] <= snapshot["total_ms"], "the pause makes no sense")
        require(0 < allocated_bytes <= RAM_MIB * MIB, "the size on disk makes no sense")
        return snapshot

    async def _show_guest(self, at_checkpoint: Okay) -> None:
        """Let the guest tell what it has noticed of the revert."""
        say("What the guest itself says, which re-reads all it has ever written:")
        before, after = await self._wait_set_back()
        _print_okay("last before the live checkpoint", at_checkpoint)
        _print_okay("last before the revert", before)
        _print_okay("first after the revert", after)
        require(
            at_checkpoint.uptime_ms <= after.uptime_ms < before.uptime_ms
            and at_checkpoint.disk_writes <= after.disk_writes < before.disk_writes,
            "the guest did not go on from the checkpoint",
        )
        await self._vm.wait_checked()
        _print_okay("all looked at twice since", self._vm.slots_report().ok_lines[-1])
        complaints = self._vm.slots_report().bad_lines
        require(not complaints, "the guest complains: " + "; ".join(complaints))
        print("    complaints: none; no write is lost, none is from the future, no page is torn")

    async def _wait_set_back(self) -> tuple[Okay, Okay]:
        """Return the guest's last words before its clock was set back, and the first after."""
        last: Okay | None = None

        def is_set_back(line: str) -> bool:
            nonlocal last
            now = parse_okay(line)
            if now is None:
                return False
            if last is not None and now.uptime_ms < last.uptime_ms:
                return True
            last = now
            return False

        after = parse_okay(await self._vm.wait_line(is_set_back))
        assert last is not None
        assert after is not None
        return last, after


def say(text: str) -> None:
    print(f"# {text}", flush=True)


def require(true: bool, otherwise: str) -> None:
    if not true:
        raise Wrong(otherwise)


def _print_okay(when: str, okay: Okay) -> None:
    uptime_s = okay.uptime_ms / 1000
    print(f"    {when:<33} up {uptime_s:6.2f} s, {okay.disk_writes:6} disk writes", flush=True)


async def demo() -> None:
    """Show it all.

    Raises: Wrong, and whatever else can go wrong; nothing is left behind in any case.
    """
    qemu = qemu_versions()[-1]
    print(f"Starting a VM on QEMU {qemu}: {RAM_MIB} MiB of RAM, {len(DISKS)} disks", flush=True)
    async with open_vm(qemu, GUEST, disks=DISKS, memory_mib=RAM_MIB) as vm:
        await vm.wait_line(lambda line: parse_okay(line) is not None)
        folder = vm.folder / "qsnapd"
        folder.mkdir()
        log = folder / "log"
        print(f"Starting the daemon: qsnapd serve --config {folder}/qsnapd.toml\n", flush=True)
        try:
            with log.open("wb") as file:
                async with open_daemon(folder, {VM: vm}, qemu.img, log=file) as daemon:
                    await _show(vm, daemon)
        except Exception:
            print(f"\nqsnapd's log:\n{log.read_text()}", file=sys.stderr)
            raise
    print("\nEverything is cleaned up.")


async def _show(vm: Vm, daemon: Daemon) -> None:
    diary = Diary(vm)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(diary.keep)
        await Demo(vm, daemon, diary).show()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    sys.exit(run_program("demo", demo, Wrong, PartMissing))
