"""How a command line makes RAM, and how to make it a private mapping of a memory image instead.

Pure. What the guest sees does not change: the blocks keep their names and sizes, only where
their pages come from does. Whatever cannot be had this way is refused in words, and the
image can still be loaded whole.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from qsnapd.errors import Blocked
from qsnapd.image.mapped_ram import Layout, MappedBlock
from qsnapd.model.snapshot import Machine
from qsnapd.vm.argv import Fields, Option

_DEFAULT_IDS = ("pc.ram", "microvm.ram")
"""What QEMU calls the RAM that only -m speaks of, on the machines of this architecture."""
_CANONICAL = "x-use-canonical-path-for-ramblock-id"
"""Whether QEMU names a block by "/objects/ID", not by the backend's id alone."""
_KEPT = ("qom-type", "id", "size", "merge", "dump", "reserve")
"""Properties of any backend; the others say where its memory comes from."""
_DEFAULT_BYTES = 128 << 20
"""What a machine has without -m."""
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)([BKMGTPE]?)", re.IGNORECASE)
_SHIFTS = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}

_SHARERS = ("vhost-user", "vfio-user", "ivshmem")
"""Devices whose other half is another process that writes to the guest's RAM."""


class CannotMap(Blocked):
    """RAM cannot be a mapping of this image, and why; loading the image whole works."""


@dataclass(frozen=True)
class MappedRam:
    """A command line whose RAM is a mapping of an image."""

    options: list[Option]
    blocks: tuple[str, ...]
    """The ids of the blocks that are mapped, as the image has them: what a view leaves out."""


def map_ram(options: Sequence[Option], image: str, layout: Layout, machine: Machine) -> MappedRam:
    """Make the RAM of *options* a private, writable mapping of the pages in *image*.

    Preconditions: holes of the image stand for zero pages; QEMU >= 8.2 (which every QEMU with
    mapped-ram is). QEMU opens *image* itself, for reading only; `require_readable` says
    whether it may. Memory of DIMMs is not mapped, it is loaded with the rest.
    Raises: CannotMap.
    """
    for option in options:
        _refuse(option)
    changed = list(options)
    backends = {str(b.fields.get("id")): b for b in _backends(options)}
    named = _named_backends(options)
    if not named:
        block = _default_block(options, layout, machine)
        if block.id in backends:
            raise CannotMap(f"an -object is called {block.id!r}, which is what the RAM is called")
        fields = Fields({"qom-type": "", "id": block.id})
        changed += [
            Option("object", str(_mapping(fields, image, block))),
            Option("machine", f"memory-backend={block.id}"),
        ]
        return MappedRam(changed, (block.id,))
    blocks = []
    for id_ in named:
        if id_ not in backends:
            raise CannotMap(f"the command line has no -object for the memory backend {id_!r}")
        backend, block = backends[id_], _block_of(id_, layout)
        _refuse_backend(backend, block)
        changed[backend.index] = Option(
            "object", str(_mapping(backend.fields, image, block)), options[backend.index].dashes
        )
        blocks.append(block.id)
    return MappedRam(changed, tuple(blocks))


@dataclass(frozen=True)
class _Backend:
    index: int
    fields: Fields

    def __str__(self) -> str:
        return f"the memory backend {self.fields['id']!r}"


def _refuse(option: Option) -> None:
    """Refuse what says of all RAM where or how it must be."""
    fields = _fields(option)
    text = option.value or ""
    if option.name == "mem-path":
        raise CannotMap(f"{option} wants the RAM in files of its own")
    if option.name == "mem-prealloc":
        raise CannotMap("-mem-prealloc wants all RAM at once")
    if option.name == "readconfig":
        raise CannotMap(f"{option}: qsnapd does not read what the file says about RAM")
    locks = fields.is_on("mem-lock") or fields.is_on("mlock")
    if option.name in ("overcommit", "realtime") and locks:
        raise CannotMap(f"{option} wants all RAM at once, and locked")
    if option.name == "numa" and "mem" in fields:
        raise CannotMap(f"{option} splits RAM without a memory backend")
    if option.name in ("device", "netdev", "object", "chardev"):
        for sharer in _SHARERS:
            if sharer in text:
                raise CannotMap(f"{option} shares the RAM with another process")
        if fields.is_on("blob"):
            raise CannotMap(f"{option} shares parts of the RAM with the host's graphics")
        if fields.is_on("free-page-reporting"):
            raise CannotMap(f"{option} gives RAM back page by page, which a mapping cannot")
        if "virtio-mem" in text:
            raise CannotMap(f"{option} gives RAM back to the host, which a mapping cannot")


def _fields(option: Option) -> Fields:
    first_keys = {"object": "qom-type", "device": "driver", "netdev": "type", "numa": "type"}
    try:
        return Fields.parse(option.value or "", first_key=first_keys.get(option.name))
    except ValueError:
        return Fields({})


def _backends(options: Sequence[Option]) -> Iterator[_Backend]:
    for index, option in enumerate(options):
        if option.name == "object":
            fields = _fields(option)
            if str(fields.get("qom-type", "")).startswith("memory-backend-") and "id" in fields:
                yield _Backend(index, fields)


def _named_backends(options: Sequence[Option]) -> list[str]:
    """The ids of the backends that main RAM consists of; none: QEMU makes it by itself."""
    memdevs = [
        str(fields["memdev"])
        for option in options
        if option.name == "numa" and "memdev" in (fields := _fields(option))
    ]
    if memdevs:
        return memdevs
    for option in reversed(options):  # a later -machine overrides an earlier one
        if option.name in ("machine", "M"):
            fields = Fields.parse(option.value or "", first_key="type")
            if fields.get("memory-backend"):
                return [str(fields["memory-backend"])]
    return []


def _default_block(options: Sequence[Option], layout: Layout, machine: Machine) -> MappedBlock:
    for block in layout.blocks:
        if block.id in _DEFAULT_IDS:
            _require_size(f"-m {_memory_option(options)}", _memory_option(options), "M", block)
            return block
    raise CannotMap(
        f"qsnapd does not know what QEMU calls the RAM of machine {machine.type}: the image has "
        f"{', '.join(block.id for block in layout.blocks)}"
    )


def _memory_option(options: Sequence[Option]) -> object:
    """The size that -m gives; several -m are as one."""
    for option in reversed(options):
        if option.name == "m":
            fields = Fields.parse(option.value or "", first_key="size")
            if "size" in fields:
                return fields["size"]
    return _DEFAULT_BYTES


def _block_of(id_: str, layout: Layout) -> MappedBlock:
    for block in layout.blocks:
        if block.id in (id_, f"/objects/{id_}"):
            return block
    raise CannotMap(f"the image has no block of the memory backend {id_!r}")


def _require_size(owner: str, size: object, unit: str, block: MappedBlock) -> None:
    """Refuse a *size*, in *unit*s if it names none, that is not the block's."""
    if _bytes(size, unit) != block.size_bytes:
        raise CannotMap(f"{owner} does not have the {block.size_bytes} bytes of RAM of the image")


def _refuse_backend(backend: _Backend, block: MappedBlock) -> None:
    """Refuse a backend that has something which a private mapping of an image has not."""
    fields = backend.fields
    kind = fields["qom-type"]
    if (check := _KINDS.get(kind)) is None:
        raise CannotMap(f"{backend} is a {kind}, which nothing can replace")
    if fields.is_on("prealloc"):
        raise CannotMap(f"{backend} wants all its RAM at once (prealloc)")
    has_nodes = any(key.partition(".")[0] == "host-nodes" for key in fields)
    if has_nodes or fields.get("policy", "default") != "default":
        raise CannotMap(f"{backend} is bound to nodes of the host, and the image's cache is not")
    check(backend)
    size = fields.get("size")
    _require_size(f"{backend} of size {size}", size, "B", block)


def _refuse_file(backend: _Backend) -> None:
    fields = backend.fields
    if fields.is_on("share"):
        raise CannotMap(f"{backend} leaves its RAM in a file that others may read (share=on)")
    if fields.is_on("pmem") or fields.is_on("readonly"):
        raise CannotMap(f"{backend} is persistent or cannot be written to")
    if "huge" in str(fields.get("mem-path")):
        raise CannotMap(f"{backend} wants huge pages, and an image is mapped by small ones")


def _refuse_memfd(backend: _Backend) -> None:
    # share=on is its default, and means nothing where nobody is on the other side
    if backend.fields.is_on("hugetlb"):
        raise CannotMap(f"{backend} wants huge pages, and an image is mapped by small ones")


_KINDS: dict[str, Callable[[_Backend], None]] = {
    "memory-backend-ram": lambda _: None,
    "memory-backend-file": _refuse_file,
    "memory-backend-memfd": _refuse_memfd,
}


def _bytes(size: object, unit: str) -> int | None:
    """What QEMU takes a size for; None: not known."""
    if isinstance(size, int):
        return size
    if not (found := _SIZE.fullmatch(str(size))):
        return None
    return int(Fraction(found[1]) * (1 << _SHIFTS[(found[2] or unit).upper()]))


def _mapping(fields: Fields, image: str, block: MappedBlock) -> Fields:
    """The backend *fields*, with its pages from the image."""
    kept = {key: value for key, value in fields.items() if key in _KEPT}
    on, off = (True, False) if fields.is_json else ("on", "off")
    return Fields(
        kept
        | {
            "qom-type": "memory-backend-file",
            "size": block.size_bytes,
            "mem-path": image,
            "offset": block.pages_offset_bytes,
            "share": off,
            # Opened for reading: whatever QEMU does, the image cannot be written to. The
            # mapping is private and can be.
            "readonly": on,
            "rom": "off",
            # The default depends on the kind of backend, for machine types before 4.0.
            _CANONICAL: on if block.id.startswith("/objects/") else off,
        },
        is_json=fields.is_json,
    )
