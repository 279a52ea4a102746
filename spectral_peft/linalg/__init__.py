"""Pure linear algebra on tensors: no PEFT, no configuration, no global random state."""

from __future__ import annotations

from spectral_peft.linalg.allocation import allocate_ranks
from spectral_peft.linalg.drivers import Factors
from spectral_peft.linalg.fingerprint import SKETCH_SIZE, same_matrix, sketch
from spectral_peft.linalg.precision import one_thread_if_small
from spectral_peft.linalg.spectrum import effective_rank, energy_rank, noise_rank
from spectral_peft.linalg.stiefel import (
    cholesky_qr_retraction,
    normalize_,
    orthonormality_error,
    polar_retraction,
    qr_retraction,
    tangent_projection,
)
from spectral_peft.linalg.svd import (
    ALGORITHMS,
    canonical_signs,
    completed,
    randomized_svd,
    singular_values,
    svd,
    svd_of_product,
    truncated_svd,
)
from spectral_peft.linalg.whitened import whiten, whitened_svd


__all__ = [
    "ALGORITHMS",
    "SKETCH_SIZE",
    "Factors",
    "allocate_ranks",
    "canonical_signs",
    "cholesky_qr_retraction",
    "completed",
    "effective_rank",
    "energy_rank",
    "noise_rank",
    "normalize_",
    "one_thread_if_small",
    "orthonormality_error",
    "polar_retraction",
    "qr_retraction",
    "randomized_svd",
    "same_matrix",
    "singular_values",
    "sketch",
    "svd",
    "svd_of_product",
    "tangent_projection",
    "truncated_svd",
    "whiten",
    "whitened_svd",
]
