"""Requests that make no sense whatever the VM is: libvirt's rules, with its words where scripts
may look for them.
"""

import os
from pathlib import Path

from qsnapd.errors import BadRequest
from qsnapd.model.request import CreateRequest


def check_request(request: CreateRequest, store: Path) -> None:
    """Refuse a request that contradicts itself, or names files in *store*; pure.

    Raises: BadRequest.
    """
    if request.disk_only:
        _refuse_saving(request)
    elif request.quiesce:
        raise BadRequest(
            "quiesce requires disk-only: with the memory in the snapshot, what the guest has not "
            "written yet is in it too"
        )
    elif not request.keep_metadata and request.memory_file is None:
        raise BadRequest(
            "external memory snapshots require a filename: without metadata there is no place of "
            "the snapshot's own to keep the memory in (--memspec FILE)"
        )
    _refuse_store_paths(request, store)


def _refuse_saving(request: CreateRequest) -> None:
    """What is about saving memory makes no sense where none is saved."""
    if request.live:
        raise BadRequest(
            "live snapshot creation is supported only during full system snapshots: a disk-only "
            "one never pauses the guest"
        )
    if request.memory_file is not None:
        raise BadRequest(
            "memory state cannot be saved with offline or disk-only snapshot: ask for one of both"
        )
    if request.strategy is not None or request.image_format is not None:
        raise BadRequest(
            "strategy and image format say how memory is saved, and a disk-only snapshot saves none"
        )


def _refuse_store_paths(request: CreateRequest, store: Path) -> None:
    """Files that a request names lie anywhere but among qsnapd's own, and apart."""
    named = [path for path in (request.memory_file, *(d.file for d in request.disks)) if path]
    for path in named:
        if Path(os.path.normpath(path)).is_relative_to(store):
            raise BadRequest(f"{path} lies in {store}, which is qsnapd's own: name another place")
    if len({os.path.normpath(path) for path in named}) < len(named):
        raise BadRequest("the same file is named twice")
