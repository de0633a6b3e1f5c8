"""Where teacher and students look: their attention on images that no student saw, for plain SiT, REPA and HASTE.

    apt-get install dataset-fashion-mnist        # Debian; or see fashion_mnist_networks.py
    python -m experiments.attention

Trains compare.py's runs from three seeds and, in colour, pixels.py's from one. RESULTS: how far the students' attention
is from the teacher's, a row per run, seed and step; MAPS: what the first seed's runs attend to; LOSSES: the denoising
loss by time. draw.py draws all three. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.attention")

import csv
from pathlib import Path

import numpy as np
import torch

import train
from checkpoint import load_model
from dataset import PreparedDataset
from experiments import compare, draw, pixels
from losses import attention_loss
from model import interpolate
from runtime import ends_in_one_line, run_script
from teacher import teacher_for_grid
from vae import sample_latents

OUT = "out/attention"
RESULTS, MAPS = compare.HERE / "attention.csv", compare.HERE / "attention.npz"
LOSSES, LOSSES_OF = compare.HERE / "loss_by_time.csv", 500  # of so many last steps
RUNS = {"plain": dict(ALIGN_STEPS=0), "features": dict(ATTENTION_WEIGHT=0), "aligned": {}}  # REPA, and HASTE so far
STOP, STEPS = 1000, (250, 500, 750, 1000, 1250, 1500, 2000)  # at which attention is measured
PIXELS_STOP, PIXELS_STEPS = 1000, (1000, 2000)  # of pixels.py's runs
TIMES = (0.1, 0.5, 0.9)  # at which it is measured
SHOWN = 0.5  # the time at which it is shown
IMAGES = 250  # test images, evenly spaced
SHOWN_IMAGES = 4  # of each data set, evenly spaced


def evenly_spaced(data, count):
    """What a prepared folder has of so many images: (x [B, C, H, W], labels, images uint8 [B, 3, H, W])."""
    moments, labels, images = data[np.arange(min(count, len(data))) * len(data) // min(count, len(data))]
    return sample_latents(moments, None, data.vae), labels, images


@torch.no_grad()
def logits_of(weights, x, labels, images, times):
    """The teacher's attention logits in the layers of LAYER_PAIRS, and for each time the student's: lists of
    [B, heads, N, N]. weights: a file of the student's. The noise is the same for all of them."""
    student, _ = load_model(weights)
    teacher = teacher_for_grid(train.TEACHER, [layer for _, layer in train.LAYER_PAIRS], student.grid)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    looks = []
    for time in times:
        t = torch.full((len(x),), time)
        x_t, _ = interpolate(x, noise, t)
        looks.append(student(x_t, t, labels, [layer for layer, _ in train.LAYER_PAIRS])[1])
    return teacher(images)[1], looks


def measure(folder, step):
    """The cross-entropy of a run's attention to the teacher's at each time, and the least that it could be."""
    weights = folder / f"checkpoints/step_{step:07d}/ema.safetensors"
    targets, looks = logits_of(weights, *evenly_spaced(PreparedDataset(f"{compare.OUT}/test"), IMAGES), TIMES)
    found = {f"t_{time}": attention_loss(logits, targets).item() for time, logits in zip(TIMES, looks)}
    return dict(found, teacher=attention_loss(targets, targets).item())


def maps(runs):
    """What is shown: images, of each the patch whose pixels differ most, where teacher and runs look from there in the
    last aligned layer (mean over paired heads), and the cross-entropy of that to the teacher's. runs: files of weights.

    images uint8 [B, H, W, 3], patches [B], attention [B, 1 + runs, N], cross_entropy [B, 1 + runs]."""
    x, labels, images = evenly_spaced(PreparedDataset(f"{compare.OUT}/test"), SHOWN_IMAGES)
    rows = []
    for weights in runs:
        targets, [looks] = logits_of(weights, x, labels, images, [SHOWN])
        heads = min(targets[-1].shape[1], looks[-1].shape[1])
        rows.append(looks[-1][:, :heads])
    rows = torch.stack([targets[-1][:, :heads], *rows], dim=1)  # [B, 1 + runs, heads, N, N]
    grid = int(rows.shape[-1] ** 0.5)
    patch = images.shape[-1] // grid
    parts = images.float().unflatten(-1, (grid, patch)).unflatten(-3, (grid, patch))  # [B, 3, grid, patch, grid, patch]
    patches = parts.std(dim=(3, 5)).mean(dim=1).flatten(1).argmax(dim=1)
    rows = torch.stack([each[..., at, :] for each, at in zip(rows, patches)])  # [B, 1 + runs, heads, N]
    loss = -(rows[:, :1].softmax(-1) * rows.log_softmax(-1)).sum(-1).mean(-1)
    return dict(images=images.permute(0, 2, 3, 1).numpy(), patches=patches.numpy(),
                attention=rows.softmax(-1).mean(2).numpy(), cross_entropy=loss.numpy())


def write_losses():
    """LOSSES: a row per run and seed, the mean of each tenth of time over the last steps."""
    with open(LOSSES, "w", newline="") as file:
        table = csv.DictWriter(file, ("run", "seed", *train.LOGS["loss_by_time.csv"]), lineterminator="\n")
        table.writeheader()
        for run in (*compare.RUNS, *compare.stopped_runs()):
            for seed in compare.SEEDS:
                log = np.genfromtxt(Path(compare.OUT, run, str(seed), "loss_by_time.csv"), delimiter=",", skip_header=1,
                                    ndmin=2)
                counted = (log[:, 0] > STEPS[-1] - LOSSES_OF) & (log[:, 0] <= STEPS[-1])
                means = (round(each, 5) for each in np.nanmean(log[counted, 1:], axis=0))
                table.writerow(dict(zip(table.fieldnames, (run, seed, STEPS[-1], *means))))


def train_runs(out, stop, steps, seeds, settings, results):
    """Makes all runs of a data set, and the maps of its first seed; its test images are in `out`, prepared."""
    compare.OUT, compare.RESULTS, compare.SEEDS = out, results, seeds
    compare.STEPS, compare.STOPS = steps, (stop,)
    compare.RUNS = {name: dict(changes, CONFLICT_EVERY=0, KEEP_EVERY=stop) for name, changes in RUNS.items()}
    compare.SETTINGS, compare.MEASURE = settings, measure
    compare.COLUMNS = ("run", "seed", "step", *(f"t_{time}" for time in TIMES), "teacher", "denoising_loss")
    compare.FILES = (__name__, "experiments.pixels", "experiments.emoji_data")
    compare.collect([])
    ends = [("plain", steps[-1]), ("features", steps[-1]), ("aligned", stop), (f"stopped at {stop}", steps[-1])]
    settings(f"{out}/plain/{seeds[0]}", seeds[0], {})
    return maps([Path(out, run, str(seeds[0]), f"checkpoints/step_{step:07d}") for run, step in ends])


@ends_in_one_line
def main():
    compare.OUT = OUT
    compare.prepare()
    clothes = train_runs(OUT, STOP, STEPS, (0, 1, 2), compare.settings, RESULTS)
    write_losses()
    pixels.OUT = f"{OUT}_emoji"
    pixels.prepare_pictures(teacher="data", held_out="test")
    emoji = train_runs(pixels.OUT, PIXELS_STOP, PIXELS_STEPS, (0,), pixels.settings, f"{pixels.OUT}/results.csv")
    np.savez(MAPS, **{f"clothes_{key}": value for key, value in clothes.items()},
             **{f"emoji_{key}": value for key, value in emoji.items()})
    draw.main()


if __name__ == "__main__":
    run_script(main)
