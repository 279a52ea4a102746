"""The figures of the documentation, drawn from the JSON files of results by `python -m benchmarks.figures`.

Each is drawn twice, as docs/figures/NAME-light.svg and NAME-dark.svg. What has no results yet is left out, and named.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cost import OWN, QUANTITIES, line_of, ratios, slopes
from benchmarks.drawing import MARKERS, Label, Style, label_ends, label_points, panels, round_numbers, write
from benchmarks.experiment import RESULTS
from benchmarks.reading import MissingError, Run, best_runs, curves, read, spread_of


FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SAME_RATE = 3e-4

NAMES = {
    "full": "full rank",
    "head": "head alone",
    "lora": "LoRA",
    "pissa-peft": "PEFT's PiSSA",
    "pissa": "PiSSA",
    "svfit": "SVFit",
    "sst": "SST",
    "sst-pool": "SST on a pool",
    "sct": "SCT",
    "osf": "OSF",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "rslora": "rsLoRA",
    "olora": "OLoRA",
    "miss": "MiSS",
    "vera": "VeRA",
    "psoft": "PSOFT",
    "relora": "ReLoRA*",
    "galore": "GaLore",
}
# Of a method, its place in the palette; -1 is the colour of text. What is not here is like OSF.
COLOURS = {"pissa": 0, "lora": 1, "sst": 2, "sst-pool": 6, "svfit": 3, "sct": 4, "full": -1, "osf": 5}
COLOURS |= {"relora": 3, "galore": 4, "pissa-peft": 5}


def method_of(experiment: str) -> str:
    """The longest known method that the name of an experiment begins with: "sst-pool" of "sst-pool-r8"."""
    known = [name for name in NAMES if experiment == name or experiment.startswith(f"{name}-")]
    return max(known, key=len, default=experiment)


def label_of(experiment: str) -> str:
    """The name of the method and what the name of the experiment says besides; steps are in the titles."""
    method = method_of(experiment)
    besides = re.sub(r"-\d+steps", "", experiment.removeprefix(method)).replace("-", ", ")
    return NAMES.get(method, method) + re.sub(r"([a-z]{2})(\d)", r"\1 \2", besides)


def colour_of(experiment: str, style: Style) -> str:
    place = COLOURS.get(method_of(experiment), COLOURS["osf"])
    return style.ink if place < 0 else style.colours[place]


def draw_curves(axes: Axes, arms: Mapping[str, list[Run]], key: str, style: Style) -> None:
    ends = []
    for i, (name, runs) in enumerate(arms.items()):
        steps, mean, low, high = curves(runs, key)
        colour = colour_of(name, style)
        axes.plot(steps, mean, color=colour, marker=MARKERS[i % len(MARKERS)])
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        ends.append(Label(steps[-1], mean[-1], f"{label_of(name)} {mean[-1]:#.3g}", colour))
    label_ends(axes, ends)


# Figures of quality

QUALITIES = {
    "causal": ("perplexity", "held-out perplexity", 1, True),
    "classification": ("accuracy", "test accuracy, %", 100, False),
}  # by task: the figure, what the axis says, a factor, whether less is better


def fine_tuning(results: Path, task: str, style: Style) -> Figure:
    """Quality against trainable parameters, and the front of what nothing else beats in both."""
    key, title, factor, falling = QUALITIES[task]
    figure, (axes,) = panels(1, height=5.6)
    points = []
    for name, runs in best_runs(results, task).items():
        mean, deviation = spread_of([factor * run["quality"][key] for run in runs])
        x, colour = runs[0]["cost"]["trainable_parameters"], colour_of(name, style)
        marker = "o" if method_of(name) in ("svfit", "pissa", "sst", "sst-pool", "sct") else "s"
        axes.errorbar(x, mean, deviation, color=colour, marker=marker, capsize=2, linewidth=1)
        points.append(Label(x, mean, label_of(name), colour))
    axes.set(xscale="log", xlabel="trainable parameters", ylabel=title)
    best = front([(label.x, label.y) for label in points], falling)
    axes.plot(
        *zip(*best, strict=True),
        color=style.ink, alpha=0.4, linewidth=0.7, linestyle=":", zorder=0, drawstyle="steps-post",
    )  # fmt: skip
    axes.margins(0.12, 0.08)
    label_points(axes, points)
    return figure


def front(points: Iterable[tuple[float, float]], falling: bool) -> list[tuple[float, float]]:
    """Those points that no other one beats with as few parameters, by their number."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], point[1] if falling else -point[1])):
        if not best or (y < best[-1][1] if falling else y > best[-1][1]):
            best.append((x, y))
    return best


ARMS = {
    "6,000 steps, r = 4 = d/16": ("full", "lora-r4", "relora-r4", "galore-r4-scale0.25", "galore-r4-scale1", "sst-r4"),
    "6,000 steps, SCT": ("full", "full-hidden56", "sct-r8", "sct-r16", "sct-r32"),
    "20,000 steps, r = 4 = d/16": ("full-20000steps", "lora-r4-20000steps", "sst-r4-20000steps"),
    "20,000 steps, r = 8 = d/8": (
        *("full-20000steps", "lora-r8-20000steps", "relora-r8-20000steps", "sst-r8-20000steps"),
    ),
}


def pretraining(results: Path, style: Style) -> Figure:
    """Held-out perplexity over the steps, by arm."""
    runs = best_runs(results, "pretraining")
    chosen = {title: {name: runs[name] for name in arms if name in runs} for title, arms in ARMS.items()}
    chosen = {title: arms for title, arms in chosen.items() if len(arms) > 1}
    if not chosen:
        raise MissingError("no two arms of pretraining")
    figure, grid = panels(len(chosen), width=10)
    for axes, (title, arms) in zip(grid, chosen.items(), strict=True):
        axes.set(title=title, xlabel="steps", ylabel="held-out perplexity", yscale="log")
        round_numbers(axes.yaxis)
        draw_curves(axes, arms, "perplexity", style)
    return figure


def convergence(results: Path, style: Style) -> Figure:
    """The training loss of PiSSA and LoRA on the causal task: at one rate, as in its paper, and each at its best."""
    best = best_runs(results, "causal")
    names = [name for name in ("lora", "pissa", "pissa-peft") if name in best]
    if not {"lora", "pissa"} <= set(names):
        raise MissingError("no runs of lora and pissa in causal")
    same = {name: list(read(results, f"causal/{name}/lr{SAME_RATE:g}-seed*.json").values()) for name in names}
    figure, grid = panels(2, height=3.4, width=10)
    titles = f"learning rate {SAME_RATE:g} for both", "each at its best rate"
    for axes, title, arms in zip(grid, titles, (same, {name: best[name] for name in names}), strict=True):
        axes.set(title=title, xlabel="steps", ylabel="training loss")
        draw_curves(axes, arms, "train_loss", style)
    return figure


def sct_ranks(results: Path, style: Style) -> Figure:
    """Perplexity of SCT by rank, next to dense models, against the parameters that train."""
    runs = best_runs(results, "pretraining")
    ranks = {int(found[1]): name for name in runs if (found := re.fullmatch(r"sct-r(\d+)", name))}
    if len(ranks) < 2:
        raise MissingError("no two ranks of sct in pretraining")
    figure, (axes,) = panels(1, height=3.6)
    labels = []
    dense = [name for name in runs if re.fullmatch(r"full(-hidden\d+|-mlp\d+)?", name)]
    for names, marker in (([ranks[r] for r in sorted(ranks)], "o"), (dense, "s")):
        points = []
        for name in names:
            mean, deviation = spread_of([run["quality"]["perplexity"] for run in runs[name]])
            points.append((runs[name][0]["cost"]["trainable_parameters"], mean))
            axes.errorbar(*points[-1], deviation, color=colour_of(name, style), marker=marker, capsize=2, linewidth=1)
            labels.append(Label(*points[-1], label_of(name), colour_of(name, style)))
        if names and marker == "o":
            axes.plot(*zip(*points, strict=True), color=colour_of(names[0], style))
    axes.set(xlabel="parameters that train, embeddings included", ylabel="held-out perplexity")
    axes.margins(0.15, 0.12)
    label_points(axes, labels)
    return figure


# Figures of singular values


def by_experiment(files: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Files of runs, named EXPERIMENT-lrRATE-seedN, by experiment; others by what is before "-seed"."""
    found: defaultdict[str, list[Any]] = defaultdict(list)
    for name, content in files.items():
        found[re.sub(r"(-lr[^-]+(-\d+)?)?-seed\d+$", "", name)].append(content)
    return dict(found)


def pruning(results: Path, style: Style) -> Figure:
    """Held-out perplexity by the share of singular values that is kept."""
    figure, (axes,) = panels(1, height=3.8)
    ends = []
    for i, (name, files) in enumerate(by_experiment(read(results, "analysis/pruning/*.json")).items()):
        by_share: defaultdict[float, list[float]] = defaultdict(list)
        for file in files:
            for point in file["points"]:
                by_share[point["percent_of_sum"]].append(point["perplexity"])
        shares = sorted(by_share, reverse=True)
        mean, colour = [statistics.fmean(by_share[share]) for share in shares], colour_of(name, style)
        axes.plot(shares, mean, color=colour, marker=MARKERS[i % len(MARKERS)])
        low, high = ([take(by_share[share]) for share in shares] for take in (min, max))
        axes.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
        ends.append(Label(shares[-1], mean[-1], f"{label_of(name)} {mean[-1]:#.3g}", colour))
    axes.set(xlabel="kept share of the sum of singular values, %", ylabel="held-out perplexity", yscale="log")
    axes.invert_xaxis()
    round_numbers(axes.yaxis)
    label_ends(axes, ends)
    return figure


def spectra(results: Path, style: Style) -> Figure:
    """The singular values of the projections, averaged over those of equal size and over seeds."""
    figure, (axes,) = panels(1, height=3.8)
    ends = []
    for name, files in by_experiment(read(results, "analysis/spectra/*.json")).items():
        lists = [values for file in files for values in file["singular_values"].values()]
        count = max(len(values) for values in lists)
        mean = [statistics.fmean(column) for column in zip(*(v for v in lists if len(v) == count), strict=True)]
        colour = colour_of(name, style)
        axes.plot(range(1, count + 1), mean, color=colour)
        ends.append(Label(count, mean[-1], label_of(name), colour))
    axes.set(xlabel="number of the singular value", ylabel="singular value, mean", yscale="log")
    round_numbers(axes.yaxis)
    label_ends(axes, ends)
    return figure


# Figures of cost

COST_NAMES = {"PEFT's OSF": "osf", "PEFT's PiSSA": "pissa-peft", "SCT, reference code": "osf", "full rank": "full"}
COST_NAMES |= {
    "LoRA": "lora",
    "SVFit": "svfit",
    "PiSSA": "pissa",
    "SST": "sst",
    "SST on a pool": "sst-pool",
    "SCT": "sct",
}
GROWTHS = {
    "step": "a step, s",
    "memory": "memory beyond the base, MiB",
    "init": "start of an adapter, s",
    "checkpoint": "checkpoint, MiB",
}
AXES = {"r": "rank", "width": "width", "depth": "layers", "tokens": "tokens in a step"}


def cost_colour(method: str, style: Style) -> str:
    return colour_of(COST_NAMES[method], style)


def growth(results: Path, quantity: str, style: Style) -> Figure:
    """How a cost grows, with the slopes of the logarithms; dashed lines are not this project's."""
    scaling = read(results, "cost/scaling.json")["scaling"]
    points, centre = scaling["points"], scaling["centre"]
    lines = {axis: line_of(points, centre, axis) for axis in AXES}
    lines = {axis: line for axis, line in lines.items() if len(line) > 1}
    if not lines:
        raise MissingError("no two points in cost/scaling.json")
    fitted = slopes(points, centre, list(lines))[quantity]
    scale = 2**20 if quantity in ("memory", "checkpoint") else 1
    figure, grid = panels(len(lines), width=10, height=3.2)
    for axes, (axis, line) in zip(grid, lines.items(), strict=True):
        axes.set(xlabel=AXES[axis], ylabel=GROWTHS[quantity], xscale="log", yscale="log")
        xs, ends = [point[axis] for point in line], []
        for i, name in enumerate(line[0]["methods"]):
            ys = [point["methods"][name][quantity] / scale for point in line]
            colour, dash = cost_colour(name, style), "-" if name in OWN else "--"
            axes.plot(xs, ys, color=colour, marker=MARKERS[i % len(MARKERS)], linestyle=dash)
            ends.append(Label(xs[-1], ys[-1], f"{name} {fitted[axis][name]['slope']:.2f}", colour))
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.minorticks_off()
        round_numbers(axes.yaxis)
        label_ends(axes, ends)
    return figure


BARS = {
    "step": "time of a step",
    "memory": "memory beyond the base",
    "init": "start of an adapter",
    "checkpoint": "checkpoint",
}


def cost_ratios(results: Path, style: Style) -> Figure:
    """Bars from 1, with quartiles: ratios to PEFT's LoRA."""
    file = next(iter(read(results, "cost/table-*.json").values()))
    table = ratios(file["methods"])
    names = [name for name in reversed(table) if name != next(iter(table))]
    figure, grid = panels(len(BARS), width=10, height=0.3 * len(names) + 0.8)
    for axes, (key, title) in zip(grid, BARS.items(), strict=True):
        for place, name in enumerate(names):
            if key not in table[name]:
                continue
            low, middle, high = table[name][key]
            colour = cost_colour(name, style)
            axes.barh(place, middle - 1, left=1, color=colour, alpha=1.0 if name in OWN else 0.45, height=0.7)
            axes.plot([low, high], [place, place], color=style.ink, linewidth=1.2)
            axes.annotate(
                f"{middle:.2f}",
                (max(high, 1.0), place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        axes.axvline(1, color=style.ink, linewidth=0.8)
        axes.set(xscale="log", title=f"{title}, ratio to LoRA")
        axes.set_yticks(range(len(names)), names)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.15)
        round_numbers(axes.xaxis)
    return figure


DRAWN: dict[str, Callable[[Path, Style], Figure]] = {
    **{f"fine-tuning-{task}": partial(fine_tuning, task=task) for task in QUALITIES},
    "pissa-convergence": convergence,
    "pretraining": pretraining,
    "sct-ranks": sct_ranks,
    "pruning": pruning,
    "spectra": spectra,
    **{f"cost-growth-{quantity}": partial(growth, quantity=quantity) for quantity in QUANTITIES},
    "cost-ratios": cost_ratios,
}


def draw(results: Path = RESULTS, folder: Path = FIGURES) -> dict[str, str]:
    """Draws what there are results for; returns the reasons of what was left out, by figure."""
    skipped = {}
    for name, figure in DRAWN.items():
        try:
            write(lambda style, figure=figure: figure(results, style=style), name, folder)
        except MissingError as reason:
            skipped[name] = str(reason)
    return skipped


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=FIGURES)
    arguments = parser.parse_args(argv)
    skipped = draw(arguments.results, arguments.out)
    print(f"{len(DRAWN) - len(skipped)} figures in {arguments.out}")
    for name, reason in skipped.items():
        print(f"left out: {name} ({reason})")


if __name__ == "__main__":
    main()
