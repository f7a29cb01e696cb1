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


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[deamon]", "unknown key deamon (there is no 'deamon'; known: daemon, vm)"),
        ("[daemon]\nsockte = '/x'", "unknown key daemon.sockte (there is no 'sockte'; known: log_"),
        (
            "[vm.a]\nqmp = '/x'\nagnet = '/y'",
            "unknown key vm.a.agnet (there is no 'agnet'; known: a",
        ),
        ("[vm.a]", "vm.a.qmp is missing"),
        ("[vm.a]\nqmp = 'x'", "vm.a.qmp: 'x' is not an absolute path"),
        ("[vm.'a/b']\nqmp = '/x'", "vm.a/b: invalid name 'a/b': it must not contain '/'"),
        ("[daemon]\nlog_level = 'loud'", "daemon.log_level: Input should be 'debug', 'info'"),
        ("[vm.a]\nqmp = '/x'\n[vm.b]\nqmp = '/x'", "vm.a and vm.b share the monitor /x"),
        ("[daemon", "is not valid TOML: "),
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
