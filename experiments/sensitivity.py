"""What HASTE's settings do early on, one at a time around compare_small.py's: alignment weights, layers, learning rate.

    python -m experiments.sensitivity

One row per variant and seed in sensitivity.csv; its denoising loss is the mean over all 500 steps. Around what,
compare_small.csv holds; what the stopping step does, that and compare.csv say.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.sensitivity")

from experiments import compare, draw
from runtime import run_script

STEP = 500  # at which samples are judged
RUNS = {
    "aligned, both weights 0.125": dict(FEATURE_WEIGHT=0.125, ATTENTION_WEIGHT=0.125),
    "aligned, both weights 2": dict(FEATURE_WEIGHT=2, ATTENTION_WEIGHT=2),
    "aligned, student's layers two later": dict(LAYER_PAIRS=[(4, 2), (5, 3)], ALIGN_DEPTH=6),
    "plain, learning rate 6e-3": dict(ALIGN_STEPS=0, LEARNING_RATE=6e-3),
    "aligned, learning rate 6e-3": dict(LEARNING_RATE=6e-3),
}


def against_plain(runs):
    """Prints each run's distance by that of plain SiT with the same seed; an aligned run's learning rate is plain's."""
    for run in runs:
        if run == "plain":
            continue
        plain = run.replace("aligned", "plain") if run.startswith("aligned, learning rate") else "plain"
        ratio = draw.values(runs, run, STEP) / draw.values(runs, plain, STEP)
        print(f"{run} by {plain}: {draw.spread(ratio)}")


def main():
    compare.SOURCE, compare.OUT = "data/fashion_mnist.png", "out/compare_small"  # whose images serve
    compare.RESULTS, compare.RUNS = compare.HERE / "sensitivity.csv", RUNS
    compare.STEPS, compare.STOPS = (STEP,), ()
    compare.main()
    varied, floor = draw.read(compare.RESULTS)
    draw.table(varied, floor)
    around, _ = draw.read(compare.HERE / "compare_small.csv")
    against_plain({**around, **varied})


if __name__ == "__main__":
    run_script(main)
