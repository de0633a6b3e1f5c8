"""What several tests share: a small prepared data set, a small teacher, and train.py's constants set for both."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported: a test never waits for a network

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import fid
import prepare_latents
import sample
import train
import train_network

ROOT = Path(__file__).parents[1]


def pytest_configure(config):
    if config.option.markexpr != "gpu":  # to the bit the same, and two processes at a time, only CPUs can promise
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))
        if item.get_closest_marker("slow") and not os.environ.get("NANOHASTE_SLOW"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; set NANOHASTE_SLOW=1"))


def load_golden(name):
    """(arrays as tensors, state dict, meta) of a reference file."""
    with np.load(ROOT / "tests/golden" / f"{name}.npz") as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    return tensors, {key[3:]: value for key, value in tensors.items() if key.startswith("sd/")}, meta


@pytest.fixture(scope="session")
def golden():
    return load_golden


def write_words(folder, count, length, pad):
    """A tokenizer of the words w0, w1, ... in a folder, as transformers writes it."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w1"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length,
                                         pad_token=pad).save_pretrained(folder)


def set_constants(patch, module, **constants):
    for name, value in constants.items():
        assert hasattr(module, name), f"{module.__name__} has no constant {name}"
        patch.setattr(module, name, value)


@pytest.fixture
def restored():
    """Puts every script's constants back as they were."""
    before = [(module, dict(vars(module))) for module in (compare, fid, prepare_latents, sample, train, train_network)]
    yield
    for module, constants in before:
        for name, value in constants.items():
            if name.isupper():
                setattr(module, name, value)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """200 real images, 20 of each class, prepared in pixel mode."""
    folder = tmp_path_factory.mktemp("data")
    Image.open(ROOT / "data/fashion_mnist_test.png").crop((0, 0, 20 * 28, 10 * 28)).save(folder / "sheet.png")
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, prepare_latents, SOURCE=str(folder / "sheet.png"), DATA_DIR=str(folder / "prepared"),
                      IMAGE_SIZE=28, VAE=None, WORKERS=0, BATCH_SIZE=64)
        prepare_latents.main()
    return folder / "prepared"


def with_latents(data_dir, folder, vae=None):
    """A copy of a data set of pixels that has latents.npy too: the pixels in -1..1, as earlier versions stored them; of
    a `vae`, with a deviation of zero."""
    shutil.copytree(data_dir, folder)
    data = prepare_latents.PreparedDataset(data_dir, with_images=False)
    meta = json.loads((folder / "meta.json").read_text())
    latents = (data[np.arange(len(data))][0].float() / 127.5 - 1).half().numpy()
    latents = np.concatenate([latents, np.zeros_like(latents)], axis=1) if vae else latents
    np.save(folder / "latents.npy", latents)
    meta.update(vae=vae, latent_shape=latents.shape[1:])
    meta["bytes"]["latents.npy"] = (folder / "latents.npy").stat().st_size
    ends = np.cumsum([count for count, _ in meta["chunks"]])
    for (_, checksums), rows in zip(meta["chunks"], np.split(latents, ends[:-1])):
        checksums["latents.npy"] = zlib.crc32(np.ascontiguousarray(rows))
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def latents_dir(tmp_path_factory, data_dir):
    """The same as if a VAE had made latents of them that are the pixels."""
    return with_latents(data_dir, tmp_path_factory.mktemp("data") / "latents", vae=dict(name="of/tests", scale=1.0))


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory, data_dir):
    """A small vision transformer, trained for one epoch by train_network.main()."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, train_network, DATA_DIR=str(data_dir), TEST_DIR=str(data_dir), OUT=str(path), EPOCHS=1,
                      BATCH_SIZE=20, ARCHITECTURE="vit_tiny_patch16_224",
                      ARCHITECTURE_SETTINGS=dict(img_size=28, patch_size=4, embed_dim=32, depth=4, num_heads=2))
        train_network.main()
    return path


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """A small VAE with random weights, written by diffusers itself."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    theirs = diffusers.AutoencoderKL(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1,
                                     down_block_types=["DownEncoderBlock2D"] * 3,
                                     up_block_types=["UpDecoderBlock2D"] * 3, scaling_factor=0.25)
    theirs.save_pretrained(folder)
    return folder, theirs


@pytest.fixture
def small_run(monkeypatch, data_dir, teacher_file, tmp_path):
    """A function that sets train's constants for a 12-step run, the switch after 6, and any others."""
    def configure(**constants):
        set_constants(monkeypatch, train, **{**small_constants(data_dir, teacher_file, tmp_path / "run"), **constants})
        return Path(train.RUN_DIR)
    return configure


def small_constants(data_dir, teacher_file, run):
    return dict(DATA_DIR=str(data_dir), RUN_DIR=str(run), WORKERS=0, MODEL="SiT-T/4", TEACHER=str(teacher_file),
                LAYER_PAIRS=[(1, 2), (2, 3)], ALIGN_DEPTH=3, ALIGN_STEPS=6, STEPS=12, BATCH_SIZE=8, LEARNING_RATE=1e-3,
                EMA_DECAY=0.9, COMPILE=False, LOG_EVERY=3, CHECKPOINT_EVERY=2, PREVIEW_EVERY=0, CONFLICT_EVERY=0)
