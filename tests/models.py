"""Small models from configs, and the few lines of training that the laws share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectral_peft import SpectralUpdate
from spectral_peft.layer import SpectralLinear


if TYPE_CHECKING:
    from tests.methods import Method


def llama(dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 5.0) -> PreTrainedModel:
    """A two-layer Llama with grouped heads: tall, wide and square weights.

    `scale` times the usual initialisation, so that a change of the weights shows in the logits.
    """
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        initializer_range=0.02 * scale,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed: int = 0) -> PreTrainedModel:
    """A two-layer GPT-2, whose layers are Conv1D."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)).eval()


def batch(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    model.eval()
    return model(input_ids=batch() if ids is None else ids).logits


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_(model: nn.Module, lr: float, steps: int = 5, optimizer: torch.optim.Optimizer | None = None) -> None:
    """A few AdamW steps on the same data whatever the global seed is."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)
    for step in range(steps):
        ids = batch(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def layers(model: nn.Module) -> Iterator[SpectralLinear]:
    return (module for module in model.modules() if isinstance(module, SpectralLinear))


def approximated_(base: nn.Module, adapted: nn.Module, method: Method) -> nn.Module:
    """`base` with the weights that the active adapters of `adapted` start with; itself, for most methods."""
    for layer in layers(adapted):
        weight = base.get_submodule(layer.key).weight
        W = weight.data.mT if layer.weight_is_transposed else weight.data
        W.copy_(method.at_start(W, layer.update_of(layer.active_adapters[0]).r))
    return base


def updates(model: nn.Module) -> Iterator[SpectralUpdate]:
    return (module for module in model.modules() if isinstance(module, SpectralUpdate))


def tensors(update: SpectralUpdate) -> dict[str, Tensor]:
    """The tensors of an update in float64, by their name within it."""
    return {name: value.detach().double() for name, value in update.named_parameters()}
