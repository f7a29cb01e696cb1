"""The linters as tests: `pytest` is the one gate."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts.tools import command

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("qsnapd", "tests")
SOURCES = sorted(str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def check(*argv: str) -> None:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


def tool(name: str) -> str:
    """Return the path of a program of the environment that runs this test."""
    return f"{Path(sys.executable).parent}/{name}"


def test_ruff() -> None:
    check(tool("ruff"), "check", "--quiet", *FOLDERS)


def test_mypy_strict() -> None:
    check(tool("mypy"), "--no-error-summary")


def test_flake8_async() -> None:
    check(tool("flake8-async"), *SOURCES)


def test_flake8_async_is_awake(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import trio\nasync def f() -> None:\n"
        "    try:\n        pass\n    finally:\n        await trio.sleep(1)\n"
    )
    done = subprocess.run(
        [tool("flake8-async"), planted], capture_output=True, text=True, check=False
    )
    assert "ASYNC102" in done.stdout
    assert done.returncode == 1


def test_systemd_units(tmp_path: Path) -> None:
    units = sorted(path for path in (ROOT / "systemd").iterdir() if path.is_file())
    assert units, "systemd/ has no unit"
    # the units name the programs where a package puts them; here they are in the environment
    ours = re.compile(r"/usr/(?:local/)?bin/(?=qsnap)")
    for unit in units:
        text = ours.sub(tool(""), unit.read_text())
        (tmp_path / unit.name).write_text(text)
    copies = [str(tmp_path / unit.name) for unit in units]
    check(*command("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", *copies)
