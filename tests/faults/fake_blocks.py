"""The block graph of the fake QEMU: disks, nodes, overlays, block jobs.

Node names, refusals and events are those of QEMU; no byte is copied. Instead each node knows
the last tick that the guest wrote into it, so that a test can tell what a disk would read.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import trio

from tests.faults.fake_monitor import Arguments, FakeMonitor, Refusal

VIRTUAL_SIZE_BYTES = 1 << 20
COMMIT_S = 0.02
"""How long one step of merging an overlay takes, by the test's clock."""


@dataclass(eq=False)
class Node:
    """One format node, with its protocol node below."""

    name: str
    filename: str
    file_node: str
    descriptor: int
    backing: "Node | None" = None
    last_tick: int | None = None
    """What the guest last wrote here; None: nothing."""
    active: bool = True

    def chain(self) -> Iterator["Node"]:
        node: Node | None = self
        while node is not None:
            yield node
            node = node.backing

    def reads(self) -> int:
        """The tick that whoever reads this disk would find."""
        return next((node.last_tick for node in self.chain() if node.last_tick is not None), 0)


@dataclass(eq=False)
class BlockJob:
    """One block-commit of an active layer."""

    id: str
    top: Node
    base: Node
    status: str = "created"
    completed: trio.Event = field(default_factory=trio.Event)
    finalized: trio.Event = field(default_factory=trio.Event)
    cancelled: trio.CancelScope = field(default_factory=trio.CancelScope)


class FakeBlocks:
    """All disks of one fake QEMU, opened for real so that qsnapd finds them in /proc."""

    def __init__(self, monitor: FakeMonitor, images: dict[str, str]) -> None:
        self._monitor = monitor
        self.nodes: dict[str, Node] = {}
        self.devices: dict[str, Node] = {}
        """By number of the disk: the node that it uses."""
        self.jobs: dict[str, BlockJob] = {}
        self.is_confined = False
        """It can open no file by name, only what it is handed."""
        for name, path in images.items():
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self.nodes[name] = Node(name, path, f"{name}-f", descriptor)
            self.devices[name] = self.nodes[name]
        monitor.serve("query-block", self._query_block)
        monitor.serve("query-named-block-nodes", self._query_nodes)
        monitor.serve("query-jobs", self._query_jobs)
        monitor.serve("blockdev-add", self._add)
        monitor.serve("blockdev-del", self._delete)
        monitor.serve("transaction", self._transaction)
        monitor.serve("block-commit", self._commit)
        monitor.serve("job-complete", self._complete)
        monitor.serve("job-finalize", self._finalize)
        monitor.serve("job-cancel", self._cancel)
        monitor.serve("job-dismiss", self._dismiss)
        monitor.serve("human-monitor-command", self._human)
        if monitor.major >= 10:
            monitor.serve("blockdev-set-active", self._set_active)

    def write(self, tick: int) -> None:
        """The guest writes *tick* to every disk."""
        for node in self.devices.values():
            node.last_tick = tick

    def activate(self, *, active: bool) -> None:
        for node in self.nodes.values():
            node.active = active

    def close(self) -> None:
        for node in self.nodes.values():
            os.close(node.descriptor)
        self.nodes.clear()
        self.devices.clear()

    # --- queries -------------------------------------------------------------------------

    def _query_block(self, _arguments: Arguments) -> object:
        return [
            {
                "device": "",
                "qdev": f"/machine/peripheral/{name}/virtio-backend",
                "removable": False,
                "inserted": self._node_info(node, nested=True),
            }
            for name, node in self.devices.items()
        ]

    def _query_nodes(self, _arguments: Arguments) -> object:
        formats = [self._node_info(node, nested=False) for node in self.nodes.values()]
        return [*formats, *({**f, "node-name": f["file-node"], "drv": "file"} for f in formats)]

    def _node_info(self, node: Node, *, nested: bool) -> dict[str, Any]:
        info = {
            "node-name": node.name,
            "file-node": node.file_node,
            "file": node.filename,
            "drv": "qcow2",
            "ro": False,
            "image": _image_info(node, nested=nested),
        }
        return {**info, "active": node.active} if self._monitor.major >= 10 else info

    def _query_jobs(self, _arguments: Arguments) -> object:
        return [
            {"id": job.id, "type": "commit", "status": job.status} for job in self.jobs.values()
        ]

    # --- nodes ---------------------------------------------------------------------------

    def _add(self, arguments: Arguments) -> None:
        name, file = arguments["node-name"], arguments["file"]
        known = {n for node in self.nodes.values() for n in (node.name, node.file_node)}
        for wanted in (name, file["node-name"]):
            if wanted in known:
                raise Refusal(f"Duplicate nodes with node-name='{wanted}'")
        self.nodes[name] = Node(name, file["filename"], file["node-name"], self._open(file))

    def _open(self, file: dict[str, Any]) -> int:
        if file["filename"].startswith("/dev/fdset/"):
            return self._monitor.open_fdset(file["filename"], os.O_RDWR)
        if self.is_confined:
            raise Refusal(f"Could not open '{file['filename']}': Permission denied")
        return os.open(file["filename"], os.O_RDWR | os.O_CLOEXEC)

    def _delete(self, arguments: Arguments) -> None:
        node = self._node(arguments["node-name"])
        if node in self.devices.values():
            raise Refusal(f"Node {node.name} is in use")
        if any(other.backing is node for other in self.nodes.values()):
            raise Refusal(f"Node '{node.name}' is busy: node is used as backing hd")
        os.close(node.descriptor)
        del self.nodes[node.name]

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise Refusal(f"Cannot find device='' nor node-name='{name}'")
        return self.nodes[name]

    def _set_active(self, arguments: Arguments) -> None:
        self.activate(active=arguments["active"])

    def _transaction(self, arguments: Arguments) -> None:
        moves = [
            (self._node(action["data"]["node"]), self._node(action["data"]["overlay"]))
            for action in arguments["actions"]
            if action["type"] == "blockdev-snapshot"
        ]
        for node, overlay in moves:
            if not node.active:
                raise Refusal(f"Block node '{node.name}' is inactive")
            if overlay.backing is not None or overlay in self.devices.values():
                raise Refusal(f"The overlay is already in use: {overlay.name}")
        for node, overlay in moves:  # refused as a whole, or done as a whole
            overlay.backing = node
            for name, used in self.devices.items():
                if used is node:
                    self.devices[name] = overlay

    # --- jobs ----------------------------------------------------------------------------

    def _commit(self, arguments: Arguments) -> None:
        top, base = self._node(arguments["device"]), self._node(arguments["base-node"])
        if arguments["job-id"] in self.jobs:
            raise Refusal("Job ID '" + arguments["job-id"] + "' already in use")
        if any(job.top is top for job in self.jobs.values()):
            raise Refusal(f"Node '{top.name}' is busy: block device is in use by block job: commit")
        if not top.active:
            raise Refusal("Block node is read-only")
        if base not in top.chain():
            raise Refusal(f"'{base.name}' is not in the backing chain of '{top.name}'")
        job = BlockJob(arguments["job-id"], top, base)
        if arguments.get("auto-finalize", True):
            job.finalized.set()
        self.jobs[job.id] = job
        self._monitor.start(self._run, job)

    async def _run(self, job: BlockJob) -> None:
        with job.cancelled:
            for status in ("running", "ready"):
                self._enter(job, status)
                await trio.sleep(COMMIT_S)
            await job.completed.wait()
            for status in ("waiting", "pending"):
                self._enter(job, status)
                await trio.sleep(COMMIT_S)
            await job.finalized.wait()
            self._switch(job)
        self._enter(job, "concluded")

    def _switch(self, job: BlockJob) -> None:
        if job.top.last_tick is not None:
            job.base.last_tick = job.top.last_tick
        for name, used in self.devices.items():
            if used is job.top:
                self.devices[name] = job.base

    def _enter(self, job: BlockJob, status: str) -> None:
        job.status = status
        self._monitor.emit("JOB_STATUS_CHANGE", id=job.id, status=status)

    def _job(self, arguments: Arguments) -> BlockJob:
        if arguments["id"] not in self.jobs:
            raise Refusal("Job not found")
        return self.jobs[arguments["id"]]

    def _complete(self, arguments: Arguments) -> None:
        job = self._job(arguments)
        if job.status != "ready":
            raise Refusal(f"Job '{job.id}' in state '{job.status}' cannot accept command verb")
        job.completed.set()

    def _finalize(self, arguments: Arguments) -> None:
        job = self._job(arguments)
        if job.status != "pending" or job.finalized.is_set():
            raise Refusal(f"Job '{job.id}' in state '{job.status}' cannot accept command verb")
        job.finalized.set()

    def _cancel(self, arguments: Arguments) -> None:
        job = self._job(arguments)
        if job.status == "concluded":
            raise Refusal(f"Job '{job.id}' in state '{job.status}' cannot accept command verb")
        job.cancelled.cancel()

    def _human(self, arguments: Arguments) -> str:
        program, node, command = arguments["command-line"].split()
        assert (program, command) == ("qemu-io", "flush"), "nothing else is asked for"
        self._node(node.strip('"'))
        return ""

    def _dismiss(self, arguments: Arguments) -> None:
        job = self._job(arguments)
        if job.status != "concluded":
            raise Refusal(f"Job '{job.id}' in state '{job.status}' cannot accept command verb")
        del self.jobs[job.id]


def _image_info(node: Node, *, nested: bool) -> dict[str, Any]:
    info: dict[str, Any] = {
        "filename": node.filename,
        "format": "qcow2",
        "virtual-size": VIRTUAL_SIZE_BYTES,
        "cluster-size": 65536,
    }
    if nested and node.backing is not None:
        info["backing-image"] = _image_info(node.backing, nested=True)
    return info
