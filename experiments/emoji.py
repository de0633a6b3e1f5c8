"""Text to image on a laptop: plain MMDiT, REPA and HASTE side by side on emoji, judged by what prompts ask for.

    pip install -r requirements-text.txt
    python -m experiments.emoji

Fetches the pictures with npm and pip (emoji_data.py, which says whose they are), trains teacher and judge, then every
run of RUNS from every seed. RESULTS has a row per run, seed and step: the Fréchet distance in the judge's features,
and how often the judge sees the group, style and skin tone that a caption names, for captions seen in training and for
held-out combinations of a concept and a style, or a concept and a tone. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.emoji")

from pathlib import Path

import numpy as np
import torch

import fid
import model
import sample
import train
from dataset import PreparedDataset
from experiments import compare, emoji_data
from runtime import ends_in_one_line, run_script
from teacher import load_network

OUT = "out/emoji"
RESULTS = compare.HERE / "emoji.csv"
SEEDS = (0, 1, 2)
STEPS = (1500, 3000)  # at which samples are judged; the last ends the runs
RUNS = {"plain": dict(ALIGN_STEPS=0), "features": dict(ATTENTION_WEIGHT=0), "aligned": dict(KEEP_EVERY=1500)}
STOPS = (1500,)
STUDENT = {}  # what differs from MMDiT-T/4
SEEN = 192  # captions of training pictures that are drawn and judged, evenly spaced
NEW = 3  # samples of each held-out caption
COLUMNS = ("run", "seed", "step", "distance", "precision", "recall", "seen_group", "seen_style", "seen_tone",
           "new_style_group", "new_style_style", "new_tone_group", "new_tone_style", "new_tone_tone", "denoising_loss",
           "gradient_cosine", "conflict_step")
PROMPTS = (  # the second half are combinations that no training picture has
    "red heart, flat drawing", "lion, 3d drawing", "sunflower, shaded drawing", "watermelon, flat drawing",
    "hushed face, 3d drawing", "OK hand with dark skin tone, shaded drawing", "orange heart, 3d drawing",
    "tulip, flat drawing", "bell pepper, shaded drawing", "cherries, 3d drawing",
    "girl with medium-light skin tone, 3d drawing", "man with dark skin tone, flat drawing")
FIGURE = "data/emoji.png"  # a sheet of samples for PROMPTS, a prompt a row


def chosen():
    """[(prepared folder, which of its pictures serve to judge)] of those seen in training and of the held-out ones."""
    seen, new = (PreparedDataset(f"{emoji_data.OUT}/prepared/{tree}") for tree in ("images", "held_out"))
    return [(seen, np.arange(SEEN) * len(seen) // SEEN), (new, np.repeat(np.arange(len(new)), NEW))]


def prompts():
    """(captions, their classes, the kind of each: "seen", "new_style" or "new_tone") that samples are drawn for."""
    captions, names = [], []
    for data, rows in chosen():
        captions += [data.captions[data.caption_offsets[i]] for i in rows]
        names += [data.classes[data.labels[i]] for i in rows]
    kinds = ["seen"] * SEEN + ["new_style" if name.endswith("_none") else "new_tone" for name in names[SEEN:]]
    return captions, names, np.array(kinds)


def settings(folder, seed, changes):
    """Sets the scripts' constants for one run."""
    model.MODELS["student"] = dict(model.MODELS["MMDiT-T/4"], **STUDENT)
    train.DATA_DIR, train.RUN_DIR = f"{emoji_data.OUT}/prepared/images", str(folder)
    train.WORKERS, train.COMPILE = 0, False
    train.SEED = seed
    train.MODEL, train.TEACHER = "student", emoji_data.WEIGHTS.format("teacher")
    train.TEXT_ENCODER, train.TEXT_LENGTH = f"{emoji_data.OUT}/text_encoder", 16
    train.TIMES = (0.4, 1.0)
    train.LAYER_PAIRS, train.ALIGN_DEPTH = [(1, 2), (2, 3)], 3
    train.ALIGN_STEPS = 1_000_000  # aligned to the end
    train.BATCH_SIZE, train.LEARNING_RATE, train.WARMUP_STEPS = 16, 1e-3, 100
    train.BETAS, train.EMA_DECAY = (0.9, 0.99), 0.997
    train.LOG_EVERY, train.PREVIEW_EVERY = 10, 0
    train.CHECKPOINT_EVERY, train.CHECKPOINTS_KEPT, train.KEEP_EVERY = 750, 1, 0
    train.CONFLICT_FROM, train.CONFLICT_EVERY, train.CONFLICT_IMAGES = 750, 750, 256
    for name, value in changes.items():
        setattr(train, name, value)
    sample.RUN_DIR, sample.PROMPTS = str(folder), prompts()[0]
    sample.NUM_SAMPLES, sample.BATCH_SIZE = len(sample.PROMPTS), 100
    sample.CLASS_SAMPLING, sample.GRID = "balanced", (20, 1)
    sample.MODE, sample.STEPS = "ode", 15
    sample.CFG_SCALE, sample.GUIDANCE = 2.0, (0.0, 1.0)


def judge(samples, out):
    """Of pictures for prompts(), in their order: distance, precision and recall in the judge's features, and how often
    it sees what the captions say."""
    fid.SAMPLES, fid.REFERENCE, fid.OUT = str(samples), f"{emoji_data.OUT}/prepared/images", f"{out}-judge.json"
    fid.FEATURES = emoji_data.WEIGHTS.format("judge")
    fid.BATCH_SIZE, fid.WORKERS = 250, 0
    measured = fid.main()
    row = {key: measured[key] for key in ("precision", "recall")} | dict(distance=measured["frechet_distance"])
    with np.load(Path(samples, "samples.npz")) as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    return row | agreement(images)


def agreement(images):
    """{kind and part of the class: how often the judge sees it} in pictures uint8 [N, 3, H, W] for prompts()."""
    _, names, kinds = prompts()
    p = emoji_data.probabilities(load_network(emoji_data.WEIGHTS.format("judge")), images)
    right = {}
    for part, (label, (values, sums)) in enumerate(emoji_data.marginals(p, chosen()[0][0].classes).items()):
        said = np.array([name.split("_")[part] for name in names])
        seen = np.array(values)[sums.argmax(1)] == said
        for kind in ("seen", "new_style", "new_tone"):
            rows = (kinds == kind) & (said != "none")  # no tone to see
            if rows.any():
                right[f"{kind}_{label}"] = seen[rows].mean()
    return right


def write_real(out):
    """The pictures that prompts() are captions of, as samples.npz: the judge cannot make more of samples."""
    Path(out).mkdir(parents=True, exist_ok=True)
    images = torch.cat([data.images(rows) for data, rows in chosen()])
    np.savez(f"{out}/samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())


def draw_sheet():
    """FIGURE, by HASTE of the first seed."""
    run = [*compare.RUNS, *compare.stopped_runs()][-1]
    settings(f"{OUT}/{run}/{SEEDS[0]}", SEEDS[0], {})
    sample.CHECKPOINT, sample.OUT = None, f"{OUT}/sheet"
    sample.NUM_SAMPLES, sample.PROMPTS, sample.GRID = 0, list(PROMPTS), (len(PROMPTS), 8)
    sample.main()
    Path(f"{OUT}/sheet/samples.png").rename(FIGURE)


@ends_in_one_line
def main():
    emoji_data.main()
    compare.OUT, compare.RESULTS, compare.COLUMNS = OUT, RESULTS, COLUMNS
    compare.SEEDS, compare.STEPS, compare.STOPS = SEEDS, STEPS, STOPS
    compare.RUNS = RUNS
    compare.SETTINGS, compare.JUDGE = settings, judge
    compare.FILES = (__name__, "experiments.emoji_data")
    write_real(f"{OUT}/real")
    compare.collect([dict(run="real images", **judge(f"{OUT}/real", f"{OUT}/real"))])
    draw_sheet()


if __name__ == "__main__":
    run_script(main)
