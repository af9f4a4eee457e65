"""The model is a plain ALBERT, the same on every peer, and the swarm's names fit its parameters."""

import pytest
import torch
from transformers import AlbertConfig

from calm_ray.tables import ModelTable, OptimizerTable
from calm_ray.training.batch import Batch
from calm_ray.training.model import (
    build_model,
    enable_gradient_checkpointing,
    model_config,
    parameter_groups,
    parameter_names,
    pretraining_losses,
)
from calm_ray.training.tokenizer import SpecialIds

ADAMW = OptimizerTable(name="adamw", learning_rate=1e-3, decay_epochs=10, weight_decay=0.1)


@pytest.fixture
def config() -> AlbertConfig:
    return AlbertConfig(
        vocab_size=50,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        classifier_dropout_prob=0.0,
    )


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 50, (3, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 8:] = 0
    labels = torch.full_like(input_ids, -100)
    labels[:, 2:4] = input_ids[:, 2:4]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=(torch.arange(12) > 5).long().expand(3, 12),
        labels=labels,
        sentence_order_label=torch.tensor([0, 1, 1]),
    )


def test_model_same_seed_gives_same_weights_and_leaves_random_state(config: AlbertConfig) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = build_model(config, seed=3)
    assert torch.equal(torch.rand(1), expected)
    second, other = build_model(config, seed=3), build_model(config, seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    weight = "albert.embeddings.word_embeddings.weight"
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_model_on_meta_device_has_the_same_names_without_memory(config: AlbertConfig) -> None:
    with torch.device("meta"):
        empty = build_model(config, seed=0)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert parameter_names(empty) == parameter_names(build_model(config, seed=0))


def test_parameter_names_follow_the_flattened_groups(config: AlbertConfig) -> None:
    model = build_model(config, seed=0)
    flat = [parameter for group in parameter_groups(model, ADAMW) for parameter in group["params"]]
    names = parameter_names(model)
    by_name = dict(model.named_parameters())
    assert len(names) == len(set(names)) == len(flat)
    assert all(by_name[name] is parameter for name, parameter in zip(names, flat, strict=True))
    assert {id(parameter) for parameter in flat} == {id(parameter) for parameter in model.parameters()}


def test_parameter_groups_exempt_biases_and_layer_norms_from_decay(config: AlbertConfig) -> None:
    model = build_model(config, seed=0)
    decayed, exempt = parameter_groups(model, ADAMW)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    names = parameter_names(model)
    for name in names[: len(decayed["params"])]:
        assert name.endswith("weight")
        assert "norm" not in name.lower()
    for name in names[len(decayed["params"]) :]:
        assert name.endswith("bias") or "norm" in name.lower()


def test_losses_equal_the_library_models_own_loss(config: AlbertConfig) -> None:
    model, batch = build_model(config, seed=0), make_batch()
    mlm_loss, sop_loss, sop_logits = pretraining_losses(model, batch)
    theirs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        labels=batch.labels,
        sentence_order_label=batch.sentence_order_label,
    )
    torch.testing.assert_close(mlm_loss + sop_loss, theirs.loss)
    torch.testing.assert_close(sop_logits, theirs.sop_logits)


def test_every_parameter_gets_a_gradient_with_and_without_checkpointing(config: AlbertConfig) -> None:
    plain, frugal, batch = build_model(config, seed=0), build_model(config, seed=0), make_batch()
    enable_gradient_checkpointing(frugal)
    gradients = []
    for model in (plain, frugal):
        mlm_loss, sop_loss, _ = pretraining_losses(model, batch)
        gradients.append(torch.autograd.grad(mlm_loss + sop_loss, list(model.parameters())))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0][:5])


def test_model_config_takes_shape_from_table_and_ids_from_tokenizer() -> None:
    table = ModelTable(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=128, num_hidden_groups=2
    )
    config = model_config(table, vocab_size=77, special_ids=SpecialIds(pad=5, unk=1, cls=2, sep=3, mask=4))
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_groups) == (64, 128, 2)
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (77, 5, 2, 3)
