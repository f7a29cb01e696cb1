"""The configuration: the sample loads, and what is wrong is named."""

from pathlib import Path

import pytest

from qsnapd import config
from qsnapd.errors import ConfigError

SAMPLE = Path(__file__).parents[2] / "configs" / "qsnapd.toml"


def load(tmp_path: Path, text: str) -> config.Config:
    file = tmp_path / "qsnapd.toml"
    file.write_text(text)
    return config.load(file)


def test_the_sample_shows_the_defaults() -> None:
    sample = config.load(SAMPLE)
    assert sample.daemon == config.DaemonConfig()
    assert sample.vm["example"].qmp == Path("/run/qemu/example/qmp.sock")


def test_the_sample_mentions_every_key() -> None:
    text = SAMPLE.read_text()
    for key in (*config.DaemonConfig.model_fields, *config.VmConfig.model_fields):
        assert f"\n{key} = " in text or f"\n#{key} = " in text


def test_an_empty_file_is_a_configuration(tmp_path: Path) -> None:
    assert load(tmp_path, "") == config.Config()


def test_paths_follow_others(tmp_path: Path) -> None:
    daemon = load(tmp_path, "[daemon]\nstate_dir = '/a/'\nruntime_dir = '/b'").daemon
    assert daemon.pending_dir == Path("/a-pending")
    assert daemon.socket == Path("/b/io.qsnapd")
    given = "[daemon]\nstate_dir = '/a'\npending_dir = '/c'"
    assert load(tmp_path, given).daemon.pending_dir == Path("/c")


def test_every_launcher_has_a_sample(tmp_path: Path) -> None:
    vm = load(
        tmp_path,
        """
        [vm.a]
        qmp = "/a"
        launcher = "unit"
        unit = "qemu@a\\x2db.service"
        [vm.a.instead]
        "netdev=net0" = "user,id=net0"
        [vm.b]
        qmp = "/b"
        launcher = "systemd-run"
        properties = ["Slice=machine.slice"]
        start_limit_s = 5
        """.replace("\\", "\\\\"),
    ).vm
    assert vm["a"].unit == "qemu@a\\x2db.service"
    assert vm["a"].instead == {"netdev=net0": "user,id=net0"}
    assert vm["b"].properties == ("Slice=machine.slice",)


def test_the_sample_unit_goes_with_its_configuration(tmp_path: Path) -> None:
    text = (SAMPLE.parent / "vm.example.service").read_text()
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    vm = load(tmp_path, "\n".join(lines)).vm["example"]
    assert (vm.launcher, vm.unit) == ("unit", "qemu-example.service")
    assert "\nExecStart=/usr/bin/qsnapd exec example -- " in text
    assert f"path={vm.qmp}," in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[deamon]", "unknown key deamon (there is no 'deamon'; known: daemon, vm)"),
        ("[daemon]\nsockte = '/x'", "unknown key daemon.sockte (there is no 'sockte'; known: band"),
        (
            "[vm.a]\nqmp = '/x'\nagnet = '/y'",
            "unknown key vm.a.agnet (there is no 'agnet'; known: a",
        ),
        ("[vm.a]", "vm.a.qmp is missing"),
        ("[vm.a]\nqmp = 'x'", "vm.a.qmp: 'x' is not an absolute path"),
        ("[vm.'a/b']\nqmp = '/x'", "vm.a/b: invalid name 'a/b': it must not contain '/'"),
        ("[daemon]\nlog_level = 'loud'", "daemon.log_level: Input should be 'debug', 'info'"),
        ("[vm.a]\nqmp = '/x'\n[vm.b]\nqmp = '/x'", "vm.a and vm.b share the monitor /x"),
        (
            "[vm.a]\nqmp = '/x'\nagent = '/z'\n[vm.b]\nqmp = '/y'\nagent = '/z'",
            "vm.a and vm.b share the guest agent /z",
        ),
        ("[daemon", "is not valid TOML: "),
        ("[vm.a]\nqmp = '/x'\nlauncher = 'unit'", "needs unit ="),
        ("[vm.a]\nqmp = '/x'\nunit = 'a.service'", "unit is given, but launcher is"),
        ("[vm.a]\nqmp = '/x'\nlauncher = 'unit'\nunit = '--now'", "vm.a.unit: String should"),
        ("[vm.a]\nqmp = '/x'\nproperties = ['A=b']", "properties are given, but launcher is"),
        ("[vm.a]\nqmp = '/x'\nlauncher = 'by-hand'", "vm.a.launcher: Input should be 'spawn'"),
        ("[vm.a]\nqmp = \"/x\\u0000\"", "vm.a.qmp: '/x\\x00' holds a character that ends"),
        ("[vm.a]\nqmp = '/x'\nhook = [\"a\\u0000\"]", "vm.a.hook.0: 'a\\x00' holds a character"),
        ("[daemon]\nreader_group = \"\\u0000\"", "daemon.reader_group: '\\x00' holds a character"),
        (f"[vm.a]\nqmp = '/{'x' * 110}'", "4 bytes longer than a socket's path may be"),
        (f"[daemon]\nruntime_dir = '/{'x' * 110}'", "bytes longer than a socket's path may be"),
        ("a = " + "[" * 20_000, "its values are nested too deep"),
        ("a = " + "9" * 5_000, "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert complaint in str(caught.value)
    assert "qsnapd.toml" in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vm\.a\.qmp is missing; vm\.b\.qmp is missing"):
        load(tmp_path, "[vm.a]\n[vm.b]\n")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*: No such file"):
        config.load(tmp_path / "missing.toml")
    (tmp_path / "latin1.toml").write_bytes(b"# \xff\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        config.load(tmp_path / "latin1.toml")
