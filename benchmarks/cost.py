"""What training with each method costs, next to PEFT's LoRA of the same rank on the same model and data.

    python -m benchmarks.cost --part table      # SmolLM2-135M: every method, ratios to LoRA
    python -m benchmarks.cost --part scaling    # small Llamas: growth with rank, width, depth and tokens
    python -m benchmarks.cost --part sst        # SST next to full rank, with its swaps and SVDs

OMP_NUM_THREADS=1 and the CPU clock, the default, help on a busy machine. Results go to benchmarks/results/cost.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiment import RESULTS, read_json, write_json
from benchmarks.rivals import METHODS
from benchmarks.side_by_side import CLOCKS, Plan, compare, llama, quartiles, smollm2, twin, versions
from spectral_peft import SST


OWN = ("SVFit", "PiSSA", "SST on a pool", "SST", "SCT")
CENTRE = {"r": 16, "width": 256, "depth": 2, "tokens": 128}
SWEEPS: dict[str, list[int]] = {
    "r": [8, 16, 32, 64, 128],
    "tokens": [64, 128, 256, 512, 1024],
    "depth": [2, 4, 8, 16],
    "width": [128, 256, 512, 1024],
}
QUICK_SWEEPS = {"r": [8, 16], "width": [128, 256], "depth": [2, 4], "tokens": [128, 256]}
QUANTITIES = ("step", "memory", "init", "checkpoint")


# The table


TIMES = ("step", "forward", "backward", "optimizer", "init", "save", "merge", "export as LoRA")
COUNTS: dict[str, Callable[[Mapping[str, Any]], int | None]] = {
    "memory": lambda own: own["bytes"]["memory"],
    "memory, peak": lambda own: own["bytes"].get("memory, peak"),
    "checkpoint": lambda own: own["checkpoint"],
}


def ratios(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each method and cost the quartiles of its ratio to the first method; counts have one value."""
    first = next(iter(methods.values()))
    table: dict[str, dict[str, list[float]]] = {}
    for name, own in methods.items():
        times = {key: list(quartiles(own[key], first[key])) for key in TIMES if key in own and key in first}
        counts = {key: [count(own) / count(first)] * 3 for key, count in COUNTS.items() if count(own)}
        table[name] = {**times, **counts}
        if "checkpoint, save_start=False" in own:
            table[name]["checkpoint, save_start=False"] = [
                own["checkpoint, save_start=False"] / first["checkpoint"]
            ] * 3
    return table


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(quartile: list[float] | None) -> str:
    if quartile is None:
        return "-"
    low, middle, high = (f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in quartile)
    return middle if low == high else f"{middle} ({low} to {high})"


def dearer(table: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """Where a method of this package costs more than the first one, in three of four rounds."""
    rows = ((name, key, value) for name in OWN for key, value in table.get(name, {}).items())
    return [f"{name}: {key} {value[1]:.2f}" for name, key, value in rows if value[0] > 1]


def table_text(methods: Mapping[str, Mapping[str, Any]]) -> str:
    table = ratios(methods)
    columns = list(dict.fromkeys(key for row in table.values() for key in row))
    rows = ([name, *(cell(row.get(key)) for key in columns)] for name, row in table.items())
    parts = list(dict.fromkeys(key for own in methods.values() for key in own["bytes"]))
    sizes = ([name, *(f"{own['bytes'][key] / 2**20:.2f}" for key in parts)] for name, own in methods.items())
    times = ([name, *(f"{statistics.median(own[k]):.3g}" for k in ("step", "init"))] for name, own in methods.items())
    return "\n\n".join(
        [
            f"Ratios to {next(iter(methods))}, median (quartiles)\n\n{markdown(['', *columns], rows)}",
            f"MiB\n\n{markdown(['', *parts], sizes)}",
            f"Seconds, medians\n\n{markdown(['', 'step', 'init'], times)}",
            f"Dearer: {'; '.join(dearer(table))}",
        ]
    )


def run_table(args: argparse.Namespace) -> None:
    base = llama(64, 2) if args.quick else smollm2()
    shape = (2, 16) if args.quick else (args.batch_size, args.length)
    methods = {name: METHODS[name] for name in METHODS if not args.methods or name in ["LoRA", *args.methods]}
    rounds, init_rounds = (2, 1) if args.quick else (args.rounds, args.init_rounds)
    result = compare(base, methods, Plan(args.r, shape, rounds, init_rounds, args.clock, exports=True))
    setting = {"model": "tiny" if args.quick else "SmolLM2-135M-Instruct", "r": args.r, "batch": shape[0]}
    setting |= {"length": shape[1], "clock": args.clock, "threads": torch.get_num_threads()}
    content = {"setting": setting, "methods": result, "versions": versions()}
    write_json(args.out / f"table-r{args.r}-{shape[0]}x{shape[1]}.json", content)
    print(table_text(result))


# How it grows


def slope(xs: list[float], ys: list[float]) -> dict[str, float]:
    """The least-squares slope of log y over log x, and the share of the variance that it explains."""
    X, Y = [math.log(x) for x in xs], [math.log(y) for y in ys]
    fit = statistics.linear_regression(X, Y)
    spread = sum((y - statistics.mean(Y)) ** 2 for y in Y)
    left = sum((y - fit.intercept - fit.slope * x) ** 2 for x, y in zip(X, Y, strict=True))
    return {"slope": fit.slope, "intercept": fit.intercept, "r2": 1 - left / spread if spread else 1.0}


def line_of(points: Sequence[Mapping[str, Any]], centre: Mapping[str, int], axis: str) -> list[Mapping[str, Any]]:
    """The points that differ from the centre along one axis alone, in its order."""
    line = [point for point in points if all(point[other] == centre[other] for other in centre if other != axis)]
    return sorted(line, key=lambda point: point[axis])


def slopes(points: Sequence[Mapping[str, Any]], centre: Mapping[str, int], axes: Iterable[str]) -> dict[str, Any]:
    """By quantity, axis and method."""
    result: dict[str, Any] = {quantity: {} for quantity in QUANTITIES}
    for axis in axes:
        line = line_of(points, centre, axis)
        xs = [point[axis] for point in line]
        for quantity in QUANTITIES:
            ys = {name: [point["methods"][name][quantity] for point in line] for name in line[0]["methods"]}
            result[quantity][axis] = {name: slope(xs, own) for name, own in ys.items()}
    return result


def measure_point(point: Mapping[str, int], rounds: int, clock: str) -> dict[str, dict[str, float]]:
    """Medians of one small Llama by method."""
    shape = (max(1, point["tokens"] // 64), 64)
    methods = {name: method for name, method in METHODS.items() if name != "full rank"}
    plan = Plan(point["r"], shape, rounds, 2, clock, limit=0.5)
    raw = compare(llama(point["width"], point["depth"]), methods, plan)
    return {
        name: {
            "step": statistics.median(own["step"]),
            "ratio": list(quartiles(own["step"], raw["LoRA"]["step"])),
            "memory": own["bytes"]["memory"],
            "init": statistics.median(own["init"]),
            "checkpoint": own["checkpoint"],
        }
        for name, own in raw.items()
    }


def run_scaling(args: argparse.Namespace) -> None:
    """Every point is written at once, and not measured again where it is there."""
    sweeps = QUICK_SWEEPS if args.quick else SWEEPS
    file = args.out / "scaling.json"
    points = read_json(file)["points"] if file.is_file() else []
    known = [{key: point[key] for key in CENTRE} for point in points]
    for axis, values in sweeps.items():
        for value in values:
            point = {**CENTRE, axis: value}
            if point in known:
                continue
            print(point, flush=True)
            points.append({**point, "methods": measure_point(point, 2 if args.quick else args.rounds, args.clock)})
            known.append(point)
            content = {"clock": args.clock, "threads": torch.get_num_threads(), "versions": versions()}
            write_json(file, {**content, "centre": CENTRE, "points": points})
    fitted = slopes(points, CENTRE, sweeps)
    write_json(file, {**read_json(file), "slopes": fitted})
    for quantity, axes in fitted.items():
        rows = ([name, *(f"{axes[axis][name]['slope']:.2f}" for axis in axes)] for name in axes["r"])
        print(f"\n{quantity}: slopes of the logarithms\n\n{markdown(['', *axes], rows)}")


# SST next to full rank


def event_seconds(update: SST, now: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one swap, and of one SVD, of one weight; the update is used up."""
    started = now()
    update._swap(update._next(1))
    swapped = now()
    update._take(update._decomposed())
    return swapped - started, now() - swapped


def run_sst(args: argparse.Namespace) -> None:
    """SST in the place of the weights at r = d / 8; its events are spread over the steps of the default schedule."""
    width, depth, shape, rounds = (64, 2, (2, 16), 2) if args.quick else (512, 4, (8, 256), args.rounds)
    base, r = llama(width, depth, vocabulary=4096), width // 8
    methods = {name: METHODS[name] for name in ("full rank", "SST")}
    result = compare(base, methods, Plan(r, shape, rounds, 1, args.clock))
    updates = [module for module in METHODS["SST"](twin(base), r).modules() if isinstance(module, SST)]
    events = [event_seconds(update, CLOCKS[args.clock]) for update in updates]
    swaps, svds = (sum(each) / updates[0].schedule.steps_per_iteration for each in zip(*events, strict=True))
    median = statistics.median(result["SST"]["step"])
    shares = {"swaps": swaps / median, "SVDs": svds / updates[0].schedule.iterations_per_round / median}
    setting = {"r": r, "width": width, "depth": depth, "batch": shape[0], "length": shape[1], "clock": args.clock}
    content = {"setting": setting, "methods": result, "shares of the time": shares, "versions": versions()}
    write_json(args.out / "sst.json", content)
    print(table_text(result))
    print(shares)


PARTS = {"table": run_table, "scaling": run_scaling, "sst": run_sst}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="table")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: a smoke test")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="cpu: CPU time of the process")
    parser.add_argument("--out", type=Path, default=RESULTS / "cost", help="folder of the results")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help="of the table; LoRA is always there")
    sizes = {"r": 16, "batch-size": 4, "length": 128, "rounds": 8, "init-rounds": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
