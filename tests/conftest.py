"""What several files of tests share: images and captions to prepare, a small prepared data set, a small teacher and the
other networks, train.py's constants set for them, and train.main() in processes of its own."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's client is imported: a test never waits for a network

import csv
import json
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import prepare_latents
import sample
import train
from dataset import PreparedDataset
from experiments import compare, train_network
from inception import InceptionV3

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
    data = PreparedDataset(data_dir, with_images=False)
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


# ---- images and captions to prepare


def photograph(rng, width, height):
    """Smooth colours with fine noise, RGB."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def tree(tmp_path):
    """Two classes of photograph-like images of mixed sizes and kinds, with a file that is no image."""
    rng = np.random.default_rng(0)
    for name, sizes in (("n02", [(80, 60), (33, 90)]), ("n01", [(64, 64), (200, 150), (40, 41)])):
        (tmp_path / "tree" / name / "deep").mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            folder = tmp_path / "tree" / name / ("deep" if i == 1 else "")
            picture = photograph(rng, width, height).convert("L" if i == 0 else "RGB")
            picture.save(folder / f"{i}.{'JPEG' if i == 2 else 'png'}")
    (tmp_path / "tree/n01/notes.txt").write_text("no image")
    return tmp_path / "tree"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Three classes of 80 photographs each, JPEGs and PNGs of mixed sizes."""
    root, rng = tmp_path_factory.mktemp("photographs") / "train", np.random.default_rng(1)
    for name in ("n03", "n01", "n02"):
        (root / name).mkdir(parents=True)
        for i in range(80):
            image = photograph(rng, *rng.integers(30, 140, 2))
            image.save(root / name / (f"{name}_{i}.JPEG" if i % 2 else f"{name}_{i}.png"))
    return root


def save(path, value, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (value, 0, 0)).save(path, **options)


LONG = " ".join(f"word{i}" for i in range(300))
SAID = {  # {number: (its captions as written, as they should be kept)}
    30: (["a red bus", "Ein gr\u00fcner Bus \U0001f68c", "a red bus"],
         ["a red bus", "Ein gr\u00fcner Bus \U0001f68c", "a red bus"]),
    7: (["  two\nlines\u2028and \x0b a\x00third\x85", " \n"], ["two lines and a third"]),
    12: ([LONG], [LONG]),
    25: (["\ud800 half of a character"], ["half of a character"]),
    40: (["", "\t"], []),
    41: ([], []),
}


def write_coco(folder, archive=None):
    """A fake COCO: (its images' folder or archive, its captions_*.json). Item number i has the red value i."""
    for number in SAID:
        save(folder / f"train/COCO_{number:03d}.png", number)
    save(folder / "train/unknown.png", 1)
    captions = [(number, texts[i]) for i in range(3)  # those of an image need not stand together
                for number, (texts, _) in SAID.items() if i < len(texts)]
    annotations = [dict(image_id=number, id=i, caption=text) for i, (number, text) in enumerate(captions)]
    images = [dict(id=number, file_name=f"COCO_{number:03d}.png") for number in SAID]
    (folder / "captions.json").write_text(json.dumps(dict(images=images, annotations=annotations)))
    if archive:
        shutil.make_archive(str(folder / "images"), archive, folder, "train")
        shutil.rmtree(folder / "train")
    source = folder / (f"images.{archive}" if archive else "train")
    return dict(SOURCE=str(source), CAPTIONS=str(folder / "captions.json"))


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    def run(**constants):
        set_constants(monkeypatch, prepare_latents, **{**dict(DATA_DIR=str(tmp_path / "out"), IMAGE_SIZE=32, VAE=None,
                                                             WORKERS=0, BATCH_SIZE=2, COMPILE=False, CAPTIONS=None,
                                                             CROP="adm", LEAVE_OUT_UNREADABLE=False), **constants})
        prepare_latents.main()
        return PreparedDataset(prepare_latents.DATA_DIR)
    return run


def contents(folder):
    """{file: bytes} of a prepared folder; of meta.json what does not name the source."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    meta = json.loads(files.pop("meta.json"))
    meta.pop("source")
    return files, meta


def damage(folder, change, name="meta.json"):
    """Applies a change to a JSON file of a copy."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def adm_center_crop(image, size):
    """guided-diffusion's image_datasets.py in numpy slices: an independent statement of the same crop."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    ratio = size / min(*image.size)
    image = image.resize(tuple(round(x * ratio) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


# ---- processes of their own


EXPERIMENT = """
import json, os, signal, sys
import checkpoint, train
for name, value in json.loads(sys.argv[1]).items():
    setattr(train, name, [tuple(v) for v in value] if name == "LAYER_PAIRS" else value)
number, at, rank = (int(value) for value in sys.argv[2:])
draw_noise, save_file = train.draw_noise, checkpoint.save_file
first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
def signal_in_the_middle_of_a_step(step, *args, **options):
    if step == at and first_start and rank in (-1, int(os.environ.get("RANK", 0))):
        os.kill(os.getpid(), number)
    return draw_noise(step, *args, **options)
def kill_in_the_middle_of_saving(tensors, path, metadata):
    if f"step_{-at:07d}" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(tensors, path, metadata)
train.draw_noise, checkpoint.save_file = signal_in_the_middle_of_a_step, kill_in_the_middle_of_saving
{extra}
train.main()
{after}
"""


@pytest.fixture
def run_process(tmp_path, data_dir, teacher_file):
    """Runs train.main() in processes of its own, on several nodes; those of `rank` (-1: all) get the signal `number` in
    the middle of the step `at`, or if negative, SIGKILL while the checkpoint of step -at is being written."""

    def run(folder, number=0, at=10**6, rank=-1, processes=None, nodes=1, restarts=0, extra="", after="", **constants):
        (tmp_path / "experiment.py").write_text(EXPERIMENT.replace("{extra}", extra).replace("{after}", after))
        constants = {**small_constants(data_dir, teacher_file, folder), **constants}
        launch = []
        if processes:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            launch = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes}",
                      f"--max-restarts={restarts}", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}"]
        command = [sys.executable, *launch, str(tmp_path / "experiment.py"), json.dumps(constants), str(int(number)),
                   str(at), str(rank)]
        agents = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
                  for _ in range(nodes)]
        ended = [agent.communicate(timeout=300) for agent in agents]
        return subprocess.CompletedProcess(command, max((agent.returncode for agent in agents), key=abs),
                                           *("".join(texts) for texts in zip(*ended)))
    return run


def read_log(run):
    with open(Path(run) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- the FID Inception


def recipe_weights(state):
    """The random weights that tests/golden/inception.npz was made with (its meta tells the recipe)."""
    weights = {}
    for key, p in state.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = p
            continue
        r = torch.randn(p.shape, generator=torch.Generator().manual_seed((zlib.crc32(key.encode()) + 7) % 2**31))
        if key.endswith("running_var"):
            weights[key] = r.abs() * 0.2 + 0.8
        elif key.endswith(("running_mean", "bias")):
            weights[key] = 0.05 * r
        elif key.endswith("bn.weight"):
            weights[key] = 1 + 0.1 * r
        else:
            weights[key] = r * (1.6 / p[0].numel()) ** 0.5
    return weights


@pytest.fixture(scope="session")
def weights():
    return recipe_weights(InceptionV3().state_dict())


@pytest.fixture
def pytorch_fids_network(monkeypatch):
    """(pytorch-fid's network, the state dict of its weights), random weights."""
    judge = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is the judge")

    def random_weights(*_, **__):  # in place of its download; num_batches_tracked and all other keys are its own
        net = judge._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        return recipe_weights(net.state_dict())
    monkeypatch.setattr(judge, "load_state_dict_from_url", random_weights)
    whole = judge.fid_inception_v3()
    monkeypatch.setattr(judge, "fid_inception_v3", lambda: whole)
    return judge.InceptionV3().eval(), whole.state_dict()
