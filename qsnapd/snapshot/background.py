"""Strategy `background`: QEMU write-protects memory and saves each page once, the guest
running; a write to a page not yet saved waits until it is.
"""

from qsnapd.qmp.migration import QueryMigrate
from qsnapd.snapshot.capture import Capture, Stopwatch
from qsnapd.snapshot.saving import require_alive, wait_saved


async def capture_background(capture: Capture) -> None:
    """Stop, pivot, begin to save; go on as soon as QEMU has captured the instant.

    That is not when the status says "active" (it says so before the device state is
    captured, and a guest let go then tears memory from disk), but when the first page has
    been saved.

    On success: the image is handed to the kernel in full; a guest that ran runs since long.
    On failure or cancellation: as far as it came; the plan's undo finds out how far.
    """
    vm, session = capture.vm, capture.vm.session
    with vm.tracker.holding() as capture.window:
        await capture.halt()
        await capture.pivot()
        watch = Stopwatch()
        await capture.begin_saving()
        while True:
            info = await session.execute(QueryMigrate())
            if info.ram is not None and info.ram.saved_pages > 0:
                break
            require_alive(info)
        capture.capture_ms = watch.ms
        if vm.at_least_10:
            await capture.release_at_once()
        else:
            # QEMU <= 8.2 has started the guest itself, right after protecting its memory.
            await capture.release()
    await wait_saved(session, "completed", watcher=capture.watch)
