"""The two lines that an organiser sends to volunteers must work as typed."""

import hashlib
from pathlib import Path

import pytest

from calm_ray.cli.invite import git_url, install_line
from calm_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://example.org/a/b.git", "https://example.org/a/b.git"),
        ("https://me:token@example.org/a/b.git", "https://example.org/a/b.git"),
        ("git@example.org:a/b.git", "ssh://git@example.org/a/b.git"),
        ("/srv/git/b.git", "file:///srv/git/b.git"),
    ],
)
def test_git_url_gets_the_scheme_that_pip_needs(remote: str, url: str) -> None:
    assert git_url(remote) == url


def test_install_line_of_a_wheel_names_its_hash(tmp_path: Path) -> None:
    wheel = tmp_path / "calm_ray-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    line = install_line(str(wheel))
    assert line == f'pip install "calm-ray @ {wheel.as_uri()}#sha256={hashlib.sha256(b"wheel").hexdigest()}"'


def test_install_line_refuses_a_url_without_hash_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="#sha256="):
        install_line("https://example.org/calm_ray.whl")
    with pytest.raises(ConfigError, match="no such file"):
        install_line(str(tmp_path / "none.whl"))
