"""How RAM on a command line becomes a mapping of an image, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.image.mapped_ram import Layout, MappedBlock
from qsnapd.model.snapshot import Machine, Process
from qsnapd.vm.argv import Fields, parse_options, words_of
from qsnapd.vm.ram_options import CannotMap, MappedRam, map_ram

MIB = 1 << 20
IMAGE = "/snap/a,b/memory.img"
SPELLED = "/snap/a,,b/memory.img"
SIZE = 64 * MIB
HALF = 32 * MIB

TAIL = "share=off,readonly=on,rom=off,x-use-canonical-path-for-ramblock-id="


def layout(*ids: str) -> Layout:
    """Blocks of RAM that share 64 MiB, and one that is no RAM."""
    size = SIZE // len(ids)
    blocks, position = [], MIB
    for id_, size_bytes in (*((id_, size) for id_ in ids), ("vga.vram", 16 * MIB)):
        blocks.append(MappedBlock(id_, size_bytes, 4096, position - 8192, position))
        position += size_bytes + MIB
    return Layout("pc", 2, tuple(blocks))


def map_words(words: str | list[str], *ids: str, type_: str = "pc-i440fx-10.0") -> MappedRam:
    argv = tuple(words.split() if isinstance(words, str) else words)
    process = Process(exe="/qemu", argv=("qemu", *argv), cwd="/", uid=0, gid=0)
    machine = Machine(type=type_, ram_bytes=SIZE, process=process)
    return map_ram(parse_options(argv), IMAGE, layout(*(ids or ("pc.ram",))), machine)


def backend(
    id_: str, *, offset: int = MIB, size: int = SIZE, more: str = "", path: bool = False
) -> str:
    """Spell the object that a block becomes."""
    return (
        f"-object qom-type=memory-backend-file,id={id_},size={size}{more},mem-path={SPELLED},"
        f"offset={offset},{TAIL}{'on' if path else 'off'}"
    )


@pytest.mark.parametrize(
    ("words", "ids", "expected"),
    [
        # what QEMU makes by itself
        ("-m 64", ["pc.ram"], f"-m 64 {backend('pc.ram')} -machine memory-backend=pc.ram"),
        (
            "-M q35,accel=kvm -m 64M,slots=2,maxmem=1G",
            ["pc.ram"],
            f"-M q35,accel=kvm -m 64M,slots=2,maxmem=1G {backend('pc.ram')} "
            "-machine memory-backend=pc.ram",
        ),
        (
            "-M microvm -m 64",
            ["microvm.ram"],
            f"-M microvm -m 64 {backend('microvm.ram')} -machine memory-backend=microvm.ram",
        ),
        # objects keep their place and what is theirs
        (
            "-object memory-backend-ram,id=m,size=64M,merge=off,prealloc=off "
            "-M pc,memory-backend=m",
            ["m"],
            f"{backend('m', more=',merge=off')} -M pc,memory-backend=m",
        ),
        (
            "-machine memory-backend=m --object size=65536K,qom-type=memory-backend-memfd,id=m",
            ["m"],
            f"-machine memory-backend=m --object size={SIZE},qom-type=memory-backend-file,id=m,"
            f"mem-path={SPELLED},offset={MIB},{TAIL}off",
        ),
        (
            "-object memory-backend-file,id=m,size=67108864,mem-path=/dev/shm/x,dump=off "
            "-machine q35 -machine memory-backend=m",
            ["m"],
            f"{backend('m', more=',dump=off')} -machine q35 -machine memory-backend=m",
        ),
        (
            "-object memory-backend-memfd,id=m,size=64M,share=on -machine memory-backend=m",
            ["m"],
            f"{backend('m')} -machine memory-backend=m",
        ),
        (
            "-object memory-backend-ram,id=m,size=64M -machine memory-backend=m",
            ["/objects/m"],
            f"{backend('m', path=True)} -machine memory-backend=m",
        ),
        # nodes
        (
            "-object memory-backend-ram,id=a,size=32M -object memory-backend-memfd,id=b,size=32M "
            "-numa node,memdev=a -numa node,nodeid=1,memdev=b -numa node -numa cpu,node-id=2",
            ["a", "b"],
            f"{backend('a', size=HALF)} {backend('b', size=HALF, offset=MIB + HALF + MIB)} "
            "-numa node,memdev=a -numa node,nodeid=1,memdev=b -numa node -numa cpu,node-id=2",
        ),
        # others are left alone
        (
            "-m 64 -object rng-random,id=r -object memory-backend-ram,id=dimm,size=1G "
            "-device pc-dimm,memdev=dimm",
            ["pc.ram"],
            "-m 64 -object rng-random,id=r -object memory-backend-ram,id=dimm,size=1G "
            f"-device pc-dimm,memdev=dimm {backend('pc.ram')} -machine memory-backend=pc.ram",
        ),
        (
            "-m 64 -device virtio-balloon-pci -overcommit mem-lock=off",
            ["pc.ram"],
            f"-m 64 -device virtio-balloon-pci -overcommit mem-lock=off {backend('pc.ram')} "
            "-machine memory-backend=pc.ram",
        ),
    ],
)  # fmt: skip
def test_ram_becomes_a_mapping(words: str, ids: list[str], expected: str) -> None:
    mapped = map_words(words, *ids)
    assert " ".join(words_of(mapped.options)) == expected
    assert mapped.blocks == tuple(ids)


def test_json_stays_json() -> None:
    before = {"qom-type": "memory-backend-ram", "id": "m", "size": SIZE, "merge": False}
    words = ["-object", json.dumps(before), "-machine", "memory-backend=m"]
    mapped = map_words(words, "m")
    assert json.loads(mapped.options[0].value or "") == {
        "qom-type": "memory-backend-file",
        "id": "m",
        "size": SIZE,
        "merge": False,
        "mem-path": IMAGE,
        "offset": MIB,
        "share": False,
        "readonly": True,
        "rom": "off",
        "x-use-canonical-path-for-ramblock-id": False,
    }


RAM = "-machine memory-backend=m -object memory-backend-ram,id=m,size=64M"
FILE = "-machine memory-backend=m -object memory-backend-file,id=m,size=64M"
MEMFD = "-machine memory-backend=m -object memory-backend-memfd,id=m,size=64M"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("-mem-path /dev/hugepages", "files of its own"),
        ("-mem-prealloc", "all RAM at once"),
        ("-readconfig /etc/vm.cfg", "does not read"),
        ("-overcommit mem-lock=on", "locked"),
        ("-realtime mlock=on", "locked"),
        ("-numa node,mem=64", "without a memory backend"),
        ("-chardev socket,id=c,path=/v -device vhost-user-fs-pci,chardev=c", "another process"),
        ("-netdev vhost-user,id=n,chardev=c", "another process"),
        ("-netdev type=vhost-user,id=n,chardev=c", "another process"),
        ('-device {"driver":"vhost-user-blk-pci","chardev":"c"}', "another process"),
        ("-object cryptodev-vhost-user,id=k,chardev=c", "another process"),
        ("-device ivshmem-plain,memdev=x", "another process"),
        ("-device virtio-gpu-pci,blob=on", "graphics"),
        ("-device virtio-balloon-pci,free-page-reporting=on", "gives RAM back"),
        ("-device virtio-mem-pci,memdev=x", "gives RAM back"),
        ("-machine memory-backend=m", "no -object"),
        ("-machine memory-backend=other", "no -object"),
        ("-m 64 -object memory-backend-ram,id=pc.ram,size=64M", "is called 'pc.ram'"),
        (f"{RAM},prealloc=on", "at once"),
        (f"{RAM},prealloc=yes", "at once"),
        (f"{RAM},policy=bind,host-nodes=0", "nodes of the host"),
        (f"{RAM},host-nodes.0=1", "nodes of the host"),
        (f"{RAM},policy=interleave", "nodes of the host"),
        (f"{RAM[:-3]}63M", "size 63M does not have the 67108864 bytes"),
        (f"{RAM[:-3]}lots", "of size lots does not have"),
        (f"{FILE},mem-path=/x,share=on", "others may read"),
        (f"{FILE},mem-path=/x,pmem=on", "persistent"),
        (f"{FILE},mem-path=/x,readonly=on", "cannot be written to"),
        (f"{FILE},mem-path=/dev/hugepages/x", "huge pages"),
        (f"{MEMFD},hugetlb=on", "huge pages"),
        (f"{RAM.replace('-ram', '-epc')}", "nothing can replace"),
        (f"{RAM.replace('-ram', '-shm')}", "nothing can replace"),
    ],
)
def test_refused_in_words(words: str, cause: str) -> None:
    with pytest.raises(CannotMap, match=cause):
        map_words(words, "m" if "id=m" in words else "pc.ram")


def test_image_of_another_machine() -> None:
    with pytest.raises(CannotMap, match="does not know what QEMU calls the RAM of machine isapc"):
        map_words("-M isapc", "other.ram", type_="isapc")
    with pytest.raises(CannotMap, match="no block of the memory backend 'm'"):
        map_words(RAM, "pc.ram")
    with pytest.raises(CannotMap, match="-m 64 does not have the 33554432 bytes of RAM"):
        map_words("-m 64", "pc.ram", "other")
    with pytest.raises(CannotMap, match="-m 134217728 does not have"):
        map_words("-M pc")
    with pytest.raises(CannotMap, match=f"-m {'9' * 5000} does not have"):
        map_words("-m " + "9" * 5000)


@pytest.mark.parametrize(
    "words",
    [
        "-m 64",
        "-m 64M",
        "-m 0.0625G",
        "-m 65536k,slots=2,maxmem=1G",
        "-m size=67108864B",
        "-m 32 -m slots=2,maxmem=1G -m 64",
        "-m 64 -m slots=2,maxmem=1G",
    ],
)
def test_sizes_as_qemu_reads_them(words: str) -> None:
    assert map_words(words).blocks == ("pc.ram",)


SHARERS = ("ivshmem", "vfio-user", "vhost-user")
values = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1).filter(
    lambda value: not any(sharer in value for sharer in SHARERS)
)


@given(name=values, value=values)
def test_whatever_is_spelled_as_a_property_does_not_change_what_is_mapped(
    name: str, value: str
) -> None:
    key = name.replace("=", "").replace(",", "").replace(".", "") or "k"
    before = {"qom-type": "memory-backend-ram", "id": "m", "size": "64M", f"x{key}": value}
    text = str(Fields(before))
    mapped = map_words(["-object", text, "-machine", "memory-backend=m"], "m")
    fields = Fields.parse(mapped.options[0].value or "")
    assert (fields["qom-type"], fields["id"]) == ("memory-backend-file", "m")
    assert (fields["mem-path"], fields["readonly"], fields["share"]) == (IMAGE, "on", "off")
    assert f"x{key}" not in fields
