"""What the demo and the bench share as programs: an orderly end, whatever ends them.

The VMs we start are nobody's children; a program that simply died would leave them running.
"""

import signal
import sys
from collections.abc import Awaitable, Callable, Iterator

import trio

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_program(name: str, main: Callable[[], Awaitable[None]], *foreseen: type[Exception]) -> int:
    """Run *main* under trio and return the program's exit status.

    Ctrl-C, SIGTERM and a closed terminal cancel *main*, so that it cleans up. A *foreseen*
    failure is told in one line, any other with its traceback.
    """
    problems: list[str] = []
    try:
        came = trio.run(_cancelled_by_signals, main)
        problems += [f"interrupted by {number.name}" for number in came]
    except* foreseen as group:
        problems += map(str, _leaves(group))
    for problem in problems:
        print(f"{name}: {problem}", file=sys.stderr)
    return 1 if problems else 0


async def _cancelled_by_signals(main: Callable[[], Awaitable[None]]) -> list[signal.Signals]:
    """Run *main* and return the signals that ended it."""
    came: list[signal.Signals] = []
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    came.append(signal.Signals(number))
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            await main()
            nursery.cancel_scope.cancel()
    return came


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc
