"""A wrong config file must tell its author the file, the key and what is allowed; a right one hashes alike anywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from calm_ray.config import (
    Config,
    PeerTable,
    RunTable,
    load_config,
    load_peer_table,
    parse_table,
    read_toml,
    state_home,
)
from calm_ray.errors import ConfigError
from calm_ray.tables import Table

GOOD = """
[run]
run_id = "small"
num_epochs = 40
target_batch_size = 256

[run.model]
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
intermediate_size = 128
max_position_embeddings = 128

[run.tokenizer]
source = "train"
vocab_size = 500

[run.data]
sequence_length = 64
sources = [{ kind = "builtin" }]

[run.optimizer]
name = "adamw"
learning_rate = 5e-3
decay_epochs = 60

[peer]
device = "cpu"

[organiser.job]
anything = "is not a peer's business"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "small.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, old: str, new: str) -> str:
    """The message for the good file with one change, without the file's path at its start."""
    assert old in GOOD
    path = write(folder, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_a_good_file_loads_with_defaults_and_without_the_organiser_tables(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.run.run_id == "small"
    assert config.run.averaging.compression == "fp16"
    assert config.run.optimizer.learning_rate == 5e-3
    assert config.peer == PeerTable(device="cpu")
    assert "organiser" not in config.model_dump_json()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # A mistyped key is one mistake, though the right one is missing too.
        (
            "target_batch_size",
            "target_batchsize",
            " [run]: unknown key `target_batchsize`; did you mean `target_batch_size`?",
        ),
        (
            'kind = "builtin"',
            'kind = "builtin", wieght = 2',
            " [run]: unknown key `data.sources.0.wieght`; did you mean `weight`?",
        ),
        (
            "sequence_length = 64",
            "sequence_length = 64\nsequence_warmup = { start_lenght = 8, length_step = 8, num_epochs = 9 }",
            " [run]: unknown key `data.sequence_warmup.start_lenght`; did you mean `start_length`?",
        ),
        ('device = "cpu"', 'devise = "cpu"', " [peer]: unknown key `devise`; did you mean `device`?"),
        ("[peer]", "[pear]", ": unknown table [pear]; did you mean `peer`?"),
        ("[peer]", "[zzz]", ": unknown table [zzz]; allowed: run, peer, organiser"),
        ("num_epochs = 40\n", "", " [run]: `num_epochs` is missing"),
        ("num_epochs = 40\ntarget_batch_size = 256", "zzz = 1", " [run]: unknown key `zzz`; allowed: ALL (and 2 more)"),
        (
            "num_epochs = 40",
            "num_epochs = 0",
            " [run]: `num_epochs`: Input should be greater than or equal to 1, got 0",
        ),
        ('name = "adamw"', 'name = "adam"', " [run]: `optimizer.name`: Input should be 'lamb' or 'adamw', got 'adam'"),
        ("5e-3", "nan", " [run]: `optimizer.learning_rate`: Input should be a finite number, got nan"),
        ("5e-3", "inf", " [run]: `optimizer.learning_rate`: Input should be a finite number, got inf"),
        ("5e-3", "-1", " [run]: `optimizer.learning_rate`: Input should be greater than 0, got -1"),
        ("vocab_size = 500", "", ' [run]: `tokenizer`: source = "train" needs `vocab_size`'),
        (
            "hidden_size = 64",
            "hidden_size = 66",
            " [run]: `model`: hidden_size 66 is not a multiple of num_attention_heads 4",
        ),
        (
            "sequence_length = 64",
            "sequence_length = 256",
            " [run]: data.sequence_length 256 is longer than model.max_position_embeddings 128",
        ),
        (
            "decay_epochs = 60",
            "decay_epochs = 60\nwarmup_epochs = 60",
            " [run]: `optimizer`: decay_epochs 60 must exceed warmup_epochs 60",
        ),
        (
            'sources = [{ kind = "builtin" }]',
            'sources = [{ kind = "hub" }]',
            ' [run]: `data.sources.0`: kind = "hub" needs `dataset`',
        ),
        (
            'sources = [{ kind = "builtin" }]',
            "sources = []",
            " [run]: `data.sources`: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            'run_id = "small"',
            'run_id = "Not Small"',
            " [run]: `run_id`: String should match pattern '^[a-z0-9][a-z0-9-]{0,62}$', got 'Not Small'",
        ),
        ("40", "", ": not valid TOML: Invalid value (at line 4, column 14)"),
        ("[peer]", "[run]", ": not valid TOML: Cannot declare ('run',) twice (at line 27, column 5)"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_remedy(tmp_path: Path, old: str, new: str, message: str) -> None:
    said = complaint(tmp_path, old, new)
    assert said == message.replace("ALL", ", ".join(RunTable.model_fields))


def test_a_run_that_is_no_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"small\.toml \[run\]: Input should be a valid dictionary"):
        load_config(write(tmp_path, "run = 3"))
    with pytest.raises(ConfigError, match=r"small\.toml: the table \[run\] is missing"):
        load_config(write(tmp_path, "[peer]"))


def test_a_missing_file_is_told_with_the_files_that_are_there(tmp_path: Path) -> None:
    there = write(tmp_path, GOOD)
    wrong = tmp_path / "smal.toml"
    with pytest.raises(ConfigError, match=re.escape(f"{wrong}: no such file; there is {there}")):
        load_config(wrong)
    with pytest.raises(ConfigError, match=r"no such file$"):
        load_config(tmp_path / "no-folder" / "x.toml")
    with pytest.raises(ConfigError, match=r"is a folder; name the TOML file in it"):
        load_config(tmp_path)


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_bytes(b"run_id = '\xff\xfe'")
    with pytest.raises(ConfigError, match=r"small\.toml: cannot be read: .*utf-8"):
        read_toml(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    """Editors on some systems write one unasked."""
    path = tmp_path / "small.toml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(path).run.run_id == "small"


def test_tables_are_frozen_and_a_truth_value_is_no_number(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, GOOD)).run
    with pytest.raises(ValueError, match="frozen"):
        run.num_epochs = 7
    assert "`num_epochs`" in complaint(tmp_path, "num_epochs = 40", "num_epochs = true")
    assert complaint(tmp_path, "num_epochs = 40", 'num_epochs = "40"').endswith("Input should be a number, got '40'")
    assert "`num_epochs`" in complaint(tmp_path, "num_epochs = 40", "num_epochs = 40.5")
    assert "`optimizer.learning_rate`" in complaint(tmp_path, "5e-3", "true")
    assert "`tokenizer.vocab_size`" in complaint(tmp_path, "500", "true")
    said = complaint(tmp_path, 'device = "cpu"', 'gradient_checkpointing = "yes"')
    assert said == " [peer]: `gradient_checkpointing`: Input should be true or false, got 'yes'"
    assert load_config(write(tmp_path, GOOD.replace("5e-3", "1", 1))).run.optimizer.learning_rate == 1.0


def test_the_hash_sees_values_and_not_how_they_are_written(tmp_path: Path) -> None:
    first = load_config(write(tmp_path, GOOD)).run
    tables = GOOD.split("\n\n")
    shuffled = "\n\n".join([tables[0], *reversed(tables[1:])])
    other = shuffled.replace("5e-3", "0.005").replace("num_epochs = 40", "report_seconds = 30\nnum_epochs=40")
    assert other != GOOD
    second = load_config(write(tmp_path, other)).run
    assert first.config_hash() == second.config_hash()
    assert first.canonical_json() == second.canonical_json()
    assert RunTable.model_validate_json(first.canonical_json()) == first


def test_the_hash_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    code = "import sys, pathlib as p, calm_ray.config as c; print(c.load_config(p.Path(sys.argv[1])).run.config_hash())"
    ran = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == load_config(path).run.config_hash()
    assert re.fullmatch(r"[0-9a-f]{64}\n", ran.stdout)


@pytest.mark.parametrize(("old", "new"), [("40", "41"), ("5e-3", "5.1e-3"), ('"small"', '"smaller"'), ("60", "61")])
def test_the_hash_differs_when_a_shared_value_does(tmp_path: Path, old: str, new: str) -> None:
    first = load_config(write(tmp_path, GOOD)).run.config_hash()
    assert load_config(write(tmp_path, GOOD.replace(old, new, 1))).run.config_hash() != first


def test_the_hash_ignores_this_machine(tmp_path: Path) -> None:
    first = load_config(write(tmp_path, GOOD))
    second = load_config(write(tmp_path, GOOD.replace('device = "cpu"', "num_threads = 3")))
    assert first.peer != second.peer
    assert first.run.config_hash() == second.run.config_hash()


def test_a_volunteer_needs_a_peer_table_only_or_no_file(tmp_path: Path) -> None:
    assert load_peer_table(None) == PeerTable()
    assert load_peer_table(write(tmp_path, '[peer]\nname = "Asha"')).name == "Asha"
    with pytest.raises(ConfigError, match=r"`name`: String should match pattern"):
        load_peer_table(write(tmp_path, '[peer]\nname = "<script>"'))
    with pytest.raises(ConfigError, match=r"\[peer\]: `device`: .*, got 'gpu'"):
        load_peer_table(write(tmp_path, '[peer]\ndevice = "gpu"'))


def test_parse_table_serves_tables_of_others_too() -> None:
    class Fleet(Table):
        max_instances: int = Field(ge=0)

    assert parse_table(Fleet, {"max_instances": 3}, where="x.toml [organiser.fleet]").max_instances == 3
    with pytest.raises(ConfigError, match=r"^x\.toml \[organiser\.fleet\]: `max_instances` is missing$"):
        parse_table(Fleet, {}, where="x.toml [organiser.fleet]")


def test_every_field_says_when_to_change_it() -> None:
    """The sentence under a field is the manual; one without would be found by nobody else."""
    undocumented = []
    tables: list[type[Table]] = [RunTable, PeerTable, *_tables_of(RunTable)]
    for table in tables:
        source = _source_of(table)
        undocumented += [
            f"{table.__name__}.{name}"
            for name in table.model_fields
            if not re.search(rf'^    {name}: [^\n]*\n    """', source, re.MULTILINE)
        ]
    allowed = {"RunTable.model", "RunTable.tokenizer", "RunTable.data", "RunTable.optimizer", "RunTable.averaging"}
    assert set(undocumented) <= allowed


def test_state_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CALM_RAY_HOME", str(tmp_path / "own"))
    assert state_home() == tmp_path / "own"
    monkeypatch.delenv("CALM_RAY_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_home() == tmp_path / "xdg" / "calm-ray"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_home() == tmp_path / "home" / ".local" / "state" / "calm-ray"


def test_the_whole_config_survives_json(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert Config.model_validate_json(config.model_dump_json()) == config


def _tables_of(table: type[Table]) -> list[type[Table]]:
    found = []
    for field in table.model_fields.values():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, Table):
                found += [candidate, *_tables_of(candidate)]
    return found


def _source_of(table: type[Table]) -> str:
    text = Path(sys.modules[table.__module__].__file__ or "").read_text(encoding="utf-8")
    start = text.index(f"class {table.__name__}(")
    end = text.find("\nclass ", start)
    return text[start : end if end > 0 else None]
