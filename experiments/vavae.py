"""The ImageNet run at 256 x 256 on VA-VAE's latents, of 32 channels: SiT-XL/1 on their 16 x 16 tokens with HASTE.

    torchrun --nproc_per_node=8 -m experiments.vavae prepare    # 42 GB of latents, and the images
    torchrun --nproc_per_node=8 -m experiments.vavae train
    torchrun --nproc_per_node=8 -m experiments.vavae sample
    torchrun --nproc_per_node=8 -m experiments.vavae fid

256 tokens as on SD-VAE's latents with patches of 2, so pairs, depth and teacher stay; on one GPU, python in place of
torchrun. LightningDiT-XL/1, another network, has FID 2.11 on these latents at 64 epochs, 1.35 in the end (arXiv
2501.01423). This run has not been made.

An estimate of what it costs, by count of operations: an image takes what it takes on SD-VAE's latents, 756 GFLOP in
phase I and 710 in phase II, so README's 67 H100-hours hold for 100 epochs, and 12 GiB of each of 8 GPUs. To encode it
takes 138 GFLOP (SD-VAE 273), to decode 252 (622).
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.vavae")

import fid
import prepare_latents
import sample
import train
from experiments.coco import run_part
from runtime import run_script

VAE = "hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt"  # or "REPA-E/e2e-vavae-hf"
RUN = "runs/haste-xl-vavae"


def settings():
    """What differs from the run on SD-VAE's latents."""
    prepare_latents.VAE = VAE
    prepare_latents.DATA_DIR = train.DATA_DIR = "data/imagenet256_vavae"
    train.RUN_DIR, train.MODEL = RUN, "SiT-XL/1"
    sample.RUN_DIR = RUN
    sample.CFG_SCALE, sample.GUIDANCE = 1.9, (0.0, 0.825)  # REPA-E's for VA-VAE at 80 epochs
    fid.SAMPLES, fid.OUT = f"{RUN}/samples/samples.npz", f"{RUN}/fid.json"


def main():
    run_part(settings, prepare=prepare_latents.main, train=train.main, sample=sample.main, fid=fid.main)


if __name__ == "__main__":
    run_script(main)
