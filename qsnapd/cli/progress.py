"""The progress bar of a job, on a terminal's stderr."""

from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """A bar that is gone when its block ends."""

    def __init__(self, name: str) -> None:
        self._progress = Progress(
            TextColumn(f"{name}  {{task.description:<10}}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job: dict[str, Any]) -> None:
        self._progress.update(
            self._task,
            description=job["phase"],
            completed=job["done_bytes"],
            total=job["total_bytes"] or None,
        )
