"""Command lines as virsh reads them."""

import click
import pytest
from click.testing import CliRunner

from qsnapd.cli.arguments import Cli, verb


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
