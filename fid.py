"""Scores samples: FID, sFID, inception score, precision, recall as ADM's evaluator does, and CLIP score.

    python fid.py                                       # SAMPLES against REFERENCE, with the constants below
    torchrun --nproc_per_node=8 fid.py                  # the same figures, by eight processes
    fid.SAMPLES = "my.npz"; fid.main()                  # from a Python file of yours

What is measured of REFERENCE is kept in an .npz beside it, for the next evaluation. ADM is OpenAI's
guided-diffusion (arXiv 2105.05233); its reference file for ImageNet 256x256 is
https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz
"""

import hashlib
import json
import math
import os
import re
import signal
import zipfile
import zlib
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
from tqdm import tqdm

import teacher
from archives import list_folder
from checks import check_constants, check_sets, check_writable, weights_checksum
from dataset import PreparedDataset, new_batch, open_loader
from images import image_names, read_image, upright_size
from inception import INCEPTION_URL, load_inception
from labels import by_numbers
from runtime import ends_in_one_line, run_script, start_processes, write_atomically

# what to compare: each an .npz (arr_0: uint8 [N, H, W, 3]), a folder of images, a folder made by
# prepare_latents.py, or the folder of a run or of its samples, where samples.npz is taken
SAMPLES = "runs/haste-xl/samples/samples.npz"  # the paper: 50,000 samples
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # its mu, sigma, mu_s, sigma_s are used as stored
OUT = None  # the JSON with the figures; None: beside SAMPLES, named after them, REFERENCE and FEATURES
# in which features
FEATURES = "inception"  # or what teacher.load_network takes: a timm name or a .safetensors file
FEATURES_SIZE = 224  # pixels at which a timm name's network sees images; None: its own size
RESIZE = "tf1"  # Inception's way to 299 pixels: "tf1", as ADM's; "bilinear", as pytorch-fid's, as COCO is judged
INCEPTION_WEIGHTS = None  # None: fetch inception.INCEPTION_URL; or the path of that file
PRECISION_RECALL_IMAGES = 10_000  # images of REFERENCE for these, as many as ADM's file has; None: all
CLIP = None  # for a CLIP score: one of transformers, "openai/clip-vit-large-patch14" or a folder
# speed and memory
BATCH_SIZE = 128  # images per call of the network
WORKERS = 8  # processes per GPU that decode a folder's images; 0: none but this one
DISTANCES = 2**26  # distances between features in memory at once; 2**26 are 256 MiB


# ----- metrics ------------------------------------------------------------------------------------
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians: mu [D], sigma [D, D].

    The root's trace is the sum of the roots of the eigenvalues of R sigma2 R, R = sigma1^(1/2):
    symmetric, and so exact for rank-deficient covariances too (fewer images than dimensions)."""
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    sigma1, sigma2 = np.asarray(sigma1, np.float64), np.asarray(sigma2, np.float64)
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(min=0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding may leave -1e-12


def inception_score(probs, splits=10):
    """(mean, std) over `splits` equal parts of exp(mean KL(p(y|x) || p(y))); probs [N, classes].

    Parts of 1,000 or more, as ADM's, are made in a random order, always the same: sorted by class,
    as folders of classes are, each part would hold few classes. Smaller ones stay in order."""
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
        raise ValueError(f"precision and recall need more than k = {k} real images and as many "
                         f"samples, got {len(real_features)} and {len(fake_features)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real, fake = (torch.as_tensor(features).to(device, torch.float32) for features in (real_features, fake_features))
    centre = real.mean(dim=0)  # the distances do not change, and float32 loses fewer digits
    real, fake = real - centre, fake - centre
    return share_inside(fake, real, neighbour_radii(real, k)), share_inside(real, fake, neighbour_radii(fake, k))


def preprocess(images, mean, std, size):
    """uint8 [B, 3, H, W] to float32 [B, 3, size, size]: resized as Pillow does, bicubic with
    antialias to bytes (which this equals within 1), then normalised."""
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
    """(callable for measure(), {name, input size, sha256 of the weights}) of the network that FEATURES names. A timm
    network's features are its head's input; of DINOv2 the normed class token, as in FD-DINOv2 (2306.04675)."""
    file = FEATURES if str(FEATURES).endswith(".safetensors") else None
    if FEATURES == "inception":
        network, file = load_inception(INCEPTION_WEIGHTS, RESIZE)
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
    digest = weights_checksum(file) if file else sha256_of(network)
    try:
        if FEATURES != "inception" and size != own_size and hasattr(network, "set_input_size"):
            if size % network.patch_embed.patch_size[0]:
                raise ValueError(f"its patches have {network.patch_embed.patch_size[0]}")
            network.set_input_size(img_size=(size, size))  # resamples a ViT's position table to the new grid
        features(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    except Exception as error:  # of each kind of network its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{FEATURES} takes no images of {size} pixels ({reason}); set "
                         "FEATURES_SIZE to a multiple of its patch size, or to None") from error
    return features, dict(features=str(FEATURES), features_size=size, weights_sha256=digest)


def load_clip(features, device):
    """(callable for measure() that gives what `features` gives and images' embeddings, callable from texts to theirs,
    {name, sha256 of the weights}) of the network that CLIP names. Embeddings [B, D] are unit vectors, and the CLIP
    score is their cosines' mean; that of arXiv 2104.08718 is 2.5 max(cos, 0), other tools print 100 max(cos, 0)."""
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


# ----- images -------------------------------------------------------------------------------------
MALFORMED = (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
STORED = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}  # in ADM's reference files


class ImageSet(NamedTuple):
    path: Path  # the file or folder itself
    count: int
    size: tuple  # height, width
    stored: dict  # statistics in the file
    batches: object  # a function (rank, world) -> (index of the first, uint8 [B, 3, H, W]) of every world-th batch


def split(count, world):
    """The rows of each batch; a small set's are smaller, so that each of `world` processes has its part."""
    size = min(BATCH_SIZE, math.ceil(count / world))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def open_npz(path, may_be_statistics):
    """The ImageSet of an ADM .npz, or of mu, sigma and the like alone; streamed, because 50,000 images are 10 GB."""
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        stored = {key: np.lib.format.read_array(archive.open(f"{key}.npy"), allow_pickle=False)
                  for key in STORED if f"{key}.npy" in names}
        alone = may_be_statistics and {"mu", "sigma"} <= stored.keys() and "arr_0.npy" not in names
        if not alone:
            file = archive.open("arr_0.npy")
            np.lib.format.read_magic(file)
            shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
            whole = archive.getinfo("arr_0.npy").file_size - file.tell() == math.prod(shape) * dtype.itemsize
    except MALFORMED as error:
        raise ValueError(f"{path}: no .npz of images ({error}); write arr_0, uint8 NHWC, with numpy.savez") from error
    if any(array.shape != STORED[key] or not np.isfinite(array).all() for key, array in stored.items()):
        raise ValueError(f"{path}: {', '.join(stored)} are not of the shapes {STORED}, or not finite; leave them out")
    if alone:
        return ImageSet(path, 0, None, stored, None)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or in_columns or not whole:
        raise ValueError(f"{path}: arr_0 is {dtype} {list(shape)}{'' if whole else ', cut short'}; "
                         "write it as uint8 [N, H, W, 3] in C order")

    def batches(rank, world):
        for i, rows in enumerate(split(shape[0], world)):
            batch_shape = (len(rows), *shape[1:])
            try:  # the other processes' batches too: so the file's checksum is checked
                pixels = np.frombuffer(bytearray(file.read(math.prod(batch_shape))), np.uint8).reshape(batch_shape)
            except MALFORMED as error:
                raise ValueError(f"{path}: damaged at image {rows[0]} ({error}); write it again") from error
            if i % world == rank:
                yield rows[0], torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return ImageSet(path, shape[0], shape[1:3], stored, batches)


class ImageFolder:
    """Images of any format and one size below a folder, in the order of their paths, or, where they have prompts
    (CLIP), of the numbers in these: 2 before 10. `folder[rows]` is a tuple of one uint8 [B, 3, H, W]. Raises ValueError
    for an image that differs in size or cannot be read."""

    def __init__(self, root):
        names = image_names(list_folder(root))
        if CLIP and names != sorted(names, key=by_numbers):
            names.sort(key=by_numbers)
            print(f"{root}: images in the order of the numbers in their names, {names[0]}, {names[1]}, ...")
        self.size, self.files = None, [Path(root, name) for name in names]
        for file in self.files:  # headers alone: 40,000 a second
            try:
                with Image.open(file) as image:
                    size = upright_size(image)
            except Exception as error:  # see images.read_image
                raise ValueError(f"{file}: cannot be read as an image ({error}); replace it or take it out") from error
            self.size = self.size or size
            if size != self.size:
                raise ValueError(f"{file}: {size[1]} x {size[0]} pixels, but {self.files[0]} has "
                                 f"{self.size[1]} x {self.size[0]}; give all images one size")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        batch = new_batch(len(rows), *self.size, 3)
        for pixels, row in zip(batch.numpy(), rows):
            try:
                pixels[:] = read_image(self.files[row].read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.files[row]}: cannot be read as an image ({error}); "
                                 "replace it or take it out") from error
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
        raise ValueError(f"{images.path}: {images.count} images, but precision and recall need 4; "
                         f"set {constant} to a larger set")
    return images


def read_prompts(images):
    """The prompt of each: its first caption in a prepared folder, or its line of prompts.txt in the images' folder."""
    data = PreparedDataset(images.path) if (images.path / "meta.json").exists() else None
    if data and data.captions:
        return [data.captions[first] for first in data.caption_offsets[:-1]]
    file = (images.path if images.path.is_dir() else images.path.parent) / "prompts.txt"
    try:
        prompts = re.split("\r?\n", file.read_bytes().decode("utf-8-sig").removesuffix("\n").removesuffix("\r"))
        if len(prompts) != images.count:
            raise ValueError(f"{len(prompts)} lines")
        return prompts
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not the {images.count} prompts of {images.path} for the CLIP score ({error}); write "
                         f"them there, in UTF-8, one a line, or set CLIP = None") from error


# ----- their statistics ---------------------------------------------------------------------------
@torch.no_grad()
def measure(name, images, kept, features, device, rank, world):
    """One pass over all images: on rank 0 their mean and covariance (N - 1) under ADM's names, and
    "features" and, if there are, "probs" and "clip" of `kept` of them, in their order.

    features: callable, uint8 [B, 3, H, W] -> (features [B, D], spatial [B, S] or None, probs [B,
    classes] or None), and after them may come CLIP's embeddings."""
    def outputs(batch):
        batch = batch.pin_memory() if device.type == "cuda" else batch
        found = zip(("features", "spatial", "probs", "clip"), features(batch.to(device, non_blocking=True)))
        return {key: y for key, y in found if y is not None}

    tables, sums = {}, {}  # sums: of y'y and, in the last row, y
    for key, y in outputs(torch.zeros(1, 3, *images.size, dtype=torch.uint8)).items():
        width = y.shape[1]
        if key != "spatial":
            tables[key] = torch.zeros(kept, width, device=device)
        if key in ("features", "spatial"):
            sums[key] = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
    chosen = np.arange(kept) * images.count // kept  # evenly spaced
    chosen_there = torch.from_numpy(chosen).to(device)
    bad = torch.full((), images.count, device=device)  # first image of the first batch not finite

    def check():
        if bad < images.count:
            raise ValueError(f"{images.path}: features from image {int(bad)} on are not finite; "
                             f"the weights of {FEATURES} may be damaged, or its precision too low")
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
        kind = "_s" if key == "spatial" else ""
        mu = sum_of[-1] / images.count
        sigma = (sum_of[:-1] - images.count * torch.outer(mu, mu)) / (images.count - 1)
        result |= {"mu" + kind: mu.numpy(), "sigma" + kind: sigma.numpy()}
    return result


def measure_reference(images, kept, features, network, device, rank, world):
    """(measure() of the reference, the file beside it that keeps this for the next evaluation or None). The file counts
    if it was made of the same images, by name, size and time, with the same network and settings."""
    path = Path(os.path.abspath(images.path))
    kind = Path(FEATURES).name + "-bilinear" * (FEATURES == "inception" and RESIZE == "bilinear")
    cache = path.with_name(f"{path.name}.{kind}-{network['weights_sha256'][:8]}-{network['features_size']}-{kept}.npz")
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


# ----- the evaluation -----------------------------------------------------------------------------
def compute_metrics(real, fake, samples, reference):
    """(label, {metric: value}, {how: they were computed}) of what measure() found."""
    distance = frechet_distance(fake["mu"], fake["sigma"], real["mu"], real["sigma"])
    if FEATURES == "inception":
        label = {"tf1": "FID, sFID, inception score, precision, recall as in ADM's evaluator",
                 "bilinear": "FID as in pytorch-fid; inception score, precision, recall of the same network"}[RESIZE]
        splits = max(1, round(samples.count / 5000))  # ADM's parts hold 5,000 images
        metrics = dict(fid=distance)
        if RESIZE == "tf1" and {"mu_s", "sigma_s"} <= real.keys():  # pytorch-fid defines no sFID
            metrics["sfid"] = frechet_distance(fake["mu_s"], fake["sigma_s"], real["mu_s"], real["sigma_s"])
        metrics["inception_score"], std = inception_score(fake["probs"], splits)
        how = dict(resize=RESIZE, inception_weights=str(INCEPTION_WEIGHTS or INCEPTION_URL),
                   inception_score_splits=splits, inception_score_std=std)
    else:
        label = f"Frechet distance in the features of {Path(FEATURES).name}"
        metrics, how = dict(frechet_distance=distance), {}
    if reference.count:
        metrics["precision"], metrics["recall"] = precision_recall(real["features"], fake["features"])
    return label, metrics, how


def print_table(label, metrics, samples, reference, kept, classes, stored, width):  # width: of the features
    for images, measured in ((samples, True), (reference, not {"mu", "sigma"} <= stored.keys())):
        if measured and images.count <= width:
            print(f"warning: {images.count:,} images in {images.path} for {width:,} features: their covariance is "
                  f"rank-deficient; the distance is computed stably, but larger than with more images")
    print(f"{label}\n  {samples.path}: {samples.count:,} images{f', classes {classes}' if classes else ''}")
    if reference.count:
        print(f"  {reference.path}: {reference.count:,} images{', statistics as stored in it' if stored else ''}; "
              f"{kept:,} of them for precision and recall")
    else:
        print(f"  {reference.path}: statistics alone, so no precision and recall")
    print("".join(f"{name:>18}" for name in metrics))
    print("".join(f"{value:>18.4f}" for value in metrics.values()))


@ends_in_one_line
def main():
    # processes, and what to compare
    rank, world, device = start_processes()
    check_constants(globals(), {
        "path": "SAMPLES REFERENCE FEATURES", "path or None": "OUT INCEPTION_WEIGHTS CLIP",
        "whole number from 0": "WORKERS PRECISION_RECALL_IMAGES", "whole number from 1": "BATCH_SIZE DISTANCES",
        "whole number from 1 or None": "FEATURES_SIZE"}, RESIZE=("tf1", "bilinear"))
    samples, reference = open_images(SAMPLES, "SAMPLES"), open_images(REFERENCE, "REFERENCE")
    out = OUT or samples.path.with_name(f"{samples.path.stem}.{reference.path.stem}.{Path(FEATURES).stem}.json")
    if rank == 0:
        check_writable(out)
    kept = min(reference.count, PRECISION_RECALL_IMAGES or reference.count)
    stored = reference.stored if FEATURES == "inception" else {}
    check_sets(samples, reference, kept)
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

    # metrics, and how they were made
    packages = ("torch", "timm", "numpy", "scipy", "pillow", *["transformers"] * bool(CLIP))
    how = dict(network, **clip, samples=samples.path, sample_count=samples.count, reference=reference.path,
               reference_count=reference.count, reference_stored=list(stored), reference_cache=cache,
               precision_recall_reference_count=kept, batch_size=BATCH_SIZE, processes=world, device=device,
               versions={name: version(name) for name in packages})
    try:
        how["samples_settings"] = json.loads(samples.path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        pass  # not sample.py's
    label, metrics, computed = compute_metrics(real, fake, samples, reference)
    if CLIP:
        texts = torch.cat([embed_texts(prompts[rows.start : rows.stop]) for rows in split(len(prompts), 1)])
        metrics["clip_score"] = (fake["clip"] * texts.cpu()).sum(dim=1).double().mean().item()
        label += f"; CLIP score in {CLIP}"
    classes = how.get("samples_settings", {}).get("CLASS_SAMPLING")
    print_table(label, metrics, samples, reference, kept, classes, stored, len(real["mu"]))
    result = json.loads(json.dumps(dict(label=label, **metrics, **how, **computed), default=str))
    write_atomically(out, lambda path: path.write_text(json.dumps(result, indent=1)))
    if OUT is None:
        print(f"  all of it in {out}")
    return result


if __name__ == "__main__":
    run_script(main)
