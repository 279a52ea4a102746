"""One file per method: its mathematics (a `SpectralUpdate`) and its configuration (a `SpectralConfig`)."""

from spectral_peft.tuners.pissa import PiSSA, PiSSAConfig
from spectral_peft.tuners.sct import SCT, RetractionRule, SCTConfig
from spectral_peft.tuners.sst import SST, PooledSST, SSTConfig
from spectral_peft.tuners.svfit import SVFit, SVFitConfig


__all__ = [
    "SCT",
    "SST",
    "PiSSA",
    "PiSSAConfig",
    "PooledSST",
    "RetractionRule",
    "SCTConfig",
    "SSTConfig",
    "SVFit",
    "SVFitConfig",
]
