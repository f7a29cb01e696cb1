"""QEMU's own part in a restore: what starting it costs, and loading, by its own clock."""

import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

from tests.bench.floor import BareMonitor

END_LIMIT_MS = 10_000


def read_load_ms(monitor_log: Path) -> float:
    """Return how long QEMU took to load its memory: from the request until it was complete."""
    at_s: dict[str, float] = {}
    for line in monitor_log.read_text().splitlines():
        message = json.loads(line)
        if message.get("event") == "MIGRATION":
            stamp = message["timestamp"]
            status = message["data"]["status"]
            at_s.setdefault(status, stamp["seconds"] + stamp["microseconds"] / 1e6)
    return (at_s["completed"] - min(at_s.values())) * 1000


def time_own_start(argv: list[str], folder: Path) -> float:
    """Start QEMU once more as it runs in *folder*, and return how long that took, in ms. Blocks.

    Preconditions: none runs there now; *argv* makes it wait for memory.
    Until it answers on its monitor. It is gone on return.
    """
    own = folder / "own"
    own.mkdir()
    try:
        # sockets and logs of its own, or qsnapd would find them
        places = re.compile(rf"{re.escape(str(folder))}/(qmp|serial|pid)")
        words = [places.sub(rf"{own}/\1", word) for word in argv]
        begun_s = time.monotonic()
        subprocess.run(words, stdin=subprocess.DEVNULL, check=True)
        process = os.pidfd_open(int((own / "pid").read_text()))
        try:
            with BareMonitor(own / "qmp2") as monitor:
                took_ms = (time.monotonic() - begun_s) * 1000
                monitor.send("quit")
            end = select.poll()
            end.register(process, select.POLLIN)
            if not end.poll(END_LIMIT_MS):
                raise TimeoutError("QEMU was told to quit and did not")
        finally:
            os.close(process)
    finally:
        shutil.rmtree(own)
    return took_ms
