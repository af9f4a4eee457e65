"""What a volunteer installs: the package alone, with its licence, and the same bytes whoever builds it."""

import hashlib
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from calm_ray import __version__
from tests.shards import ROOT


def build(folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_every_module_of_the_package_and_nothing_of_the_organisers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"calm_ray-{__version__}.dist-info/"
    assert wheel.name == f"calm_ray-{__version__}-py3-none-any.whl"
    assert {name for name in names if not name.startswith(("calm_ray/", info))} == set()
    assert f"{info}licenses/LICENSE" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "calm_ray").rglob("*.py")}
    assert modules <= names


def test_wheel_says_what_it_needs_and_offers(wheel: Path) -> None:
    info = f"calm_ray-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    assert "calm-ray = calm_ray.cli.main:main" in scripts
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert any(r.startswith("hivemind") for r in needed)
    # A volunteer never joins Ray, rents no machine and serves no page.
    not_for_volunteers = ("ray", "boto3", "google-cloud", "fastapi", "uvicorn", "sqlalchemy")
    assert [r for r in needed if r.startswith(not_for_volunteers)] == []


def test_wheel_is_the_same_bytes_each_time(wheel: Path, tmp_path: Path) -> None:
    """Its SHA-256 is what volunteers are given, and what the supervisor installs it under."""
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, build(tmp_path))}
    assert len(digests) == 1
