"""Worker threads and programs without waiting, so that the test's clock can jump.

A jumping clock jumps as soon as every task waits. It does not see that one waits for a
thread or for qemu-img, so a deadline of minutes would pass within the millisecond that
these take. Here both run in place, in the steps in which trio could be cancelled there; as a
side effect every run of a test takes the same steps.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import TypeVar

import outcome
import pytest
import trio

ResultT = TypeVar("ResultT")


async def run_here(
    function: Callable[..., ResultT], *arguments: object, **_options: object
) -> ResultT:
    """`trio.to_thread.run_sync`: can be cancelled before it begins, then no more."""
    await trio.lowlevel.checkpoint()
    result = outcome.capture(function, *arguments)
    await trio.lowlevel.cancel_shielded_checkpoint()
    return result.unwrap()


def deliver_here(
    function: Callable[[], ResultT], deliver: Callable[[outcome.Outcome[ResultT]], object]
) -> None:
    """`trio.lowlevel.start_thread_soon`."""
    deliver(outcome.capture(function))


async def run_program_here(
    command: Sequence[str], *, pass_fds: Sequence[int] = (), **_options: object
) -> "subprocess.CompletedProcess[bytes]":
    """`trio.run_process`: can be cancelled before it begins and when its work is done."""
    await trio.lowlevel.checkpoint()
    done = _run(command, pass_fds)
    await trio.lowlevel.checkpoint()
    return done


def _run(command: Sequence[str], pass_fds: Sequence[int]) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, capture_output=True, check=True, pass_fds=pass_fds)


def stay_in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let qsnapd do all that blocks in place; and skip syncing, as no power will fail here."""
    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)
    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", deliver_here)
    monkeypatch.setattr(trio.from_thread, "check_cancelled", lambda: None)
    monkeypatch.setattr(trio, "run_process", run_program_here)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda _descriptor: None)
