"""Every mistake that a person can make is told in one line, with its cause and its remedy, and never with a traceback.

All commands are real processes. Those that do not load torch answer in a fraction of a second and run one by one; the
slow ones are started together before the first test, and each test then waits for its own.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from calm_ray.bundle import seal_bundle
from calm_ray.config import load_config
from calm_ray.invite import Invite
from calm_ray.signing import load_or_create_key
from tests.eventually import Child, Children, eventually
from tests.integration.runs import write_config
from tests.shards import ROOT

PEER_ID = "QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxann"
SLOW_SECONDS = 100.0
"""Loading torch in several processes at once, on two cores that may be busy."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command that has ended said."""

    exit_code: int
    stdout: str
    stderr: str

    def is_one_clear_line(self, *parts: str, exit_code: int = 2, program: str = "calm-ray") -> bool:
        """Whether stderr holds one message of ours, with `parts` in it in this order, and nothing to be afraid of."""
        told = [line for line in self.stderr.splitlines() if line.startswith(f"{program}: ")]
        assert len(told) == 1, self
        assert re.search(".*".join(map(re.escape, parts)), told[0]), told[0]
        assert "Traceback" not in self.stderr + self.stdout, self
        assert self.exit_code == exit_code, self
        return True


def run(module: str, *argv: str | Path, cwd: Path) -> Answer:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *map(str, argv)],
        cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return Answer(exit_code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def calm_ray(*argv: str | Path, cwd: Path) -> Answer:
    return run("calm_ray", *argv, cwd=cwd)


def invite_to(*ports: int) -> str:
    addresses = tuple(f"/ip4/127.0.0.1/tcp/{port}/p2p/{PEER_ID}" for port in ports)
    return Invite(run_id="tiny", addresses=addresses, organiser_key=bytes(32)).encode()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- config files ----------------------------------------------------------------------------------------------------


def altered(folder: Path, *changes: tuple[str, str]) -> Path:
    path = write_config(folder / "run.toml")
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("num_epochs", "num_epoch", ["run.toml [run]: unknown key `num_epoch`", "did you mean `num_epochs`?"]),
        ("learning_rate", "lerning_rate", ["[run]: unknown key `optimizer.lerning_rate`", "did you mean"]),
        ("num_epochs = 1000", "num_epochs = 0", ["[run]: `num_epochs`", "greater than or equal to 1", "got 0"]),
        ("num_epochs = 1000", 'num_epochs = "many"', ["[run]: `num_epochs`", "number", "got 'many'"]),
        ('name = "adamw"', 'name = "sgd"', ["[run]: `optimizer.name`", "'lamb' or 'adamw'", "got 'sgd'"]),
        ("sequence_length = 32", "sequence_length = 64", ["[run]: data.sequence_length 64 is longer than"]),
        ('compression = "none"', 'compression = "zip"', ["[run]: `averaging.compression`", "'none', 'fp16' or '8bit'"]),
        ('device = "cpu"', 'device = "tpu"', ["run.toml [peer]: `device`", "auto|cpu", "got 'tpu'"]),
        ("[peer]", "[pear]", ["run.toml: unknown table [pear]", "did you mean `peer`?"]),
        ("[run]", "[run", ["run.toml: not valid TOML", "line 2"]),
    ],
    ids=lambda value: None if isinstance(value, list) else value.replace(" ", ""),
)  # fmt: skip
def test_mistake_in_a_config_names_file_key_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, told: list[str]
) -> None:
    assert calm_ray("config", altered(tmp_path, (old, new)), cwd=tmp_path).is_one_clear_line(*told)


def test_missing_config_names_the_ones_that_are_there(tmp_path: Path) -> None:
    write_config(tmp_path / "mine.toml")
    answer = calm_ray("config", tmp_path / "main.toml", cwd=tmp_path)
    assert answer.is_one_clear_line("main.toml: no such file; there is", "mine.toml")


def test_job_tells_mistakes_in_the_organisers_tables(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.toml", more="[organiser.job]\nnum_trainer = 2\n")
    answer = run("launchers.job", path, cwd=tmp_path)
    assert answer.is_one_clear_line(
        "[organiser]: unknown key `job.num_trainer`", "did you mean `num_trainers`?", program="job"
    )
    assert not (tmp_path / "out").exists(), "a config that is wrong must not move the last run's output away"
    assert run("launchers.job", "no.toml", cwd=tmp_path).is_one_clear_line("no.toml: no such file", program="job")


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("join", "nonsense"), ["invite: must start with `calm1-`, got `nonsense`"]),
        (("join", "calm1-AAAA"), ["invite: incomplete or altered", "copy the whole line again"]),
        (("join", invite_to(4001)[:-9]), ["invite: incomplete or altered", "copy the whole line again"]),
        (("join", invite_to(4001) + "!"), ["invite: contains characters that do not belong there"]),
        (("join", invite_to(4001), "--config", "no.toml"), ["no.toml: no such file"]),
        (("join", invite_to(4001), "--name", "a/b"), ["--name: `name`", "got 'a/b'"]),
        (("peer", "--invite", "calm1-AAAA", "--folder", "p"), ["invite: incomplete or altered"]),
        (("peer", "--invite", invite_to(4001)), ["--folder is missing"]),
        (("peer", "--folder", "p"), ["give an invite, or a bundle to start a new run from"]),
        (("peer", "--invite", invite_to(4001), "--folder", "p", "--resume", "c"), ["only an auxiliary peer can"]),
        (("peer", "--spec", "{"), ["--spec: not JSON"]),
        (("peer", "--spec", "[]"), ["--spec: ", "valid dictionary"]),
        (("peer", "--spec", '{"folder": "p", "invite": "x"}'), ["--spec: `role` is missing"]),
        (("peer", "--spec", '{"role": "boss", "folder": "p", "invite": "x"}'), ["--spec: `role`", "got 'boss'"]),
        (("peer", "--spec", '{"role": "trainer", "folder": "p"}'), ["--spec: give an invite, or a bundle"]),
        (("peer", "--spec", '{"roll": "trainer", "folder": "p"}'), ["--spec: unknown key `roll`", "`role`"]),
        (("invite", "out/none"), ["out/none/invite.txt: not found; give the output folder of a run"]),
        (("status", "calm1-AAAA"), ["invite: incomplete or altered"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_mistake_in_an_argument_is_told_at_once(tmp_path: Path, argv: tuple[str, ...], told: list[str]) -> None:
    assert calm_ray(*argv, cwd=tmp_path).is_one_clear_line(*told)
    assert not any(tmp_path.iterdir()), "nothing was made for a start that could not be"


def test_status_without_peers_names_the_command_that_starts_one(tmp_path: Path) -> None:
    answer = calm_ray("status", tmp_path, cwd=tmp_path)
    assert answer.is_one_clear_line(f"no peer runs under {tmp_path}", "calm-ray join INVITE", exit_code=1)


@pytest.mark.parametrize(
    "argv", [(), ("jion",), ("join",), ("join", "a", "--public", "--client-mode"), ("peer", "--x")]
)
def test_mistyped_command_is_told_with_its_usage(tmp_path: Path, argv: tuple[str, ...]) -> None:
    answer = calm_ray(*argv, cwd=tmp_path)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("usage: calm-ray")
    assert re.match(r"calm-ray( \w+)?: error: ", answer.stderr.splitlines()[-1])
    assert "Traceback" not in answer.stderr


# --- folders and ports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["a-file", "a-file/below", "/proc/nowhere", "with-a-folder-for-a-lock"])
def test_folder_that_cannot_be_used_is_told_with_a_remedy(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a-file").write_text("")
    (tmp_path / "with-a-folder-for-a-lock" / "lock").mkdir(parents=True)
    answer = calm_ray("join", invite_to(closed_port()), "--folder", folder, cwd=tmp_path)
    assert answer.is_one_clear_line(folder, "choose another --folder, which you own")


@pytest.mark.parametrize("out", ["a-file/run", "/proc/nowhere/run"])
def test_output_that_cannot_be_written_is_told_with_a_remedy(tmp_path: Path, out: str) -> None:
    (tmp_path / "a-file").write_text("")
    answer = run("launchers.job", write_config(tmp_path / "run.toml"), "--out", out, cwd=tmp_path)
    assert answer.is_one_clear_line(out, "choose another --out", program="job")


@pytest.mark.parametrize("command", ["join", "peer"])
def test_port_that_is_taken_is_told_with_a_remedy(tmp_path: Path, command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config = altered(tmp_path, ("/tcp/0", f"/tcp/{port}"))
        invite = (invite_to(port),) if command == "join" else ("--invite", invite_to(port))
        answer = calm_ray(command, *invite, "--config", config, "--folder", tmp_path / "peer", cwd=tmp_path)
    assert answer.is_one_clear_line(
        f"[peer] listen /ip4/127.0.0.1/tcp/{port}: Address already in use; choose another port"
    )


@pytest.mark.parametrize(
    ("listen", "told"),
    [
        ("0.0.0.0:4001", ["[peer] listen: not a multiaddress", "write it like /ip4/0.0.0.0/tcp/4001"]),
        ("/ip4/0.0.0.0/tcp/65536", ["[peer] listen: not a multiaddress", "write it like"]),
        ("/ip4/198.51.100.1/tcp/4001", ["[peer] listen /ip4/198.51.100.1/tcp/4001: ", "0.0.0.0 stands for every"]),
    ],
)  # fmt: skip
def test_impossible_listen_address_is_told_with_a_remedy(tmp_path: Path, listen: str, told: list[str]) -> None:
    config = altered(tmp_path, ("/ip4/127.0.0.1/tcp/0", listen))
    answer = calm_ray("join", invite_to(1), "--config", config, "--folder", tmp_path / "peer", cwd=tmp_path)
    assert answer.is_one_clear_line(*told)


def test_impossible_announced_address_is_told_with_a_remedy(tmp_path: Path) -> None:
    config = altered(tmp_path, ('device = "cpu"', 'device = "cpu"\nannounce = ["my.host:4001"]'))
    answer = calm_ray("join", invite_to(1), "--config", config, "--folder", tmp_path / "peer", cwd=tmp_path)
    assert answer.is_one_clear_line("[peer] announce: not a multiaddress", "'my.host:4001'", "write it like")


# --- nobody there ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SlowCommands"]:
    folder = tmp_path_factory.mktemp("slow")
    with Children(folder) as children:
        yield SlowCommands(folder, children)


class SlowCommands:
    """Started together, since each spends its first seconds on loading torch. stderr goes to a file of its own."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder, self._children = folder, children
        self.ports = closed_port(), closed_port()
        self.joining = self._start(
            "joining", "calm_ray", "join", invite_to(*self.ports), "--folder", folder / "joining"
        )
        forged = self._bundle_with_a_forged_run()
        self.forged = self._start(
            "forged", "calm_ray", "peer", "--role", "auxiliary", "--bundle", forged, "--folder", folder / "forged"
        )
        self.jobs = {name: self._start_job(name) for name in ("no-match", "no-text", "no-mask")}

    def stderr(self, name: str) -> str:
        return (self.folder / f"{name}.err").read_text()

    def answer(self, name: str, child: Child) -> Answer:
        exit_code = child.wait(SLOW_SECONDS)
        return Answer(exit_code=exit_code, stdout=child.output(), stderr=self.stderr(name))

    def _start(self, name: str, module: str, *argv: str | Path) -> Child:
        command = [sys.executable, "-W", "ignore", "-m", module, *map(str, argv)]
        redirected = ["sh", "-c", 'exec "$@" 2>"$0"', str(self.folder / f"{name}.err"), *command]
        return self._children.start(redirected, cwd=self.folder, env={"PYTHONPATH": str(ROOT)})

    def _start_job(self, name: str) -> Child:
        folder = self.folder / name
        folder.mkdir()
        path = write_config(folder / "run.toml", run_id=name)
        source = '{ kind = "builtin" }'
        text = path.read_text()
        if name == "no-mask":
            self._write_tokenizer_without_mask(folder / "tokenizer")
            text = text.replace('source = "train"\nvocab_size = 300', 'source = "path"\npath = "tokenizer"')
        else:
            (folder / "empty.txt").write_text("\n  \n\n")
            pattern = "corpus/*.txt" if name == "no-match" else "empty.txt"
            text = text.replace(source, f'{{ kind = "files", paths = ["{pattern}"], in_bundle = true }}')
        path.write_text(text)
        return self._start(name, "launchers.job", path, "--out", self.folder / "out" / name)

    @staticmethod
    def _write_tokenizer_without_mask(folder: Path) -> None:
        folder.mkdir()
        words = {"<pad>": 0, "<unk>": 1, "[CLS]": 2, "[SEP]": 3, "word": 4}
        Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
        names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def _bundle_with_a_forged_run(self) -> Path:
        folder = self.folder / "bundle"
        folder.mkdir()
        run_table = load_config(write_config(self.folder / "forged.toml")).run
        (folder / "run.json").write_bytes(run_table.canonical_json())
        seal_bundle(folder, run=run_table, key=load_or_create_key(self.folder / "key"))
        (folder / "run.json").write_bytes(run_table.canonical_json().replace(b"tiny", b"tidy"))
        return folder


@pytest.mark.timeout(240)
def test_nobody_at_any_address_is_told_at_once_with_a_verdict_for_each(slow: SlowCommands) -> None:
    """Before torch is loaded, that is: the port of a run that is down should not take half a minute to be told."""
    first = eventually(lambda: slow.stderr("joining"), 20).splitlines()[0]
    assert first.startswith("calm-ray: no bootstrap peer answers: ")
    for port in slow.ports:
        assert f"127.0.0.1:{port} refuses connections: the peer is down or listens elsewhere" in first
    assert "Check your connection" in first
    assert "Trying again" in first


@pytest.mark.timeout(240)
def test_second_peer_in_one_folder_is_refused_with_the_first_ones_pid(slow: SlowCommands) -> None:
    answer = calm_ray("join", invite_to(1), "--folder", slow.folder / "joining", cwd=slow.folder)
    assert answer.is_one_clear_line(
        f"joining: another peer runs here (process {slow.joining.pid}); stop it, or choose another --folder"
    )


@pytest.mark.timeout(240)
def test_volunteer_whom_nobody_answers_tries_again_and_says_so(slow: SlowCommands) -> None:
    slow.joining.says("restarting: no bootstrap peer answers: ", SLOW_SECONDS)
    assert re.search(r"restarting: .*; trying again in \d+ s, log: \S+peer\.log", slow.joining.output())
    slow.joining.signal_group(signal.SIGINT)
    assert slow.joining.wait(15) == 0
    assert "Traceback" not in slow.stderr("joining") + slow.joining.output()


@pytest.mark.timeout(240)
def test_altered_bundle_is_told_by_the_peer_that_should_serve_it(slow: SlowCommands) -> None:
    answer = slow.answer("forged", slow.forged)
    assert answer.is_one_clear_line("run.json: missing or altered; delete the folder and fetch the bundle again")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no-match", ["'corpus/*.txt' matches no file in", "put the text there, or correct the pattern"]),
        ("no-text", ["data.sources[0]: holds no text; add some, or remove the source"]),
        ("no-mask", ["tokenizer.path", "tokenizer has no mask_token", 'use source = "train"']),
    ],
)
def test_run_that_cannot_be_prepared_is_told_before_ray_starts(slow: SlowCommands, name: str, told: list[str]) -> None:
    answer = slow.answer(name, slow.jobs[name])
    assert answer.is_one_clear_line(*told, program="job")
    assert "Invite" not in answer.stdout
