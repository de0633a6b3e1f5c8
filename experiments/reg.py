"""REG, the teacher's class token denoised beside the latents, with and without alignment: {plain, REPA, HASTE} x
{without, with REG} x {to the end, stopped}.

    apt-get install dataset-fashion-mnist        # Debian; or see fashion_mnist_networks.py
    python -m experiments.reg fashion_mnist      # compare.py's larger student: reg.csv
    python -m experiments.reg emoji              # a SiT on emoji of 32 x 32 pixels, by class: reg_emoji.csv
    python -m experiments.reg small              # the first column of reg.csv again, from its first seed

One row per run, seed and step, and the answers: how much a choice changes the last distance. The teachers have no class
token, so the mean of their patch tokens stands in: it is of the teacher that everything else here aligns to. A run that
stops drops features and attention; the class token stays. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.reg")

import shutil
from pathlib import Path

import numpy as np
import torch

import train
from checks import weights_checksum
from class_tokens import ClassTokens
from dataset import PreparedDataset
from experiments import compare, draw, emoji_data, pixels
from experiments.coco import run_part
from experiments.compare_small import beside
from runtime import ends_in_one_line, run_script

OUT = "out/reg"
REG = dict(CLASS_WEIGHT=0.03)
LOSSES = {"plain": dict(ALIGN_STEPS=0), "features": dict(ATTENTION_WEIGHT=0), "aligned": {},
          "reg": REG | dict(ALIGN_STEPS=0), "reg features": REG | dict(ATTENTION_WEIGHT=0), "reg aligned": REG}
PATCH = 4  # of the students
STEPS, STOP = (500, 1000, 2000), 1000
EMOJI_STEPS, EMOJI_STOP = (1500, 3000), 1500
EMOJI_STUDENT = dict(depth=4, patch_size=PATCH)  # what differs from pixels.py's SiT
EMOJI_SIT = dict(MODEL="velocity", TIMES="uniform")  # which it calls so
QUESTIONS = {  # pairs of runs: the first one's distance by the second one's
    "attention, with REG": [("reg aligned", "reg features"),
                            ("reg aligned, stopped at {}", "reg features, stopped at {}")],
    "attention, without REG": [("aligned", "features"), ("stopped at {}", "features, stopped at {}")],
    "a stop, with REG": [("reg features, stopped at {}", "reg features"),
                         ("reg aligned, stopped at {}", "reg aligned")],
    "a stop, without REG": [("features, stopped at {}", "features"), ("stopped at {}", "aligned")],
    "REG without alignment": [("reg", "plain")],
    "REG with alignment": [("reg features", "features"), ("reg aligned", "aligned"),
                           ("reg aligned, stopped at {}", "stopped at {}")],
    "alignment, with REG": [("reg features", "reg"), ("reg aligned", "reg"), ("reg aligned, stopped at {}", "reg")],
}


def settings(out, results, steps, stop, **changes):
    """Sets compare.py's constants: plain and REG alone, every other run to its end and stopped."""
    compare.OUT, compare.RESULTS = out, results
    compare.STEPS, compare.STOPS = steps, (stop,)
    changes |= dict(CONFLICT_EVERY=0, KEEP_EVERY=stop)
    compare.RUNS = {name: losses | changes for name, losses in LOSSES.items()}
    compare.STOPPED = tuple(name for name, losses in LOSSES.items() if "ALIGN_STEPS" not in losses)


def write_class_tokens():
    """The class tokens of the runs' images, which two runs that start at once would both begin to write."""
    compare.SETTINGS(compare.OUT, 0, {})
    teacher = dict(TEACHER=train.TEACHER, checksums=dict(TEACHER=weights_checksum(train.TEACHER)), MIRROR=False)
    data = PreparedDataset(train.DATA_DIR, with_images=False)
    tokens = ClassTokens(data, teacher, data.shape[1] // PATCH, world=1)
    tokens.compute(0, 0, torch.device("cpu"))
    share = between_classes(tokens.open(with_images=False).class_tokens[0], np.asarray(data.labels))
    print(f"class tokens: {share:.0%} of their variance is between classes")


def between_classes(tokens, labels):
    """The share of the variance of tokens [N, E] that is between classes [N], so what a label tells of them."""
    tokens = np.asarray(tokens, np.float64)
    within = sum((labels == label).mean() * tokens[labels == label].var(axis=0).sum() for label in np.unique(labels))
    return 1 - within / tokens.var(axis=0).sum()


def answers(results):
    """Markdown: for each of QUESTIONS the ratio of last distances, mean (lowest to highest) of the seeds."""
    runs, _ = draw.read(results)
    last, stop = draw.judged_at(runs)[-1], next(run for run in runs if run.startswith("stopped")).split()[-1]
    print("| what changes | distance of | by that of | ratio |\n|---|---|---|---|")
    for question, pairs in QUESTIONS.items():
        for names in pairs:
            with_it, without = (name.format(stop) for name in names)
            ratios = draw.values(runs, with_it, last) / draw.values(runs, without, last)
            print(f"| {question} | {with_it} | {without} | {draw.spread(ratios)} |")


def run_on_clothes():
    """compare.py's images, their class tokens, and all runs."""
    compare.prepare()
    write_class_tokens()
    compare.main()


def fashion_mnist():
    settings(OUT, compare.HERE / "reg.csv", STEPS, STOP)
    run_on_clothes()
    answers(compare.RESULTS)


def prepare_emoji(out):
    """The emoji in a folder, as pixels.py has them but smaller."""
    pixels.OUT, pixels.IMAGE_SIZE, pixels.STUDENT = out, 32, pixels.STUDENT | EMOJI_STUDENT
    Path(out).mkdir(parents=True, exist_ok=True)
    shutil.copy(emoji_data.WEIGHTS.format("judge"), f"{out}/judge.safetensors")  # it sees 32 pixels as it is
    pixels.prepare()


@ends_in_one_line
def emoji():
    settings(f"{OUT}_emoji", compare.HERE / "reg_emoji.csv", EMOJI_STEPS, EMOJI_STOP, **EMOJI_SIT)
    prepare_emoji(compare.OUT)
    compare.SETTINGS, compare.JUDGE = pixels.settings, pixels.judge
    compare.FILES = ("experiments.pixels", "experiments.emoji_data")
    write_class_tokens()
    real = f"{pixels.OUT}/real"
    compare.collect([dict(run="real images", **pixels.judge(real, real))])
    answers(compare.RESULTS)


def small():
    settings(f"{OUT}_small", f"{OUT}_small/results.csv", STEPS[:1], STOP)
    compare.SEEDS, compare.STOPPED = (0,), ()  # nothing has stopped yet
    run_on_clothes()
    beside(draw.read(compare.RESULTS)[0], draw.read(compare.HERE / "reg.csv")[0])


def main():
    run_part(lambda: None, fashion_mnist=fashion_mnist, emoji=emoji, small=small)


if __name__ == "__main__":
    run_script(main)
