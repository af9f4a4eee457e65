"""The walls of docs/architecture.md, checked on the source: who imports whom, one home for each SDK, small files.

Imports inside functions and under TYPE_CHECKING count too: a wall that holds only at the top of a file is none.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.shards import ROOT

PURE = {
    "bundle",
    "clock",
    "code",
    "config",
    "errors",
    "invite",
    "membership",
    "parent",
    "report",
    "signing",
    "summary",
    "tables",
}
"""Modules of calm_ray that anything may import, and that import nothing heavy."""

PURE_MAY_USE = {"cryptography", "pydantic", "pydantic_core"}
"""Third-party packages allowed in a pure module. Whatever is added here is loaded by `calm-ray --help`."""

SIBLINGS = {"access", "checkpoint", "observe", "swarm", "training"}

MAY_IMPORT: Mapping[str, set[str]] = {
    **dict.fromkeys(PURE, PURE),
    "hub": PURE,
    **dict.fromkeys(SIBLINGS, PURE | {"hub"}),
    "peers": PURE | {"hub", "checkpoint", "observe", "swarm", "training"},
    "web": PURE | {"access", "hub", "observe"},
    "actors": PURE | {"peers"},
    "cli": PURE | SIBLINGS | {"actors", "hub", "peers", "web"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""Unit of calm_ray (a subpackage or a module at its top) -> other units it may import. Nothing points up."""

HOMES: Mapping[str, tuple[str, ...]] = {
    "boto3": ("launchers/providers/aws.py",),
    "botocore": ("launchers/providers/aws.py",),
    "datasets": ("calm_ray/training/",),
    "fastapi": ("calm_ray/web/",),
    "google.api_core": ("launchers/providers/gcp.py",),
    "google.auth": ("launchers/providers/gcp.py",),
    "google.cloud": ("launchers/providers/gcp.py",),
    "hivemind": ("calm_ray/swarm/",),
    "huggingface_hub": ("calm_ray/hub.py",),
    "pytorch_optimizer": ("calm_ray/training/",),
    "ray": ("calm_ray/actors/", "launchers/"),
    "safetensors": ("calm_ray/checkpoint/", "calm_ray/training/"),
    "sqlalchemy": ("calm_ray/access/",),
    "starlette": ("calm_ray/web/",),
    "tokenizers": ("calm_ray/checkpoint/", "calm_ray/training/"),
    "torch": ("calm_ray/checkpoint/", "calm_ray/peers/", "calm_ray/swarm/", "calm_ray/training/"),
    "trackio": ("calm_ray/observe/",),
    "transformers": ("calm_ray/checkpoint/", "calm_ray/training/"),
    "uvicorn": ("calm_ray/web/",),
    "wandb": ("calm_ray/observe/",),
}
"""SDK -> where alone it may be imported."""

NO_TORCH_IN_PEERS = {
    "budget", "control", "control_server", "endings", "handle", "judge", "launch", "lock", "log", "parent", "process",
    "spec", "status", "vitals", "watchdog",
}  # fmt: skip
"""Modules of calm_ray/peers that run before, beside or without the training process, and must stay light."""

DISTRIBUTIONS = {
    "google.cloud": "google-cloud-compute",
    "google.protobuf": "protobuf",
    "multihash": "py-multihash",
    "pydantic_core": "pydantic",
}
"""Import name -> name in pyproject.toml, where they differ. `google.auth` and `google.api_core` come with the last."""

LINES_LIMIT = 400


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported module: `from calm_ray.swarm import node` is `calm_ray.swarm.node`, as the name may be a module."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"

    def is_of(self, package: str) -> bool:
        return self.name == package or self.name.startswith(f"{package}.")


def read_imports(source: str, file: str) -> list[Import]:
    """All imports in a file's text, wherever they stand; a relative one is made absolute by the file's path."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [Import(file=file, line=node.lineno, name=alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = file.removesuffix(".py").split("/")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found += [Import(file=file, line=node.lineno, name=f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "?"
            found.append(Import(file=file, line=node.lineno, name=str(name)))
    return found


@cache
def imports_under(*folders: str) -> tuple[Import, ...]:
    return tuple(
        found
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in read_imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    )


def unit_of(file: str) -> str:
    """`calm_ray/swarm/node.py` -> `swarm`; `calm_ray/config.py` -> `config`."""
    return file.split("/")[1].removesuffix(".py")


def wrong_edges(imports: tuple[Import, ...]) -> Iterator[str]:
    for found in imports:
        if not found.is_of("calm_ray"):
            continue
        mine, other = unit_of(found.file), [*found.name.split("."), "__init__"][1]
        # `from calm_ray import __version__` is the package itself, which every unit may import.
        if other != mine and other in MAY_IMPORT and other != "__init__" and other not in MAY_IMPORT[mine]:
            yield f"{found}; {mine} may import {', '.join(sorted(MAY_IMPORT[mine])) or 'nothing of ours'}"


def outside_home(imports: tuple[Import, ...]) -> Iterator[str]:
    for found in imports:
        for package, homes in HOMES.items():
            if found.is_of(package) and not found.file.startswith(homes):
                yield f"{found}; only {', '.join(homes)} may"


def test_every_unit_of_the_package_has_its_place_in_the_table() -> None:
    there = {unit_of(path.relative_to(ROOT).as_posix()) for path in (ROOT / "calm_ray").rglob("*.py")}
    assert there <= MAY_IMPORT.keys(), "say in MAY_IMPORT (and in docs/architecture.md) where the new unit belongs"


def test_units_import_only_what_lies_below_them() -> None:
    assert list(wrong_edges(imports_under("calm_ray"))) == []


def test_the_table_of_units_has_no_circle() -> None:
    done: set[str] = set(PURE)
    left = MAY_IMPORT.keys() - PURE
    while ready := {unit for unit in left if MAY_IMPORT[unit] <= done}:
        done |= ready
        left -= ready
    assert left == set()


def test_the_package_never_imports_the_launchers_or_the_tests() -> None:
    assert [str(i) for i in imports_under("calm_ray") if i.is_of("launchers") or i.is_of("tests")] == []
    assert [str(i) for i in imports_under("launchers") if i.is_of("tests")] == []


def test_each_sdk_is_imported_in_its_home_alone() -> None:
    assert list(outside_home(imports_under("calm_ray", "launchers"))) == []


def test_pure_modules_use_little_beyond_the_standard_library() -> None:
    allowed = PURE_MAY_USE | sys.stdlib_module_names | {"calm_ray"}
    pure = [i for i in imports_under("calm_ray") if unit_of(i.file) in PURE]
    assert [str(i) for i in pure if i.name.split(".")[0] not in allowed] == []


def test_the_watchdog_and_its_neighbours_stay_free_of_torch_and_of_what_loads_it() -> None:
    """Not even inside a function: the watchdog outlives its children, and its memory is there for the whole run."""
    light = [i for i in imports_under("calm_ray/peers") if Path(i.file).stem in NO_TORCH_IN_PEERS]
    heavy = ("torch", "calm_ray.swarm", "calm_ray.training", "calm_ray.checkpoint")
    assert light, "the watchdog has moved: mend NO_TORCH_IN_PEERS"
    assert [str(i) for i in light if any(i.is_of(package) for package in heavy)] == []


def test_every_imported_distribution_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    base = _names(project["dependencies"])
    organiser = base | _names([r for extra in ("ray", "organiser", "aws", "gcp", "sinks") for r in extras[extra]])
    peers_alone = {"calm_ray/actors/", "calm_ray/web/", "calm_ray/access/", "calm_ray/observe/"}
    missing = []
    for found in imports_under("calm_ray", "launchers"):
        top = found.name.split(".")[0]
        if top in sys.stdlib_module_names or top in ("calm_ray", "launchers") or found.is_of("google.auth"):
            continue
        wanted = next((dist for name, dist in DISTRIBUTIONS.items() if found.is_of(name)), top)
        is_extra = found.file.startswith(("launchers/", *peers_alone))
        if _normal(wanted) not in (organiser if is_extra else base):
            missing.append(str(found))
    assert missing == [], "declare them in pyproject.toml, and their versions in constraints.txt"


def test_every_requirement_has_one_exact_version_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = _names([requirement for group in groups for requirement in group])
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin)] == []
    names = [pin.split("==")[0] for pin in pins]
    assert names == sorted(set(names))
    assert wanted - set(names) == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in requirements}


def test_no_file_is_too_long_or_has_a_name_that_says_nothing() -> None:
    files = [p for top in ("calm_ray", "launchers", "tests", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {name: count for name, count in lines.items() if count > LINES_LIMIT} == {}
    assert [name for name in lines if Path(name).stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_tests_sleep_in_one_place_only() -> None:
    """A sleep in a test is too long or too short: `eventually` waits for what is meant."""
    naps = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("time.sleep", "sleep", "asyncio.sleep"):
                continue
            # A fake that must be slow, say, may sleep if it tells why on that line: `# sleep: ...`.
            if path.name != "eventually.py" and "# sleep: " not in lines[node.lineno - 1]:
                naps.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert naps == []


LIGHT = """
import sys
{code}
heavy = ("torch", "ray", "hivemind", "transformers", "datasets", "huggingface_hub", "fastapi", "boto3", "numpy")
print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""

HELP = """
from calm_ray.cli.main import main
try:
    main({!r}.split())
except SystemExit as ended:
    assert not ended.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import calm_ray",
        "import calm_ray.__main__",
        "import calm_ray.config, calm_ray.report, calm_ray.bundle, calm_ray.invite",
        HELP.format("--help"),
        HELP.format("join --help"),
        "from calm_ray.cli.main import main\nassert main(['config', 'runs/demo.toml']) == 0",
    ],
)
def test_light_commands_load_nothing_heavy(code: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LIGHT.format(code=code)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.splitlines()[-1] == "[]"


def test_the_driver_of_the_job_loads_no_torch() -> None:
    modules = "launchers.job, launchers.crew, launchers.watch, launchers.verdict"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        (
            "calm_ray/swarm/x.py",
            "def f():\n from calm_ray.training import a",
            "swarm/x.py:2 imports calm_ray.training.a",
        ),
        ("calm_ray/training/x.py", "from calm_ray import swarm", "imports calm_ray.swarm"),
        ("calm_ray/training/x.py", "from ..swarm import node", "imports calm_ray.swarm.node"),
        ("calm_ray/config.py", "import calm_ray.hub", "imports calm_ray.hub"),
        ("calm_ray/peers/x.py", "from calm_ray.actors.a import B", "imports calm_ray.actors.a.B"),
        ("calm_ray/actors/x.py", "import calm_ray.swarm.node as n", "imports calm_ray.swarm.node"),
    ],
)
def test_wrong_edges_are_found_wherever_they_hide(file: str, source: str, complaint: str) -> None:
    (found,) = wrong_edges(tuple(read_imports(source, file)))
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("calm_ray/peers/x.py", "def f():\n  import ray.util"),
        ("calm_ray/cli/x.py", "from huggingface_hub import HfApi"),
        ("launchers/backstop.py", "import boto3"),
        ("launchers/job.py", "from google.cloud import compute_v1"),
        ("calm_ray/report.py", "import importlib\nimportlib.import_module('torch')"),
    ],
)
def test_an_sdk_outside_its_home_is_found(file: str, source: str) -> None:
    assert len(list(outside_home(tuple(read_imports(source, file))))) == 1


def test_allowed_imports_raise_no_complaint() -> None:
    source = "import rayon, torchvision, os\nfrom calm_ray import __version__\nfrom calm_ray.swarm.node import Node"
    imports = tuple(read_imports(source, "calm_ray/swarm/x.py"))
    assert [*wrong_edges(imports), *outside_home(imports)] == []
