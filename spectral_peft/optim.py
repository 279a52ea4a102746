"""Learning rates for singular vectors, singular values and everything else, as parameter groups of any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from torch import nn
from torch.optim import Optimizer

from spectral_peft.errors import SpectralError
from spectral_peft.unsupported import refuse_processes
from spectral_peft.update import SpectralUpdate


REFERENCE_HEIGHT = 1024
"""The height of a factor at which `factor_lr` is its learning rate."""


# By the module whose parameters they step: a copy of a model, or a pickled one, has none of them.
_in_backward: WeakKeyDictionary[nn.Module, list[Optimizer]] = WeakKeyDictionary()


class _Kind(NamedTuple):
    name: str
    lr: float
    weight_decay: float


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    factor_lr: float | None = None,
    value_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Every trainable parameter of a model with spectral adapters once, in groups for a torch optimizer.

    A step of Adam moves every entry by about its learning rate, and so turns a unit column of m entries by about
    lr sqrt(m) radians. Orthonormal factors whose columns have m entries therefore train at

        factor_lr * sqrt(1024 / m),

    with which the columns of all turn by about 32 factor_lr radians a step. Weight decay does nothing to a factor that
    is made orthonormal again, and pulls singular values to their start instead of to zero; so both go without, as do
    biases and norms.

    Args:
        model: What trains is taken from it: the parameters that require a gradient.
        lr: The learning rate of what is neither an orthonormal factor nor a singular value: modules that train in
            full, biases, the factors of PiSSA.
        factor_lr: That of orthonormal factors of height 1024 (U and Vh of SCT and SST). None means `lr`.
        value_lr: That of singular values (SCT, SST, SVFit). None means `lr`.
        weight_decay: That of matrices that are not orthonormal factors.

    Returns:
        Dictionaries with `params`, `lr`, `weight_decay` and a `name` for logs, in the order of the model.

    Raises:
        ValueError: nothing in the model trains.
    """
    roles = _roles(model)
    groups: dict[_Kind, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            role, height = roles.get(id(parameter)), max(parameter.shape, default=1)
            if role == "factor":
                rate = (lr if factor_lr is None else factor_lr) * math.sqrt(REFERENCE_HEIGHT / height)
                kind = _Kind(f"factors of height {height}", rate, 0.0)
            elif role == "value":
                kind = _Kind("singular values", lr if value_lr is None else value_lr, 0.0)
            else:
                kind = _Kind("vectors", lr, 0.0) if parameter.ndim < 2 else _Kind("matrices", lr, weight_decay)
            groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise ValueError("No parameter of the model requires a gradient: add an adapter that trains first.")
    return [{"params": parameters, **kind._asdict()} for kind, parameters in groups.items()]


def create_spectral_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    factor_lr: float | None = None,
    value_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over `parameter_groups`, in the manner of `peft.optimizers.create_loraplus_optimizer`.

    The Trainer takes it as ``Trainer(..., optimizers=(optimizer, None))`` and makes the scheduler itself, which
    multiplies the rate of each group.

    Args:
        model: A model with spectral adapters.
        optimizer_cls: For example `torch.optim.AdamW`.
        lr: As in `parameter_groups`.
        factor_lr: As in `parameter_groups`.
        value_lr: As in `parameter_groups`.
        weight_decay: As in `parameter_groups`.
        kwargs: Further arguments of `optimizer_cls`.

    Raises:
        ValueError: nothing in the model trains.
    """
    groups = parameter_groups(model, lr, factor_lr=factor_lr, value_lr=value_lr, weight_decay=weight_decay)
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


def step_in_backward(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    factor_lr: float | None = None,
    value_lr: float | None = None,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> list[Optimizer]:
    """Steps every layer as soon as `backward` has its gradients, and drops them: there never are those of two layers.

    Saves the memory of the gradients. The call of `backward` is then the whole step: gradients can neither be
    accumulated nor clipped by their common norm, and there is nothing to call `step` on. Each layer has an optimizer
    of its own, over the groups of `parameter_groups`, so that the factors of a weight are stepped, and retracted,
    together.

    Args:
        model: A model with spectral adapters.
        optimizer_cls: For example `torch.optim.AdamW`.
        lr: As in `parameter_groups`.
        factor_lr: As in `parameter_groups`.
        value_lr: As in `parameter_groups`.
        weight_decay: As in `parameter_groups`.
        kwargs: Further arguments of `optimizer_cls`.

    Returns:
        The optimizers, to make learning rate schedulers for them and to save their state. They live as long as the
        modules that hold the parameters, whether the list is kept or not.

    Raises:
        ValueError: nothing in the model trains.
        SpectralError: there are several processes, whose gradients are averaged only after this step; or what trains
            is stepped in backward already, by an earlier call.
    """
    refuse_processes("`step_in_backward`")
    if any(module in _in_backward for module, _ in _units(model)):
        raise SpectralError(
            "The model is stepped in backward already. To change a learning rate, change that of the optimizers that "
            "`step_in_backward` returned. What is to train has to require a gradient before the first call."
        )
    groups = parameter_groups(model, lr, factor_lr=factor_lr, value_lr=value_lr, weight_decay=weight_decay)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    optimizers = []
    for module, unit in _units(model):
        own = [{**group_of[id(parameter)], "params": [parameter]} for parameter in unit]
        optimizers.append(optimizer_cls(own, lr=lr, **kwargs))  # type: ignore[call-arg]
        _in_backward.setdefault(module, []).append(optimizers[-1])
        _step_when_complete(optimizers[-1], unit)
    return optimizers


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """What has to be stepped together, and its module: what an update trains; every other parameter by itself."""
    taken: set[int] = set()
    for update in model.modules():
        if isinstance(update, SpectralUpdate):
            unit = [value for _, value in update.trained_parameters() if value.requires_grad]
            taken.update(map(id, unit))
            if unit:
                yield update, unit
    for module in model.modules():
        for value in module.parameters(recurse=False):
            if value.requires_grad and id(value) not in taken:
                taken.add(id(value))
                yield module, [value]


def _step_when_complete(optimizer: Optimizer, unit: list[nn.Parameter]) -> None:
    # A parameter holds its hooks where Python's garbage collector does not look: what they hold strongly, and what
    # that refers to, would be there for ever if the parameter is part of it.
    stepped, parameters = ref(optimizer), [ref(parameter) for parameter in unit]

    def step(_: nn.Parameter) -> None:
        optimizer = stepped()
        complete = all(value is not None and value.grad is not None for value in (known() for known in parameters))
        if optimizer is not None and complete:
            optimizer.step()
            optimizer.zero_grad()

    for parameter in unit:
        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]


def _roles(model: nn.Module) -> dict[int, str]:
    """What the trained parameters of the updates are, by their identity: "factor" if orthonormal, or "value"."""
    roles = {}
    for update in model.modules():
        if isinstance(update, SpectralUpdate):
            for name, parameter in update.trained_parameters():
                child = name.split(".")[0]
                if child in update.orthonormal:
                    roles[id(parameter)] = "factor"
                elif child in update.spectrum:
                    roles[id(parameter)] = "value"
    return roles
