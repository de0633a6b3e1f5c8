"""Turns images into a prepared data set: VAE latents to train on, the images for the teacher, labels, captions.

    python prepare_latents.py                               # ImageNet: SOURCE into DATA_DIR, with the constants below
    torchrun --nproc_per_node=8 prepare_latents.py          # on eight GPUs
    prepare_latents.SOURCE = ...; prepare_latents.main()    # anything else, from a Python file of yours

SOURCE is told apart by what it is: a folder, zip or tar with one folder of images per class; a tar of one tar per
class (ILSVRC2012_img_train.tar); webdataset's tars; parquet files; a sprite sheet; what REPA's and HASTE's code wrote;
images with captions, COCO's (CAPTIONS) or in a .txt or .json beside each. Archives are read in place. meta.json
is written last: a folder without it is unfinished, and the same command goes on (see dataset.PreparedDataset).
"""

import itertools
import json
import math
import os
import platform
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from checks import check_constants, check_space, check_webp, comparable, refuse_other, weights_checksum
from dataset import FORMAT, REMEDY, PreparedDataset, new_batch, open_loader
from images import ImageFiles, PublishedLatents, center_crop, open_source, pack, square_crop
from published import SCALE
from runtime import ends_in_one_line, lock_folder, remove_folder, reserve, run_script, start_processes, write_atomically
from vae import describe_latents, load_vae

# source
SOURCE = "data/imagenet/train"  # what to prepare: see above
CAPTIONS = None  # COCO's captions_*.json, for the images in SOURCE; None: captions beside the images, if any lie there
SHEET_TILE = 28  # sprite sheet: edge of a tile in pixels
SHEET_CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat",  # sprite sheet: its classes in order, each
                 "sandal", "shirt", "sneaker", "bag", "ankle boot"]  # with the same number of whole rows
LEAVE_OUT_UNREADABLE = False  # True: finish without images that cannot be read, or lack a caption, once listed
# result
DATA_DIR = "data/imagenet256"
IMAGE_SIZE = 256  # pixels
CROP = "adm"  # ADM's centre crop, as for ImageNet; "square": the largest centred square, then Lanczos, as for COCO
VAE = "stabilityai/sd-vae-ft-ema"  # hub name, folder or file, see experiments/README.md; None: pixels, no VAE
VAE_SCALE = None  # of its latents: None is what the VAE says; s, or (s, m) for (z - m) s, a recipe's own
VAE_PRECISION = "float32"  # or "bf16": see experiments/README.md for what it does to the moments
MIRROR = False  # store the latents of the mirrored images too, for train.MIRROR
# speed
BATCH_SIZE = 64  # images per call of the VAE
WORKERS = 16  # processes per GPU that decode, crop and pack; 0: none but this one
COMPILE = True  # torch.compile the VAE's encoder
CHUNK = 1024  # images that are written together: what a killed run has to do again, per process
# check
CHECK = False  # True: compare a finished DATA_DIR with its checksums, prepare nothing
CHECK_IMAGES = 256  # images that are encoded again
CHECK_TOLERANCE = 0.02  # root mean square of the difference from their latents, by that of the latents


# ----- what workers do ----------------------------------------------------------------------------
class Crops:
    """What the workers do: `crops[indices]` is a batch, (tensor, packed images, notes).

    tensor: uint8 pixels [B, C, H, W], or the moments float16 [B, 2C, h, w] of a source that brings them. notes {index:
    the image's captions, a list}, if it has any. An image that cannot be read, or lacks a caption where others have
    them, is zeros, packed to no bytes, and its note is the reason, a str.
    """

    def __init__(self, source, size, moments_shape):
        self.source, self.size, self.moments_shape = source, size, moments_shape
        self.crop = square_crop if CROP == "square" else center_crop

    def __getitem__(self, indices):
        pixels = new_batch(len(indices), self.size, self.size, len(self.source.mode))
        targets = pixels.numpy() if self.source.mode == "RGB" else pixels.numpy()[..., 0]
        brought = VAE is not None and hasattr(self.source, "moments")
        moments = np.zeros((len(indices), *self.moments_shape), np.float16) if brought else None
        packed, notes = [b""] * len(indices), {}
        for row, i in enumerate(indices):
            try:
                image = self.crop(self.source[i], self.size)
                if brought:
                    moments[row] = self.source.moments(i)
                if self.source.captions_checksum is not None:
                    notes[int(i)] = self.source.captions(i)
                targets[row] = image
                packed[row] = pack(image)
            except ValueError as error:  # its own fault; what else fails ends the run
                notes[int(i)], targets[row] = str(error), 0
        return torch.from_numpy(moments) if brought else pixels.permute(0, 3, 1, 2), packed, notes


# ----- chunks -------------------------------------------------------------------------------------
@torch.no_grad()
def encode(pixels, vae, device):
    """uint8 [B, C, H, W] to what latents.npy stores, float16 moments [B, 2C, h, w] on the device."""
    x = (pixels.to(device, non_blocking=True).float() / 127.5 - 1).expand(-1, 3, -1, -1)
    if COMPILE:  # for one shape: a smaller batch is padded
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, BATCH_SIZE - len(x)))
    with torch.autocast(device.type, torch.bfloat16, enabled=VAE_PRECISION == "bf16"):
        mean, std = vae.encode(x.contiguous(memory_format=torch.channels_last))
    return torch.cat([mean, std], dim=1)[: len(pixels)].half()


def write_chunk(folder, number, first, moments, packed, reasons, captions, captions_state):
    """Writes a chunk's latents into their rows from `first` on and its packed images into a file of
    their own, then, atomically, the record that makes both count. moments: {file: float16 tensors
    of the chunk's batches}; captions: a list for each image that is kept, if there are any."""
    kept = np.array([len(file) > 0 for file in packed])
    joined = b"".join(packed)
    checksums = {"images.bin": zlib.crc32(joined)}
    for name, tensors in moments.items():
        rows = np.load(folder / name, mmap_mode="r+")[first : first + len(kept)]
        rows[:] = torch.cat(tensors).cpu().numpy()
        if not np.isfinite(rows).all():
            raise ValueError(f"{folder / name}: the VAE makes values that are not finite, or beyond float16, of images "
                             f"{first}..{first + len(rows) - 1}; choose other weights, or VAE_PRECISION = \"float32\"")
        rows.flush()
        checksums[name] = zlib.crc32(rows[kept])
    if captions:
        checksums["captions.txt"] = zlib.crc32(json.dumps(captions).encode())  # and of where each image's begin
    part = folder / f"unfinished/{number:06d}"
    write_atomically(f"{part}.bin", lambda path: path.write_bytes(joined))
    record = dict(lengths=[len(file) for file in packed], reasons=reasons, captions=captions, checksums=checksums,
                  captions_state=captions_state)
    write_atomically(f"{part}.json", lambda path: path.write_text(json.dumps(record)))


def prepare_chunks(plan, device, rank, world):
    """Makes this rank's part of what is missing: decoded, cropped and packed in worker processes, encoded here, written
    in a thread, so that the device waits for nobody."""
    chunks = {number: plan.chunks[number] for number in plan.missing[rank::world]}
    batches = [rows[i : i + BATCH_SIZE] for rows in chunks.values() for i in range(0, len(rows), BATCH_SIZE)]
    loader = open_loader(plan.crops, batches, WORKERS, device)
    total, written = len(plan.source.labels), None
    bar = tqdm(total=total, initial=total - plan.missing_images, unit="img", desc=plan.folder.name, disable=rank > 0)
    with bar, ThreadPoolExecutor(1) as writer:
        for number, rows in chunks.items():
            moments, packed, reasons, captions = {name: [] for name in plan.latents_files}, [], {}, []
            state = plan.source.captions_state(rows)  # before they are read
            while len(packed) < len(rows):
                tensor, files, notes = next(loader)
                for name in plan.latents_files:
                    x = tensor if name == "latents.npy" else tensor.flip(-1)
                    moments[name].append(x if x.is_floating_point() else encode(x, plan.vae, device))
                packed += files
                reasons.update({plan.source.name(i): note for i, note in notes.items() if isinstance(note, str)})
                captions += [note for note in notes.values() if isinstance(note, list)]
                bar.update(min(len(files) * world, bar.total - bar.n))
            if written is not None:
                written.result()  # raises what the thread raised; and no more than two chunks are in memory
            chunk = number, rows[0], moments, packed, reasons, captions, state
            written = writer.submit(write_chunk, plan.folder, *chunk)
        if written is not None:
            written.result()


# ----- planning -----------------------------------------------------------------------------------
def describe(source):
    """Prints what was understood of a source before the work starts."""
    classes, counts = source.classes, np.bincount(source.labels, minlength=len(source.classes))
    if source.captions_checksum is not None:
        try:
            first = repr(source.captions(0)[0][:100])
        except ValueError as error:
            first = f"an image with {error}"
        number = "captions beside them" if source.coco is None else f"{sum(map(len, source.coco)):,} captions"
        print(f"{SOURCE}: {len(source.labels):,} images with {number}, from {first}")
        if classes == ["all"]:
            return
    comment = ""
    if len(classes) == 1000:
        info = timm.data.ImageNetInfo()
        in_order = list(classes) in (info.label_names(), info.label_descriptions())
        comment = "; ImageNet's, in their order" if in_order else "; by their names not ImageNet's 1,000 in order"
    print(f"{SOURCE}: {len(source.labels):,} images of {len(classes):,} classes, from "
          f"{classes[0]!r} ({counts[0]:,}) to {classes[-1]!r} ({counts[-1]:,}){comment}")


def check_source(source):
    """Raises ValueError for a source that cannot be prepared with these constants."""
    if source.labels.min() < 0:
        raise ValueError(f"{SOURCE}: has labels below 0, as test splits without labels do; choose the training images")
    if CAPTIONS and source.captions_checksum is None:
        raise ValueError(f"CAPTIONS {CAPTIONS!r}: {SOURCE} is no folder or archive of images; set CAPTIONS to None")
    brings_latents = VAE is not None and isinstance(source, PublishedLatents)
    if brings_latents and (MIRROR or source[0].size != (IMAGE_SIZE, IMAGE_SIZE)):
        raise ValueError(f"{SOURCE}: brings latents of images of {source[0].size} pixels, not "
                         "mirrored; set IMAGE_SIZE to their size and MIRROR to False")


def open_vae(source, device):
    """(VAE or None, what meta.json says of it, shape of what is stored of an image)."""
    if VAE is None:
        return None, None, (len(source.mode), IMAGE_SIZE, IMAGE_SIZE)
    if isinstance(source, PublishedLatents):
        scale, shift = VAE_SCALE or (SCALE, 0.0)
        vae, shape = None, source.shape
    else:
        vae, scale, shift = load_vae(VAE, *(VAE_SCALE or ()))
        vae = vae.to(device, memory_format=torch.channels_last)
        if IMAGE_SIZE % vae.factor:
            raise ValueError(f"IMAGE_SIZE {IMAGE_SIZE} is no multiple of {vae.factor}, the VAE's reduction")
        if COMPILE:
            vae.encode = torch.compile(vae.encode)
        shape = (2 * vae.channels, IMAGE_SIZE // vae.factor, IMAGE_SIZE // vae.factor)
    return vae, dict(name=VAE, scale=scale, **(dict(shift=shift) if shift else {})), shape


class Plan:
    """A source, the folder that it becomes, and the chunks of images in which it does; what is done of them. Raises
    ValueError where another source, or other settings, began the folder."""

    def __init__(self, folder, settings, device):
        self.folder, self.unfinished, self.settings = folder, folder / "unfinished", settings
        self.source = open_source(SOURCE, CAPTIONS, SHEET_TILE, SHEET_CLASSES)
        plan_file, names_file = self.unfinished / "plan.json", self.unfinished / "names.npz"
        self.begun = json.loads(plan_file.read_text()) if plan_file.exists() else None
        if self.begun and self.begun["names_checksum"] != self.source.fingerprint and names_file.exists():
            self.source.follow(**np.load(names_file), checksum=self.begun["names_checksum"])
        check_source(self.source)
        self.vae, self.vae_meta, self.shape = open_vae(self.source, device)
        self.latents_files = [] if VAE is None else ["latents.npy"] + ["latents_mirrored.npy"] * MIRROR
        self.crops = Crops(self.source, IMAGE_SIZE, self.shape)
        count = len(self.source.labels)
        self.record = dict(settings, images=count, names_checksum=self.source.fingerprint,
                           captions_checksum=self.source.captions_checksum, chunk=CHUNK)
        if self.begun:
            if self.begun["names_checksum"] == self.source.fingerprint:
                self.begun["source"] = settings["source"]  # the same, wherever it lies now
            refuse_other(folder, "begun", comparable(self.begun, self.record), comparable(self.record, self.begun))
        self.chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
        self.removed = np.zeros(count, bool) if self.source.removed is None else self.source.removed
        self.moving = (self.unfinished / "moving").exists()
        self.missing = [number for number in range(len(self.chunks)) if self.is_missing(number)]
        self.missing_images = sum(len(self.chunks[number]) for number in self.missing)

    def record_of(self, number):
        return self.unfinished / f"{number:06d}.json"

    def is_missing(self, number):
        """Whether a chunk has to be made: it has no record; or, until the parts are being moved, an image of it was
        removed since, its captions have changed, or one could not be read and may be repaired now."""
        record, rows = self.record_of(number), self.chunks[number]
        if not record.exists() or self.moving:
            return not record.exists()
        said = json.loads(record.read_text())
        state = self.source.captions_state(rows)
        changed = self.removed[list(rows)].any() or said.get("captions_state", state) != state
        return changed or bool(said["reasons"] and not LEAVE_OUT_UNREADABLE)


def begin(plan):
    """Claims the folder, says what will be done and makes room for it."""
    plan.unfinished.mkdir(parents=True, exist_ok=True)
    lock_folder(plan.unfinished, "DATA_DIR")
    if (plan.folder / "meta.json").exists():
        raise ValueError(f"{plan.folder}: another process has just finished it; there is nothing to do")
    describe(plan.source)
    shape = (len(plan.source.labels), *plan.shape)
    latents_bytes = 2 * math.prod(shape) * len(plan.latents_files)
    check_space(plan.folder, plan.crops, plan.missing_images, 0 if plan.begun else latents_bytes)
    if not plan.begun:
        for name in plan.latents_files:
            reserve(plan.folder / name, shape)
        if type(plan.source) is ImageFiles:
            np.savez(plan.unfinished / "names.npz", names=plan.source.names, labels=plan.source.labels)
        write_atomically(plan.unfinished / "plan.json", lambda path: path.write_text(json.dumps(plan.record)))
    elif VAE is None:
        (plan.folder / "latents.npy").unlink(missing_ok=True)  # begun by a version that stored pixels there too


# ----- joining ------------------------------------------------------------------------------------
def judge(plan, records, kept, rank, wait_for_all):
    """Lists the images that could not be read, or have no caption, in unreadable.txt; returns how many. Raises
    ValueError if they may not be left out, or if no image is left."""
    reasons = {name: reason for record in records for name, reason in record["reasons"].items()}
    file = plan.folder / "unreadable.txt"
    if rank == 0:
        file.unlink(missing_ok=True)
        if reasons:
            listed = "".join(f"{name}: {reason}\n" for name, reason in reasons.items())
            file.write_bytes(os.fsencode(listed))  # names need not be UTF-8
    wait_for_all()
    unreadable = len(reasons) - int(plan.removed.sum())
    if not kept.any() or unreadable and not (LEAVE_OUT_UNREADABLE or plan.moving):
        unlabelled = list(reasons.values()).count("no label")
        faults = ["could not be read"] * (unlabelled < unreadable) + ["have no label"] * (unlabelled > 0)
        if plan.source.captions_checksum is not None:
            faults.append("have no caption")
        remedy = ", or set LEAVE_OUT_UNREADABLE = True" if kept.any() else ""
        raise ValueError(f"{plan.folder}: {unreadable:,} of {len(kept):,} images {' or '.join(faults)}; "
                         f"unreadable.txt there lists them, the others are done. Repair or remove them and run "
                         f"again{remedy}")
    return len(reasons)


def move_parts(folder, first_bytes, rank, world):
    """Moves the chunks' packed images to their places in images.bin. A part that is gone was moved before a kill."""
    with open(folder / "images.bin", "r+b") as images:
        for number in range(rank, len(first_bytes), world):
            part = folder / f"unfinished/{number:06d}.bin"
            if part.exists():
                images.seek(first_bytes[number])
                images.write(part.read_bytes())
                images.flush()
                os.fsync(images.fileno())
                part.unlink()


def drop_rows(path, kept):
    """Leaves only the kept rows [N] in a .npy file, unless a run before this one has done it."""
    rows, chosen = np.load(path, mmap_mode="r"), np.flatnonzero(kept)
    if len(rows) == len(chosen):
        return

    def write(temporary):
        shorter = np.lib.format.open_memmap(temporary, "w+", rows.dtype, (len(chosen), *rows.shape[1:]))
        for first in range(0, len(chosen), CHUNK):
            shorter[first : first + CHUNK] = rows[chosen[first : first + CHUNK]]
        shorter.flush()
    write_atomically(path, write)


def finish(plan, records, kept, ends):
    """All but images.bin; last meta.json, which makes the folder a data set. Returns what it says."""
    folder, source, captions = plan.folder, plan.source, None
    for name in plan.latents_files:
        drop_rows(folder / name, kept)
    np.save(folder / "image_offsets.npy", np.concatenate([[0], ends[1:][kept]]))
    np.save(folder / "labels.npy", source.labels[kept].astype(np.int64))
    names = [*plan.latents_files, "images.bin", "image_offsets.npy", "labels.npy"]
    if source.captions_checksum is not None:
        captions = [own for record in records for own in record.get("captions", [])]  # of each image that is kept
        (folder / "captions.txt").write_bytes("".join(f"{one}\n" for own in captions for one in own).encode())
        np.save(folder / "caption_offsets.npy", np.cumsum([0, *map(len, captions)]))
        names += ["captions.txt", "caption_offsets.npy"]
    chunks = []
    for rows, record in zip(plan.chunks, records):
        labels = source.labels[rows][kept[rows]].astype(np.int64)
        chunks.append((len(labels), {**record["checksums"], "labels.npy": zlib.crc32(labels)}))
    versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                    pillow=PIL.__version__)
    meta = dict(format=FORMAT, count=int(kept.sum()), **plan.settings, vae=plan.vae_meta, latent_shape=plan.shape,
                image_mode=source.mode, classes=source.classes, captions=sum(map(len, captions or [])) or None,
                captions_checksum=source.captions_checksum,
                bytes={name: (folder / name).stat().st_size for name in names}, versions=versions, chunks=chunks)
    write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))
    remove_folder(plan.unfinished)
    return meta


def report(plan, meta, seconds, unreadable):
    """Prints what was made, and what was left out and why."""
    source, made = plan.source, plan.missing_images
    captions = f" with {meta['captions']:,} captions" if meta["captions"] else ""
    sizes = ", ".join(f"{name} {meta['bytes'][name] / 2**20:,.0f} MiB" for name in (*plan.latents_files, "images.bin"))
    print(f"{plan.folder}: {meta['count']:,} images of {len(source.classes)} classes{captions}, {made:,} of them in "
          f"these {seconds:.0f} s ({made / seconds:.0f} images/s)\n"
          f"  {list(plan.shape)} an image: {sizes}\n"
          f"  left out: {unreadable} unreadable images, {source.unclassed} images outside class folders; "
          f"ignored {source.ignored} files that are no images{' of CAPTIONS' if CAPTIONS else ''}")
    if VAE is not None:
        print(f"  {describe_latents(PreparedDataset(plan.folder, with_images=False))}")


# ----- checking -----------------------------------------------------------------------------------
def check(folder):
    """Compares a finished folder with its checksums, and if it has latents, CHECK_IMAGES of its images, encoded again,
    with these. Raises ValueError that names the file and the images where they differ."""
    data, first = PreparedDataset(folder), 0
    for count, checksums in tqdm(data.meta["chunks"], desc=f"{folder}: checksums", unit="chunk"):
        last = first + count
        arrays = {"latents.npy": data.latents, "latents_mirrored.npy": data.mirrored, "labels.npy": data.labels}
        contents = {name: rows[first:last] for name, rows in arrays.items() if rows is not None}
        contents["images.bin"] = data.packed[data.offsets[first] : data.offsets[last]]
        if "captions.txt" in checksums:
            spans = itertools.pairwise(data.caption_offsets[first : last + 1])
            contents["captions.txt"] = json.dumps([data.captions[begin:end] for begin, end in spans]).encode()
        for name, content in contents.items():
            if zlib.crc32(np.ascontiguousarray(content)) != checksums[name] or \
                    (name.startswith("latents") and not np.isfinite(content).all()):
                raise ValueError(f"{folder / name}: damaged somewhere in images {first}..{last - 1}; {REMEDY}")
        first = last
    written = f"{folder}: {len(data):,} images are what was written"
    if data.vae is None:
        return print(written)
    rows = np.unique(np.linspace(0, len(data) - 1, CHECK_IMAGES).astype(int))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(data.vae["name"], data.vae["scale"])[0].to(device)
    worst = 0
    for some in np.array_split(rows, -(-len(rows) // BATCH_SIZE)):
        stored, _, images = data[some]
        again = encode(images, vae, device)
        error = (again.cpu().float() - stored.float()).square().mean(dim=(1, 2, 3)).sqrt()
        error /= stored.float().square().mean(dim=(1, 2, 3)).sqrt()
        worst = max(worst, error.max().item())
        if worst > CHECK_TOLERANCE:
            raise ValueError(f"{folder / 'latents.npy'}: image {some[error.argmax()]}, encoded again, differs by "
                             f"{worst:.1%}; these latents belong to other images or another VAE: {REMEDY}")
    print(f"{written}; {len(rows)} of them, encoded again, differ by at most {worst:.2%} (root mean square)")


# ----- the preparation ----------------------------------------------------------------------------
def is_finished(folder, settings):
    """Whether the folder is a data set. Raises ValueError where it was prepared with other settings."""
    if not (folder / "meta.json").exists():
        return False
    finished = PreparedDataset(folder).meta
    checksum = finished.get("captions_checksum")
    if CAPTIONS and checksum and Path(CAPTIONS).is_file():
        checksum = zlib.crc32(Path(CAPTIONS).read_bytes())
    settings = dict(settings, captions_checksum=checksum)
    refuse_other(folder, "finished", comparable(finished, settings), comparable(settings, finished))
    if os.environ.get("RANK", "0") == "0":
        if (folder / "unfinished").exists():
            remove_folder(folder / "unfinished")
        print(f"{folder}: already finished, {finished['count']:,} images; nothing to do")
    return True


@ends_in_one_line
def main():
    started = time.time()
    check_constants(globals(), {
        "path": "SOURCE DATA_DIR", "path or None": "CAPTIONS VAE", "list or None": "SHEET_CLASSES",
        "scale, (scale, shift) or None": "VAE_SCALE", "True or False": "LEAVE_OUT_UNREADABLE MIRROR COMPILE CHECK",
        "whole number from 1": "SHEET_TILE IMAGE_SIZE BATCH_SIZE CHUNK CHECK_IMAGES", "whole number from 0": "WORKERS",
        "number from 0": "CHECK_TOLERANCE"}, CROP=("adm", "square"), VAE_PRECISION=("float32", "bf16"))
    check_webp()
    folder = Path(DATA_DIR)
    settings = dict(source=str(SOURCE), captions_source=CAPTIONS and str(CAPTIONS), image_size=IMAGE_SIZE, crop=CROP,
                    vae_name=VAE, vae_checksum=weights_checksum(VAE) if VAE else None, mirror=MIRROR,
                    vae_precision=VAE_PRECISION if VAE else None,
                    **(dict(vae_scale=VAE_SCALE) if VAE and VAE_SCALE else {}))
    if CHECK:
        return check(folder)
    if is_finished(folder, settings):
        return
    rank, world, device = start_processes()
    torch.set_float32_matmul_precision("high")  # on GPUs float32 convolutions and products may use TF32
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for the one shape there is
    wait_for_all = dist.barrier if world > 1 else lambda: None

    # from the source to chunks of latents and packed images
    plan = Plan(folder, settings, device)
    wait_for_all()
    if rank == 0:
        begin(plan)
    wait_for_all()
    prepare_chunks(plan, device, rank, world)
    wait_for_all()

    # what could not be read
    records = [json.loads(plan.record_of(number).read_text()) for number in range(len(plan.chunks))]
    lengths = np.concatenate([record["lengths"] for record in records])
    kept = lengths > 0
    unreadable = judge(plan, records, kept, rank, wait_for_all)

    # packed images to their places in images.bin; from here on, what is left out stays left out
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if rank == 0:
        (plan.unfinished / "moving").touch()
        with open(folder / "images.bin", "ab") as file:
            file.truncate(ends[-1])
    wait_for_all()
    move_parts(folder, ends[: -1 : CHUNK], rank, world)
    wait_for_all()
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        meta = finish(plan, records, kept, ends)
        report(plan, meta, time.time() - started, unreadable)


if __name__ == "__main__":
    run_script(main)
