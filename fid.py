"""Scores samples against real images: FID, sFID, inception score, precision and recall, as ADM's evaluator does.

    python fid.py                                       # SAMPLES against REFERENCE, with the constants below
    fid.SAMPLES = "my.npz"; fid.main()                  # from a Python file of yours

ADM is OpenAI's guided-diffusion (arXiv 2105.05233); its reference file for ImageNet 256x256 is
https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz
"""

import json
import os
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from scipy.special import xlogy
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import teacher
from prepare_latents import PreparedDataset, write_atomically

# what to compare: each an .npz (arr_0: uint8 [N, H, W, 3]) or a folder made by prepare_latents.py
SAMPLES = "runs/haste-xl/samples/samples.npz"  # the paper: 50,000 samples
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # mu, sigma, mu_s, sigma_s in an .npz are used as stored
OUT = "runs/haste-xl/fid.json"
# in which features
FEATURES = "inception"  # or what teacher.load_network takes: a timm name or a .safetensors file
INCEPTION_WEIGHTS = None  # None: fetch INCEPTION_URL into torch.hub's cache; or the path of that file
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
PRECISION_RECALL_IMAGES = 10_000  # images of REFERENCE for precision and recall, as many as ADM's file has; None: all
# speed and memory
BATCH_SIZE = 128  # images per call of the network
WORKERS = 8  # processes that decode a folder's images; 0: none but this one
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
    """(mean, std) over `splits` equal parts of exp(mean KL(p(y|x) || p(y))); probs [N, classes], in their order."""
    scores = []
    for part in np.array_split(np.asarray(probs, np.float64), splits):
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
    """InceptionV3("tf1") with INCEPTION_WEIGHTS, or with INCEPTION_URL, fetched once and checked against its hash."""
    path = Path(INCEPTION_WEIGHTS or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name))
    try:
        if INCEPTION_WEIGHTS:
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        network = InceptionV3("tf1")
        network.load_state_dict(state)
        return network
    except Exception as error:  # network, zip, unpickler and state dict each raise their own; one sentence serves all
        found = "damaged, or of another network" if path.exists() else "no such file, nor could it be fetched"
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path}: {found} ({reason}); put a copy of {INCEPTION_URL} there, or set "
                         f"INCEPTION_WEIGHTS to the path of one") from error


# ---- images and their statistics

MALFORMED = (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
STORED = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}  # in ADM's reference files


def open_npz(path):
    """What open_images returns, of an ADM .npz; streamed, because 50,000 images are 10 GB."""
    try:
        archive = zipfile.ZipFile(path)
        file = archive.open("arr_0.npy")
        version = "_".join(map(str, np.lib.format.read_magic(file)))
        shape, in_columns, dtype = getattr(np.lib.format, f"read_array_header_{version}")(file)
        whole = archive.getinfo("arr_0.npy").file_size - file.tell() == np.prod(shape) * dtype.itemsize
        stored = {key: np.lib.format.read_array(archive.open(f"{key}.npy"), allow_pickle=False)
                  for key in STORED if f"{key}.npy" in archive.namelist()}
    except MALFORMED as error:
        raise ValueError(f"{path}: no .npz of images ({error}); write arr_0, uint8 NHWC, with numpy.savez") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or in_columns or not whole:
        raise ValueError(f"{path}: arr_0 is {dtype} {list(shape)}{'' if whole else ', cut short'}; write it as uint8 "
                         f"[N, H, W, 3] in C order")
    if any(array.shape != STORED[key] for key, array in stored.items()):
        raise ValueError(f"{path}: {', '.join(stored)} are not of the shapes {STORED}; leave them out")

    def batches():
        for start in range(0, shape[0], BATCH_SIZE):
            batch_shape = (min(BATCH_SIZE, shape[0] - start), *shape[1:])
            try:
                pixels = np.frombuffer(file.read(int(np.prod(batch_shape))), np.uint8).reshape(batch_shape)
            except MALFORMED as error:
                raise ValueError(f"{path}: damaged at image {start} ({error}); write it again") from error
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    return shape[0], batches(), stored


def open_images(path, constant):
    """(count, iterator over uint8 [B, 3, H, W], the statistics stored beside them) of an .npz or a prepared folder."""
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file or folder; set {constant} to an .npz of images or to a prepared folder")
    if Path(path).is_dir():
        data = PreparedDataset(path)
        indices = [batch.numpy() for batch in torch.arange(len(data)).split(BATCH_SIZE)]
        loader = DataLoader(data, sampler=indices, batch_size=None, num_workers=min(WORKERS, os.cpu_count()))
        count, batches, stored = len(data), (images for _, _, images in loader), {}
    else:
        count, batches, stored = open_npz(path)
    if count < 4:
        raise ValueError(f"{path}: {count} images, but precision and recall need 4; set {constant} to a larger set")
    return count, batches, stored


@torch.no_grad()
def measure(name, count, batches, features, kept, device):
    """One pass over all images: their mean and covariance (N - 1) under ADM's names, and `features` of `kept` of them.

    features: callable, uint8 [B, 3, H, W] -> (features [B, D], spatial [B, S] or None, probs [B, classes] or None)."""
    sums, rows, probs = {}, [], []  # sums: of 1, y and y'y, in float64, of each kind of features
    chosen = torch.arange(kept) * count // kept  # evenly spaced
    with tqdm(total=count, unit="img", desc=name) as bar:
        for batch in batches:
            x, spatial, p = features(batch.to(device))
            rows.append(x.cpu()[torch.isin(torch.arange(bar.n, bar.n + len(x)), chosen)])
            probs += [] if p is None else [p.cpu()]
            for kind, y in (("", x), ("_s", spatial)):
                if y is not None:
                    old, y = sums.get(kind, (0, 0, 0)), y.double()
                    sums[kind] = old[0] + len(y), old[1] + y.sum(dim=0), old[2] + y.T @ y
            bar.update(len(batch))
    result = dict(features=torch.cat(rows), probs=torch.cat(probs) if probs else None)
    for kind, (n, total, products) in sums.items():
        sigma = (products - torch.outer(total, total) / n) / (n - 1)
        result["mu" + kind], result["sigma" + kind] = (total / n).cpu().numpy(), sigma.cpu().numpy()
    return result


def network_features(device):
    """The callable for measure() of the network that FEATURES names."""
    network = teacher.load_network(FEATURES).to(device)
    config = timm.data.resolve_model_data_config(network)

    def features(images):
        x = teacher.preprocess(images, config["mean"], config["std"], config["input_size"][1])
        return network.forward_head(network.forward_features(x), pre_logits=True).flatten(1), None, None
    return features


def main():
    count, samples, _ = open_images(SAMPLES, "SAMPLES")
    reference_count, reference, stored = open_images(REFERENCE, "REFERENCE")
    stored = stored if FEATURES == "inception" else {}
    kept = min(reference_count, PRECISION_RECALL_IMAGES or reference_count)
    Path(OUT).parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")  # TF32's 10 bits of mantissa would show in the metrics
    torch.backends.cudnn.allow_tf32 = False
    features = load_inception().to(device) if FEATURES == "inception" else network_features(device)

    real = {**measure("reference", reference_count, reference, features, kept, device), **stored}
    fake = measure("samples", count, samples, features, count, device)

    precision, recall = precision_recall(real["features"], fake["features"])
    distance = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    how = dict(features=str(FEATURES), samples=str(SAMPLES), sample_count=count, reference=str(REFERENCE),
               reference_count=reference_count, reference_stored=list(stored), precision_recall_reference_count=kept,
               device=str(device), versions=dict(torch=torch.__version__, timm=timm.__version__))
    if FEATURES == "inception":
        how.update(inception_weights=str(INCEPTION_WEIGHTS or INCEPTION_URL),
                   inception_score_splits=max(1, round(count / 5000)))  # ADM's parts hold 5,000 images
        score, how["inception_score_std"] = inception_score(fake["probs"], how["inception_score_splits"])
        sfid = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
        label = "FID, sFID, inception score, precision, recall as in ADM's evaluator"
        metrics = dict(fid=distance, sfid=sfid, inception_score=score, precision=precision, recall=recall)
    else:
        label = f"Frechet distance in the features of {Path(FEATURES).name}"
        metrics = dict(frechet_distance=distance, precision=precision, recall=recall)
    result = dict(label=label, **metrics, **how)
    write_atomically(OUT, lambda path: path.write_text(json.dumps(result, indent=1)))
    print(f"{label}\n  {SAMPLES}: {count:,} images\n  {REFERENCE}: {reference_count:,} images"
          f"{', statistics as stored in it' if stored else ''}; {kept:,} of them for precision and recall")
    print("".join(f"{name:>18}" for name in metrics) + "\n" + "".join(f"{value:>18.4f}" for value in metrics.values()))
    return result


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # bad input: its one line says what, where and the remedy
        sys.exit(f"fid.py: {error}")
