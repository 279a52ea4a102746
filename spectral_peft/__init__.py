"""Spectral fine-tuning for Hugging Face PEFT. Importing this package registers its methods with PEFT."""

from spectral_peft.calibration import Calibration, calibrate
from spectral_peft.callback import SpectralCallback
from spectral_peft.config import CalibratedConfig, SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.export import export_lora
from spectral_peft.factored import build_factored, load_factored, save_factored
from spectral_peft.hotswap import hotswap_adapter
from spectral_peft.hub import push_to_hub
from spectral_peft.memory import MemoryEstimate, estimate_memory, return_freed_memory, save_on_disk
from spectral_peft.merged import export_merged
from spectral_peft.model import SpectralModel, register
from spectral_peft.optim import create_spectral_optimizer, parameter_groups, step_in_backward
from spectral_peft.report import ParameterReport, parameter_report, untargeted_modules
from spectral_peft.schedule import Schedule
from spectral_peft.statistics import spectral_statistics
from spectral_peft.training import spectral_step
from spectral_peft.tuners import (
    SCT,
    SST,
    PiSSA,
    PiSSAConfig,
    PooledSST,
    RetractionRule,
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
    "CalibratedConfig",
    "Calibration",
    "Diagonal",
    "Factor",
    "MemoryEstimate",
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
    "SpectralCallback",
    "SpectralConfig",
    "SpectralError",
    "SpectralModel",
    "SpectralUpdate",
    "build_factored",
    "calibrate",
    "create_spectral_optimizer",
    "estimate_memory",
    "export_lora",
    "export_merged",
    "hotswap_adapter",
    "load_factored",
    "parameter_groups",
    "parameter_report",
    "push_to_hub",
    "register",
    "return_freed_memory",
    "save_factored",
    "save_on_disk",
    "spectral_statistics",
    "spectral_step",
    "step_in_backward",
    "untargeted_modules",
]
