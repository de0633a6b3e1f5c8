"""The paper's ImageNet run at 512 x 512: SiT-XL/2 on 1,024 tokens with HASTE, stopped at 300,000 steps.

    torchrun --nproc_per_node=8 -m experiments.imagenet512 prepare    # or python, on one GPU
    torchrun --nproc_per_node=8 -m experiments.imagenet512 train
    torchrun --nproc_per_node=8 -m experiments.imagenet512 sample
    torchrun --nproc_per_node=8 -m experiments.imagenet512 fid

Grid and position table of the student and the teacher's 448 pixels follow from the data set.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.imagenet512")

import fid
import prepare_latents
import sample
import train
from experiments.coco import run_part
from runtime import run_script

RUN = "runs/haste-xl-512"


def settings():
    """What differs from the 256 x 256 run."""
    prepare_latents.IMAGE_SIZE = 512
    prepare_latents.DATA_DIR = train.DATA_DIR = "data/imagenet512"
    train.RUN_DIR, train.ALIGN_STEPS = RUN, 300_000
    sample.RUN_DIR, sample.CFG_SCALE, sample.GUIDANCE = RUN, 1.25, (0.0, 1.0)
    fid.SAMPLES, fid.OUT, fid.REFERENCE = f"{RUN}/samples/samples.npz", f"{RUN}/fid.json", "VIRTUAL_imagenet512.npz"


def main():
    run_part(settings, prepare=prepare_latents.main, train=train.main, sample=sample.main, fid=fid.main)


if __name__ == "__main__":
    run_script(main)
