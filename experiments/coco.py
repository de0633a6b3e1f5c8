"""The paper's text-to-image run: MS-COCO 2014 at 256 x 256, an MMDiT with HASTE, stopped at 200,000 of 250,000 steps.

    torchrun --nproc_per_node=8 -m experiments.coco prepare    # or python, on one GPU
    torchrun --nproc_per_node=8 -m experiments.coco train
    torchrun --nproc_per_node=8 -m experiments.coco sample
    torchrun --nproc_per_node=8 -m experiments.coco fid

In DATA lie, from https://cocodataset.org, train2014.zip and val2014.zip as they are (read in place), and what
annotations_trainval2014.zip holds. The text encoder, OpenAI's CLIP ViT-L/14, is fetched from the hub.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.coco")

import sys

import fid
import prepare_latents
import sample
import train
from runtime import run_script

DATA = "data/coco"
RUN = "runs/haste-coco"
SAMPLES = 40_192  # val2014's images in order, one of each one's captions at random


def settings():
    """What differs from the ImageNet run."""
    prepare_latents.CROP = "square"  # the largest square, then Lanczos

    train.DATA_DIR, train.RUN_DIR, train.MODEL = f"{DATA}/train256", RUN, "MMDiT/2"
    train.ALIGN_STEPS, train.STEPS = 200_000, 250_000
    train.CHECKPOINT_EVERY, train.KEEP_EVERY = 10_000, 50_000

    sample.RUN_DIR, sample.NUM_SAMPLES, sample.PROMPTS = RUN, SAMPLES, f"{DATA}/val256"
    sample.CFG_SCALE, sample.GUIDANCE = 2.25, (0.0, 1.0)  # HASTE's; REPA's is 2.0

    fid.SAMPLES, fid.REFERENCE, fid.OUT = f"{RUN}/samples/samples.npz", f"{DATA}/val256", f"{RUN}/fid.json"
    fid.RESIZE, fid.CLIP = "bilinear", train.TEXT_ENCODER  # pytorch-fid's convention, as the published figures


def prepare():
    """train2014 to train on, val2014 to draw prompts from and to judge by."""
    for split in ("train", "val"):
        prepare_latents.SOURCE, prepare_latents.DATA_DIR = f"{DATA}/{split}2014.zip", f"{DATA}/{split}256"
        prepare_latents.CAPTIONS = f"{DATA}/annotations/captions_{split}2014.json"
        prepare_latents.main()


def run_part(settings, **parts):
    """Sets an experiment's constants and runs the part of it that the command names."""
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        raise ValueError(f"say which part to run: {', '.join(parts)}")
    settings()
    parts[sys.argv[1]]()


def main():
    run_part(settings, prepare=prepare, train=train.main, sample=sample.main, fid=fid.main)


if __name__ == "__main__":
    run_script(main)
