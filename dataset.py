"""The prepared folder as training and evaluation read it, and the loader that reads ahead of them."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info

from checks import check_webp
from runtime import STOP_SIGNALS

FORMAT = 1  # of the prepared folder
REMEDY = "delete the folder and run prepare_latents.py again"  # for a finished folder that is damaged


class PreparedDataset:
    """Reads a folder that prepare_latents.py wrote. `dataset[indices]` is a batch: (moments, labels, images or None).

    latents.npy           only with a VAE: float16 [N, 2C, h, w], posterior mean and std
    latents_mirrored.npy  the same of the mirrored images, if prepared with MIRROR
    images.bin            lossless WebP files end to end
    image_offsets.npy     int64 [N + 1]: where each begins and ends
    labels.npy            int64 [N]
    captions.txt          only if there are: UTF-8, one a line
    caption_offsets.npy   int64 [N + 1]: image i has captions offsets[i] .. offsets[i + 1] - 1
    meta.json             count, sizes, class names, VAE and its scale and shift, source, versions, bytes, checksums

    Without a VAE the moments are the images' pixels, uint8 [B, C, H, W] (C 1 for grayscale), decoded once for both.
    `dataset[indices, draws]`, draws in 0..1, has the number of a caption of each image, int64 [B], in place of labels.
    Index i + N is image i mirrored left to right; with a VAE only if `mirrored` is not None. Large files are memory
    maps. With `with_images=False` images are None, and with a VAE their files are not opened. `captions` is None, or
    all, in order. Raises ValueError where the folder is missing, unfinished or damaged.
    """

    def __init__(self, path, with_images=True):
        self.path, self.with_images = Path(path), with_images
        self.meta = read_meta(self.path)
        self.vae, self.classes = self.meta["vae"], self.meta["classes"]
        channels, *size = self.meta["latent_shape"]
        self.shape = (channels if self.vae is None else channels // 2, *size)  # of one latent, (C, h, w)
        self.check_sizes()
        self.latents, self.mirrored = self.load_latents("latents.npy"), self.load_latents("latents_mirrored.npy")
        self.labels = np.load(self.path / "labels.npy")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"{self.path / 'labels.npy'}: labels {self.labels.min()}..{self.labels.max()}, but "
                             f"meta.json names {len(self.classes)} classes; {REMEDY}")
        if with_images or self.vae is None:
            check_webp()
            self.packed = np.asarray(np.memmap(self.path / "images.bin", dtype=np.uint8, mode="r"))
            self.offsets = np.load(self.path / "image_offsets.npy", mmap_mode="r")
        self.captions = self.caption_offsets = None
        if "captions.txt" in self.meta["bytes"]:
            self.read_captions()

    def check_sizes(self):
        """Raises ValueError unless the files that will be read have the sizes that meta.json says."""
        unused = () if self.with_images else "image"
        if self.vae is None:
            unused = "latents"  # earlier versions stored the pixels a second time there
        for name, expected in self.meta["bytes"].items():
            file = self.path / name
            found = file.stat().st_size if file.exists() else 0
            if found != expected and not name.startswith(unused):
                raise ValueError(f"{file}: {found} bytes, meta.json says {expected}; {REMEDY}")

    def load_latents(self, name):
        stored = self.vae is not None and name in self.meta["bytes"]
        return np.load(self.path / name, mmap_mode="r") if stored else None

    def read_captions(self):
        """Raises ValueError unless every image has at least one."""
        file = self.path / "captions.txt"
        damaged = ValueError(f"{file}: damaged, or not the captions that caption_offsets.npy gives "
                             f"to {len(self)} images; {REMEDY}")
        try:
            *self.captions, rest = file.read_bytes().decode().split("\n")
            offsets = self.caption_offsets = np.load(self.path / "caption_offsets.npy")
            whole = not rest and [len(offsets), *offsets[[0, -1]]] == [len(self) + 1, 0, len(self.captions)]
        except (ValueError, IndexError) as error:
            raise damaged from error
        if not whole or np.diff(offsets).min(initial=1) < 1:
            raise damaged

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):  # a worker process opens the files itself: pickled, a memory map is a copy
        return PreparedDataset, (self.path, self.with_images)

    def images(self, rows):
        """uint8 [B, 3, H, W] (channels last in memory); grayscale images are repeated over the channels."""
        size = self.meta["image_size"]
        pixels, rows = new_batch(len(rows), size, size, 3), np.asarray(rows)
        for row, begin, end, target in zip(rows, self.offsets[rows], self.offsets[rows + 1], pixels.numpy()):
            try:
                target[:] = Image.open(io.BytesIO(self.packed[begin:end]), formats=("WEBP",))  # lossless WebP is RGB
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{self.path / 'images.bin'}: image {row} is damaged ({error}); {REMEDY}") from error
        return pixels.permute(0, 3, 1, 2)

    def caption_numbers(self, rows, draws):
        """Of each image's captions the number of the one that its draw in 0..1 picks, int64 [B]."""
        first, last = self.caption_offsets[rows], self.caption_offsets[rows + 1] - 1
        return np.minimum(first + (np.asarray(draws) * (last - first + 1)).astype(int), last)

    def __getitem__(self, indices):
        indices, draws = indices if isinstance(indices, tuple) else (indices, None)
        indices = np.asarray(indices)
        flip, rows = indices >= len(self), indices % len(self)
        labels = torch.from_numpy(self.labels[rows] if draws is None else self.caption_numbers(rows, draws))
        images = self.images(rows) if self.with_images or self.vae is None else None
        if images is not None and flip.any():
            images[flip] = images[flip].flip(-1)
        if self.vae is None:
            return images[:, : self.shape[0]], labels, images if self.with_images else None
        moments = torch.from_numpy(self.latents[rows])
        if flip.any():
            moments[flip] = torch.from_numpy(self.mirrored[rows[flip]])
        return moments, labels, images


def read_meta(folder):
    """What a prepared folder's meta.json says. Raises ValueError where there is none, or it is damaged."""
    file = folder / "meta.json"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; set DATA_DIR to a prepared data set, or make "
                         "one with prepare_latents.py")
    if not file.exists():
        raise ValueError(f"{folder}: no meta.json, so this is not a finished data set; run "
                         "prepare_latents.py again, it goes on where it stopped")
    try:
        meta = json.loads(file.read_text())
        if missing := {"format", "bytes", "vae", "classes", "latent_shape"} - meta.keys():
            raise KeyError(*missing)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); {REMEDY}") from error
    if meta["format"] != FORMAT:
        raise ValueError(f"{file}: format {meta['format']}, this version reads {FORMAT}; {REMEDY}")
    return meta


# ----- batches, read ahead ------------------------------------------------------------------------
def new_batch(*shape):
    """An empty uint8 tensor; in a loader's process in memory shared with its parent, so that sending does not copy."""
    batch = torch.empty(shape, dtype=torch.uint8)
    return batch if get_worker_info() is None else batch.share_memory_()


def open_loader(dataset, batches, workers, device):
    """Iterator over dataset[indices] of the batches of indices, read ahead by so many processes."""
    workers = min(workers, os.cpu_count())
    context = "fork" if workers and sys.platform == "linux" else None  # whatever Python's: it needs no __main__ guard
    return iter(DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers,
                           multiprocessing_context=context, worker_init_fn=leave_process_group,
                           pin_memory=device.type == "cuda"))


def leave_process_group(_):
    """For loaders' processes: a signal to the whole group is for their parent, which ends them when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in STOP_SIGNALS - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
