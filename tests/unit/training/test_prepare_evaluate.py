"""The organiser's parts, and the measure of a checkpoint against them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AlbertForPreTraining, AutoTokenizer

from calm_ray.config import RunTable
from calm_ray.errors import CheckpointRejected, ConfigError
from calm_ray.training.data import is_held_out
from calm_ray.training.evaluate import Evaluation, evaluate, evaluate_model, held_out_batches, main
from calm_ray.training.model import build_model
from calm_ray.training.prepare import (
    load_bundle_model_config,
    load_bundle_run,
    load_bundle_tokenizer,
    write_parts,
)


def changed(run: RunTable, **data: Any) -> RunTable:
    values = run.model_dump()
    values["data"].update(data)
    return RunTable.model_validate(values)


@pytest.fixture(scope="module")
def checkpoint_dir(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_model(load_bundle_model_config(bundle_dir), seed=0).save_pretrained(folder)
    return folder


def test_parts_are_complete_and_fit_each_other(tiny_run: RunTable, bundle_dir: Path) -> None:
    assert (bundle_dir / "run.json").read_bytes() == tiny_run.canonical_json()
    assert load_bundle_run(bundle_dir) == tiny_run
    config = load_bundle_model_config(bundle_dir)
    tokenizer, special_ids = load_bundle_tokenizer(bundle_dir)
    assert config.vocab_size == len(tokenizer) <= 500
    assert config.pad_token_id == special_ids.pad
    assert (bundle_dir / "text" / "0.txt").stat().st_size > 100_000
    loaded = AutoTokenizer.from_pretrained(str(bundle_dir / "tokenizer"))
    assert loaded("a b", "c", return_token_type_ids=True)["token_type_ids"][-1] == 1


def test_parts_of_a_files_source_hold_its_documents(tiny_run: RunTable, tmp_path: Path) -> None:
    lines = [f"This is the document number {i} of the corpus." for i in range(50)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    run = changed(tiny_run, sources=[{"kind": "files", "paths": ["a.txt"], "in_bundle": True}])
    write_parts(run, config_dir=tmp_path, out_dir=tmp_path / "bundle")
    assert (tmp_path / "bundle/text/0.txt").read_text(encoding="utf-8").split("\n\n")[:-1] == lines


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_parts_of_an_empty_corpus_raise_config_error(tiny_run: RunTable, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    run = changed(tiny_run, sources=[{"kind": "files", "paths": ["a.txt"], "in_bundle": True}])
    with pytest.raises(ConfigError, match=r"data\.sources.*(empty|no text)"):
        write_parts(run, config_dir=tmp_path, out_dir=tmp_path / "bundle")


def test_parts_take_a_tokenizer_from_a_path(tiny_run: RunTable, bundle_dir: Path, tmp_path: Path) -> None:
    values = tiny_run.model_dump()
    values["tokenizer"] = {"source": "path", "path": "tokenizer"}
    write_parts(RunTable.model_validate(values), config_dir=bundle_dir, out_dir=tmp_path)
    assert load_bundle_tokenizer(tmp_path)[0].get_vocab() == load_bundle_tokenizer(bundle_dir)[0].get_vocab()


def test_parts_when_the_hub_cannot_be_reached_name_the_tokenizer(tiny_run: RunTable, tmp_path: Path) -> None:
    values = tiny_run.model_dump()
    values["tokenizer"] = {"source": "hub", "hub_id": "calm-ray-tests/is-not-there"}
    with pytest.raises(ConfigError, match=r"tokenizer\.hub_id 'calm-ray-tests/is-not-there': cannot be downloaded"):
        write_parts(RunTable.model_validate(values), config_dir=tmp_path, out_dir=tmp_path)


def test_load_bundle_run_from_another_folder_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name the folder that holds run\.json"):
        load_bundle_run(tmp_path)


def test_evaluation_of_untrained_model_is_near_the_uniform_guess(bundle_dir: Path, checkpoint_dir: Path) -> None:
    result = evaluate(checkpoint_dir, bundle_dir)
    assert result.num_sequences == 200
    assert result.num_masked_tokens > 1000
    assert result.mean_mlm_loss == pytest.approx(result.ln_vocab_size, abs=0.2)
    assert result.mean_sop_loss == pytest.approx(math.log(2), abs=0.1)
    assert 0.3 < result.sop_accuracy < 0.7
    assert result.unigram_loss < result.ln_vocab_size - 0.5


def test_evaluation_is_the_same_at_every_call_and_leaves_the_model_training(bundle_dir: Path) -> None:
    model = build_model(load_bundle_model_config(bundle_dir), seed=0)
    torch.manual_seed(1)
    first = evaluate_model(model, bundle_dir=bundle_dir)
    torch.manual_seed(2)
    assert evaluate_model(model, bundle_dir=bundle_dir) == first
    assert model.training


def test_evaluation_sees_only_held_out_documents(tiny_run: RunTable, bundle_dir: Path, tmp_path: Path) -> None:
    text = (bundle_dir / "text/0.txt").read_text(encoding="utf-8").strip().split("\n\n")
    tokenizer, special_ids = load_bundle_tokenizer(bundle_dir)
    batches = held_out_batches(
        tiny_run, tokenizer, special_ids=special_ids, bundle_dir=bundle_dir, data_root=tmp_path, num_sequences=64
    )
    documents = [document for document in text if is_held_out(document, fraction=0.2)]
    decoded = tokenizer.batch_decode([tokenizer(d)["input_ids"] for d in documents], skip_special_tokens=True)
    held_out = " ".join(map(str, decoded))
    for batch in batches:
        original = torch.where(batch.labels >= 0, batch.labels, batch.input_ids)
        for ids, types in zip(original.tolist(), batch.token_type_ids.tolist(), strict=True):
            first = [i for i, t in zip(ids, types, strict=True) if not t]
            first = first[: first.index(special_ids.sep)]
            assert str(tokenizer.decode(first, skip_special_tokens=True)).strip() in held_out


def test_evaluation_when_nothing_is_held_out_says_what_to_change(tiny_run: RunTable, tmp_path: Path) -> None:
    lines = [f"This is the document number {i} of the corpus." for i in range(200)]
    lines = [line for line in lines if not is_held_out(line, fraction=0.2)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    run = changed(tiny_run, sources=[{"kind": "files", "paths": ["a.txt"], "in_bundle": True}])
    write_parts(run, config_dir=tmp_path, out_dir=tmp_path)
    model = build_model(load_bundle_model_config(tmp_path), seed=0)
    with pytest.raises(ConfigError, match="held_out_fraction: no document"):
        evaluate_model(model, bundle_dir=tmp_path)


def test_evaluation_of_a_broken_checkpoint_is_rejected(bundle_dir: Path, checkpoint_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        evaluate(tmp_path, bundle_dir)
    (tmp_path / "config.json").write_bytes((checkpoint_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointRejected, match="does not load"):
        evaluate(tmp_path, bundle_dir)


def test_evaluation_of_a_model_that_is_not_finite_is_rejected(bundle_dir: Path) -> None:
    model = build_model(load_bundle_model_config(bundle_dir), seed=0)
    with torch.no_grad():
        model.predictions.bias.fill_(float("nan"))
    with pytest.raises(CheckpointRejected, match="not finite"):
        evaluate_model(model, bundle_dir=bundle_dir, num_sequences=8)


def test_evaluation_of_another_runs_model_names_the_mismatch(bundle_dir: Path) -> None:
    config = load_bundle_model_config(bundle_dir)
    config.vocab_size = 100
    with pytest.raises(ConfigError, match="another run"):
        evaluate_model(AlbertForPreTraining(config), bundle_dir=bundle_dir)


def test_evaluate_command_prints_one_json_object(
    bundle_dir: Path, checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(checkpoint_dir), str(bundle_dir), "--json", "--num-sequences", "32"]) == 0
    result = Evaluation(**json.loads(capsys.readouterr().out))
    assert result.num_sequences == 32


def test_evaluate_command_reports_a_mistake_in_one_line(
    bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(bundle_dir)]) == ConfigError.exit_code
    assert capsys.readouterr().err == f"{tmp_path}: no config.json there; name the folder of a checkpoint\n"
