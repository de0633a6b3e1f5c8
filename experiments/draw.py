"""Draws what compare.py and late.py measured: a figure of distance against steps, tables, and what follows from them.

    PYTHONPATH=. python experiments/draw.py       # writes data/compare.png; needs matplotlib

Every figure is the mean over seeds with the spread (lowest to highest) behind it.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PANELS = {HERE / "compare.csv": "student of 8 blocks of width 128", HERE / "late.csv": "4 blocks of width 64"}
FIGURE = "data/compare.png"
SHOWN = {"plain": "plain SiT", "features": "features (REPA)", "attention": "attention alone",
         "aligned": "features and attention, to the end",
         "stopped at 2000": "features and attention until step 2,000 (HASTE)"}
HASTE = "stopped at 2000"


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
    return f"{numbers.mean():.{digits}f} ({numbers.min():.{digits}f} to {numbers.max():.{digits}f})"


def speed_up(runs, seed, step):
    """Steps that plain SiT needs to reach HASTE's distance at `step`, by that step; None: it does not reach it.

    Between two steps at which it was judged, log distance is taken as linear in log steps."""
    wanted = float(runs[HASTE][seed][step]["distance"])
    steps = sorted(runs["plain"][seed])
    distances = [float(runs["plain"][seed][each]["distance"]) for each in steps]
    for (a, b), (high, low) in zip(zip(steps, steps[1:]), zip(distances, distances[1:])):
        if low <= wanted:
            share = np.clip(np.log(high / wanted) / np.log(high / low), 0, 1)
            return a * (b / a) ** share / step
    return None


def draw(panels):
    """One panel for each of {title: runs}."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    figure, row = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), sharey=True, squeeze=False,
                                  layout="constrained")
    colors = {run: f"C{i}" for i, run in enumerate(SHOWN)}
    for axes, (title, runs) in zip(row[0], panels.items()):
        steps = judged_at(runs)
        for run in (run for run in SHOWN if run in runs):
            numbers = np.stack([values(runs, run, step) for step in steps])
            axes.plot(steps, numbers.mean(axis=1), "--" if run == HASTE else "-", color=colors[run], marker="o",
                      markersize=3, label=SHOWN[run])
            axes.fill_between(steps, numbers.min(axis=1), numbers.max(axis=1), color=colors[run], alpha=0.2)
        axes.axvline(int(HASTE.split()[-1]), color=colors[HASTE], linestyle="--", linewidth=0.8)
        axes.set(title=title, xscale="log", yscale="log", xlabel="training steps")
        axes.set_xticks(steps, [f"{step:,}" for step in steps])
        axes.set_yticks([4, 6, 10, 15])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    row[0][0].set_ylabel("Fréchet distance, judge's features")
    row[0][0].legend(fontsize=8)
    figure.savefig(FIGURE, dpi=150)


def table(runs, floor):
    """Markdown: a row per run with the distance at each step, and at the last one what else was measured."""
    steps, rest = judged_at(runs), ("precision", "recall", "teacher_distance")
    print("| run | " + " | ".join(f"{step:,} steps" for step in steps) + " | precision | recall | teacher's features |")
    print("|---|" + "---|" * (len(steps) + len(rest)))
    for run in runs:
        cells = [spread(values(runs, run, step)) for step in steps]
        cells += [spread(values(runs, run, steps[-1], column)) for column in rest]
        print(f"| {run} | " + " | ".join(cells) + " |")
    print("| real images |" + " |" * (len(steps) - 1)
          + "".join(f" {float(floor[key]):.2f} |" for key in ("distance", *rest)))


def conclusions(runs):
    """Ratios and speed-up, losses, the last step, and what the gradients' conflict would have done."""
    steps, seeds = judged_at(runs), sorted(runs["plain"])
    for step in steps:
        ratio = values(runs, HASTE, step) / values(runs, "plain", step)
        ups = [speed_up(runs, seed, step) for seed in seeds]
        print(f"step {step:,}: HASTE's distance by plain's {spread(ratio)}; plain needs so many times the steps: "
              + ", ".join(f"more than {steps[-1] / step:.2f}" if up is None else f"{up:.2f}" for up in ups))
    last = steps[-1]
    for run in runs:
        ratios = np.concatenate([values(runs, run, step) / values(runs, "plain", step) for step in steps])
        print(f"{run}: distance by plain's, all steps and seeds {spread(ratios)}; denoising loss before step {last:,} "
              + spread(values(runs, run, last, "denoising_loss"), 4))
    for run in (run for run in runs if run.startswith("stopped")):
        ratios = {step: values(runs, run, step) / np.minimum(values(runs, "plain", step), values(runs, "aligned", step))
                  for step in steps}
        print(f"{run} by the better of plain and aligned, seed by seed: "
              + "; ".join(f"step {step:,}: " + ", ".join(f"{x:.2f}" for x in each) for step, each in ratios.items()))
    for run in runs:
        rows = [runs[run][seed][last] for seed in seeds]
        if all(row["gradient_cosine"] for row in rows):
            measured = {step: [runs[run][seed][step]["gradient_cosine"] for seed in seeds] for step in steps}
            print(f"{run}: gradient cosine " + "; ".join(f"{step:,}: {spread(np.array(each, float), 3)}"
                                                         for step, each in measured.items() if all(each))
                  + "; the conflict trigger stops at " + ", ".join(row["conflict_step"] or "no step" for row in rows))


def main():
    panels = {}
    for path, title in PANELS.items():
        panels[title], floor = read(path)
        print(f"\n{title}")
        table(panels[title], floor)
        conclusions(panels[title])
    draw(panels)


if __name__ == "__main__":
    main()
