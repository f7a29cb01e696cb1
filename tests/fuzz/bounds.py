"""What one input may cost, whatever it says: a little memory, and time in proportion."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

HEADROOM_BYTES = 256 << 20
"""How much may be mapped beyond what there is: more than any window, bitmap or thread takes."""
TIME_LIMIT_S = 2.0
"""Of the CPU, for a small input; watched code takes several times as long as it does elsewhere."""
TIME_LIMIT_S_PER_MIB = 10.0
_PAGE_BYTES = resource.getpagesize()


class TooExpensive(AssertionError):
    """An input took longer than one of its size may."""


@contextmanager
def bounded(size_bytes: int) -> Iterator[None]:
    """Let the block have what an input of that size may cost.

    Raises: MemoryError, in the block, where it wants more. TooExpensive.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + HEADROOM_BYTES, hard))
    began_s = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    took_s = time.process_time() - began_s
    if took_s > TIME_LIMIT_S + TIME_LIMIT_S_PER_MIB * size_bytes / (1 << 20):
        raise TooExpensive(f"{size_bytes} bytes took {took_s:.1f} s")


def _mapped_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * _PAGE_BYTES
