"""iREPA's two parts, a 3 x 3 convolution as projector ("conv") and teacher tokens normalised over each image ("norm"),
with features alone and with attention too, to the end and stopped.

    python -m experiments.irepa fashion_mnist    # late.py's student: irepa.csv
    python -m experiments.irepa pixels           # pixels.py's: irepa_pixels.csv

One row per run, seed and step, and a table of what each choice changes. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.irepa")

import numpy as np

from experiments import compare, draw, late, pixels
from experiments.coco import run_part
from runtime import ends_in_one_line, run_script

LOSSES = {"features": dict(ATTENTION_WEIGHT=0), "aligned": {}}
PARTS = {"": {}, " conv": dict(PROJECTOR="conv"), " norm": dict(SPATIAL_NORM=0.6),
         " conv norm": dict(PROJECTOR="conv", SPATIAL_NORM=0.6)}
STOP, STEPS = 1000, 2000


def settings(out, **changes):
    """Sets compare.py's constants: every run to its end and stopped, and plain."""
    compare.OUT, compare.STEPS, compare.STOPS = out, (STOP, STEPS), (STOP,)
    changes |= dict(CONFLICT_EVERY=0, KEEP_EVERY=STOP)
    runs = {loss + part: {**LOSSES[loss], **PARTS[part], **changes} for loss in LOSSES for part in PARTS}
    compare.RUNS, compare.STOPPED = {"plain": dict(changes, ALIGN_STEPS=0), **runs}, tuple(runs)


def effects(results):
    """Markdown: the last distance with a choice by that without it, otherwise the same run; of all such pairs the
    geometric mean, and of these the mean (lowest to highest) of the seeds."""
    runs, _ = draw.read(results)
    cells = {}  # of each run but plain: what was chosen, and log distances, one a seed
    for name in runs:
        chosen = "features" not in name, "conv" in name, "norm" in name, "stopped" in name
        if name != "plain":
            cells[chosen] = np.log(draw.values(runs, name, STEPS))
    print("| with, by without | to the end | stopped |\n|---|---|---|")
    for i, choice in enumerate(("attention", "conv", "norm", "stopping")):
        columns = []
        for stopped in (False, True):
            changes = []
            for chosen, numbers in cells.items():
                without = (*chosen[:i], False, *chosen[i + 1 :])
                if chosen[i] and chosen[-1] == stopped and without in cells:
                    changes.append(numbers - cells[without])
            columns.append(draw.spread(np.exp(np.mean(changes, axis=0))) if changes else "")
        print(f"| {choice} | {' | '.join(columns)} |")


def fashion_mnist():
    settings("out/irepa", **late.LAYERS)
    compare.RESULTS, compare.STUDENT = compare.HERE / "irepa.csv", late.STUDENT
    compare.main()
    effects(compare.RESULTS)


@ends_in_one_line
def in_pixels():
    settings("out/irepa_pixels")
    pixels.prepare()
    compare.RESULTS = compare.HERE / "irepa_pixels.csv"
    compare.SETTINGS, compare.JUDGE = pixels.settings, pixels.judge
    compare.FILES = ("experiments.pixels", "experiments.emoji_data")
    real = f"{pixels.OUT}/real"
    compare.collect([dict(run="real images", **pixels.judge(real, real))])
    effects(compare.RESULTS)


def main():
    run_part(lambda: None, fashion_mnist=fashion_mnist, pixels=in_pixels)


if __name__ == "__main__":
    run_script(main)
