"""SVFit's own invariant: the leading singular values move, everything else of the SVD stays."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, cast_mixed_precision_params, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from spectral_peft import Size, SVFitConfig
from spectral_peft.linalg import truncated_svd
from tests.models import llama, logits, train_, trainable
from tests.tolerance import tolerance


def test_the_adapted_weight_has_the_trained_singular_values_and_the_old_vectors() -> None:
    W = torch.randn(24, 16, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    update = SVFitConfig(r=6).build(Size(24, 16, 6, torch.float64))
    update.start_(truncated_svd(W, 6, "exact"))
    dS = torch.rand(6, dtype=torch.float64)
    update.dS.weight.data.copy_(dS)
    expected = torch.cat([S[:6] + dS, S[6:]])
    rotated = U.T @ (W + update.matrix()) @ Vh.T
    torch.testing.assert_close(rotated, torch.diag(expected), atol=tolerance(torch.float64, 24), rtol=0)


def test_a_small_change_shows_in_16_bits() -> None:
    update = SVFitConfig().build(Size(4, 4, 2, torch.bfloat16))
    update.S.weight.data.fill_(8.0)
    update.dS.weight.data.fill_(0.01)
    assert float(update.singular_values()[0].detach()) == pytest.approx(8.01, rel=1e-4)


def test_it_merges_where_only_the_frozen_vectors_are_in_16_bits() -> None:
    """As PEFT's `cast_mixed_precision_params` leaves it."""
    model = get_peft_model(llama(), SVFitConfig(r=4, target_modules=["up_proj"]))
    train_(model, 1e-1)
    cast_mixed_precision_params(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=0, atol=0.1)


def test_parameters_on_roberta_base() -> None:
    """The published sixteenth of LoRA's count: LoRA r=8 on q, v trains 294,912; SVFit at full rank 18,432."""
    with torch.device("meta"):
        roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=100))
    targets = {"target_modules": ["query", "value"]}
    lora = get_peft_model(roberta, LoraConfig(r=8, **targets))
    assert sum(value.numel() for value in trainable(lora)) == 294_912
    per_layer = SVFitConfig(r=1.0, **targets).build(Size(768, 768, 768, device=torch.device("meta")))
    assert 24 * sum(value.numel() for _, value in per_layer.trained_parameters()) == 18_432 == 294_912 // 16
