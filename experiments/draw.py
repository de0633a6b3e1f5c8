"""Draws what compare.py, late.py, emoji.py and pixels.py measured: distance over steps, tables, what follows from them.

    python -m experiments.draw       # writes the figures of FIGURES; needs matplotlib

Every figure is the mean over seeds with the spread (lowest to highest) behind it.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.draw")

import csv
from collections import defaultdict
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
    return f"{numbers.mean():.{digits}f} ({numbers.min():.{digits}f} to {numbers.max():.{digits}f})"


def speed_up(runs, haste, seed, step):
    """Steps that plain SiT needs to reach HASTE's distance at `step`, by that step; None: it does not reach it.

    Between two steps at which it was judged, log distance is taken as linear in log steps."""
    wanted = float(runs[haste][seed][step]["distance"])
    steps = sorted(runs["plain"][seed])
    distances = [float(runs["plain"][seed][each]["distance"]) for each in steps]
    for i, low in enumerate(distances[1:]):
        if low <= wanted:
            (a, b), high = steps[i : i + 2], distances[i]
            share = np.clip(np.log(high / wanted) / np.log(high / low), 0, 1)
            return a * (b / a) ** share / step
    return None


def draw(panels, haste, file):
    """One panel for each of {title: runs}, into a file."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    size = 5.5 * len(panels), 4.2  # inches
    figure, row = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
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


if __name__ == "__main__":
    main()
