"""Makes the teacher and the two judges, data/*.safetensors, again, from all 60,000 Fashion-MNIST training images.

    apt-get install dataset-fashion-mnist                       # Debian; or put the four .gz files into IDX_DIR
    python -m experiments.fashion_mnist_networks

Writes the images as sprite sheets (28 x 28 tiles sorted by class), prepares them, and calls train_network.main().
The judge has another architecture (a residual convolutional network) and another seed than the teacher, so that a
student is not judged by the network it imitated; the judge of speedrun.py's report has a third one (dense connections
in place of residual ones), so that no attempt is judged by the network that it was chosen by.
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.fashion_mnist_networks")

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

import prepare_latents
from experiments import train_network
from runtime import run_script

IDX_DIR = "/usr/share/datasets/fashion-mnist"
WORK_DIR = "data"  # sheets and prepared folders
NETWORKS = {  # train_network's constants, pass after pass; of the test images the teacher's first gets 89.78 % right
    "teacher": [dict(EPOCHS=15, LEARNING_RATE=2e-3, SHIFT=0, EMA_DECAY=0.0),
                dict(EPOCHS=6, LEARNING_RATE=1e-3, SHIFT=1, EMA_DECAY=0.999)],  # 90.41 %
    "judge": [dict(EPOCHS=6, LEARNING_RATE=2e-3, SHIFT=0, EMA_DECAY=0.0, MIRROR=False, SEED=1, ARCHITECTURE="resnet18",
                   ARCHITECTURE_SETTINGS=dict(layers=(1, 1, 1, 1), channels=(24, 48, 96, 128), stem_width=24))],
    "report_judge": [dict(EPOCHS=6, LEARNING_RATE=2e-3, SHIFT=0, EMA_DECAY=0.0, MIRROR=False, SEED=2,
                          ARCHITECTURE="densenet121",
                          ARCHITECTURE_SETTINGS=dict(growth_rate=24, block_config=(4, 6, 4)))],
}


def read_idx(path):
    """Array of an MNIST idx file: two zero bytes, type 8 (uint8), dimensions, big-endian sizes, then the data."""
    content = gzip.decompress(Path(path).read_bytes())
    sizes = np.frombuffer(content, ">i4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)


def write_sheet(split, path):
    """All images of a split ("train", "t10k") as one sheet, 100 tiles wide, sorted by class."""
    images, labels = (read_idx(f"{IDX_DIR}/{split}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    tiles = images[np.argsort(labels, kind="stable")]
    rows = len(tiles) // 100
    Image.fromarray(tiles.reshape(rows, 100, 28, 28).transpose(0, 2, 1, 3).reshape(rows * 28, 2800)).save(path)


def main():
    Path(WORK_DIR).mkdir(exist_ok=True)
    prepare_latents.IMAGE_SIZE, prepare_latents.VAE, prepare_latents.WORKERS = 28, None, 0
    for split, name in (("train", "fashion_mnist_60000"), ("t10k", "fashion_mnist_10000")):
        prepare_latents.SOURCE, prepare_latents.DATA_DIR = f"{WORK_DIR}/{name}.png", f"{WORK_DIR}/{name}"
        write_sheet(split, prepare_latents.SOURCE)
        prepare_latents.main()
    for name, passes in NETWORKS.items():
        out = f"data/{name}.safetensors"
        for number, constants in enumerate(passes):
            train_network.DATA_DIR = f"{WORK_DIR}/fashion_mnist_60000"
            train_network.TEST_DIR = f"{WORK_DIR}/fashion_mnist_10000"
            train_network.OUT, train_network.START_FROM = out, out if number else None
            for key, value in constants.items():
                setattr(train_network, key, value)
            train_network.main()


if __name__ == "__main__":
    run_script(main)
