"""The model: a plain ALBERT with its two pretraining heads, and what the swarm must know about its parameters.

Nothing here is our own architecture: a checkpoint loads with `AlbertForPreTraining.from_pretrained`, so a reader needs
only transformers. Two things are ours. The language-modelling head runs on the masked positions alone, because logits
over a vocabulary of 32,000 at all 512 positions cost an 8 GB GPU a quarter of its memory and teach nothing. And
gradient checkpointing is switched on by hand: transformers 5.23 does not support it for ALBERT.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForPreTraining
from transformers.models.albert.modeling_albert import AlbertLayer

from calm_ray.tables import ModelTable, OptimizerTable
from calm_ray.training.batch import Batch
from calm_ray.training.tokenizer import SpecialIds


def model_config(table: ModelTable, *, vocab_size: int, special_ids: SpecialIds) -> AlbertConfig:
    """Return the transformers config for `table`. `vocab_size` is the tokenizer's true size, not the one asked for."""
    return AlbertConfig(
        vocab_size=vocab_size,
        embedding_size=table.embedding_size,
        hidden_size=table.hidden_size,
        num_hidden_layers=table.num_hidden_layers,
        num_hidden_groups=table.num_hidden_groups,
        num_attention_heads=table.num_attention_heads,
        intermediate_size=table.intermediate_size,
        hidden_dropout_prob=table.dropout_probability,
        attention_probs_dropout_prob=table.dropout_probability,
        max_position_embeddings=table.max_position_embeddings,
        pad_token_id=special_ids.pad,
        bos_token_id=special_ids.cls,
        eos_token_id=special_ids.sep,
    )


def build_model(albert_config: AlbertConfig, *, seed: int) -> AlbertForPreTraining:
    """Return a model in training mode whose initial weights depend on `seed` alone.

    The global random state is left as it was, so building a model between two draws changes neither. Under
    `torch.device("meta")` the model has names and shapes but no memory. Weights are drawn on the CPU even where a GPU
    is the default device: two kinds of GPU draw different numbers from one seed.
    """
    on_meta = torch.get_default_device().type == "meta"
    with torch.device("meta" if on_meta else "cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        model = AlbertForPreTraining._from_config(albert_config, attn_implementation="sdpa")
    return model.train()


def enable_gradient_checkpointing(model: AlbertForPreTraining) -> None:
    """Recompute each layer in the backward pass: activations of one layer in memory, about a third more compute."""
    for layer in model.modules():
        if isinstance(layer, AlbertLayer):
            # Not reentrant: the reentrant kind cannot be used with torch.autograd.grad, which the loop relies upon.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def parameter_groups(model: nn.Module, table: OptimizerTable) -> list[dict[str, Any]]:
    """Return [decay, no decay] for the optimizer. The same model always gives the same order, on every machine."""
    decayed, exempt = _split_by_decay(model)
    return [
        {"params": [parameter for _, parameter in decayed], "weight_decay": table.weight_decay},
        {"params": [parameter for _, parameter in exempt], "weight_decay": 0.0},
    ]


def parameter_names(model: nn.Module) -> list[str]:
    """Return names in the order in which `parameter_groups` flattens; tied weights once, under their first name."""
    decayed, exempt = _split_by_decay(model)
    return [name for name, _ in [*decayed, *exempt]]


def pretraining_losses(model: AlbertForPreTraining, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean masked-LM loss, the mean sentence-order loss (0-d, fp32, nats) and the order logits (B, 2).

    The sum of the two losses equals `AlbertForPreTraining`'s own loss; only the logits of unmasked positions, which it
    computes and ignores, are left out.
    """
    hidden = model.albert(
        batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids, return_dict=True
    )
    is_masked = batch.labels != -100
    mlm_logits = model.predictions(hidden.last_hidden_state[is_masked])
    mlm_loss = functional.cross_entropy(mlm_logits.float(), batch.labels[is_masked])
    sop_logits = model.sop_classifier(hidden.pooler_output).float()
    sop_loss = functional.cross_entropy(sop_logits, batch.sentence_order_label)
    return mlm_loss, sop_loss, sop_logits


NamedParameters = Sequence[tuple[str, nn.Parameter]]


def _split_by_decay(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Biases and layer norms are the vectors of this model; a matrix is always a weight or an embedding."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [(n, p) for n, p in named if p.ndim >= 2], [(n, p) for n, p in named if p.ndim < 2]
