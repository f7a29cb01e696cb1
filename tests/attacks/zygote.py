"""Daemons that start at once: forked from a process that has imported everything.

stdin: a socket of sequenced packets. Each asks for a daemon: {"words", "config", "environment",
"log", "file_limit_s", "reply_limit_s", "garbling"}; the answer is its pid. Ends, and leaves its
daemons alone, when that socket is closed.
"""

import json
import os
import signal
import socket
import sys
from typing import Any

import qsnapd.daemon  # noqa: F401 -- what takes long to import
from qsnapd import threads
from qsnapd.cli.daemon import main as run_qsnapd
from qsnapd.qmp.commands import Command
from tests.attacks import garbled


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for them
    with socket.socket(fileno=os.dup(0)) as orders:
        while order := orders.recv(1 << 20):
            pid = os.fork()
            if pid == 0:
                orders.close()
                become_daemon(json.loads(order))
            orders.send(str(pid).encode())


def become_daemon(order: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["environment"])
    if order["garbling"]:
        garbled.install(order["garbling"])
    threads.FILE_LIMIT_S = order["file_limit_s"]
    if (limit_s := order["reply_limit_s"]) is not None:
        shorten(Command, limit_s)
    sys.argv = ["qsnapd", *order["words"], "--config", order["config"]]
    run_qsnapd()


def shorten(command: type[Command[Any]], limit_s: float) -> None:
    """Let no reply to it, or to what is derived from it, be waited for any longer."""
    command.timeout_s = min(command.timeout_s, limit_s)
    for derived in command.__subclasses__():
        shorten(derived, limit_s)


if __name__ == "__main__":
    main()
