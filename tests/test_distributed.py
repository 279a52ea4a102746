"""Two processes do what one does on their joint batch, and keep their updates equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from spectral_peft import SpectralError, spectral_statistics, step_in_backward
from tests.methods import METHODS
from tests.models import batch, llama, logits, trainable
from tests.processes import Pair


STEPS = 6
TARGETS = ["q_proj", "k_proj", "down_proj"]  # square, and wide, and wide again with rows that do not divide by two
NAMED = {method.name: method for method in METHODS}  # the formulas of a method cannot be sent to a process


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.kill()


# What the processes run


def adapted(name: str, **fields: Any) -> nn.Module:
    return get_peft_model(llama(torch.float64), NAMED[name](target_modules=TARGETS, r=5, **fields))


def train(
    model: nn.Module, name: str, rows: slice, first: int = 0, optimizer: Any = None, steps: int = STEPS
) -> list[float]:
    """The losses of the steps on these rows of the batch."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=NAMED[name].lr, weight_decay=0.0)
    losses = []
    for step in range(first, first + steps):
        ids = batch(seed=step)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_rows() -> slice:
    return slice(dist.get_rank(), dist.get_rank() + 1)


def mean_over_processes(losses: list[float]) -> Tensor:
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, whole, on every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def same_as_one_process(name: str, model: nn.Module, losses: list[float], **fields: Any) -> None:
    """Losses, state, and the figures that are logged."""
    alone = adapted(name, **fields)
    expected = torch.tensor(train(alone, name, slice(None)), dtype=torch.float64)
    torch.testing.assert_close(mean_over_processes(losses), expected, rtol=1e-5, atol=0)
    state = gathered(model)
    assert state.keys() == alone.state_dict().keys()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key + text)
    figures = spectral_statistics(model, per_layer=True)
    assert figures == pytest.approx(spectral_statistics(alone, per_layer=True), rel=1e-3, abs=1e-4)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return next(child for name, child in model.named_modules() if name.endswith("model.layers"))


def sharded(model: nn.Module) -> nn.Module:
    for layer in decoder_layers(model):
        fully_shard(layer)
    return fully_shard(model)


def ddp(name: str, folder: Path, find_unused: bool) -> None:
    model = adapted(name)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
    losses = train(parallel, name, own_rows())
    assert_same_everywhere(model)
    same_as_one_process(name, model, losses)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(torch.float64), folder)), logits(model))


def ddp_after_one_is_ahead(name: str) -> float:
    """The second process has counted a step that the first has not."""
    model = adapted(name)
    if dist.get_rank() == 1:
        train(model, name, slice(None), steps=1)
    train(DistributedDataParallel(model), name, own_rows(), steps=3)
    assert_same_everywhere(model)
    return spectral_statistics(model)["spectral/swaps"]


def assert_same_everywhere(model: nn.Module) -> None:
    for key, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), key


def fsdp2(name: str, folder: Path, fields: dict[str, Any]) -> None:
    model = adapted(name, **fields)
    for number, layer in enumerate(decoder_layers(model)):
        decoder_layers(model)[number] = checkpoint_wrapper(layer)
    model = sharded(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=NAMED[name].lr, weight_decay=0.0)
    losses = train(model, name, own_rows(), optimizer=optimizer)
    if name.startswith("sst"):  # the last step was a swap
        assert not any(value.full_tensor().any() for state in optimizer.state.values() for value in moments(state))
    same_as_one_process(name, model, losses, **fields)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # the others have no state
        model.save_pretrained(folder, state_dict=state)
    expected = logits(model)
    dist.barrier()
    reloaded = PeftModel.from_pretrained(llama(torch.float64), folder)
    torch.testing.assert_close(logits(reloaded), expected)
    whole = gathered(model)
    assert all(torch.equal(whole[key], value) for key, value in reloaded.state_dict().items())


def moments(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return state["exp_avg"], state["exp_avg_sq"]


def continued(name: str, folder: Path) -> None:
    """One process trains and saves; two load that and go on, in FSDP2 and in DDP, as one does."""
    if dist.get_rank() == 0:
        model = adapted(name)
        train(model, name, slice(None))
        model.save_pretrained(folder)
    dist.barrier()

    def load() -> nn.Module:
        return PeftModel.from_pretrained(llama(torch.float64), folder, is_trainable=True)

    expected = torch.tensor(train(load(), name, slice(None), first=STEPS), dtype=torch.float64)
    for parallel in (sharded, DistributedDataParallel):
        losses = train(parallel(load()), name, own_rows(), first=STEPS)
        torch.testing.assert_close(mean_over_processes(losses), expected, rtol=1e-5, atol=0)


def through_accelerate(name: str, folder: Path, kind: str, adapter_only: bool) -> None:
    """What `accelerator.save_state` and the Trainer call; FSDP plugins need an accelerator other than the CPU."""
    PartialState(cpu=True)  # its logger asks for it
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    rank = dist.get_rank()
    accelerator = SimpleNamespace(
        num_processes=2, process_index=rank, is_main_process=rank == 0, is_fsdp2=True, wait_for_everyone=dist.barrier
    )
    model = sharded(adapted(name))
    train(model, name, own_rows())
    save_fsdp_model(plugin, accelerator, model, str(folder), adapter_only=adapter_only)
    dist.barrier()
    resumed = sharded(adapted(name))
    load_fsdp_model(plugin, accelerator, resumed, str(folder), adapter_only=adapter_only)
    if name == "sst":
        still = [torch.optim.SGD(trainable(each), lr=0.0) for each in (model, resumed)]
        for each, optimizer in zip((model, resumed), still, strict=True):
            train(each, name, own_rows(), optimizer=optimizer, steps=1)
    expected, state = gathered(model), gathered(resumed)
    assert [key for key, value in expected.items() if not torch.equal(value, state[key])] == []


def refusal(of: str) -> str:
    """The error of what is not supported."""
    with pytest.raises(SpectralError) as raised:
        ATTEMPTS[of]()
    return str(raised.value)


def step_in_fsdp1() -> None:
    model = get_peft_model(llama(), NAMED["sst-pool"]()).train()
    parallel = flattened(model)
    parallel(input_ids=batch(), labels=batch()).loss.backward()
    torch.optim.SGD(trainable(model), lr=1e-3).step()


def load_in_fsdp1(folder: Path) -> None:
    """The first pass is one of views, which FSDP1 puts in the place of the parameters."""
    parallel = flattened(PeftModel.from_pretrained(llama(), folder, is_trainable=True))
    expected = logits(PeftModel.from_pretrained(llama(), folder))
    torch.testing.assert_close(parallel(input_ids=batch()).logits, expected)


def tensor_parallel() -> nn.Module:
    model, mesh = llama(), init_device_mesh("cpu", (2,))
    for layer in decoder_layers(model):
        parallelize_module(layer, mesh, {"self_attn.q_proj": ColwiseParallel()})
    return model


ATTEMPTS = {
    "an adapter after fully_shard": lambda: get_peft_model(sharded(llama()), NAMED["svfit"]()),
    "an adapter under tensor parallelism": lambda: get_peft_model(tensor_parallel(), NAMED["svfit"]()),
    "an adapter after FSDP1": lambda: get_peft_model(flattened(llama()), NAMED["svfit"]()),
    "a schedule in FSDP1": lambda: flattened(get_peft_model(llama(), NAMED["sct"]())).train(),
    "a step in FSDP1": step_in_fsdp1,
    "step_in_backward": lambda: step_in_backward(get_peft_model(llama(), NAMED["svfit"]()), torch.optim.SGD, lr=1e-3),
}


def flattened(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


# The laws


@pytest.mark.parametrize("find_unused", [False, True], ids=["bare", "find_unused_parameters"])
def test_ddp_is_one_process_on_the_joint_batch(pair, tmp_path, method, find_unused):
    pair.run(ddp, method.name, tmp_path, find_unused)


def test_ddp_counts_as_the_first_process_does(pair):
    assert pair.run(ddp_after_one_is_ahead, "sst") == [1, 1]


def test_fsdp2_is_one_process_on_the_joint_batch(pair, tmp_path, method):
    pair.run(fsdp2, method.name, tmp_path, {})


@pytest.mark.parametrize("name", ["svfit", "pissa"])
def test_an_adapter_from_a_file_trains_in_fsdp1(pair, tmp_path, name):
    get_peft_model(llama(), NAMED[name]()).save_pretrained(tmp_path)
    pair.run(load_in_fsdp1, tmp_path)


VARIANTS = {"riemannian": {"gradient": "riemannian"}, "absorb": {"absorb": True}, "freed": {"keep_base_weight": False}}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_fsdp2_of_the_rules_of_sct(pair, tmp_path, fields):
    pair.run(fsdp2, "sct", tmp_path, fields)


@pytest.mark.parametrize("name", ["svfit", "sst"])
def test_two_processes_go_on_where_one_stopped(pair, tmp_path, name):
    pair.run(continued, name, tmp_path)


@pytest.mark.parametrize("adapter_only", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize("name", ["pissa", "sst"])
def test_checkpoints_of_accelerate_hold_everything(pair, tmp_path, name, kind, adapter_only):
    if (name, kind, adapter_only) == ("sst", "FULL_STATE_DICT", True):  # holds trainable parameters alone
        with pytest.raises(AssertionError, match="set `state_dict_type` to SHARDED_STATE_DICT"):
            pair.run(through_accelerate, name, tmp_path, kind, adapter_only)
    else:
        pair.run(through_accelerate, name, tmp_path, kind, adapter_only)


REFUSALS = {
    "an adapter after fully_shard": "Add the adapter first",
    "an adapter under tensor parallelism": "`tp_plan`",
    "an adapter after FSDP1": "flattened by FullyShardedDataParallel",
    "a schedule in FSDP1": "fsdp_version: 2",
    "a step in FSDP1": "fsdp_version: 2",
    "step_in_backward": "over all parameters after `backward`",
}


@pytest.mark.parametrize("of", REFUSALS)
def test_what_is_not_supported_says_what_to_do(pair, of):
    assert all(REFUSALS[of] in message for message in pair.run(refusal, of))


def test_zero_3_is_refused():
    model = llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.ds_id, weight.data = 7, torch.empty(0)  # what DeepSpeed leaves of a partitioned weight
    with pytest.raises(SpectralError, match="up_proj is partitioned by DeepSpeed ZeRO-3"):
        get_peft_model(model, NAMED["svfit"]())


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, torch.compile], ids=["checkpoint_wrapper", "compile"])
def test_wrappers_of_layers_do_not_show_in_checkpoints(tmp_path, method, wrap):
    model = adapted(method.name, **({"save_start": False} if method.recomputable else {}))
    train(model, method.name, slice(None))
    expected = logits(model)
    model.save_pretrained(tmp_path / "bare")
    layers = decoder_layers(model)
    for number, layer in enumerate(bare_layers := list(layers)):
        layers[number] = wrap(layer)
    model.save_pretrained(tmp_path / "wrapped")
    bare, wrapped = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("bare", "wrapped"))
    assert bare.keys() == wrapped.keys()
    assert all(torch.equal(bare[key], wrapped[key]) for key in bare)
    for value in trainable(model):
        value.data.zero_()
    model.load_adapter(tmp_path / "bare", "default")
    for number, layer in enumerate(bare_layers):
        layers[number] = layer
    assert torch.equal(logits(model), expected)
