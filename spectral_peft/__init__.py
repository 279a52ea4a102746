"""Spectral fine-tuning for Hugging Face PEFT. Importing this package registers its methods with PEFT."""

from spectral_peft.calibration import Calibration, calibrate
from spectral_peft.config import CalibratedConfig, SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.export import export_lora
from spectral_peft.model import SpectralModel, register
from spectral_peft.report import ParameterReport, parameter_report, untargeted_modules
from spectral_peft.tuners import SST, PiSSA, PiSSAConfig, PooledSST, Schedule, SSTConfig, SVFit, SVFitConfig
from spectral_peft.update import Diagonal, Factor, Size, SpectralUpdate


__version__ = "0.1.0"

__all__ = [
    "SST",
    "CalibratedConfig",
    "Calibration",
    "Diagonal",
    "Factor",
    "ParameterReport",
    "PiSSA",
    "PiSSAConfig",
    "PooledSST",
    "SSTConfig",
    "SVFit",
    "SVFitConfig",
    "Schedule",
    "Size",
    "SpectralConfig",
    "SpectralError",
    "SpectralModel",
    "SpectralUpdate",
    "calibrate",
    "export_lora",
    "parameter_report",
    "register",
    "untargeted_modules",
]
