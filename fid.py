"""Scores samples: FID, sFID, inception score, precision, recall as ADM's evaluator does, and CLIP score of prompts.

    python fid.py                                       # SAMPLES against REFERENCE, with the constants below
    torchrun --nproc_per_node=8 fid.py                  # the same figures, by eight processes
    fid.SAMPLES = "my.npz"; fid.main()                  # from a Python file of yours

What is measured of REFERENCE is kept in an .npz beside it, for the next evaluation. ADM is OpenAI's
guided-diffusion (arXiv 2105.05233); its reference file for ImageNet 256x256 is
https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz
"""

import hashlib
import json
import os
import signal
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from scipy.special import xlogy
from torch import nn
from tqdm import tqdm

import teacher
from prepare_latents import (check_constants, check_writable, ends_in_one_line, image_names, list_folder, new_batch,
                             open_loader, PreparedDataset, read_image, run_script, start_processes, write_atomically)

# what to compare: each an .npz (arr_0: uint8 [N, H, W, 3]), a folder of images, a folder made by prepare_latents.py,
# or the folder of a run or of its samples, where samples.npz is taken
SAMPLES = "runs/haste-xl/samples/samples.npz"  # the paper: 50,000 samples
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # mu, sigma, mu_s, sigma_s in an .npz are used as stored; they may be all
OUT = "runs/haste-xl/fid.json"
# in which features
FEATURES = "inception"  # or what teacher.load_network takes: a timm name or a .safetensors file
FEATURES_SIZE = 224  # pixels at which a timm name's network sees images; None: its own size, as a .safetensors file's
RESIZE = "tf1"  # Inception's way to 299 pixels: "tf1", as ADM's; "bilinear", as pytorch-fid's, in which COCO is judged
INCEPTION_WEIGHTS = None  # None: fetch INCEPTION_URL into torch.hub's cache; or the path of that file
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
PRECISION_RECALL_IMAGES = 10_000  # images of REFERENCE for precision and recall, as many as ADM's file has; None: all
CLIP = None  # CLIP score of SAMPLES: a CLIP of transformers by hub name ("openai/clip-vit-large-patch14") or folder
# speed and memory
BATCH_SIZE = 128  # images per call of the network
WORKERS = 8  # processes per GPU that decode a folder's images; 0: none but this one
DISTANCES = 2**26  # distances between features in memory at once; 2**26 are 256 MiB


# ---- metrics

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu [D], sigma [D, D].

    The root's trace is the sum of the roots of the eigenvalues of R sigma2 R, R = sigma1^(1/2): symmetric, and so exact
    for rank-deficient covariances too (fewer images than dimensions)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding may leave -1e-12


def inception_score(probs, splits=10):
    """(mean, std) over `splits` equal parts of exp(mean KL(p(y|x) || p(y))); probs [N, classes].

    Parts of 1,000 or more, as ADM's, are made in a random order, always the same: sorted by class, as folders of
    classes are, each part would hold few classes. Smaller ones stay in order."""
    scores, probs = [], np.asarray(probs)
    if len(probs) >= 1000 * splits:
        probs = probs[np.random.default_rng(0).permutation(len(probs))]
    for part in np.array_split(probs, splits):
        part = part.astype(np.float64)
        divergence = xlogy(part, part) - xlogy(part, part.mean(axis=0))  # 0 log 0 is 0
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def neighbour_radii(features, k):
    """Distance of each row [N, D] to its k-th nearest other row: [N]."""
    radii = []
    for rows in torch.arange(len(features), device=features.device).split(max(1, DISTANCES // len(features))):
        distances = torch.cdist(features[rows], features)
        distances[rows - rows[0], rows] = torch.inf  # a row is not its own neighbour
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def share_inside(points, centres, radii):
    """Share of points [N, D] that lie in the ball of at least one centre [M, D] with radii [M]."""
    inside = [(torch.cdist(some, centres) <= radii).any(1) for some in points.split(max(1, DISTANCES // len(centres)))]
    return torch.cat(inside).double().mean().item()


@torch.no_grad()
def precision_recall(real_features, fake_features, k=3):
    """(precision, recall) of arXiv 1904.06991: the share of samples that lie within a real image's distance to its k-th
    nearest other real image, and the same with the roles exchanged. Features [N, D] and [M, D], numpy or torch."""
    if min(len(real_features), len(fake_features)) <= k:
        raise ValueError(f"precision and recall need more than k = {k} real images and as many samples, got "
                         f"{len(real_features)} and {len(fake_features)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real, fake = (torch.as_tensor(features).to(device, torch.float32) for features in (real_features, fake_features))
    centre = real.mean(dim=0)  # the distances do not change, and float32 loses fewer digits
    real, fake = real - centre, fake - centre
    return share_inside(fake, real, neighbour_radii(real, k)), share_inside(real, fake, neighbour_radii(fake, k))


# ---- the FID Inception: Google's Inception v3 of 2015-12-05 (arXiv 1512.00567), parameter names as in torchvision

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)  # as in TensorFlow
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    """Convolution, batch norm, ReLU; padding "same" or "valid" as TensorFlow calls it."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding="same"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches of convolutions on the same input, concatenated; the pool runs first in the one called branch_pool. A
    branch is a list of layers, (out_channels, kernel, ...) as Conv takes them, or of a fork, itself a list of two."""

    def __init__(self, channels, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {branch: [] for branch in branches}
        for branch, layers in branches.items():
            width = channels
            for i, layer in enumerate(layers, start=1):
                name = branch if len(layers) == 1 else f"{branch}_{i}"
                fork = {name + "a": layer[0], name + "b": layer[1]} if isinstance(layer, list) else {name: layer}
                for key, arguments in fork.items():
                    self.add_module(key, Conv(width, *arguments))
                width = arguments[0]
                self.branches[branch].append(list(fork))

    def forward(self, x):
        outputs = []
        for branch, layers in self.branches.items():
            ys = [self.pool(x) if branch == "branch_pool" else x]
            for names in layers:
                ys = [getattr(self, name)(ys[0]) for name in names]
            outputs += ys
        return torch.cat(outputs, dim=1)


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize of [B, C, H, W] to size x size: output i reads input i * n / size, without the
    half pixel that every later resize adds. ADM's graph begins with it."""
    for dim in (3, 2):
        n = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = position.long()
        fraction = (position - low).view(-1, *[1] * (3 - dim))
        x_low, x_high = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        x = x_low + (x_high - x_low) * fraction
    return x


class InceptionV3(nn.Module):
    """The network behind FID, sFID and IS, with the parameters of INCEPTION_URL's file, in eval mode.

    resize="tf1": TensorFlow 1's resize to 299, (x - 128) / 128, logits without bias, as in ADM's graph.
    resize="bilinear": half-pixel bilinear resize of x / 255 to 299, 2 x - 1, logits with bias, as in pytorch-fid."""

    def __init__(self, resize="tf1"):
        super().__init__()
        assert resize in ("tf1", "bilinear")
        self.resize = resize
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2, "valid"), Conv(32, 32, 3, 1, "valid")
        self.Conv2d_2b_3x3, self.Conv2d_3b_1x1 = Conv(32, 64, 3), Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, "valid")
        for name, channels, c in (("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)):
            self.add_module(name, Mixed(channels, average_pool, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                                        branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(c, 1)]))
        self.Mixed_6a = Mixed(288, halving_pool, branch3x3=[(384, 3, 2, "valid")],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, "valid")], branch_pool=[])
        row, column = (1, 7), (7, 1)  # 7x7 kernels, taken apart
        for name, c in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
            self.add_module(name, Mixed(
                768, average_pool, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)], branch_pool=[(192, 1)]))
        self.Mixed_7a = Mixed(768, halving_pool, branch3x3=[(192, 1), (320, 3, 2, "valid")],
                              branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3, 2, "valid")], branch_pool=[])
        fork = [(384, (1, 3)), (384, (3, 1))]
        # the max pool in 7c alone is the 2015 graph's own oddity
        for name, channels, pool in (("Mixed_7b", 1280, average_pool), ("Mixed_7c", 2048, max_pool)):
            self.add_module(name, Mixed(channels, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                                        branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)]))
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # on a CPU 1.5 times as fast

    @torch.no_grad()
    def forward(self, images):
        """images uint8 [B, 3, H, W] to (pool [B, 2048], spatial [B, 2023], probs [B, 1008]), float32.

        spatial: the first 7 channels of Mixed_6d's 1x1 branch, flattened H-W-C, the order of ADM's mu_s, sigma_s."""
        if self.resize == "tf1":
            x = (resize_tf1(images.float(), 299) - 128) / 128
        else:
            x = 2 * F.interpolate(images.float() / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(halving_pool(x))))  # [B, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [B, 768, 17, 17], the 1x1 branch first
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean(dim=(2, 3))
        logits = F.linear(pool, self.fc.weight, None if self.resize == "tf1" else self.fc.bias)
        return pool, spatial, logits.softmax(dim=1)


def load_inception():
    """(InceptionV3(RESIZE), its weights' path), INCEPTION_WEIGHTS or INCEPTION_URL's, fetched once and checked against
    its hash."""
    path = Path(INCEPTION_WEIGHTS or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name))
    try:
        state = (torch.load(path, map_location="cpu", weights_only=True) if INCEPTION_WEIGHTS else
                 torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                                    weights_only=True))
        network = InceptionV3(RESIZE)
        network.load_state_dict(state)
        return network, path
    except Exception as error:  # network, zip, unpickler and state dict each raise their own; one sentence serves all
        found = "damaged, or of another network" if path.exists() else "no such file, nor could it be fetched"
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path}: {found} ({reason}); put a copy of {INCEPTION_URL} there, or set "
                         f"INCEPTION_WEIGHTS to the path of one") from error


def preprocess(images, mean, std, size):
    """uint8 [B, 3, H, W] to float32 [B, 3, size, size]: resized as Pillow does, bicubic with antialias to bytes (which
    this equals within 1), then normalised."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
    return teacher.preprocess(images, mean, std, size)


def sha256_of(network):
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().numpy())
    return digest.hexdigest()


@torch.no_grad()
def load_features(device):
    """(callable for measure(), {name, input size, sha256 of the weights}) of the network that FEATURES names.

    A timm network's features are its head's input; of DINOv2 the normed class token, as in FD-DINOv2 (2306.04675)."""
    file = FEATURES if str(FEATURES).endswith(".safetensors") else None
    if FEATURES == "inception":
        network, file = load_inception()
        features, size = network.to(device), 299
    else:
        network = teacher.load_network(FEATURES)
        config = timm.data.resolve_model_data_config(network)
        own_size = config["input_size"][1]
        size = own_size if file or FEATURES_SIZE is None else FEATURES_SIZE
        mean, std = (torch.tensor(config[name], device=device) for name in ("mean", "std"))

        def features(images):
            x = network.forward_features(preprocess(images, mean, std, size))
            return network.forward_head(x, pre_logits=True).flatten(1), None, None

        network.to(device)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else sha256_of(network)
    try:
        if FEATURES != "inception" and size != own_size and hasattr(network, "set_input_size"):
            if size % network.patch_embed.patch_size[0]:
                raise ValueError(f"its patches have {network.patch_embed.patch_size[0]}")
            network.set_input_size(img_size=(size, size))  # resamples a ViT's position table to the new grid
        features(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    except Exception as error:  # of each kind of network its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{FEATURES} takes no images of {size} pixels ({reason}); set FEATURES_SIZE to a multiple of "
                         f"its patch size, or to None") from error
    return features, dict(features=str(FEATURES), features_size=size, weights_sha256=digest)


def load_clip(features, device):
    """(callable for measure() that gives what `features` gives and images' embeddings, callable from texts to theirs,
    {name, sha256 of the weights}) of the network that CLIP names.

    Embeddings [B, D] are unit vectors, their products cosines, and the CLIP score is here the plain mean of these; that
    of arXiv 2104.08718 is 2.5 max(cos, 0), and other tools print 100 max(cos, 0)."""
    try:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        network, info = transformers.CLIPModel.from_pretrained(CLIP, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(CLIP)
        if info["missing_keys"] or len(tokenizer) <= len(tokenizer.all_special_ids):  # made up in silence
            raise ValueError(f"without {next(iter(info['missing_keys']), 'a vocabulary')}")
        network = network.to(device, torch.float32).eval().requires_grad_(False)
        try:
            settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(CLIP)
        except OSError:
            settings = {}  # none there: OpenAI's
        mean = torch.tensor(settings.get("image_mean", timm.data.OPENAI_CLIP_MEAN), device=device)
        std = torch.tensor(settings.get("image_std", timm.data.OPENAI_CLIP_STD), device=device)
        size, length = network.config.vision_config.image_size, network.config.text_config.max_position_embeddings

        def features_and_embeddings(images):
            pooled = network.vision_model(pixel_values=preprocess(images, mean, std, size)).pooler_output
            return *features(images), F.normalize(network.visual_projection(pooled))

        def embed_texts(texts):
            tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return F.normalize(network.text_projection(network.text_model(**tokens.to(device)).pooler_output))

        *_, embedding = features_and_embeddings(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
        if not (embedding * embed_texts([""])).isfinite().all():
            raise ValueError("its weights are damaged")
    except Exception as error:  # the hub, the network stack and transformers each raise their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        remedy = ("pip install -r requirements-text.txt, or set CLIP = None" if isinstance(error, ImportError) else
                  "set CLIP to one's hub name or folder; without a connection, copy the Hugging Face cache (HF_HOME)")
        raise ValueError(f"CLIP {CLIP}: transformers loads no such model ({reason}); {remedy}") from error
    return features_and_embeddings, embed_texts, dict(clip=str(CLIP), clip_weights_sha256=sha256_of(network))


# ---- images

MALFORMED = (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
STORED = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}  # in ADM's reference files


class ImageSet(NamedTuple):
    path: Path  # the file or folder itself
    count: int
    size: tuple  # height, width
    stored: dict  # statistics in the file
    batches: Callable  # (rank, world) -> (index of the first, uint8 [B, 3, H, W]) of every world-th batch; or None


def split(count, world):
    """The rows of each batch; a small set's are smaller, so that each of `world` processes has its part."""
    size = min(BATCH_SIZE, -(-count // world))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def open_npz(path, may_be_statistics):
    """The ImageSet of an ADM .npz, or of mu, sigma and the like alone; streamed, because 50,000 images are 10 GB."""
    try:
        archive = zipfile.ZipFile(path)
        stored = {key: np.lib.format.read_array(archive.open(f"{key}.npy"), allow_pickle=False)
                  for key in STORED if f"{key}.npy" in archive.namelist()}
        alone = may_be_statistics and {"mu", "sigma"} <= stored.keys() and "arr_0.npy" not in archive.namelist()
        if not alone:
            file = archive.open("arr_0.npy")
            np.lib.format.read_magic(file)
            shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
            whole = archive.getinfo("arr_0.npy").file_size - file.tell() == np.prod(shape) * dtype.itemsize
    except MALFORMED as error:
        raise ValueError(f"{path}: no .npz of images ({error}); write arr_0, uint8 NHWC, with numpy.savez") from error
    if any(array.shape != STORED[key] or not np.isfinite(array).all() for key, array in stored.items()):
        raise ValueError(f"{path}: {', '.join(stored)} are not of the shapes {STORED}, or not finite; leave them out")
    if alone:
        return ImageSet(path, 0, None, stored, None)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or in_columns or not whole:
        raise ValueError(f"{path}: arr_0 is {dtype} {list(shape)}{'' if whole else ', cut short'}; write it as uint8 "
                         f"[N, H, W, 3] in C order")

    def batches(rank, world):
        for i, rows in enumerate(split(shape[0], world)):
            batch_shape = (len(rows), *shape[1:])
            try:  # the other processes' batches too: so the file's checksum is checked
                pixels = np.frombuffer(bytearray(file.read(int(np.prod(batch_shape)))), np.uint8).reshape(batch_shape)
            except MALFORMED as error:
                raise ValueError(f"{path}: damaged at image {rows[0]} ({error}); write it again") from error
            if i % world == rank:
                yield rows[0], torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return ImageSet(path, shape[0], shape[1:3], stored, batches)


class ImageFolder:
    """Images of any format and one size below a folder, in the order of their paths. `folder[rows]` is a tuple of one
    uint8 [B, 3, H, W]. Raises ValueError for an image that differs in size or cannot be read."""

    def __init__(self, root):
        self.size, self.files = None, [Path(root, name) for name in image_names(list_folder(root))]
        for file in self.files:  # headers alone: 40,000 a second
            try:
                with Image.open(file) as image:
                    size = image.size[::-1]
            except Exception as error:  # see prepare_latents.read_image
                raise ValueError(f"{file}: cannot be read as an image ({error}); replace it or take it out") from error
            self.size = self.size or size
            if size != self.size:
                raise ValueError(f"{file}: {size[1]} x {size[0]} pixels, but {self.files[0]} has {self.size[1]} x "
                                 f"{self.size[0]}; give all images one size")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        batch = new_batch(len(rows), *self.size, 3)
        for pixels, row in zip(batch.numpy(), rows):
            try:
                pixels[:] = read_image(self.files[row].read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.files[row]}: cannot be read as an image ({error}); replace it or take it "
                                 f"out") from error
        return (batch.permute(0, 3, 1, 2),)


def open_images(path, constant):
    """The ImageSet that SAMPLES or REFERENCE (`constant`) names. Raises ValueError where there is none."""
    path = Path(path)
    drawn = [file for file in (path / "samples.npz", path / "samples/samples.npz") if file.is_file()]
    prepared = (path / "meta.json").exists()
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; set {constant} to an .npz of images or to a folder of them")
    if path.is_file() or drawn:
        images = open_npz(drawn[0] if drawn else path, constant == "REFERENCE" and FEATURES == "inception")
    elif not prepared and any((path / name).exists() for name in ("unfinished", "checkpoints")):
        raise ValueError(f"{path}: unfinished, or a run without samples; run prepare_latents.py or sample.py again")
    else:
        data = PreparedDataset(path) if prepared else ImageFolder(path)
        size = (data.meta["image_size"],) * 2 if prepared else data.size

        def batches(rank, world):
            mine = [np.array(rows) for rows in split(len(data), world)[rank::world]]
            for rows, batch in zip(mine, open_loader(data, mine, WORKERS, torch.device("cpu"))):
                yield int(rows[0]), batch[-1]
        images = ImageSet(path, len(data), size, {}, batches)
    if images.count < 4 and images.batches is not None:
        raise ValueError(f"{images.path}: {images.count} images, but precision and recall need 4; set {constant} to a "
                         f"larger set")
    return images


def read_prompts(images):
    """The prompt of each: its first caption in a prepared folder, or its line of prompts.txt in the images' folder."""
    data = PreparedDataset(images.path) if (images.path / "meta.json").exists() else None
    if data and data.captions:
        return [data.captions[first] for first in data.caption_offsets[:-1]]
    file = (images.path if images.path.is_dir() else images.path.parent) / "prompts.txt"
    try:
        prompts = file.read_bytes().decode().removesuffix("\n").split("\n")  # splitlines() knows other ends of lines
        if len(prompts) != images.count:
            raise ValueError(f"{len(prompts)} lines")
        return prompts
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the {images.count} prompts of {images.path} for the CLIP score ({error}); write "
                         f"them there, in UTF-8, one a line, or set CLIP = None") from error


# ---- their statistics


@torch.no_grad()
def measure(name, images, kept, features, device, rank, world):
    """One pass over all images: on rank 0 their mean and covariance (N - 1) under ADM's names, and "features" and, if
    there are, "probs" and "clip" of `kept` of them, in their order.

    features: callable, uint8 [B, 3, H, W] -> (features [B, D], spatial [B, S] or None, probs [B, classes] or None), and
    after them may come CLIP's embeddings."""
    def outputs(batch):
        batch = (batch.pin_memory() if device.type == "cuda" else batch).to(device, non_blocking=True)
        return {key: y for key, y in zip(("features", "spatial", "probs", "clip"), features(batch)) if y is not None}

    widths = {key: y.shape[1] for key, y in outputs(torch.zeros(1, 3, *images.size, dtype=torch.uint8)).items()}
    tables = {key: torch.zeros(kept, width, device=device) for key, width in widths.items() if key != "spatial"}
    sums = {key: torch.zeros(width + 1, width, dtype=torch.float64, device=device)  # of y'y and, in the last row, y
            for key, width in widths.items() if key in ("features", "spatial")}
    chosen = np.arange(kept) * images.count // kept  # evenly spaced
    chosen_there = torch.from_numpy(chosen).to(device)
    bad = torch.full((), images.count, device=device)  # first image of the first batch with features not finite

    def check():
        if bad < images.count:
            raise ValueError(f"{images.path}: features from image {int(bad)} on are not finite; the weights of "
                             f"{FEATURES} may be damaged, or its precision too low")
    with tqdm(total=images.count, unit="img", desc=name, disable=rank > 0) as bar:
        for number, (first, batch) in enumerate(images.batches(rank, world)):
            found, (start, end) = outputs(batch), np.searchsorted(chosen, [first, first + len(batch)])
            for y in found.values():
                bad = torch.where(y.isfinite().all(), bad, bad.clamp(max=first))
            if number % 100 == 0:  # to look waits for the device
                check()
            for key, table in tables.items():
                table[start:end] = found[key][chosen_there[start:end] - first]
            for key, sum_of in sums.items():
                y = found[key].double()
                sum_of[:-1].addmm_(y.T, y)
                sum_of[-1] += y.sum(dim=0)
            bar.update(min(len(batch) * world, images.count - bar.n))
    check()
    tables, sums = ({key: tensor.cpu() for key, tensor in some.items()} for some in (tables, sums))
    if world > 1:  # a table's row is zero in all processes but one
        for tensor in (*tables.values(), *sums.values()):
            dist.reduce(tensor, 0)
    result = dict(tables)
    for key, sum_of in sums.items():
        kind, mu = "_s" if key == "spatial" else "", sum_of[-1] / images.count
        sigma = (sum_of[:-1] - images.count * torch.outer(mu, mu)) / (images.count - 1)
        result |= {"mu" + kind: mu.numpy(), "sigma" + kind: sigma.numpy()}
    return result


def measure_reference(images, kept, features, network, device, rank, world):
    """(measure() of the reference, the file beside it that keeps this for the next evaluation or None). The file counts
    if it was made of the same images, by name, size and time, with the same network and settings."""
    path = Path(os.path.abspath(images.path))
    kind = Path(FEATURES).name + ("-bilinear" if (FEATURES, RESIZE) == ("inception", "bilinear") else "")
    cache = path.with_name(f"{path.name}.{kind}-{network['weights_sha256'][:8]}-"
                           f"{network['features_size']}-{kept}.npz")
    names = sorted(list_folder(path)) if path.is_dir() else [""]
    states = [(name, (path / name).stat().st_size, (path / name).stat().st_mtime_ns) for name in names]
    made_of = json.dumps(dict(network, format=1, kept=kept, images=images.count, features=kind,
                              files=hashlib.sha256(json.dumps(states).encode()).hexdigest()))
    real = None
    try:
        if rank == 0:
            with np.load(cache, allow_pickle=False) as file:
                real = dict(file) if str(file["made_of"]) == made_of else None
    except MALFORMED:
        pass  # none, or damaged
    known = [real is not None]
    if world > 1:
        dist.broadcast_object_list(known, 0)
    if known[0]:
        if rank == 0:
            print(f"{cache}: statistics of {images.path} from an earlier evaluation")
        return real, cache
    real = measure("reference", images, kept, features, device, rank, world)

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez(file, made_of=made_of, **{key: value for key, value in real.items() if key != "probs"})
    try:
        if rank == 0:
            write_atomically(cache, write)
    except OSError as error:
        print(f"{cache}: not written ({error.strerror}), so the next evaluation measures {images.path} again")
        cache = None
    return real, cache


@ends_in_one_line
def main():
    # processes, and what to compare
    rank, world, device = start_processes()
    check_constants(globals(), {
        "path": "SAMPLES REFERENCE OUT FEATURES", "path or None": "INCEPTION_WEIGHTS CLIP",
        "whole number from 0": "WORKERS PRECISION_RECALL_IMAGES", "whole number from 1": "BATCH_SIZE DISTANCES",
        "whole number from 1 or None": "FEATURES_SIZE"}, RESIZE=("tf1", "bilinear"))
    if rank == 0:
        check_writable(OUT)
    samples, reference = open_images(SAMPLES, "SAMPLES"), open_images(REFERENCE, "REFERENCE")
    kept = min(reference.count, PRECISION_RECALL_IMAGES or reference.count)
    stored = reference.stored if FEATURES == "inception" else {}
    if reference.count and samples.size != reference.size:
        raise ValueError(f"{samples.path}: images of {samples.size[1]} x {samples.size[0]} pixels, those of "
                         f"{reference.path} have {reference.size[1]} x {reference.size[0]}; compare images of one size")
    if reference.count and kept < 4:
        raise ValueError(f"PRECISION_RECALL_IMAGES {kept}: precision and recall need 4")
    prompts = read_prompts(samples) if CLIP else None

    # networks
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.set_float32_matmul_precision("highest")  # TF32's 10 bits of mantissa would show in the metrics
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = False, True
    if local_rank > 0:
        dist.barrier()  # a node's first process fetches the weights, the others find them there
    features, network = load_features(device)
    of_samples, embed_texts, clip = load_clip(features, device) if CLIP else (features, None, {})
    if world > 1 and local_rank == 0:
        dist.barrier()

    # statistics
    real, cache = {}, None
    if reference.count:
        real, cache = measure_reference(reference, kept, features, network, device, rank, world)
    fake = measure("samples", samples, samples.count, of_samples, device, rank, world)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    real = {**real, **stored}

    # metrics
    how = dict(network, **clip, samples=samples.path, sample_count=samples.count, reference=reference.path,
               reference_count=reference.count, reference_stored=list(stored), reference_cache=cache,
               precision_recall_reference_count=kept, batch_size=BATCH_SIZE, processes=world, device=device,
               versions={name: version(name) for name in
                         ("torch", "timm", "numpy", "scipy", "pillow") + ("transformers",) * bool(CLIP)})
    try:
        how["samples_settings"] = json.loads(samples.path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        pass  # not sample.py's
    distance = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    if FEATURES == "inception":
        label = {"tf1": "FID, sFID, inception score, precision, recall as in ADM's evaluator",
                 "bilinear": "FID as in pytorch-fid; inception score, precision, recall of the same network"}[RESIZE]
        metrics = dict(fid=distance)
        how.update(resize=RESIZE, inception_weights=str(INCEPTION_WEIGHTS or INCEPTION_URL),
                   inception_score_splits=max(1, round(samples.count / 5000)))  # ADM's parts hold 5,000 images
        if RESIZE == "tf1" and {"mu_s", "sigma_s"} <= real.keys():  # pytorch-fid defines no sFID
            metrics["sfid"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
        metrics["inception_score"], how["inception_score_std"] = inception_score(fake["probs"],
                                                                                 how["inception_score_splits"])
    else:
        label, metrics = f"Frechet distance in the features of {Path(FEATURES).name}", dict(frechet_distance=distance)
    if reference.count:
        metrics["precision"], metrics["recall"] = precision_recall(real["features"], fake["features"])
    if CLIP:
        texts = torch.cat([embed_texts(prompts[rows.start : rows.stop]) for rows in split(len(prompts), 1)])
        metrics["clip_score"] = (fake["clip"] * texts.cpu()).sum(dim=1).double().mean().item()
        label += f"; CLIP score in {CLIP}"

    # table and file
    for images, measured in ((samples, True), (reference, not {"mu", "sigma"} <= stored.keys())):
        if measured and images.count <= len(real["mu"]):
            print(f"warning: {images.count:,} images in {images.path} for {len(real['mu']):,} features: their "
                  f"covariance is rank-deficient; the distance is computed stably, but larger than with more images")
    classes = how.get("samples_settings", {}).get("CLASS_SAMPLING")
    print(f"{label}\n  {samples.path}: {samples.count:,} images{f', classes {classes}' if classes else ''}")
    if reference.count:
        print(f"  {reference.path}: {reference.count:,} images{', statistics as stored in it' if stored else ''}; "
              f"{kept:,} of them for precision and recall")
    else:
        print(f"  {reference.path}: statistics alone, so no precision and recall")
    print("".join(f"{name:>18}" for name in metrics) + "\n" + "".join(f"{value:>18.4f}" for value in metrics.values()))
    result = json.loads(json.dumps(dict(label=label, **metrics, **how), default=str))
    write_atomically(OUT, lambda path: path.write_text(json.dumps(result, indent=1)))
    return result


if __name__ == "__main__":
    run_script(main)
