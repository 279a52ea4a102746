"""A callback of transformers' Trainer: checks that the adapter trains, and figures about it in the Trainer's logs."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers.trainer_callback import TrainerCallback

from spectral_peft.errors import SpectralError
from spectral_peft.statistics import spectral_statistics
from spectral_peft.training import begin_step, finish_step, take_resets, trained_updates
from spectral_peft.update import SpectralUpdate


class SpectralCallback(TrainerCallback):
    """Checks at the start of a training that the adapter will train, and adds figures about it to every log.

    It warns where a schedule is longer than the training, and would do nothing in it.

    ::

        trainer = Trainer(model, ...)  # or one of TRL's
        trainer.add_callback(SpectralCallback(trainer))

    It is not needed for the schedules: they follow the steps of every torch optimizer. Where something else moves the
    parameters, it runs them; what a hook has seen never happens twice.

    The figures are those of `spectral_statistics`, and ``spectral/optimizer_state_reset``: the share of the trained
    numbers whose optimizer state a schedule has reset since the last log. They are measured when the Trainer logs its
    loss, and are part of that log: progress bar, ``log_history``, TensorBoard, Weights & Biases, Trackio and others
    see them beside the loss. For that it has to come before the reporting callbacks, which a Trainer puts in front of
    those that it is given: so it takes the trainer, as callbacks of TRL do, and moves itself to the front when the
    training begins. Logs of its own would be further lines between those of the loss, with the metrics of TRL's
    trainers in them a second time.

    It has no state: nothing of it is in a checkpoint, and it can be added or left out when a training is resumed.

    Args:
        trainer: The trainer that it is added to.
        spectra_every: None, or the number of optimizer steps after which the next log holds the figures of each weight
            too: three numbers per weight.
    """

    def __init__(self, trainer: Any, *, spectra_every: int | None = None) -> None:
        if spectra_every is not None and spectra_every < 1:
            raise ValueError(f"`spectra_every` should be at least 1, or None for no spectra, got {spectra_every}.")
        self.trainer = trainer
        self.spectra_every = spectra_every
        self._spectra_due = 0
        self._scheduled: list[SpectralUpdate] = []
        self._steps: dict[SpectralUpdate, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks model and optimizer.

        Raises:
            SpectralError: the model has no spectral adapter that trains, or the optimizer does not hold all of it.
        """
        model, optimizer = kwargs["model"], _unwrapped(kwargs["optimizer"])
        check_optimizer(model, optimizer)
        callbacks = self.trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        take_resets(optimizer)
        self._spectra_due = state.global_step + (self.spectra_every or 0)
        self._scheduled = [update for update in trained_updates(model) if update.scheduled]
        if state.global_step == 0:  # of a training that goes on it was said before
            _warn_of_late_turns(self._scheduled, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What a schedule does before the step, where torch's hooks will not."""
        self._steps = begin_step(self._scheduled, _unwrapped(kwargs["optimizer"]))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The spectral step, where torch's hooks have not seen one."""
        optimizer = kwargs["optimizer"]
        if not getattr(optimizer, "step_was_skipped", False):
            finish_step(self._steps, _unwrapped(optimizer))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the figures to the log of the loss, which the other callbacks get after this one.

        On every process, as the Trainer calls it: where parameters are sharded, they are gathered for the figures.
        """
        logs, model = kwargs["logs"], kwargs["model"]
        if "loss" not in logs:
            return
        with_spectra = self.spectra_every is not None and state.global_step >= self._spectra_due
        if with_spectra:
            self._spectra_due = state.global_step + (self.spectra_every or 0)
        entries = spectral_statistics(model, per_layer=with_spectra)
        if self._scheduled:
            entries["spectral/optimizer_state_reset"] = _share_of_resets(_unwrapped(kwargs["optimizer"]))
        logs.update(entries)
        state.log_history[-1].update(entries)  # the Trainer has copied the log already

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets go of the model."""
        self._scheduled, self._steps = [], {}


def _warn_of_late_turns(updates: list[SpectralUpdate], max_steps: int) -> None:
    for update_cls in dict.fromkeys(map(type, updates)):
        steps = min(update.steps_to_turn() for update in updates if type(update) is update_cls)
        if steps > max_steps:
            warnings.warn(
                f"The schedule of {update_cls.__name__} has no turn in a training of {max_steps} steps: the next one "
                f"comes after {steps}. Let it come more often: `steps_per_iteration` of SST, `retract_every` of SCT.",
                stacklevel=2,
            )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raises SpectralError unless a spectral adapter of `model` trains and `optimizer` holds all of what it trains.

    Only torch optimizers are looked at; those of DeepSpeed hold copies.
    """
    updates = trained_updates(model)
    if not updates:
        found = any(isinstance(module, SpectralUpdate) for module in model.modules())
        raise SpectralError(
            "No spectral adapter of the model trains: all are frozen. Load one to train on with "
            "`PeftModel.from_pretrained(model, folder, is_trainable=True)`, or activate it with `set_adapter`."
            if found
            else "The model has no spectral adapter: add one with `get_peft_model(model, config)`, with the config of "
            "a method of spectral_peft, before the trainer is made."
        )
    if not isinstance(optimizer, Optimizer):
        return
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    ours = {id(value) for update in updates for _, value in update.trained_parameters() if value.requires_grad}
    missing = [name for name, value in model.named_parameters() if id(value) in ours - held]
    if len(missing) == len(ours):
        raise SpectralError(
            f"The optimizer holds none of the {len(ours)} parameters of the spectral adapter, which would not train: "
            "it was built before the adapter was added. Build it after `get_peft_model`, for instance with "
            "`create_spectral_optimizer(model, ...)`, or leave it to the trainer."
        )
    if missing:
        raise SpectralError(
            f"The optimizer does not hold {len(missing)} of the {len(ours)} parameters of the spectral adapter, which "
            f"would not train: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Give it every parameter "
            "that requires a gradient, for instance with `create_spectral_optimizer(model, ...)`, or freeze those "
            "that should not train."
        )


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer within accelerate's wrapper."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _share_of_resets(optimizer: Any) -> float:
    resets = take_resets(optimizer)
    trained = {id(value): value.numel() for group in optimizer.param_groups for value in group["params"]}
    return sum(trained.get(key, 0) for key in resets) / sum(trained.values())
