"""What a training step costs is no more than its formula says, as a ratio to PEFT's LoRA of the same rank.

Operations and bytes are counted, not seconds: they are the same on every machine. The formulas are about one weight
(m, n), k = min(m, n), T tokens, rank R and a pool of POOL. What is counted of LoRA is what its formulas say, so that
no bound is looser than it looks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.counts import aten_calls, flops, nbytes, save, saved_bytes, state_bytes, trained
from spectral_peft.linalg import SKETCH_SIZE
from tests.methods import METHODS, Method


R, POOL, T = 4, 12, 2 * 24
ADAM = 10  # calls for one tensor
DECOMPOSITIONS = ("svd", "linalg_qr", "geqrf", "eig", "cholesky")
READS = ("_local_scalar_dense", "nonzero")
Formula = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Cost:
    """The formulas of a method, for a weight (m, n) with k = min(m, n).

    Attributes:
        products: Multiplications and additions of a forward and backward pass; 4 T m n of them are the base weight's.
        saved: Numbers that autograd keeps, beside the input of the layer.
        trained: Numbers that an optimizer moves.
        tensors: How many tensors they are.
        stored: Floating point numbers in a checkpoint.
        integers: Integers of 64 bits there, beside the fingerprint.
        keeps_input: Whether autograd keeps the input of the layer too.
        after_step: Calls after an optimizer step.
        fingerprint: Bytes of it in a checkpoint.
    """

    products: Formula
    saved: Formula
    trained: Formula
    tensors: int
    stored: Formula
    integers: Formula = lambda m, n, k: 0
    keeps_input: bool = True
    after_step: int = 0
    fingerprint: int = 2 * SKETCH_SIZE * 4


LORA = Cost(
    products=lambda m, n, k: 4 * T * m * n + 6 * T * R * (m + n),
    saved=lambda m, n, k: T * R,
    trained=lambda m, n, k: R * (m + n),
    tensors=2,
    stored=lambda m, n, k: R * (m + n),
    fingerprint=0,
)
COSTS = {
    "svfit": Cost(
        products=lambda m, n, k: 4 * T * m * n + 4 * T * R * (m + n),
        saved=lambda m, n, k: T * R,
        keeps_input=False,
        trained=lambda m, n, k: R,
        tensors=1,
        stored=lambda m, n, k: R * (m + n + 2),
    ),
    "pissa": Cost(
        products=lambda m, n, k: 4 * T * m * n + 10 * T * R * (m + n),  # four thin products, two factors train
        saved=lambda m, n, k: T * R,
        trained=lambda m, n, k: R * (m + n),
        tensors=2,
        stored=lambda m, n, k: 2 * R * (m + n),
    ),
    "sst": Cost(
        products=lambda m, n, k: 4 * T * k * (m + n) + 2 * T * R * (m + n),
        saved=lambda m, n, k: T * k + k,
        trained=lambda m, n, k: R * (m + n) + k,
        tensors=3,
        stored=lambda m, n, k: k * (m + n + 2),
        integers=lambda m, n, k: k + 1 + 6,  # the order, the step, the digest of the schedule
        after_step=2 * 3 + 2 + 1,  # normalizes U and Vh, clamps S, counts the step
    ),
    "sst-pool": Cost(
        products=lambda m, n, k: 4 * T * m * n + (2 * 4 * POOL + 2 * R) * T * (m + n),  # now and at the start
        saved=lambda m, n, k: 2 * T * POOL + POOL,
        trained=lambda m, n, k: R * (m + n) + POOL,
        tensors=3,
        stored=lambda m, n, k: POOL * (2 * (m + n) + 3),
        integers=lambda m, n, k: POOL + 1 + 6,
        after_step=2 * 3 + 2 + 1,
    ),
    "sct": Cost(
        products=lambda m, n, k: 6 * T * R * (m + n),
        saved=lambda m, n, k: 2 * T * R + R,
        trained=lambda m, n, k: R * (m + n + 1),
        tensors=3,
        stored=lambda m, n, k: R * (m + n + 2),
        integers=lambda m, n, k: 1 + 5,
        after_step=2 * 8,  # for U and Vh: the Gram matrix and the product, with their views and casts
    ),
}


HIDDEN, MLP, LAYERS = 96, 128, 2
SIZES = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_attention_heads": 4, "num_key_value_heads": 2}


def base_model(layers: int = LAYERS) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=64, tie_word_embeddings=False, **SIZES)
    return LlamaForCausalLM(config).requires_grad_(False).train()


SHAPES = [tuple(layer.weight.shape) for layer in base_model().model.layers.modules() if isinstance(layer, nn.Linear)]
INPUTS = T * (HIDDEN + HIDDEN + MLP) * LAYERS  # of q, k, v; of gate and up; of down. Attention keeps that of o itself.


def total(formula: Formula) -> float:
    return sum(formula(m, n, min(m, n)) for m, n in SHAPES)


def config_of(name: str) -> PeftConfig:
    """With the default schedule, but for the warm-up: no change of vectors while operations are counted."""
    fields = {"sst": {"warmup_steps": 0}, "sst-pool": {"warmup_steps": 0, "pool": POOL}}.get(name, {})
    config = {"lora": LoraConfig, **{method.name: method.config for method in METHODS}}[name]
    return config(r=R, target_modules="all-linear", **fields)


def adapted(name: str, layers: int = LAYERS) -> PeftModel:
    return get_peft_model(base_model(layers), config_of(name))


def forward(model: nn.Module) -> Tensor:
    ids = torch.arange(T).view(2, -1) % 64
    return model(input_ids=ids, labels=ids).loss


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer after one step, with the gradients of the next one there."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    forward(model).backward()
    optimizer.step()
    return optimizer


def checkpoint(model: nn.Module) -> int:
    with TemporaryDirectory() as folder:
        save(model, Path(folder))
        return nbytes(load_file(Path(folder) / "adapter_model.safetensors").values())


@functools.cache
def of_base() -> tuple[float, int]:
    """Of the model without an adapter: operations outside of its layers' weights, and bytes that autograd keeps."""
    model = base_model()
    model.enable_input_require_grads()
    return flops(lambda: forward(model)) - total(lambda m, n, k: 4 * T * m * n), saved_bytes(
        model, lambda: forward(model)
    )


def count_products(name: str) -> float:
    model = adapted(name)
    model.enable_input_require_grads()  # else the first layers have no gradient of their input
    return flops(lambda: forward(model))


def count_saved(name: str) -> float:
    model = adapted(name)
    model.enable_input_require_grads()
    return saved_bytes(model, lambda: forward(model)) - of_base()[1]


def count_state(name: str) -> float:
    model = adapted(name)
    optimizer = stepped(model)
    return 2 * nbytes(trained(model)) + state_bytes(optimizer)


def calls_of_step(model: nn.Module) -> int:
    return len(aten_calls(stepped(model).step))


def count_calls(name: str) -> float:
    """Those that two more layers add: what does not grow with the model is left out."""
    return calls_of_step(adapted(name, 2 * LAYERS)) - calls_of_step(adapted(name))


COUNTED: dict[str, tuple[Callable[[str], float], Callable[[Cost], float]]] = {
    "operations": (count_products, lambda cost: of_base()[0] + total(cost.products)),
    "saved activations": (count_saved, lambda cost: 4 * (total(cost.saved) + cost.keeps_input * INPUTS)),
    "trained, gradients and state": (
        count_state,
        lambda cost: 4 * (4 * total(cost.trained) + cost.tensors * len(SHAPES)),  # AdamW has a step for each tensor
    ),
    "checkpoint": (
        lambda name: checkpoint(adapted(name)),
        lambda cost: 4 * total(cost.stored) + 8 * total(cost.integers) + cost.fingerprint * len(SHAPES),
    ),
    "calls of a step": (count_calls, lambda cost: (ADAM * cost.tensors + cost.after_step) * len(SHAPES)),
}


@functools.cache
def counted_of_lora(quantity: str) -> float:
    return COUNTED[quantity][0]("lora")


@pytest.mark.parametrize("quantity", COUNTED)
def test_lora_costs_what_its_formula_says(quantity: str) -> None:
    assert counted_of_lora(quantity) == COUNTED[quantity][1](LORA)


@pytest.mark.parametrize("quantity", COUNTED)
def test_no_method_costs_more_than_its_formula_says(method: Method, quantity: str) -> None:
    count, formula = COUNTED[quantity]
    ratio, bound = count(method.name) / counted_of_lora(quantity), formula(COSTS[method.name]) / formula(LORA)
    assert ratio <= bound * (1 + 1e-9)
    assert ratio >= bound * 0.95, "cheaper than the formula: tighten it"


def test_a_step_does_not_wait_for_the_device(method: Method) -> None:
    """Nothing but a change of the trained vectors reads a number back, for which a GPU would have to finish first."""
    model = adapted(method.name)
    optimizer = torch.optim.SGD(trained(model), lr=1e-3)
    forward(model).backward()
    optimizer.step()
    calls = aten_calls(optimizer.step)
    assert calls
    assert [call for call in calls if any(part in call for part in READS)] == []


def test_loading_decomposes_nothing(method: Method, tmp_path: Path) -> None:
    with_start = aten_calls(lambda: adapted(method.name))
    assert any(part in call for call in with_start for part in DECOMPOSITIONS)
    save(adapted(method.name), tmp_path)
    base = base_model()
    calls = aten_calls(lambda: PeftModel.from_pretrained(base, tmp_path))
    assert [call for call in calls if any(part in call for part in DECOMPOSITIONS)] == []
