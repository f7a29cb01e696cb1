"""The command line of a QEMU that only loads an image, never runs it, and touches nothing.

Everything that shapes what is loaded stays: the machine, all devices, their RAM, how many
queues a card has and whether its network knows offloading headers. What lies behind the
devices on the host is replaced by nothing.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qsnapd.vm.apart_seen import own_cid
from qsnapd.vm.argv import Option, escaped
from qsnapd.vm.members import Members
from qsnapd.vm.shared import refuse_shared

_LEFT_OUT = frozenset(
    {
        *("D", "d", "dfilter", "trace", "pidfile", "daemonize", "runas", "chroot", "run-with"),
        *("qmp", "qmp-pretty", "mon", "monitor", "gdb", "s", "qtest", "qtest-log", "plugin"),
        *("vnc", "display", "full-screen", "perfmap", "jitdump"),
        *("mem-path", "mem-prealloc", "overcommit", "name", "add-fd"),
    }
)
_OBJECTS_LEFT_OUT = ("filter-", "input-", "qtest")
_OFFLOADING = frozenset({"tap", "bridge"})
"""Networks with headers for offloading: a card that used them loads into no other kind."""
_GUEST_FORWARD = re.compile(r"(.*?:.*?:\d+)-(?!cmd:).*", re.DOTALL)
_CHARDEV_KEPT = ("backend", "id", "mux")
_RAM_FILE_ONLY = (
    *("mem-path", "share", "align", "pmem", "readonly", "rom", "offset", "discard-data"),
    *("hugetlb", "hugetlbsize", "seal", "prealloc", "prealloc-threads", "prealloc-context"),
    *("host-nodes", "policy", "dump", "merge", "reserve"),
)


@dataclass(frozen=True)
class Isolated:
    """A command line that needs nothing of the host but the disks it names."""

    options: tuple[Option, ...]
    needs_own_network: bool
    """It makes tap interfaces: start it in a network namespace of its own, with the right
    to make them there (e.g. through `unshare --user --map-root-user --net`)."""


def isolate(options: Sequence[Option], folder: str) -> Isolated:
    """Make of a VM's command line that of a QEMU to load its image into.

    *folder* is the throwaway's own, and there. The caller has replaced the disks, and adds
    a monitor and what waits for the load. The process is meant to be a child: nothing of
    `-daemonize`, `-runas` and the like is left.

    Raises: Blocked: the image needs another process (vhost-user, a TPM) to be loaded.
    """
    refuse_shared(options)
    isolation = _Isolation(folder)
    changed: list[Option] = []
    for option in options:
        if option.name not in _LEFT_OUT:
            changed += isolation.handle(option)
    if isolation.had_network and not isolation.has_network:
        changed.append(Option("net", "none"))  # or QEMU adds one of its own
    changed += [Option("display", "none"), Option("monitor", "none")]
    return Isolated(tuple(changed), isolation.needs_own_network)


class _Isolation:
    def __init__(self, folder: str) -> None:
        self.needs_own_network = False
        self.had_network = False
        self.has_network = False
        self._hubs = 0
        self._folder = folder
        self._handlers: dict[str, Callable[[Option], list[Option]]] = {
            "audio": self._audio,
            "audiodev": self._audio,
            "chardev": self._chardev,
            "debugcon": self._nothing_behind,
            "device": self._device,
            "net": self._net,
            "netdev": self._netdev,
            "nic": self._netdev,
            "nographic": lambda option: [Option("machine", "graphics=off")],
            "object": self._object,
            "parallel": self._nothing_behind,
            "serial": self._nothing_behind,
            "spice": self._spice,
        }

    def handle(self, option: Option) -> list[Option]:
        handler = self._handlers.get(option.name)
        return [option] if handler is None else handler(option)

    def _nothing_behind(self, option: Option) -> list[Option]:
        value = option.value or ""
        if value == "none" or value.startswith("chardev:"):
            return [option]
        return [Option(option.name, "null", option.dashes)]

    def _chardev(self, option: Option) -> list[Option]:
        members = Members.of(option, "backend")
        if members.get("backend") not in ("ringbuf", "memory", "msmouse", "wctablet", "testdev"):
            members.keep(*_CHARDEV_KEPT)
            members.set("backend", "null")
        members.drop("logfile", "logappend")
        return [Option(option.name, str(members), option.dashes)]

    def _device(self, option: Option) -> list[Option]:
        members = Members.of(option, "driver")
        if "guest-cid" in members:  # the VM itself may be running
            members.set("guest-cid", own_cid(self._folder))
        return [Option(option.name, str(members), option.dashes)]

    def _net(self, option: Option) -> list[Option]:
        self.had_network = True
        members = Members.of(option, "type")
        kind = members.get("type")
        if kind not in ("nic", "none", "user"):
            return []  # the hub that -net means knows no offloading, whatever is behind it
        self.has_network = True
        if kind == "user":
            _close_user(members)
        return [Option(option.name, str(members), option.dashes)]

    def _netdev(self, option: Option) -> list[Option]:
        members = Members.of(option, "type")
        kind = members.get("type")
        if kind in ("none", "hubport"):
            return [option]
        # A card on -nic says its own in the same words.
        own = ("type", "id", "model", "mac", "macaddr", "addr", "vectors", "name")
        if kind == "user":
            _close_user(members)
        elif kind in _OFFLOADING:
            members.keep(*own, *("queues", "vnet_hdr", "sndbuf"))
            members.set("type", "tap")
            for script in ("script", "downscript"):
                members.set(script, "no")
            self.needs_own_network = True
        else:
            members.keep(*own)
            members.set("type", "hubport")
            self._hubs += 1
            members.set("hubid", self._hubs)
        return [Option(option.name, str(members), option.dashes)]

    def _object(self, option: Option) -> list[Option]:
        members = Members.of(option, "qom-type")
        kind = members.get("qom-type")
        if kind.startswith(_OBJECTS_LEFT_OUT):
            return []
        if kind in ("memory-backend-file", "memory-backend-memfd", "memory-backend-ram"):
            members.set("qom-type", "memory-backend-ram")
            members.drop(*_RAM_FILE_ONLY)
        return [Option(option.name, str(members), option.dashes)]

    def _audio(self, option: Option) -> list[Option]:
        members = Members.of(option, "driver")
        members.keep("driver", "id", "model")
        members.set("driver", "none")
        return [Option(option.name, str(members), option.dashes)]

    def _spice(self, option: Option) -> list[Option]:
        # A qxl card cannot be had without.
        address = escaped(f"{self._folder}/spice")
        return [Option("spice", f"unix=on,addr={address},disable-ticketing=on", option.dashes)]


def _close_user(members: Members) -> None:
    """Let nobody in. The network itself stays: its connections are a part of the image."""
    for key in [key for key, _ in members if re.match(r"(hostfwd|smb|tftp|bootfile)", key)]:
        members.drop(key)
    members.rewrite(r"guestfwd(\.\d+\.str)?", lambda rule: _GUEST_FORWARD.sub(r"\1-null", rule))
