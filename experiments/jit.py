"""Does stopping help in pixels? JiT-B/16 on ImageNet 256 x 256, 200 epochs: plain, aligned to the end, and stopped.

    torchrun --nproc_per_node=8 -m experiments.jit prepare
    torchrun --nproc_per_node=8 -m experiments.jit plain
    torchrun --nproc_per_node=8 -m experiments.jit aligned
    python -m experiments.jit branch    # the two below go on from what is kept of "aligned"
    torchrun --nproc_per_node=8 -m experiments.jit stopped_50
    torchrun --nproc_per_node=8 -m experiments.jit stopped_100
    torchrun --nproc_per_node=8 -m experiments.jit judge    # fid.json beside each run's samples

Published: REPA, never stopped, brings the guided FID of JiT-B/16 from 7.81 to 6.71 at 100 epochs and from 4.37 to 5.14
at 200 (PixelREPA, arXiv 2603.14366, figure 1 and table); users who repeat the plain run get 4.7. Nobody has stopped it.
HASTE's thesis holds in pixels if a stopped run at 200 epochs lies below plain; if it lies between plain and aligned,
stopping mends a part of the harm alone; if at aligned, the harm is done before the stop.

An estimate of what it costs, by count of operations at 40 % of 790 TFLOP/s: 34 H100-hours plain, 44 aligned, 25 and 17
the stopped ones from where they branch off, 0.4 for 50,000 samples.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.jit")

from functools import partial

import fid
import prepare_latents
import sample
import train
from experiments.coco import run_part
from experiments.compare import start_from
from runtime import run_script

RUN = "runs/jit-b-{}"
EPOCH = 1_251  # steps
RUNS = {"plain": 0, "aligned": 200, "stopped_50": 50, "stopped_100": 100}  # epochs of phase I
JUDGED = (50, 100, 200)  # epochs; the last ends the runs
SCALES = (2.5, 3.0, 3.5)  # of guidance, of which each run's best counts


def settings():
    """JiT's recipe (arXiv 2511.13720), and for alignment HASTE's pairs of SiT-B."""
    prepare_latents.VAE, prepare_latents.DATA_DIR = None, "data/imagenet256_pixels"
    train.DATA_DIR, train.MODEL, train.MIRROR = prepare_latents.DATA_DIR, "JiT-B/16", True
    train.TIMES = (0.8, 0.8)
    train.BATCH_SIZE, train.STEPS = 1024, JUDGED[-1] * EPOCH
    train.LEARNING_RATE, train.WARMUP_STEPS = 2e-4, 5 * EPOCH
    train.BETAS = (0.9, 0.95)
    train.GRAD_CLIP = 1e6  # which clips nothing
    train.LAYER_PAIRS, train.ALIGN_DEPTH = [(2, 7), (3, 9), (4, 11)], 4
    train.CONFLICT_TIMES = (0.3, 0.5, 0.7, 0.9)  # where its times lie
    train.KEEP_EVERY = train.CONFLICT_FROM = JUDGED[0] * EPOCH
    train.CHECKPOINT_EVERY = train.KEEP_EVERY // 6  # which makes a checkpoint at each of these
    sample.CLASS_SAMPLING, sample.GUIDANCE = "balanced", (0.0, 0.9)
    sample.MODE, sample.SOLVER, sample.STEPS = "ode", "heun", 50


def train_run(name):
    train.RUN_DIR, train.ALIGN_STEPS = RUN.format(name), RUNS[name] * EPOCH
    train.main()


def branch():
    for name, epochs in RUNS.items():
        if name.startswith("stopped"):
            start_from(RUN.format("aligned"), RUN.format(name), epochs * EPOCH)


def judge():
    """Against ADM's statistics of ImageNet; JiT is judged by statistics of its own, so figures do not quite compare."""
    for name in RUNS:
        sample.RUN_DIR = RUN.format(name)
        for epoch in JUDGED:
            if name.startswith("stopped") and epoch <= RUNS[name]:
                continue  # until then it is "aligned"
            sample.CHECKPOINT = f"{sample.RUN_DIR}/checkpoints/step_{epoch * EPOCH:07d}/ema.safetensors"
            for scale in SCALES:
                sample.CFG_SCALE, sample.OUT = scale, f"{sample.RUN_DIR}/samples_{epoch}_{scale}"
                sample.main()
                fid.SAMPLES, fid.OUT = f"{sample.OUT}/samples.npz", f"{sample.OUT}/fid.json"
                fid.main()


def main():
    run_part(settings, prepare=prepare_latents.main, branch=branch, judge=judge,
             **{name: partial(train_run, name) for name in RUNS})


if __name__ == "__main__":
    run_script(main)
