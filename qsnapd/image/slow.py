"""Room for what takes seconds in a thread, apart from what must not wait.

trio has 40 threads for everybody. Reading whole images must leave some for the journal, and
for undoing a job whose guest stands still.
"""

import trio

SLOW = trio.CapacityLimiter(8)
"""To be passed as the `limiter` of `trio.to_thread.run_sync`."""
