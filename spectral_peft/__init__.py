"""Spectral fine-tuning for Hugging Face PEFT. Importing this package registers its methods with PEFT."""

from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.export import export_lora
from spectral_peft.model import SpectralModel, register
from spectral_peft.optim import create_spectral_optimizer, parameter_groups
from spectral_peft.report import ParameterReport, parameter_report, untargeted_modules
from spectral_peft.tuners import (
    SCT,
    SST,
    PiSSA,
    PiSSAConfig,
    PooledSST,
    RetractionRule,
    Schedule,
    SCTConfig,
    SSTConfig,
    SVFit,
    SVFitConfig,
)
from spectral_peft.update import Diagonal, Factor, Size, SpectralUpdate


__version__ = "0.1.0"

__all__ = [
    "SCT",
    "SST",
    "Diagonal",
    "Factor",
    "ParameterReport",
    "PiSSA",
    "PiSSAConfig",
    "PooledSST",
    "RetractionRule",
    "SCTConfig",
    "SSTConfig",
    "SVFit",
    "SVFitConfig",
    "Schedule",
    "Size",
    "SpectralConfig",
    "SpectralError",
    "SpectralModel",
    "SpectralUpdate",
    "create_spectral_optimizer",
    "export_lora",
    "parameter_groups",
    "parameter_report",
    "register",
    "untargeted_modules",
]
