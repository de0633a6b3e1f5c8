"""Draws what compare.py, late.py, emoji.py, pixels.py and attention.py measured, and prints tables and what follows.

    python -m experiments.draw       # writes all figures in data/ but samples; needs matplotlib

Lines are means over seeds with the spread (lowest to highest) behind them.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.draw")

import csv
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FIGURES = {  # a file: its panels, and which run is HASTE
    "data/compare.png": ({"student of 8 blocks of width 128": HERE / "compare.csv",
                          "4 blocks of width 64": HERE / "late.csv"}, "stopped at 2000"),
    "data/emoji_distance.png": ({"text to image, MMDiT of 6 blocks of width 192": HERE / "emoji.csv"},
                                "stopped at 1500"),
    "data/pixels_distance.png": ({"64 x 64 pixels, JiT of 6 blocks of width 128": HERE / "pixels.csv"},
                                 "stopped at 2000"),
}
TIMES = ("t_0.1", "t_0.5", "t_0.9")  # attention.csv's columns
EVIDENCE = {  # a row of data/evidence.png: which rows, which run is HASTE, at which step
    "Fashion-MNIST, SiT of\n2.5M parameters": ("compare.csv", "stopped at 2000", 3000),
    "Fashion-MNIST, SiT of\n0.33M parameters": ("late.csv", "stopped at 2000", 8000),
    "emoji from text,\nMMDiT": ("emoji.csv", "stopped at 1500", 3000),
    "emoji in pixels,\nJiT": ("pixels.csv", "stopped at 2000", 4000),
}
SHOWN = {"plain": "plain", "features": "features (REPA)", "attention": "attention alone",
         "aligned": "features and attention, to the end"}
TICKS = np.array([4, 6, 10, 15, 20, 25, 30, 40, 60, 100])  # of distances
REST = {"precision": "precision", "recall": "recall", "teacher_distance": "teacher's features"}
FOLLOWED = {"seen_group": "seen: group", "seen_style": "style", "seen_tone": "tone",
            "new_style_group": "held-out style: group", "new_style_style": "style",
            "new_tone_group": "held-out tone: group", "new_tone_style": "style", "new_tone_tone": "tone"}


def read(path):
    """{run: {seed: {step: row}}} and the row of real images."""
    runs, floor = defaultdict(lambda: defaultdict(dict)), None
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["run"] == "real images":
                floor = row
            else:
                runs[row["run"]][int(row["seed"])][int(row["step"])] = row
    return runs, floor


def values(runs, run, step, column="distance"):
    """One number per seed."""
    return np.array([float(rows[step][column]) for _, rows in sorted(runs[run].items())])


def judged_at(runs):
    """The steps at which the runs were judged."""
    return sorted(next(iter(next(iter(runs.values())).values())))


def spread(numbers, digits=2):
    said = f"{numbers.mean():.{digits}f}"
    return said if len(numbers) == 1 else f"{said} ({numbers.min():.{digits}f} to {numbers.max():.{digits}f})"


def first_below(rows, wanted, column="distance"):
    """Steps that a run, {step: row}, takes to a distance; None: it does not reach it.

    Between two steps at which it was judged, log distance is taken as linear in log steps."""
    steps = sorted(rows)
    distances = [float(rows[step][column]) for step in steps]
    if distances[0] <= wanted:
        return steps[0]
    for (a, b), (high, low) in zip(pairwise(steps), pairwise(distances)):
        if low <= wanted:
            return a * (b / a) ** (np.log(high / wanted) / np.log(high / low))
    return None


def speed_up(runs, haste, seed, step):
    """Steps that plain SiT needs to reach HASTE's distance at `step`, by that step; None: it does not reach it."""
    steps = first_below(runs["plain"][seed], float(runs[haste][seed][step]["distance"]))
    return steps and steps / step


def canvas(width, height, *grid, **options):
    """matplotlib's figure of so many inches, and its axes."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot.subplots(*grid, figsize=(width, height), layout="constrained", **options)


def draw(panels, haste, file):
    """One panel for each of {title: runs}, into a file."""
    figure, row = canvas(5.5 * len(panels), 4.2, 1, len(panels), sharey=True, squeeze=False)
    shown = SHOWN | {haste: f"features and attention until step {int(haste.split()[-1]):,} (HASTE)"}
    colors = {run: f"C{i}" for i, run in enumerate(shown)}
    for axes, (title, runs) in zip(row[0], panels.items()):
        steps = judged_at(runs)
        for run in shown:
            if run not in runs:
                continue
            numbers = np.stack([values(runs, run, step) for step in steps])
            axes.plot(steps, numbers.mean(axis=1), "--" if run == haste else "-", color=colors[run], marker="o",
                      markersize=3, label=shown[run])
            axes.fill_between(steps, numbers.min(axis=1), numbers.max(axis=1), color=colors[run], alpha=0.2)
        axes.axvline(int(haste.split()[-1]), color=colors[haste], linestyle="--", linewidth=0.8)
        axes.set(title=title, xscale="log", yscale="log", xlabel="training steps")
        axes.set_xticks(steps, [f"{step:,}" for step in steps])
        low, high = axes.get_ylim()
        axes.set_yticks(TICKS[(TICKS > low) & (TICKS < high)])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    row[0][0].set_ylabel("Fréchet distance, judge's features")
    row[0][0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def evidence(file):
    """A row for each of EVIDENCE: the last distance by plain's of the same seed, a point per seed."""
    figure, axes = canvas(6, 4.2)
    for row, (results, haste, step) in enumerate(EVIDENCE.values()):
        runs, _ = read(HERE / results)
        marks = {"features": ("features alone (REPA)", "s", "C1"), "aligned": ("both, to the end", "^", "C0"),
                 haste: ("both, stopped (HASTE)", "o", "black")}
        for place, (run, (label, marker, color)) in enumerate(marks.items()):
            ratios = values(runs, run, step) / values(runs, "plain", step) if run in runs else np.array([])
            axes.plot(ratios, [row + 0.22 * (place - 1)] * len(ratios), marker, color=color, markersize=7, alpha=0.8,
                      label=None if row else label)
        axes.axhline(row + 0.5, color="lightgrey", linewidth=0.8)
    axes.axvline(1, color="grey")
    axes.text(0.998, 0.5, "plain", rotation=90, ha="right", va="center", color="grey")
    axes.set_yticks(range(len(EVIDENCE)), EVIDENCE)
    axes.set(ylim=(len(EVIDENCE) - 0.5, -0.5), xlabel="Fréchet distance, by plain's of the same seed")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, columnspacing=1, handletextpad=0.2)
    figure.savefig(file, dpi=150)


def styles(runs):
    """{run: (label, colour, line)} of attention.py's runs; and the step of the switch."""
    stopped, = (run for run in runs if run.startswith("stopped"))
    stop = int(stopped.split()[-1])
    return {"plain": ("plain", "C7", ":"), "features": ("features alone (REPA)", "C1", "--"),
            "aligned": ("both, to the end", "C0", "-."),
            stopped: (f"both, stopped at {stop:,} (HASTE)", "black", "-")}, stop


def band(axes, x, numbers, label, color, line):
    """A line of the means of numbers [len(x), seeds], and the spread behind it."""
    axes.plot(x, numbers.mean(axis=1), line, color=color, linewidth=2, label=label)
    axes.fill_between(x, numbers.min(axis=1), numbers.max(axis=1), color=color, alpha=0.2, linewidth=0)


def cross_entropy(runs, file):
    """A panel for each time at which attention.py measured: attention's cross-entropy to the teacher's over steps."""
    (lines, stop), steps = styles(runs), judged_at(runs)
    entropy = values(runs, "plain", steps[0], "teacher")[0]
    figure, row = canvas(7, 3.3, 1, len(TIMES), sharey=True)
    for axes, column in zip(row, TIMES):
        for run, style in lines.items():
            band(axes, steps, np.stack([values(runs, run, step, column) for step in steps]), *style)
        axes.axhline(entropy, color="C2", linewidth=1)
        axes.axvline(stop, color="black", linewidth=0.6)
        axes.set(title=column.replace("_", " = "), xlabel="training steps", ylim=(1.5, None))
        axes.set_xticks([0, stop, steps[-1]], ["0", f"{stop:,}", f"{steps[-1]:,}"])
    row[0].set_ylabel("cross-entropy to the teacher's")
    row[0].text(0, entropy - 0.1, "the teacher's own entropy", va="top", fontsize=8, color="C2")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    figure.savefig(file, dpi=150)


def bins_of_time(runs):
    """loss_by_time.csv's columns of losses."""
    row = next(iter(next(iter(runs["plain"].values())).values()))
    return [column for column in row if column.startswith("t ")]


def loss_by_time(runs, file):
    """The denoising loss of attention.py's runs in each tenth of time, by plain's of the same seed."""
    lines, _ = styles(runs)
    step, = judged_at(runs)
    bins = bins_of_time(runs)
    figure, axes = canvas(5, 3.6)
    for run, style in lines.items():
        ratios = [values(runs, run, step, column) / values(runs, "plain", step, column) for column in bins]
        band(axes, np.arange(len(bins)) / 10 + 0.05, np.stack(ratios), *style)
    axes.set(xlabel="time, from data (0) to noise (1)", ylabel="denoising loss, by plain's")
    axes.legend(fontsize=9)
    figure.savefig(file, dpi=150)


def attention(maps, file):
    """A row for each image of attention.py's maps: the image with the patch from which is looked, then where."""
    titles = ["image, and the\npatch that looks", "the teacher", "plain", "features\nalone (REPA)",
              "HASTE, at\nthe switch", "HASTE, long\nafter it"]
    sets = sorted({name.split("_")[0] for name in maps.files})
    rows = [tuple(maps[f"{name}_{part}"][i] for part in ("images", "patches", "attention", "cross_entropy"))
            for name in sets for i in range(len(maps[f"{name}_images"]))]
    figure, grid = canvas(6.2, 1.22 * len(rows), len(rows), len(titles))
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, fontsize=8)
    for line, (image, at, attended, losses) in zip(grid, rows):
        side, edge = int(attended.shape[-1] ** 0.5), len(image)
        patch = edge / side
        drawn = np.abs(image.mean(axis=-1) - image[0, 0].mean())  # how far from the background
        for axes in line:
            axes.set(xticks=[], yticks=[])
            corner = patch * (at % side) - 0.5, patch * (at // side) - 0.5
            axes.add_patch(rectangle(corner, patch))
        line[0].imshow(image)
        for axes, heat, loss in zip(line[1:], attended, losses):
            axes.imshow(255 - drawn / 3, cmap="gray", vmin=0, vmax=255)
            over = np.zeros((side, side, 4)) + (0.2, 0, 0.5, 0)  # violet, the more opaque the more is looked there
            over[..., 3] = heat.reshape(side, side) / attended.max()
            axes.imshow(over, extent=(-0.5, edge - 0.5, edge - 0.5, -0.5))
            axes.set_xlabel(f"{loss:.2f}", fontsize=8, labelpad=1)
    figure.savefig(file, dpi=150)


def rectangle(corner, side):
    """The outline of a square in a picture, seen on light and on dark."""
    from matplotlib import patches, patheffects
    shadow = patheffects.withStroke(linewidth=2.5, foreground="white")
    return patches.Rectangle(corner, side, side, fill=False, edgecolor="black", linewidth=1.2, path_effects=[shadow])


def attention_table(runs):
    """Markdown: attention's cross-entropy to the teacher's, at the switch and at the end."""
    (_, stop), last = styles(runs), judged_at(runs)[-1]
    heads = [f"{column.replace('_', ' = ')}: step {step:,}" for column in TIMES for step in (stop, last)]
    print(f"| run | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for run in runs:
        cells = [spread(values(runs, run, step, column)) for column in TIMES for step in (stop, last)]
        print(f"| {run} | " + " | ".join(cells) + " |")


def loss_table(runs):
    """Markdown: plain's denoising loss in each tenth of time, and that of the others by it."""
    step, = judged_at(runs)
    bins = bins_of_time(runs)
    print(f"| denoising loss | {' | '.join(bins)} |")
    print("|---|" + "---|" * len(bins))
    for run in runs:
        by = 1 if run == "plain" else np.stack([values(runs, "plain", step, column) for column in bins])
        numbers = np.stack([values(runs, run, step, column) for column in bins]) / by
        cells = [spread(each, 3) for each in numbers]
        print(f"| {run}{'' if run == 'plain' else ', by plain'} | " + " | ".join(cells) + " |")


def table(runs, floor):
    """Markdown: a row per run with the distance at each step, and at the last one what else was measured."""
    steps = judged_at(runs)
    rest = {key: name for key, name in REST.items() if floor.get(key)}
    heads = [*(f"{step:,} steps" for step in steps), *rest.values()]
    print(f"| run | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for run in runs:
        cells = [spread(values(runs, run, step)) for step in steps]
        cells += [spread(values(runs, run, steps[-1], column)) for column in rest]
        print(f"| {run} | " + " | ".join(cells) + " |")
    print("| real images |" + " |" * (len(steps) - 1)
          + "".join(f" {float(floor[key]):.2f} |" for key in ("distance", *rest)))
    if "seen_group" in floor:
        print("\n| % that the judge sees, last step | " + " | ".join(FOLLOWED.values()) + " |")
        print("|---|" + "---|" * len(FOLLOWED))
        for run in runs:
            cells = [spread(100 * values(runs, run, steps[-1], key), 0) for key in FOLLOWED]
            print(f"| {run} | " + " | ".join(cells) + " |")
        print("| real images | " + " | ".join(f"{100 * float(floor[key]):.0f}" for key in FOLLOWED) + " |")


def conclusions(runs, haste):
    """Ratios and speed-up, losses, the last step, and what the gradients' conflict would have done."""
    steps, seeds = judged_at(runs), sorted(runs["plain"])
    for step in steps:
        ratio = values(runs, haste, step) / values(runs, "plain", step)
        ups = [speed_up(runs, haste, seed, step) for seed in seeds]
        said = ", ".join(f"more than {steps[-1] / step:.2f}" if up is None else f"{up:.2f}" for up in ups)
        print(f"step {step:,}: HASTE's distance by plain's {spread(ratio)}; "
              f"plain needs so many times the steps: {said}")
    last = steps[-1]
    for run in runs:
        ratios = np.concatenate([values(runs, run, step) / values(runs, "plain", step) for step in steps])
        losses = spread(values(runs, run, last, "denoising_loss"), 4)
        print(f"{run}: distance by plain's, all steps and seeds {spread(ratios)}; "
              f"denoising loss before step {last:,} {losses}")
    for run in runs:
        if not run.startswith("stopped"):
            continue
        said = []
        for step in steps:
            better = np.minimum(values(runs, "plain", step), values(runs, "aligned", step))
            ratios = values(runs, run, step) / better
            said.append(f"step {step:,}: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
        print(f"{run} by the better of plain and aligned, seed by seed: {'; '.join(said)}")
    for run in runs:
        if not all(runs[run][seed][last]["gradient_cosine"] for seed in seeds):
            continue
        said = []
        for step in steps:
            cosines = [runs[run][seed][step]["gradient_cosine"] for seed in seeds]
            if all(cosines):
                said.append(f"{step:,}: {spread(np.array(cosines, float), 3)}")
        stops = ", ".join(runs[run][seed][last]["conflict_step"] or "no step" for seed in seeds)
        print(f"{run}: gradient cosine {'; '.join(said)}; the conflict trigger stops at {stops}")


def main():
    for file, (results, haste) in FIGURES.items():
        panels = {}
        for title, path in results.items():
            panels[title], floor = read(path)
            print(f"\n{title}")
            table(panels[title], floor)
            conclusions(panels[title], haste)
        draw(panels, haste, file)
    evidence("data/evidence.png")
    runs, _ = read(HERE / "attention.csv")
    attention_table(runs)
    cross_entropy(runs, "data/cross_entropy.png")
    attention(np.load(HERE / "attention.npz"), "data/attention.png")
    runs, _ = read(HERE / "loss_by_time.csv")
    loss_table(runs)
    loss_by_time(runs, "data/loss_by_time.png")


if __name__ == "__main__":
    main()
