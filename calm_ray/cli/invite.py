"""`calm-ray invite FOLDER`: what to send to volunteers, two lines that work as typed."""

import hashlib
import re
import subprocess
from pathlib import Path

from calm_ray import __version__
from calm_ray.errors import ConfigError
from calm_ray.invite import INVITE_FILE, decode_invite


def print_invite(folder: Path, *, wheel: str | None) -> int:
    path = folder / INVITE_FILE
    if not path.exists():
        raise ConfigError(f"{path}: not found; give the output folder of a run that is up, such as out/demo")
    invite = path.read_text().strip()
    decode_invite(invite)
    print("Send both lines to volunteers (Linux or macOS, Python 3.11 to 3.13):\n")
    print(f"  {install_line(wheel)}")
    print(f"  calm-ray join {invite}\n")
    print(f"(After a release on a package index: pip install calm-ray=={__version__})")
    return 0


def install_line(wheel: str | None) -> str:
    """The exact pip command for this very code: a wheel with its hash, or this checkout's commit in git."""
    if wheel is not None:
        return f'pip install "calm-ray @ {_wheel_reference(wheel)}"'
    remote, commit = _git("remote", "get-url", "origin"), _git("rev-parse", "HEAD")
    if remote and commit:
        return f'pip install "calm-ray @ git+{git_url(remote)}@{commit}"'
    built = sorted(Path("dist").glob("calm_ray-*.whl"))
    if built:
        return f'pip install "calm-ray @ {_wheel_reference(str(built[-1]))}"'
    raise ConfigError("no git remote and no wheel in dist/ to name: run `make wheel`, or pass --wheel PATH_OR_URL")


def git_url(remote: str) -> str:
    """A git remote as pip wants it after `git+`: always with a scheme, and never with the organiser's own token."""
    if remote.startswith("/"):
        return Path(remote).as_uri()
    if "://" not in remote and ":" in remote:
        host, _, path = remote.partition(":")
        return f"ssh://{host}/{path}"
    return re.sub(r"^(https?://)[^/@]*@", r"\1", remote)


def _wheel_reference(wheel: str) -> str:
    if "://" in wheel:
        if "#sha256=" not in wheel:
            raise ConfigError(f"--wheel {wheel}: add #sha256=HEX to the URL, so that volunteers get what you built")
        return wheel
    path = Path(wheel).resolve()
    if not path.is_file():
        raise ConfigError(f"--wheel {wheel}: no such file")
    return f"{path.as_uri()}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
