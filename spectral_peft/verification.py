"""Whether a stored adapter is sound, as far as that can be told without its base model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from spectral_peft.errors import SpectralError
from spectral_peft.linalg import orthonormality_error
from spectral_peft.stored import StoredAdapter
from spectral_peft.update import SpectralUpdate


__all__ = ["Finding", "verify"]


LARGEST_DRIFT = 0.3
"""The largest entry of |X^T X - I| that training leaves behind: the vectors of SST drift between two SVDs."""


class Finding(NamedTuple):
    """What one check says of one module.

    Attributes:
        module: Name of the module.
        check: "finite", "state", "start", or "orthonormal".
        passed: Whether it is as it should be.
        detail: The measured figure, or what is wrong.
    """

    module: str
    check: str
    passed: bool
    detail: str


@torch.no_grad()
def verify(adapter: StoredAdapter) -> list[Finding]:
    """Checks every module of an adapter.

    - finite: no NaN or Inf.
    - state: counters and indices of a schedule are possible.
    - start: the frozen start is the one whose sketch was noted when the adapter was made; where a schedule changes it,
      there is nothing to compare.
    - orthonormal: the trained factors that should be orthonormal are, up to what their training leaves behind.

    Whether the base model is the right one is checked when the adapter is loaded.
    """
    return [finding for module, update in adapter.updates.items() for finding in _findings(adapter, module, update)]


def _findings(adapter: StoredAdapter, module: str, update: SpectralUpdate | None) -> list[Finding]:
    tensors = adapter.tensors_of(module)
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    findings = [Finding(module, "finite", not broken, f"NaN or Inf in {', '.join(broken)}" if broken else "")]
    if update is None or broken:
        return findings
    try:
        update.check_state(tensors)
        findings.append(Finding(module, "state", True, ""))
    except SpectralError as error:
        findings.append(Finding(module, "state", False, str(error)))
    if not update.scheduled:
        same = update.has_noted_start()
        findings.append(Finding(module, "start", same, "" if same else "is not the one that the fingerprint is of"))
    if update.orthonormal:
        drift = max(_drift(value) for name, value in update.trained_parameters() if _child(name) in update.orthonormal)
        findings.append(Finding(module, "orthonormal", drift <= LARGEST_DRIFT, f"off by {drift:.1e}"))
    return findings


def _child(name: str) -> str:
    return name.split(".")[0]


def _drift(X: nn.Parameter) -> float:
    return float(orthonormality_error(X if X.shape[0] >= X.shape[1] else X.mT))
