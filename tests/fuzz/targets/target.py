"""What every target is."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.inline import stay_in_this_thread
from tests.fuzz.mutating import Mutate, spoil_bytes

Feed = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """One thing to feed."""

    name: str
    open: Callable[[], AbstractContextManager[Feed]]
    """Makes ready what is used for all inputs."""
    seeds: Callable[[], list[bytes]]
    """Valid inputs, to begin with; made when they are asked for."""
    spoil: Mutate = spoil_bytes
    """Makes an input of another one."""
    runs_long: int = 100_000
    """How many inputs there are in the long form."""
    runs_short: int = 500
    max_bytes: int = 1 << 17
    """Of one input; what is longer is cut off."""


def plain(feed: Feed) -> Callable[[], AbstractContextManager[Feed]]:
    """For what needs nothing to be made ready."""
    return lambda: nullcontext(feed)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the inputs of one target."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield Path(folder)


@contextmanager
def in_this_thread() -> Iterator[None]:
    """Let qsnapd do all that blocks in place: threads would cost more than what they do."""
    with pytest.MonkeyPatch.context() as patch:
        stay_in_this_thread(patch)
        yield


@contextmanager
def file_of(data: bytes) -> Iterator[int]:
    """A descriptor of a file that holds *data*, and may have holes."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)
