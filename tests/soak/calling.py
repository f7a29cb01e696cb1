"""Calls of a daemon over its socket, as qsnapctl makes them, without a process for each."""

from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio

from qsnapd.control.client import Client
from tests.system.processes import ANSWER_LIMIT_S


class Call(Protocol):
    async def __call__(self, method: str, **parameters: object) -> dict[str, Any]:
        """Return the reply. Raises: QsnapError: what the daemon says."""


def caller(control: Path) -> Call:
    """Calls the daemon that listens there."""

    async def call(method: str, **parameters: object) -> dict[str, Any]:
        work = partial(_call, control, method, parameters)
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    return call


def _call(control: Path, method: str, parameters: dict[str, object]) -> dict[str, Any]:
    with Client(control, reply_limit_s=ANSWER_LIMIT_S) as client:
        return client.call(method, **parameters)
