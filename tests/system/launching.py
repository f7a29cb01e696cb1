"""A program that starts a QEMU as the daemon does, and ends: run inside a `Manager`.

stdin: {"kind", "vm", "unit", "pending_dir", "launch", "log"}; stdout: why it failed, if it did.
Ends once QEMU listens on the socket that is its only argument, or will not.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import trio

from qsnapd.model.plan import Launch
from qsnapd.store.pending import Pending
from qsnapd.vm.launcher import Started, launcher_of

LIMIT_S = 30.0
LOOK_EVERY_S = 0.05


async def main(qmp: Path, wanted: Mapping[str, str]) -> None:
    launcher = launcher_of(
        wanted["kind"],  # type: ignore[arg-type]
        wanted["vm"],
        unit=wanted["unit"],
        pending=Pending.of(Path(wanted["pending_dir"]), wanted["vm"]),
        patience_s=LIMIT_S,
    )
    launch = Launch.model_validate_json(wanted["launch"])
    if wanted["kind"] != "unit":  # it is prepared before the old QEMU is ended, not here
        await launcher.prepare(launch)
    started = await launcher.start(launch, Path(wanted["log"]))
    with trio.fail_after(LIMIT_S):
        words = await _come_up(started, qmp)
    if words is not None:
        await trio.to_thread.run_sync(started.kill)
        print(words)


async def _come_up(started: Started, qmp: Path) -> str | None:
    while not (words := await trio.to_thread.run_sync(started.failed)):
        try:
            await (await trio.open_unix_socket(qmp)).aclose()
            return None
        except OSError:
            await trio.sleep(LOOK_EVERY_S)
    return words


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), json.load(sys.stdin))
