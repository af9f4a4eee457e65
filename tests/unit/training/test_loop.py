"""The gradient source: right gradients, whole or not at all."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AlbertForPreTraining, PreTrainedTokenizerFast

from calm_ray.config import RunTable
from calm_ray.errors import ConfigError
from calm_ray.training.compute import Compute
from calm_ray.training.loop import GROWTH_STEPS, GradientSource, LossScale
from calm_ray.training.model import build_model, pretraining_losses
from calm_ray.training.prepare import load_bundle_model_config
from calm_ray.training.stream import TrainingBatches
from calm_ray.training.tokenizer import SpecialIds

FP32 = Compute(device="cpu", precision="fp32", micro_batch_size=8, gradient_checkpointing=False)

MakeBatches = Callable[[int], TrainingBatches]


@pytest.fixture
def make_batches(
    tiny_run: RunTable, bundle_dir: Path, tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds
) -> Iterator[MakeBatches]:
    opened: list[TrainingBatches] = []

    def make(seed: int) -> TrainingBatches:
        batches = TrainingBatches(
            tiny_run,
            bundle_dir=bundle_dir,
            data_root=bundle_dir,
            tokenizer=tokenizer,
            special_ids=special_ids,
            batch_size=8,
            seed=seed,
        )
        opened.append(batches)
        return batches

    yield make
    for batches in opened:
        batches.close()


@pytest.fixture
def model(bundle_dir: Path) -> AlbertForPreTraining:
    config = load_bundle_model_config(bundle_dir)
    config.classifier_dropout_prob = 0.0
    return build_model(config, seed=0)


def test_step_adds_the_gradient_of_the_mean_loss(model: AlbertForPreTraining, make_batches: MakeBatches) -> None:
    result = GradientSource(model, batches=make_batches(1), compute=FP32).step(epoch=0)
    assert result.is_finite
    assert result.num_samples == 8
    batch = next(make_batches(1))
    mlm_loss, sop_loss, _ = pretraining_losses(model, batch)
    expected = torch.autograd.grad(mlm_loss + sop_loss, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert result.mean_mlm_loss == pytest.approx(mlm_loss.item(), rel=1e-4)
    assert result.mean_sop_loss == pytest.approx(sop_loss.item(), rel=1e-4)
    assert result.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in expected]).norm()), rel=1e-4)


def test_steps_accumulate_until_the_caller_zeroes(model: AlbertForPreTraining, make_batches: MakeBatches) -> None:
    source = GradientSource(model, batches=make_batches(2), compute=FP32)
    totals = []
    for _ in range(2):
        source.step(epoch=0)
        totals.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad(set_to_none=False)
    fresh = GradientSource(model, batches=make_batches(2), compute=FP32)
    fresh.step(epoch=0)
    model.zero_grad(set_to_none=False)
    fresh.step(epoch=0)
    for first, both, parameter in zip(*totals, model.parameters(), strict=True):
        torch.testing.assert_close(both - first, parameter.grad, rtol=1e-3, atol=1e-6)


def test_step_when_loss_is_not_finite_leaves_no_trace(model: AlbertForPreTraining, make_batches: MakeBatches) -> None:
    source = GradientSource(model, batches=make_batches(3), compute=FP32)
    source.step(epoch=0)
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    weight = model.albert.embeddings.position_embeddings.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    for count in (1, 2):
        result = source.step(epoch=0)
        assert not result.is_finite
        assert result.num_samples == 0
        assert source.num_refused_in_a_row == count
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    with torch.no_grad():
        weight.copy_(kept)
    assert source.step(epoch=0).is_finite
    assert source.num_refused_in_a_row == 0


def test_step_when_gradient_overflows_with_a_finite_loss_is_refused(
    model: AlbertForPreTraining, make_batches: MakeBatches
) -> None:
    model.predictions.bias.register_hook(lambda gradient: gradient * float("inf"))
    result = GradientSource(model, batches=make_batches(4), compute=FP32).step(epoch=0)
    assert not result.is_finite
    assert result.mean_mlm_loss < 10
    assert all(parameter.grad is None for parameter in model.parameters())


def test_step_with_checkpointing_and_bf16_gives_nearly_the_same_gradient(
    model: AlbertForPreTraining, make_batches: MakeBatches
) -> None:
    frugal = build_model(model.config, seed=0)
    compute = replace(FP32, precision="bf16", gradient_checkpointing=True)
    GradientSource(model, batches=make_batches(5), compute=FP32).step(epoch=0)
    GradientSource(frugal, batches=make_batches(5), compute=compute).step(epoch=0)
    exact, rough = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, frugal)
    )
    assert rough.dtype == torch.float32
    assert float(torch.cosine_similarity(exact, rough, dim=0)) > 0.98


def test_loss_scale_halves_after_overflow_and_doubles_after_a_long_run() -> None:
    scale = LossScale(value=1024.0)
    assert scale.after(is_finite=False) == LossScale(value=512.0)
    for _ in range(GROWTH_STEPS):
        scale = scale.after(is_finite=True)
    assert scale == LossScale(value=2048.0)
    assert LossScale(value=1.0).after(is_finite=False).value == 1.0


def test_stream_of_another_seed_gives_other_batches(make_batches: MakeBatches) -> None:
    first, same, other = (next(make_batches(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.input_ids, same.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)


def test_stream_follows_the_sequence_length_warmup(
    tiny_run: RunTable, bundle_dir: Path, tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds
) -> None:
    values = tiny_run.model_dump()
    values["data"]["sequence_warmup"] = {"start_length": 16, "length_step": 8, "num_epochs": 4}
    run = RunTable.model_validate(values)
    with TrainingBatches(
        run,
        bundle_dir=bundle_dir,
        data_root=bundle_dir,
        tokenizer=tokenizer,
        special_ids=special_ids,
        batch_size=64,
        seed=0,
    ) as batches:
        assert next(batches).input_ids.shape[1] == 16
        batches.set_epoch(4)
        lengths = [next(batches).input_ids.shape[1] for _ in range(40)]
        assert lengths[-1] == 48


def test_stream_of_fragments_says_so_instead_of_reading_for_ever(
    tiny_run: RunTable, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, special_ids: SpecialIds
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"n{i}" for i in range(200)), encoding="utf-8")
    values = tiny_run.model_dump()
    values["data"]["sources"] = [{"kind": "files", "paths": ["a.txt"]}]
    with (
        TrainingBatches(
            RunTable.model_validate(values),
            bundle_dir=tmp_path,
            data_root=tmp_path,
            tokenizer=tokenizer,
            special_ids=special_ids,
            batch_size=8,
            seed=0,
        ) as batches,
        pytest.raises(ConfigError, match=r"data\.sources: 6400 documents in a row gave no example"),
    ):
        next(batches)
