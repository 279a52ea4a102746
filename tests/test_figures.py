"""Every figure is drawn from result files, in both variants, and to the same bytes each time."""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest


pytest.importorskip("matplotlib", reason="the figures need the extra `plot`")

from benchmarks.cost import CENTRE, QUICK_SWEEPS
from benchmarks.drawing import spread
from benchmarks.experiment import write_json
from benchmarks.figures import DRAWN, by_experiment, draw, front, label_of
from benchmarks.reading import best_runs
from benchmarks.rivals import METHODS


def run(task: str, name: str, rate: float, seed: int, value: float, parameters: int) -> dict:
    key = "perplexity" if task == "pretraining" else "train_loss"
    curve = [{"step": step, key: value + 10 / step} for step in (10, 20, 30)]
    return {
        "validation": value,
        "quality": {"perplexity": value, "accuracy": 1 / value},
        "curve": curve,
        "cost": {"trainable_parameters": parameters},
        "run": {"task": task, "name": name, "learning_rate": rate, "seed": seed},
    }


def write_runs(results: Path) -> None:
    experiments = {
        "causal": ("lora", "pissa", "pissa-peft", "svfit", "svfit-r128", "full", "dora", "some-new-method"),
        "classification": ("lora", "sst-pool", "head", "full"),
        "pretraining": ("full", "full-hidden56", "lora-r4", "relora-r4", "sst-r4", "sct-r8", "sct-r16"),
    }
    for task, names in experiments.items():
        for i, name in enumerate(names):
            for rate, seed in ((3e-4, 0), (1e-2, 0), (3e-4, 1)):
                content = run(task, name, rate, seed, 2 + i / 3 + rate + seed / 10, 100 * 4**i)
                write_json(results / task / name / f"lr{rate:g}-seed{seed}.json", content)
    diverged = {**run("causal", "vera", 3e-4, 0, 1, 1), "validation": None, "quality": {}}
    write_json(results / "causal" / "vera" / "lr0.0003-seed0.json", diverged)


def write_analysis(results: Path) -> None:
    folder = results / "analysis"
    for name in ("full-lr0.003-seed0", "full-lr0.003-seed1", "sst-r4-lr0.01-seed0"):
        points = [{"percent_of_sum": p, "percent_of_values": p, "perplexity": 120 - p} for p in (100, 95, 90)]
        write_json(folder / "pruning" / f"{name}.json", {"points": points})
    for name in ("full-lr0.003-seed0", "sst-r4-lr0.01-seed0", "start-seed0"):
        values = {"q_proj": [3.0, 2.0, 0.5], "up_proj": [4.0, 1.0, 0.2], "k_proj": [1.0]}
        write_json(folder / "spectra" / f"{name}.json", {"singular_values": values})


def write_costs(results: Path) -> None:
    random.seed(0)
    costs = {
        name: {
            **{key: [random.uniform(0.5, 2) for _ in range(3)] for key in ("step", "init", "save")},
            "bytes": {"memory": random.randint(100, 1000)},
            "checkpoint": random.randint(100, 1000),
        }
        for name in METHODS
    }
    write_json(results / "cost" / "table-r16-4x128.json", {"methods": costs})
    points = {tuple({**CENTRE, axis: value}.items()) for axis, values in QUICK_SWEEPS.items() for value in values}
    measured = [
        {
            **dict(point),
            "methods": {
                name: dict.fromkeys(("step", "memory", "init", "checkpoint"), math.prod(value for _, value in point))
                for name in METHODS
            },
        }
        for point in sorted(points)
    ]
    write_json(results / "cost" / "scaling.json", {"centre": CENTRE, "points": measured})


def test_every_figure_is_drawn_twice_and_to_the_same_bytes(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for fill in (write_runs, write_analysis, write_costs):
        fill(results)
    assert draw(results, tmp_path / "one") == {}
    assert draw(results, tmp_path / "other") == {}
    drawn = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    assert drawn.keys() == {f"{name}-{style}.svg" for name in DRAWN for style in ("light", "dark")}
    for name, content in drawn.items():
        assert content == (tmp_path / "other" / name).read_bytes(), name
        text = "".join(ElementTree.fromstring(content).itertext())  # as text, and not as outlines
        assert re.search("LoRA|SCT|SST|full rank", text), name
        assert name.endswith("light.svg") == (b"#1f2328" in content), name  # the ink of the light variant
    assert b"PiSSA 1.00" in drawn["cost-growth-step-light.svg"]  # a slope


def test_what_has_no_results_is_left_out_and_named(tmp_path: Path) -> None:
    write_analysis(tmp_path)
    skipped = draw(tmp_path, tmp_path / "out")
    assert skipped.keys() == DRAWN.keys() - {"pruning", "spectra"}
    assert "no runs in causal" in skipped["pissa-convergence"]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_runs_are_those_of_the_best_rate(tmp_path: Path) -> None:
    write_runs(tmp_path)
    found = best_runs(tmp_path, "causal")
    assert "vera" not in found  # diverged
    assert [(one["run"]["learning_rate"], one["run"]["seed"]) for one in found["lora"]] == [(3e-4, 0), (3e-4, 1)]


def test_front_has_what_nothing_beats() -> None:
    points = [(10, 5.0), (1, 9.0), (100, 6.0), (1000, 2.0), (1, 8.0)]
    assert front(points, falling=True) == [(1, 8.0), (10, 5.0), (1000, 2.0)]
    assert front(points, falling=False) == [(1, 9.0)]


def test_names() -> None:
    assert label_of("sst-pool-r8") == "SST on a pool, r8"
    assert label_of("galore-r4-scale0.25") == "GaLore, r4, scale 0.25"
    assert label_of("sst-r4-20000steps") == "SST, r4"
    assert by_experiment({"sst-r4-lr1e-05-seed0": 1, "sst-r4-lr0.01-seed1": 2, "start-seed0": 3}) == {
        "sst-r4": [1, 2],
        "start": [3],
    }


@pytest.mark.parametrize("places", [[], [0.5], [0.1, 0.1, 0.1], [0.0, 0.05, 0.9], [0.98, 0.99, 1.0]])
def test_labels_are_apart(places: list[float]) -> None:
    moved = spread(places, apart=0.1)
    assert all(upper - lower > 0.1 - 1e-3 for lower, upper in pairwise(moved))
    assert all(-1e-9 < place < 1 + 1e-9 for place in moved)
