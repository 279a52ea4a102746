"""PiSSA's own invariant: it is PEFT's PiSSA, without the change of the base weight."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from spectral_peft import PiSSAConfig
from tests.models import llama, logits, train_
from tests.tolerance import tolerance


@pytest.mark.parametrize("alpha", [8, 4, 32])
def test_it_trains_as_peft_s_pissa_does(alpha: int) -> None:
    targets = {"r": 8, "target_modules": "all-linear"}
    reference = get_peft_model(llama(), LoraConfig(init_lora_weights="pissa", lora_alpha=alpha, **targets))
    ours = get_peft_model(llama(), PiSSAConfig(svd="exact", alpha=alpha, **targets))
    start = logits(ours)
    rounding = tolerance(torch.float32, 32)
    torch.testing.assert_close(logits(reference), start, rtol=rounding, atol=10 * rounding)
    for model in (reference, ours):
        train_(model, lr=1e-3, steps=10)
    moved = (logits(ours) - start).norm()
    difference = (logits(ours) - logits(reference)).norm()
    assert moved > 0.05 * start.norm()
    # Ten AdamW steps amplify the rounding of the two starts: small against what was learned.
    assert difference < 1e-3 * moved


def test_no_alpha_is_the_paper_s_scaling_of_one() -> None:
    targets = {"r": 8, "target_modules": "all-linear"}
    outputs = []
    for alpha in (None, 8):
        model = get_peft_model(llama(), PiSSAConfig(alpha=alpha, **targets))
        train_(model, lr=1e-3)
        outputs.append(logits(model))
    assert torch.equal(*outputs)
