"""What `estimate_memory` says of a training step, beside the peak of the resident memory of one.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/estimate_memory.py --rows 4 --length 256

A Llama of the size of SmolLM2-135M from a config, float32, AdamW, gradient checkpointing, two steps. Each method runs
in a process of its own; what the process had before the model was built is taken off.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from threading import Event, Thread

import psutil
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_peft import PiSSAConfig, SCTConfig, SpectralConfig, SSTConfig, SVFitConfig, estimate_memory


METHODS: dict[str, SpectralConfig] = {
    "SVFit, r = 64": SVFitConfig(r=64, target_modules="all-linear"),
    "PiSSA, r = 64": PiSSAConfig(r=64, target_modules="all-linear"),
    "SST, r = 16 of a pool of 64": SSTConfig(r=16, pool=64, target_modules="all-linear"),
    "SST, r = 32": SSTConfig(r=32, target_modules="all-linear"),
    "SCT, r = 64, without dense weights": SCTConfig(r=64, keep_base_weight=False, target_modules="all-linear"),
}


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most resident memory while it lasts, looked at every 4 ms."""
    seen, done = [resident()], Event()

    def look() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], resident())
            time.sleep(0.004)

    thread = Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def compare(method: str, rows: int, length: int) -> tuple[float, float]:
    """(estimated, measured) in GB."""
    before = resident()
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
        )
    )
    model = get_peft_model(base, METHODS[method])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=False)
    ids = torch.randint(model.config.vocab_size, (rows, length))
    gc.collect()
    with peak() as most:
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return estimate_memory(model, rows * length).total / 1e9, (most[0] - before) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    print(f"{arguments.rows} x {arguments.length} tokens | estimated, GB | measured, GB | ratio")
    for method in METHODS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            estimated, measured = pool.submit(compare, method, arguments.rows, arguments.length).result()
        print(f"{method} | {estimated:.2f} | {measured:.2f} | {estimated / measured:.3f}", flush=True)


if __name__ == "__main__":
    main()
