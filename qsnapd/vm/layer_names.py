"""The file names of a disk's images, also where QEMU has cut them off.

An image that lies over another one than its header says, which is so where files were handed
over by descriptor, QEMU names by the JSON of its whole chain, and cuts that off at 4 KiB. What it
calls the file itself is then to be had from the node below, at the price of a slow question.
"""

from collections.abc import Iterator, Mapping, Sequence

from qsnapd.qmp.block import BlockInfo, ImageInfo, NodeStats, QueryNamedBlockNodes, QueryNodeStats
from qsnapd.qmp.session import QmpSession

_JSON, _CUT_OFF = "json:", "..."


async def read_layer_names(
    session: QmpSession, devices: Sequence[BlockInfo]
) -> list[tuple[str, ...]]:
    """For each device, what QEMU calls its images' files, active layer first.

    A name may still be that of a node, for `plain_name`, or cut off if nothing tells more.
    Raises: VmError.
    """
    named = [
        tuple(image.filename for image in layers(device.inserted.image)) if device.inserted else ()
        for device in devices
    ]
    if not any(_is_cut_off(name) for names in named for name in names):
        return named
    nodes = await session.execute(QueryNamedBlockNodes())
    files: dict[str | None, str] = {node.node_name: node.image.filename for node in nodes}
    below = {
        stats.node_name: tuple(_file_nodes(stats))
        for stats in await session.execute(QueryNodeStats())
    }
    tops = [device.inserted.node_name if device.inserted else "" for device in devices]
    return [
        _completed(names, below.get(top, ()), files)
        for top, names in zip(tops, named, strict=True)
    ]


def layers(image: ImageInfo) -> list[ImageInfo]:
    """The image and those below it, newest first."""
    images = [image]
    while images[-1].backing_image is not None:
        images.append(images[-1].backing_image)
    return images


def _is_cut_off(name: str) -> bool:
    return name.startswith(_JSON) and name.endswith(_CUT_OFF)


def _file_nodes(stats: NodeStats | None) -> Iterator[str | None]:
    """The node below each image of a chain, by name."""
    while stats is not None:
        yield stats.parent.node_name if stats.parent is not None else None
        stats = stats.backing


def _completed(
    names: Sequence[str], file_nodes: Sequence[str | None], files: Mapping[str | None, str]
) -> tuple[str, ...]:
    if len(names) != len(file_nodes):  # changed between the two questions
        return tuple(names)
    return tuple(
        files.get(node, name) if _is_cut_off(name) else name
        for name, node in zip(names, file_nodes, strict=True)
    )
