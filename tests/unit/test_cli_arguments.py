"""Command lines as virsh reads them."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qsnapd.cli.arguments import Cli, parse_diskspec, parse_memspec, verb


def test_memspecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_memspec("/m.img") == "/m.img"
    assert parse_memspec("file=/m.img,snapshot=external") == "/m.img"
    assert parse_memspec("snapshot=external,file=m.img") == f"{tmp_path}/m.img"
    assert parse_memspec("m.img") == f"{tmp_path}/m.img"
    assert parse_memspec("/a,,b=c.img") == "/a,b=c.img"


def test_diskspecs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_diskspec("vda") == {"target": "vda"}
    assert parse_diskspec("vda,snapshot=no") == {"target": "vda", "snapshot": "no"}
    assert parse_diskspec("vda,file=/x/a,,b.qcow2") == {"target": "vda", "file": "/x/a,b.qcow2"}
    assert parse_diskspec("vda,driver=qcow2,stype=file,file=o.qcow2") == {
        "target": "vda",
        "file": f"{tmp_path}/o.qcow2",
    }
    assert parse_diskspec("./d.img") == {"target": f"{tmp_path}/d.img"}


@pytest.mark.parametrize(
    "spec", ["", "vda,x=1", "vda,file", "vda,file=/a,file=/b", "vda,snapshot=internal", ",file=/a"]
)
def test_bad_diskspecs(spec: str) -> None:
    with pytest.raises(click.UsageError, match="diskspec"):
        parse_diskspec(spec)


@pytest.mark.parametrize("spec", ["", "file=", "snapshot=external", "/m,snapshot=no", "/m,x=1"])
def test_bad_memspecs(spec: str) -> None:
    with pytest.raises(click.UsageError, match="memspec"):
        parse_memspec(spec)


def placed(line: str) -> str:
    """Parse *line* as a verb with a domain, an optional name and spare words for --disk."""
    group = click.Group()

    @verb(group, "take", "domain", "name?", rest="disk")
    @click.option("--disk", multiple=True)
    @click.option("--live", is_flag=True)
    def take(cli: Cli, **options: object) -> None:
        click.echo(" ".join(f"{key}={options[key]}" for key in sorted(options)))

    done = CliRunner().invoke(group, ["take", *line.split()], obj=Cli(socket="unused"))
    return done.output.strip()


@pytest.mark.parametrize(
    "line",
    [
        "vm1 s1 --live",
        "--live vm1 s1",
        "vm1 --live s1",
        "--domain vm1 --name s1 --live",
        "--name s1 --live vm1",
        "s1 --domain=vm1 --live",
    ],
)
def test_every_order_means_the_same(line: str) -> None:
    assert placed(line) == "disk=() domain=vm1 live=True name=s1"


def test_words_that_are_left_over_and_words_that_are_missing() -> None:
    assert placed("vm1 s1 vda,snapshot=no --disk vdb") == (
        "disk=('vdb', 'vda,snapshot=no') domain=vm1 live=False name=s1"
    )
    assert "command 'take' requires <domain>" in placed("--name s1")
