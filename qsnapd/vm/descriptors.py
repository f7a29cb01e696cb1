"""Options that name descriptors inherited from the parent: nobody can pass those again."""

from qsnapd.errors import Blocked
from qsnapd.vm.argv import Fields, Option

_FIRST_KEYS = {
    "add-fd": "",
    "blockdev": "driver",
    "chardev": "backend",
    "device": "driver",
    "drive": "",
    "fsdev": "fsdriver",
    "net": "type",
    "netdev": "type",
    "nic": "type",
    "object": "qom-type",
    "virtfs": "fsdriver",
}
"""Options made of key=value, with the key of a bare first word."""
_KEYS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock_fd"})
_PATHS = ("/dev/fdset/", "/dev/fd/", "/proc/self/fd/")


def refuse_descriptors(option: Option) -> None:
    """Raise Blocked, with the option's own words, if it needs an inherited descriptor."""
    if option.name not in _FIRST_KEYS or option.value is None:
        return
    try:
        fields = Fields.parse(option.value, first_key=_FIRST_KEYS[option.name])
    except ValueError:
        fields = Fields({})  # JSON in QEMU's dialect; who has to change it will say so
    for key, value in fields.items():
        leaf = key.rsplit(".", 1)[-1]
        # The address of a stream or dgram netdev: {"type": "fd", "str": "7"}.
        is_address = "." in key and leaf == "type" and value == "fd"
        if leaf in _KEYS or is_address or (isinstance(value, str) and value.startswith(_PATHS)):
            raise Blocked(
                f"-{option.name} {option.value}: the descriptor was passed by whoever started "
                "QEMU and cannot be passed again; use a path or a name instead"
            )
