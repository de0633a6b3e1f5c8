"""The class tokens of the training images, which REG (arXiv 2507.01467) denoises beside their latents: computed once,
before a run's first step, so that phase II needs neither the teacher nor the images. Beside the prepared data lie then

    class_tokens_TEACHER_16x16.npy            float16 [N, E], of a teacher that sees 16 x 16 patches
    class_tokens_TEACHER_16x16_mirrored.npy   of the mirrored images, with train.MIRROR

where TEACHER is the beginning of its weights' checksum, or timm's name. Where it has no class token, they are called
patch_means, as the means of its patch tokens stand in. Until a file is whole, it is in a folder .unfinished.
"""

import os
import re

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from dataset import PreparedDataset, open_loader
from model import pack, unpack
from runtime import lock_folder, remove_folder, reserve, write_atomically
from teacher import teacher_for_grid
from vae import sample_latents

CHUNK = 64  # images that the teacher sees at once, whoever computes them: so they are the same to the bit


def clean_state(data, moments, posterior_noise, cls=None):
    """What the student learns to make of noise: latents [B, C, h, w], of REG packed with their class tokens cls [B, E].
    posterior_noise: in the state's shape, as all that is drawn, or None where pixels need none."""
    if cls is None:
        return sample_latents(moments, posterior_noise, data.vae)
    if posterior_noise is not None:
        posterior_noise, _ = unpack(posterior_noise, data.shape)
    return pack(sample_latents(moments, posterior_noise, data.vae), cls.float())


def read_tokens(file, count):
    """The memory map of a file. Raises ValueError where it is damaged, or not of so many images."""
    try:
        tokens = np.load(file, mmap_mode="r")
        if tokens.dtype != np.float16 or tokens.ndim != 2 or len(tokens) != count:
            raise ValueError(f"{tokens.dtype} {list(tokens.shape)}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: damaged, or not the class tokens of {count:,} images ({error}); delete it, and it "
                         f"is computed again") from error
    return tokens


class WithClassTokens(PreparedDataset):
    """A prepared folder whose batches have a fourth part: the images' class tokens, float16 [B, E]."""

    def __init__(self, files, path, with_images=True):
        super().__init__(path, with_images)
        self.files = files
        self.class_tokens = [read_tokens(file, len(self)) for file in files]

    def __reduce__(self):
        return WithClassTokens, (self.files, self.path, self.with_images)

    def __getitem__(self, indices):
        flip, rows = np.divmod(indices, len(self))
        tokens, flip = self.class_tokens[0][rows], flip > 0
        if flip.any():
            tokens[flip] = self.class_tokens[1][rows[flip]]
        return *super().__getitem__(indices), torch.from_numpy(tokens)


class ClassTokens:
    """The class tokens that a run on the prepared folder `data` with these settings reads, of width `dim`; of a teacher
    with grid x grid patches, which is loaded only where some are missing."""

    def __init__(self, data, settings, grid, world):
        checksum, teacher = settings["checksums"]["TEACHER"], settings["TEACHER"]
        name = checksum[:16] if checksum else re.sub(r"[^\w.-]", "_", teacher)
        suffixes = ("", "_mirrored")[: 1 + settings["MIRROR"]]
        files_of = {kind: [data.path / f"{kind}_{name}_{grid}x{grid}{suffix}.npy" for suffix in suffixes]
                    for kind in ("class_tokens", "patch_means")}
        self.path, self.world, self.teacher = data.path, world, None
        self.kind = next((kind for kind, files in files_of.items() if all(file.exists() for file in files)), None)
        if self.any_rank(self.kind is None):
            self.teacher = teacher_for_grid(teacher, [], grid)
            self.kind = "class_tokens" if self.teacher.has_class_token else "patch_means"
        self.files = files_of[self.kind]
        self.dim = self.teacher.dim if self.teacher else read_tokens(self.files[0], len(data)).shape[1]

    def any_rank(self, missing):
        """Whether something is missing for any process: of nodes that do not see the same, all do the same."""
        missing = torch.tensor(int(missing))
        if self.world > 1:
            dist.all_reduce(missing, dist.ReduceOp.MAX)
        return bool(missing)

    def compute(self, workers, rank, device):
        """Writes the files that are missing; every process takes part. Returns a line if there are no class tokens."""
        for number, file in enumerate(self.files):
            if self.any_rank(not file.exists()):
                data = PreparedDataset(self.path)
                write_tokens(file, data, number * len(data), self.teacher.to(device), workers, rank, self.world, device)
        self.teacher = None
        return "" if self.kind == "class_tokens" else \
            "TEACHER has no class token: the mean of its patch tokens is denoised in its place\n"

    def open(self, with_images=True):
        return WithClassTokens(self.files, self.path, with_images)


def write_tokens(file, data, first, teacher, workers, rank, world, device):
    """The class tokens of the data set's items from `first` on, by all processes and in float32 (on GPUs TF32). They go
    into a memory-mapped file, where `done` says which chunks are there: killed, the same command goes on."""
    unfinished, wait_for_all = file.with_suffix(".unfinished"), dist.barrier if world > 1 else lambda: None
    tokens_file, done_file, N = unfinished / "tokens.npy", unfinished / "done.npy", len(data)
    if rank == 0:
        begin(unfinished, tokens_file, done_file, (N, teacher.dim))
    wait_for_all()
    if not done_file.exists():
        raise ValueError(f"{unfinished}: rank {rank} does not see what rank 0 wrote there; put DATA_DIR on a disk that "
                         f"all nodes share, or copy {file.name} to each when it is there")
    tokens, done = np.load(tokens_file, mmap_mode="r+"), np.load(done_file, mmap_mode="r+")
    missing = np.flatnonzero(~done)
    wait_for_all()  # all have seen the same before one goes on
    chunks = [np.arange(chunk * CHUNK, min(N, (chunk + 1) * CHUNK)) for chunk in missing[rank::world]]
    batches = open_loader(data, [first + rows for rows in chunks], workers, device)
    with tqdm(total=len(done), initial=len(done) - len(missing), unit="img", unit_scale=CHUNK, desc="class tokens",
              disable=rank > 0) as bar:
        for rows, (_, _, images) in zip(chunks, batches):
            tokens[rows] = teacher.class_token(images.to(device)).cpu().numpy()
            if not np.isfinite(tokens[rows]).all():
                raise ValueError(f"TEACHER has class tokens beyond float16, as of images {rows[0]} to {rows[-1]}; "
                                 f"choose another, or set CLASS_WEIGHT to 0")
            tokens.flush()
            done[rows[0] // CHUNK] = True
            bar.update(int(done.sum()) - bar.n)  # of all processes
    wait_for_all()
    if rank == 0:
        del tokens, done  # their files go
        os.replace(tokens_file, file)
        remove_folder(unfinished)
    wait_for_all()


def begin(unfinished, tokens_file, done_file, shape):
    """Claims the folder, and reserves in it what is not there yet."""
    try:
        unfinished.mkdir(exist_ok=True)
        lock_folder(unfinished, "DATA_DIR")
        if not (tokens_file.exists() and done_file.exists()):
            reserve(tokens_file, shape)
            write_atomically(done_file, lambda path: reserve(path, (-(-shape[0] // CHUNK),), bool))
    except OSError as error:
        raise ValueError(f"{unfinished}: class tokens cannot be written there ({error.strerror}); make DATA_DIR "
                         f"writable until they are, or set CLASS_WEIGHT to 0") from error
