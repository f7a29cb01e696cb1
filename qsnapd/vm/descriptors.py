"""Options that name descriptors inherited from the parent, and what to say in their place.

Nobody can pass those descriptors again, but for a service that has them from its manager.
"""

from collections.abc import Mapping, Sequence

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
_ID_KEYS = ("id", "node-name", "set")
"""What an option is known by: most have an id, nodes a name, descriptors their set."""
_KEYS = frozenset({"fd", "fds", "vhostfd", "vhostfds", "sock_fd"})
_PATHS = ("/dev/fdset/", "/dev/fd/", "/proc/self/fd/")


def apply_instead(options: Sequence[Option], instead: Mapping[str, str]) -> list[Option]:
    """Put the values of *instead* where its keys name an option: "netdev=net0", "add-fd=2".

    An empty value leaves the option out. Keys that name nothing have no effect: the same
    configuration may serve several command lines.
    """
    return [
        option if value is None else Option(option.name, value, option.dashes)
        for option in options
        if (value := instead.get(key_of_option(option))) != ""
    ]


def key_of_option(option: Option) -> str:
    """What `instead` calls an option: its name, and its id if it has one."""
    fields = _fields(option)
    known_by = next((fields[key] for key in _ID_KEYS if key in fields), None)
    return option.name if known_by is None else f"{option.name}={known_by}"


def refuse_descriptors(option: Option) -> None:
    """Raise Blocked, with the option's own words, if it needs an inherited descriptor."""
    for key, value in _fields(option).items():
        leaf = key.rsplit(".", 1)[-1]
        # The address of a stream or dgram netdev: {"type": "fd", "str": "7"}.
        is_address = "." in key and leaf == "type" and value == "fd"
        if leaf in _KEYS or is_address or (isinstance(value, str) and value.startswith(_PATHS)):
            raise Blocked(
                f"-{option.name} {option.value}: the descriptor was passed by whoever started "
                "QEMU and cannot be passed again. Say in the configuration's [vm.NAME.instead] "
                f'what is to be used instead: "{key_of_option(option)}" = "..."'
            )


def _fields(option: Option) -> Fields:
    if option.name not in _FIRST_KEYS or option.value is None:
        return Fields({})
    try:
        return Fields.parse(option.value, first_key=_FIRST_KEYS[option.name])
    except ValueError:
        return Fields({})  # JSON in QEMU's dialect; who has to change it will say so
