"""When would a measurement have ended phase I? RARE's plateau of the features' residual (arXiv 2609.34732), and HASTE's
gradient cosine, time by time and block by block, on the aligned runs of compare.py, late.py and pixels.py.

    python -m experiments.release

Makes these runs once more, with more measured, and draws nothing. RESULTS has the step at which each rule fires in each
run, the noise of its fast average, and the cosines. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.release")

import csv
from itertools import product
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

import sample
import train
from experiments import compare, draw, late, pixels
from runtime import ends_in_one_line, run_script

OUT = "out/release"
RESULTS = compare.HERE / "release.csv"
COMPARISONS = {  # what prepares, what sets constants; student, layers, steps; blocks (from 1) whose gradients count
    "compare": (compare.prepare, compare.settings, compare.STUDENT, {}, 3000, (2, 3, 4)),
    "late": (compare.prepare, compare.settings, late.STUDENT, late.LAYERS, 8000, (1, 2, 3)),
    "pixels": (pixels.prepare, pixels.settings, {}, {}, 4000, (1, 2, 3)),
}
TIMES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
WINDOWS = ((400, 100), (150, 30), (150, 8))  # of the slow and the fast average, in steps
BELOW = 0.02
CORRECTED = {"as published": False, "bias-corrected": True}
COLUMNS = ("comparison", "seed", "rule", "slow", "fast", "noise", "step", "time", "block", "cosine")


def plateau(residuals, slow, fast, start, below=BELOW, corrected=False):
    """(the first step after `start` at which the slow average of the residuals is less than `below` above the fast one,
    by its own size, or None; both averages [2, N]). Steps are counted from 1. RARE, section 5.

    residuals: of each step, (1 - mean cosine of student's and teacher's tokens) / 2. slow, fast: decays. corrected:
    averages over what there was alone; else they begin at the first residual.
    """
    residuals = np.asarray(residuals, float)
    origin = 0 if corrected else residuals[0]
    averages = np.stack([origin + lfilter([1 - decay], [1, -decay], residuals - origin) for decay in (slow, fast)])
    if corrected:
        averages /= 1 - np.array([[slow], [fast]]) ** np.arange(1, len(residuals) + 1)
    fires = np.flatnonzero(1 - averages[1, start:] / averages[0, start:] < below)
    return start + 1 + int(fires[0]) if len(fires) else None, averages


def cosines(gradient_cosine, blocks):
    """train.gradient_cosine that also measures at each of TIMES and in each of the blocks, into cosines.csv."""
    def measure(*arguments):
        mean = gradient_cosine(*arguments)
        before = train.ALIGN_DEPTH, train.CONFLICT_TIMES
        with open(Path(train.RUN_DIR, "log.csv")) as log:
            step = int(log.readlines()[-1].split(",")[0]) + train.LOG_EVERY  # which this step will log
        for block, time in product(blocks, TIMES):
            train.ALIGN_DEPTH, train.CONFLICT_TIMES = block, (time,)
            cosine = gradient_cosine(*arguments)
            with open(Path(train.RUN_DIR, "cosines.csv"), "a") as file:
                file.write(f"{step},{time},{block},{cosine}\n")
        train.ALIGN_DEPTH, train.CONFLICT_TIMES = before
        return mean
    return measure


def settings(folder, seed, changes):
    """A comparison's own, with cosines at each quarter of its steps and nothing drawn."""
    _, set_constants, _, _, steps, blocks = COMPARISONS[Path(folder).parts[-3]]
    set_constants(folder, seed, changes)
    train.CONFLICT_FROM = train.CONFLICT_EVERY = steps // 4
    train.gradient_cosine = cosines(train.gradient_cosine, blocks)
    sample.NUM_SAMPLES, sample.GRID = 0, None


def nothing(samples, out):
    return {}


def read(folder, comparison, seed, steps):
    """The rows of RESULTS that a run gives."""
    with open(folder / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    every = int(log[0]["step"])  # a row's losses are means over so many steps, and averages decay by as many
    residuals = np.array([(1 + float(row["feature_loss"])) / 2 for row in log])
    half = residuals[len(log) // 2 :]  # the later one, where it hardly falls: neighbours differ by noise
    noise = np.diff(half).std() / 2**0.5 / half.mean() * every**0.5  # of one step, relative
    for rule, corrected in CORRECTED.items():
        for slow, fast in WINDOWS:
            decays = (1 - 1 / slow) ** every, (1 - 1 / fast) ** every
            fires, _ = plateau(residuals, *decays, steps // 8 // every, corrected=corrected)
            yield dict(comparison=comparison, seed=seed, rule=rule, slow=slow, fast=fast,
                       noise=round(noise / (2 * fast) ** 0.5, 5), step=fires * every if fires else "")
    measured = {}  # cosines of a step that a resumed run made again stand there twice
    for line in (folder / "cosines.csv").read_text().split():
        *place, cosine = line.split(",")
        measured[tuple(place)] = round(float(cosine), 5)
    for (step, time, block), cosine in measured.items():
        yield dict(comparison=comparison, seed=seed, step=step, time=time, block=block, cosine=cosine)


def chosen(rows, **columns):
    """Those of the rows that have these values."""
    return [row for row in rows if all(row[column] == value for column, value in columns.items())]


def tables():
    """Markdown: where the rules fire, seed by seed, and the noise of their fast average, mean of the seeds; the cosines
    over all steps and seeds."""
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["comparison"] for row in rows))
    print(f"| plateau, windows | {' | '.join(names)} |\n|---|" + "---|" * len(names))
    for rule, slow, fast in dict.fromkeys((row["rule"], row["slow"], row["fast"]) for row in rows if row["rule"]):
        cells = []
        for name in names:
            fired = chosen(rows, comparison=name, rule=rule, slow=slow, fast=fast)
            steps = "; ".join(f"{int(row['step']):,}" if row["step"] else "never" for row in fired)
            noise = np.mean([float(row["noise"]) for row in fired])
            cells.append(f"{steps} (noise {noise:.1%})")
        print(f"| {rule}, {slow} and {fast} steps | " + " | ".join(cells) + " |")
    print(f"\n| cosine at time | {' | '.join(map(str, TIMES))} |\n|---|" + "---|" * len(TIMES))
    for name, block in dict.fromkeys((row["comparison"], row["block"]) for row in rows if row["block"]):
        cells = []
        for time in TIMES:
            measured = chosen(rows, comparison=name, block=block, time=str(time))
            cells.append(draw.spread(np.array([float(row["cosine"]) for row in measured]), 3))
        print(f"| {name}, block {block} | " + " | ".join(cells) + " |")


@ends_in_one_line
def main():
    rows = []
    compare.SETTINGS, compare.JUDGE = settings, nothing
    compare.FILES = (__name__, "experiments.pixels", "experiments.emoji_data")
    for name, (prepare, _, student, layers, steps, _) in COMPARISONS.items():
        compare.OUT, compare.RESULTS = f"{OUT}/{name}", f"{OUT}/{name}.csv"
        compare.STUDENT, compare.STEPS, compare.STOPS = student, (steps,), ()
        compare.RUNS = {"aligned": layers}
        prepare()
        compare.collect([])
        for seed in compare.SEEDS:
            rows += read(Path(compare.OUT, "aligned", str(seed)), name, seed, steps)
    with open(RESULTS, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    tables()


if __name__ == "__main__":
    run_script(main)
