"""Weights that exist or none: a small JiT learns emoji of a kind it has not seen, symbols, from the weights of a run on
other emoji (train.INIT_FROM) and from scratch, in the same steps.

    python -m experiments.attention      # makes SOURCE, the run on other emoji; or set it to one of pixels.py's
    python -m experiments.fine_tune

RESULTS has a row per run, seed and step. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.fine_tune")

import shutil
from pathlib import Path

import prepare_latents
from dataset import PreparedDataset
from experiments import compare, emoji_data, pixels
from runtime import ends_in_one_line, run_script

SOURCE = "out/attention_emoji/aligned/0"
SET = "data/emoji_symbols"  # the pictures to learn
OUT = "out/fine_tune"
RESULTS = compare.HERE / "fine_tune.csv"
SEEDS = (0, 1, 2)
STEPS = (250, 500)  # at which samples are judged; the last ends the runs
RUNS = {
    "scratch": dict(ALIGN_STEPS=0),
    "weights": dict(ALIGN_STEPS=0, INIT_FROM=SOURCE),
    "weights, a fifth of the rate": dict(ALIGN_STEPS=0, INIT_FROM=SOURCE, LEARNING_RATE=2e-4),
}
IMAGES, REFERENCE = 100, 200  # samples of each class that are judged, and pictures that they are judged by


def prepare():
    """The symbols, in a class for each style, and the judge of pixels.py, which has not seen them either."""
    pixels.prepare()
    judge = Path(pixels.OUT, "judge.safetensors")
    emoji_data.FROM, emoji_data.OUT = emoji_data.FROM or f"{emoji_data.OUT}/packages", SET
    emoji_data.GROUPS = {"symbols": ("Symbols", r"(?!keycap).*")}
    emoji_data.TONED, emoji_data.AT_MOST, emoji_data.LEARNED = [], {}, {}
    emoji_data.write_trees()
    prepare_latents.SOURCE, prepare_latents.DATA_DIR = f"{SET}/teacher", f"{OUT}/data"
    prepare_latents.main()
    shutil.copyfile(judge, f"{OUT}/judge.safetensors")
    pixels.OUT, pixels.IMAGES = OUT, IMAGES
    data = PreparedDataset(f"{OUT}/data")
    pixels.write_real(data, REFERENCE, f"{OUT}/reference")
    pixels.write_real(data, IMAGES, f"{OUT}/real")


@ends_in_one_line
def main():
    prepare()
    compare.OUT, compare.RESULTS, compare.SEEDS = OUT, RESULTS, SEEDS
    compare.RUNS, compare.STEPS, compare.STOPPED, compare.STOPS = RUNS, STEPS, (), ()
    compare.SETTINGS, compare.JUDGE = pixels.settings, pixels.judge
    compare.FILES = ("experiments.pixels", "experiments.emoji_data")
    compare.collect([dict(run="real images", **pixels.judge(f"{OUT}/real", f"{OUT}/real"))])


if __name__ == "__main__":
    run_script(main)
