"""HASTE in pixels on a laptop: a small JiT on emoji of 64 x 64 pixels, by class, in patches of 8: plain, REPA, HASTE to
the end and stopped; beside it a plain SiT of its size, which predicts the velocity.

    python -m experiments.pixels

Takes emoji_data.py's pictures (all but those held out), teacher and classes; trains a judge of its own, which sees all
64 pixels. RESULTS has a row per run, seed and step. Stopped or killed, the same command goes on.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.pixels")

from pathlib import Path

import numpy as np

import fid
import model
import prepare_latents
import sample
import train
from dataset import PreparedDataset
from experiments import compare, emoji_data, train_network
from runtime import ends_in_one_line, run_script

OUT = "out/pixels"
RESULTS = compare.HERE / "pixels.csv"
IMAGE_SIZE = 64
STEPS = (1000, 2000, 4000)  # at which samples are judged; the last ends the runs
STOPS = (2000, 3000)
RUNS = {
    "plain": dict(ALIGN_STEPS=0),
    "features": dict(ATTENTION_WEIGHT=0),
    "aligned": dict(KEEP_EVERY=1000),
    "velocity": dict(MODEL="velocity", ALIGN_STEPS=0),  # plain
}
STUDENT = dict(depth=6, hidden_size=128, num_heads=4, patch_size=8, projector_dim=256)
IMAGES = 20  # samples of each class that are judged
REFERENCE = 100  # pictures of each class that they are judged by, evenly spaced; of small classes some twice


def settings(folder, seed, changes):
    """Sets the scripts' constants for one run."""
    model.MODELS["student"] = dict(model.MODELS["JiT-T/4"], **STUDENT)
    model.MODELS["velocity"] = dict(model.MODELS["SiT-T/4"], **STUDENT)
    train.DATA_DIR, train.RUN_DIR = f"{OUT}/data", str(folder)
    train.WORKERS, train.COMPILE = 0, False
    train.SEED = seed
    train.MODEL, train.TEACHER = "student", emoji_data.WEIGHTS.format("teacher")
    train.TIMES = (0.8, 0.8)
    train.LAYER_PAIRS, train.ALIGN_DEPTH = [(1, 2), (2, 3)], 3
    train.ALIGN_STEPS = 1_000_000  # aligned to the end
    train.BATCH_SIZE, train.LEARNING_RATE, train.WARMUP_STEPS = 16, 1e-3, 100
    train.BETAS, train.EMA_DECAY = (0.9, 0.99), 0.997
    train.LOG_EVERY, train.PREVIEW_EVERY = 10, 0
    train.CHECKPOINT_EVERY, train.CHECKPOINTS_KEPT, train.KEEP_EVERY = 1000, 1, 0
    train.CONFLICT_FROM, train.CONFLICT_EVERY, train.CONFLICT_IMAGES = 1000, 1000, 256
    train.CONFLICT_TIMES = (0.3, 0.5, 0.7, 0.9)
    for name, value in changes.items():
        setattr(train, name, value)
    sample.RUN_DIR, sample.NUM_SAMPLES, sample.BATCH_SIZE = str(folder), IMAGES * len(classes()), 90
    sample.CLASS_SAMPLING, sample.GRID = "balanced", (18, 4)
    sample.MODE, sample.STEPS, sample.CFG_SCALE = "ode", 20, 1.0
    sample.PRECISION = "float32"


def classes():
    return PreparedDataset(f"{OUT}/data", with_images=False).classes


def judge(samples, out):
    """Distance, precision and recall in the judge's features, of images of all classes in equal numbers."""
    fid.SAMPLES, fid.REFERENCE, fid.OUT = str(samples), f"{OUT}/reference/samples.npz", f"{out}-judge.json"
    fid.FEATURES = f"{OUT}/judge.safetensors"
    fid.BATCH_SIZE, fid.WORKERS = 120, 0
    measured = fid.main()
    return {key: measured[key] for key in ("precision", "recall")} | dict(distance=measured["frechet_distance"])


def write_real(data, count, out):
    """So many pictures of each class of a prepared folder, evenly spaced, as samples.npz."""
    rows = []
    for label in np.unique(data.labels):
        of_class = np.flatnonzero(data.labels == label)
        rows.append(of_class[np.arange(count) * len(of_class) // count])
    images = data.images(np.concatenate(rows))  # [N, 3, H, W]
    Path(out).mkdir(parents=True, exist_ok=True)
    np.savez(f"{out}/samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())


def prepare_pictures(**folders):
    """Pictures of emoji_data.py's trees at IMAGE_SIZE, each in a folder of OUT: tree=folder."""
    emoji_data.main()
    prepare_latents.IMAGE_SIZE = IMAGE_SIZE
    for tree, folder in folders.items():
        prepare_latents.SOURCE, prepare_latents.DATA_DIR = f"{emoji_data.OUT}/{tree}", f"{OUT}/{folder}"
        prepare_latents.main()


def prepare():
    """The pictures, and a judge of them."""
    prepare_pictures(teacher="data", judge_train="judge_train", judge_test="judge_test")
    _, _, constants = emoji_data.NETWORKS["judge"]
    for name, value in constants.items():
        setattr(train_network, name, value)
    train_network.DATA_DIR, train_network.TEST_DIR = f"{OUT}/judge_train", f"{OUT}/judge_test"
    train_network.OUT, train_network.START_FROM = f"{OUT}/judge.safetensors", None
    if not Path(train_network.OUT).exists():
        train_network.main()
    data = PreparedDataset(f"{OUT}/data")
    write_real(data, REFERENCE, f"{OUT}/reference")
    write_real(data, IMAGES, f"{OUT}/real")


@ends_in_one_line
def main():
    prepare()
    compare.OUT, compare.RESULTS = OUT, RESULTS
    compare.RUNS, compare.STEPS, compare.STOPS = RUNS, STEPS, STOPS
    compare.SETTINGS, compare.JUDGE = settings, judge
    compare.FILES = (__name__, "experiments.emoji_data")
    compare.collect([dict(run="real images", **judge(f"{OUT}/real", f"{OUT}/real"))])


if __name__ == "__main__":
    run_script(main)
