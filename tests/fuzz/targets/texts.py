"""What people and other hosts write: the configuration, manifests, descriptions of exports, XML."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from xml.sax.saxutils import escape, unescape

from qsnapd import config
from qsnapd.cli.output import local_time
from qsnapd.control.authorization import Access
from qsnapd.control.view import placed
from qsnapd.errors import BadRequest, ConfigError, ManifestInvalid, ManifestTooNew
from qsnapd.model.names import check_name
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import EXPORT_NAME, Export
from qsnapd.snapshot.moving.sources import parse_export
from qsnapd.xml.reading import LIMIT_BYTES
from qsnapd.xml.request import read_request
from qsnapd.xml.snapshot import read_snapshot, write_snapshot
from tests.fuzz import seeds
from tests.fuzz.mutating import spoil_bytes, spoil_json, spoil_text
from tests.fuzz.targets.target import Feed, Target, plain, scratch

UNIX_PATH_LIMIT_BYTES = 107


def require_path(path: str | Path) -> None:
    """What is stored or asked for as a path can be one."""
    assert os.fspath(path).startswith("/")
    assert "\0" not in os.fspath(path)


# --- the configuration -----------------------------------------------------------------------


@contextmanager
def _open_config() -> Iterator[Feed]:
    with scratch() as folder:
        file = folder / "qsnapd.toml"

        def feed(data: bytes) -> None:
            file.write_bytes(data)
            with suppress(ConfigError):
                _require_usable(config.load(file))

        yield feed


def _require_usable(found: config.Config) -> None:
    daemon = found.daemon
    for path in (daemon.socket, daemon.state_dir, daemon.runtime_dir, daemon.pending_dir):
        require_path(path)
    assert daemon.qemu_img
    assert "\0" not in daemon.qemu_img
    with suppress(ConfigError):
        Access.of_groups(operator=daemon.operator_group, reader=daemon.reader_group)
    monitors = [vm.qmp for vm in found.vm.values()]
    assert len(set(monitors)) == len(monitors)
    for name, vm in found.vm.items():
        check_name(name)
        for socket in filter(None, (daemon.socket, vm.qmp, vm.agent)):
            require_path(socket)
            assert len(os.fsencode(socket)) <= UNIX_PATH_LIMIT_BYTES
        for limit_s in filter(None, (vm.freeze_limit_s, vm.hold_limit_s, vm.start_limit_s)):
            assert 0 < limit_s < math.inf
        for word in (*(vm.hook or ()), *vm.properties, *vm.instead, *vm.instead.values()):
            assert "\0" not in word


# --- manifests and exports -------------------------------------------------------------------


def feed_manifest(data: bytes) -> None:
    with suppress(ManifestInvalid, ManifestTooNew):
        require_manifest(parse_manifest(data, "it"))


def feed_export(data: bytes) -> None:
    try:
        export = parse_export(data, EXPORT_NAME)
    except (ManifestInvalid, ManifestTooNew):
        return
    require_manifest(export.snapshot)
    assert Export.model_validate_json(export.model_dump_json()) == export
    for name, file in export.files().items():
        assert "/" not in name
        assert not name.startswith(".")
        assert file.size_bytes >= 0
        assert file.data_bytes >= 0
    assert EXPORT_NAME not in export.files()


def require_manifest(manifest: Manifest) -> None:
    """It holds what the rest takes for granted, and goes wherever manifests go."""
    for name in filter(None, (manifest.name, manifest.vm, manifest.parent)):
        assert check_name(name) not in ("", ".", "..")
    layers = (*manifest.disks, *manifest.left_out)
    files = [file for disk in layers for file in (*disk.chain, *disk.known_as)]
    for path in (*(d.frozen for d in layers), *(file.path for file in files)):
        require_path(path)
    if manifest.memory is not None:
        require_path(manifest.memory.path)
    for number in (manifest.paused_ms, manifest.total_ms):
        assert 0 <= number < math.inf
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    [snapshot] = placed([manifest], None, {})
    local_time(snapshot.model_dump(mode="json")["created_at"])
    xml = write_snapshot(manifest).encode()
    if len(xml) <= LIMIT_BYTES:
        assert read_snapshot(xml) == manifest


# --- XML -------------------------------------------------------------------------------------


def feed_request(data: bytes) -> None:
    try:
        request = read_request(data)
    except BadRequest:
        return
    assert CreateRequest.model_validate_json(request.model_dump_json()) == request
    if request.name is not None:
        check_name(request.name)
    for path in filter(None, (request.memory_file, *(disk.file for disk in request.disks))):
        require_path(path)


def feed_snapshot(data: bytes) -> None:
    with suppress(BadRequest, ManifestInvalid, ManifestTooNew):
        require_manifest(read_snapshot(data))


def _spoil_snapshot(data: bytes, random: Random) -> bytes:
    """Spoil the XML, or the manifest that lies within."""
    front, mark, rest = data.partition(b"'urn:qsnapd:snapshot'>")
    inner, end, back = rest.partition(b"</qsnapd:manifest>")
    if not end or random.randrange(3) == 0:
        return spoil_bytes(data, random, seeds.XML_WORDS)
    manifest = spoil_json(unescape(inner.decode(errors="replace")).encode(), random)
    return front + mark + escape(manifest.decode(errors="replace")).encode() + end + back


TARGETS = (
    Target("config", _open_config, seeds.configs, spoil_text(*seeds.TOML_WORDS)),
    Target("manifest", plain(feed_manifest), seeds.manifests, spoil_json),
    Target("export", plain(feed_export), seeds.exports, spoil_json),
    Target("xml-request", plain(feed_request), seeds.xml_requests, spoil_text(*seeds.XML_WORDS)),
    Target("xml-snapshot", plain(feed_snapshot), seeds.xml_snapshots, _spoil_snapshot),
)
