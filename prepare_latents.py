"""Turns images into a prepared data set: VAE latents to train on, the images for the teacher, labels, captions.

    python prepare_latents.py                               # ImageNet: SOURCE into DATA_DIR, with the constants below
    torchrun --nproc_per_node=8 prepare_latents.py          # on eight GPUs
    prepare_latents.SOURCE = ...; prepare_latents.main()    # anything else, from a Python file of yours

SOURCE is told apart by what it is: a folder with one folder of images per class; a zip or an uncompressed tar of such
a tree; a tar of one tar per class (ILSVRC2012_img_train.tar), read in place; the folder that REPA's and HASTE's
preprocessing wrote; or a sprite sheet, one image of square tiles, sorted by class. Images with captions need no class
folders: COCO's with their annotations (CAPTIONS), or any with a .txt (one caption a line) or .json ("caption") beside
each, in a folder, a zip, a tar, or a folder of webdataset's tars.

A prepared folder is a few large files that memory-map (see PreparedDataset); meta.json is written last, so a folder
without it is unfinished, and the same command goes on where it stopped.
"""

import gc
import io
import itertools
import json
import math
import multiprocessing
import numbers
import os
import platform
import posixpath
import re
import shutil
import signal
import stat
import struct
import sys
import tarfile
import threading
import time
import traceback
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import wraps
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the rest is imported

import numpy as np
import PIL
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, get_worker_info
from tqdm import tqdm

from vae import SCALE, AutoencoderKL, load_vae  # noqa: F401 - the VAE stood here once

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
VAE = "stabilityai/sd-vae-ft-ema"  # hub name, or diffusers' folder or weights file; None: pixels, no VAE
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

FORMAT = 1  # of the prepared folder
Image.MAX_IMAGE_PIXELS = None  # the user's own: a large one is no attack
REMEDY = "delete the folder and run prepare_latents.py again"  # for a finished folder that is damaged


# ---------------------------------------------------------------------------------------------------------------------
# what every script shares: processes, how it ends, files that are whole or absent


joined = itertools.count()  # how often processes were joined here


def start_processes(nccl=False):
    """(rank, number of processes, device) of this process. Those that torchrun started are joined: for tensors on the
    CPU by gloo, and if `nccl` for those on GPUs too; with it one process on a GPU is a group of one, for FSDP."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # their store still has the addresses of another main() before, and torchrun restarts one node's processes with
        # the store of the attempt before
        one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if one_node else 0}, {next(joined)}"
        store, _, _ = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl and device.type == "cuda" else "gloo", rank=rank,
                                world_size=world, store=dist.PrefixStore(attempt, store),
                                device_id=device if nccl and device.type == "cuda" else None,
                                timeout=timedelta(hours=1 if nccl else 24))  # one may have much more to do
    elif nccl and has_bf16(device) and dist.is_nccl_available() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, store=dist.HashStore())
    return rank, world, device


def has_bf16(device):
    """Whether a device computes in bf16: GPUs of compute capability 8 (Ampere) on; for others PyTorch emulates it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}


def exit_status(number):
    """Of a program that a stop signal ended: as a shell reports Ctrl-C; 0 for those that schedulers send."""
    return 130 if number == signal.SIGINT else 0


def ends_in_one_line(main):
    """A script's main(). Ctrl-C, SIGTERM or SIGUSR1 end the whole program, also one that called main(), with one line;
    a second one at once. What libraries raise and the user can mend becomes an OSError with a remedy."""
    def stop(number, _):
        signal.signal(number, signal.SIG_DFL)
        print(f"{Path(sys.argv[0]).name}: stopped; the same command goes on", file=sys.stderr)
        sys.exit(exit_status(number))

    @wraps(main)
    def until_its_end():
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # a loader's process runs the script
            sys.exit("this system's loader processes run the script again: put its last lines under "
                     "if __name__ == '__main__':, or set WORKERS = 0")
        here = threading.current_thread() is threading.main_thread()  # signals are of no other thread
        handlers = {number: signal.signal(number, stop) for number in STOP_SIGNALS if here}
        try:
            return main()
        except (ValueError, OSError, RuntimeError, SystemExit) as error:
            if (mendable := in_one_line(error)) is None:
                raise
            traceback.clear_frames(error.__traceback__)  # ends loaders, whose processes would complain at their own end
            raise mendable from (None if mendable is error else error)
        finally:
            gc.enable()
            gc.unfreeze()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return until_its_end


def in_one_line(error):
    """The error that says what the user can do: ours as it is, or in place of a library's; None for our mistakes."""
    lines = str(error).strip().splitlines() or [""]
    caught = "Caught " in lines[0] and "DataLoader worker process" in lines[0]  # in a loader's process
    text = lines[-1].removeprefix(f"{type(error).__name__}: ") if caught else lines[0]
    for sign, remedy in (
            ("OutOfMemoryError", "the GPU's memory is full; set a smaller BATCH_SIZE, in train.py more MICRO_BATCHES"),
            ("DataLoader worker", "a loader's process was ended, for lack of memory or of room in /dev/shm; set fewer "
                                  "WORKERS, or 0"),
            ("shared memory", "no room in /dev/shm for what loaders send; enlarge it, or set WORKERS = 0"),
            ("ompiler", "torch.compile found no working C++ compiler; install one, or set COMPILE = False")):
        if isinstance(error, RuntimeError) and sign in f"{type(error).__name__}: {text if caught else error}":
            return OSError(f"{remedy} ({text[:200]})")
    if isinstance(error, RuntimeError):
        return None
    return (OSError if isinstance(error, OSError) else ValueError)(text) if caught else error


def collect_stops():
    """The stop signals that come from here on, a list that grows: for work that ends only at places of its own."""
    numbers = []

    def collect(number, _):
        signal.signal(number, signal.SIG_DFL)
        numbers.append(number)

    for number in STOP_SIGNALS:
        signal.signal(number, collect)
    return numbers


def run_script(main):
    """Runs a script's main(). What the user can mend becomes one line that says what, where and the remedy."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        of_the_system = isinstance(error, OSError) and error.errno is not None  # the disk is full, or gone
        sys.exit(f"{Path(sys.argv[0]).name}: {error}"
                 + ("; what is done is kept, the same command goes on" if of_the_system else ""))


def open_loader(dataset, batches, workers, device):
    """Iterator over dataset[indices] of the batches of indices, read ahead by so many processes."""
    workers = min(workers, os.cpu_count())
    forked = workers and sys.platform == "linux"  # whatever Python's default: a script needs no __main__ guard then
    return iter(DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers,
                           multiprocessing_context="fork" if forked else None, worker_init_fn=leave_process_group,
                           pin_memory=device.type == "cuda"))


def leave_process_group(_):
    """For loaders' processes: a signal to the whole group (Ctrl-C, torchrun's SIGTERM) is for their parent, which ends
    them when it has saved its work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in STOP_SIGNALS - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def check_constants(constants, rules, **choices):
    """Checks a script's constants, globals(), before any work: {rule: names}, and for each other name its choices.
    Rules are "[two] [whole] number[s] from|above A [to B] [or None]", "True or False", "path [or None]".

    Whole floats become ints, None becomes 0 where that is allowed, ~ is expanded. Raises ValueError that names the
    constant, its value and what is allowed.
    """
    for name, rule in (*choices.items(), *((name, rule) for rule, names in rules.items() for name in names.split())):
        value = constants[name]
        if not isinstance(rule, str):
            if not any(value == choice for choice in rule):
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, rule))}")
            continue
        if value is None and rule.endswith("or None"):
            continue
        if found := re.match(r"(two )?(whole )?number(s)? (from|above) (\S+)(?: to (\S+))?", rule):
            two, whole, many, bound, low, high = found.groups()
            listed = list(value) if many and isinstance(value, (tuple, list)) else [value]
            listed = [0 if each is None and whole and low == "0" else each for each in listed]
            good = all(isinstance(each, numbers.Real) and not isinstance(each, bool)
                       and float(low) <= each <= float(high or 1e300) and (bound == "from" or each > float(low))
                       and (not whole or each % 1 == 0) for each in listed)
            good = good and len(listed) == (2 if two else len(listed) or 1)
            if good:
                value = tuple(int(each) if whole else each for each in listed)
                value = value if many else value[0]
        elif rule == "True or False":
            good = isinstance(value, bool)
        else:  # a path, or a name
            good = isinstance(value, (str, os.PathLike)) and str(value)
            value = os.path.expanduser(value) if good else value
        if not good:
            raise ValueError(f"{name} = {value!r}; allowed: {rule}")
        constants[name] = value


def check_writable(path):
    """Raises now what writing the file after hours of work would raise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; set OUT to a file's path")
    with open(f"{path}.tmp", "wb"):
        os.remove(f"{path}.tmp")


def lock_folder(folder, constant):
    """Claims a folder: until the file that it returns is closed, at the latest when the process ends, others are
    refused with a ValueError. Systems and disks without such locks are taken as they are."""
    file = open(folder / "lock", "a+")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ValueError(f"{folder}: {file.read() or 'another process'} is at work here; wait for its end, or choose "
                         f"another {constant}") from error
    except (ImportError, OSError):  # Windows, or a network disk
        pass
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def write_atomically(path, write):
    """Calls write(temporary path beside `path`), flushes it to disk and renames: the file is whole or absent. What a
    killed process leaves, the next one writes over."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# sources


def center_crop(image, size):
    """ADM's crop (guided-diffusion): halve with a box filter while the short edge is >= 2 * size, scale the short edge
    to size (bicubic), cut the centre. PIL image in, PIL image of size x size out."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > 2**28:  # of an extreme shape: its middle alone, not a gigabyte
        x, y = image.width / width, image.height / height
        return image.resize((size, size), Image.BICUBIC, (left * x, top * y, (left + size) * x, (top + size) * y))
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))


def square_crop(image, size):
    """MS-COCO's published preprocessing: the largest centred square, scaled to size (Lanczos)."""
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    return image.crop((left, top, left + square, top + square)).resize((size, size), Image.LANCZOS)


SYSTEM = {"__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}  # folders


def list_folder(root):
    """Path relative to root of every file below it. Links are followed, but for those to a folder they lie in."""
    def walk(folder, prefix, above):
        real = os.path.realpath(folder)
        if real not in above:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        yield from walk(entry.path, f"{prefix}{entry.name}/", above | {real})
                    else:
                        yield prefix + entry.name
    return walk(root, "", frozenset())


def is_hidden(name):
    return any(part.startswith(".") or part in SYSTEM for part in name.split("/"))


def image_names(names):
    """Those of the names that are of images, by suffix, and neither hidden nor in a system's folder; in order."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted((name for name in names if os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name)),
                  key=lambda name: name.split("/"))


def follow_links(places, links):
    """{name: place} of an archive, with its links {name: target}: to a file, or to a folder and all below it."""
    for name, target in links.items():
        for _ in links:  # a link to a link
            target = links.get(target, target)
        if target in places:
            places[name] = places[target]
        elif target != "." and not name.startswith(f"{target}/"):
            below = [each for each in places if each.startswith(f"{target}/")]
            places.update({name + each[len(target):]: places[each] for each in below} or {name: (0, -1, False)})
    return places


def list_tar(file):
    """{name: (first byte, bytes, False)} of every file in a tar, folders' names ending with /. A tar inside it counts
    as a folder of its own name; of several files of one name the last counts, as in unpacking."""
    places, links = {}, {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep a kilobyte for each
            name = posixpath.normpath(member.name.lstrip("/"))
            places.pop(name, None), links.pop(name, None)
            if member.sparse is not None:
                raise ValueError(f"{name} is packed as a sparse file; pack it again without --sparse")
            if member.isdir():
                places[f"{name}/"] = 0, 0, False
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname)
            elif member.isreg() and name.endswith(".tar"):
                places.update({f"{name[:-4]}/{inner}": (member.offset_data + start, size, False)
                               for inner, (start, size, _) in list_tar(tar.extractfile(member)).items()})
            elif member.isreg():
                places[name] = member.offset_data, member.size, False
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # tarfile takes a header cut short for the end
            raise tarfile.ReadError("it ends too early")
    return follow_links(places, links)


def list_zip(file):
    """{name: (first byte of its header, bytes, whether deflated)} of every file in a zip, else as list_tar."""
    places, links, archive = {}, {}, zipfile.ZipFile(file)
    for info in archive.infolist():
        name = posixpath.normpath(info.filename)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} is encrypted or packed in an unusual way; unpack the zip")
        if stat.S_ISLNK(info.external_attr >> 16):
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), os.fsdecode(archive.read(info))))
        else:
            place = info.header_offset, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED
            places[f"{name}/" if info.is_dir() else name] = place
    return follow_links(places, links)


def to_8_bit(image):
    """A PIL image whose channels have 8 bits: of 16, the low ones are dropped (Pillow would clip at 255)."""
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{'floats' if image.mode == 'F' else '32-bit integers'} have no range to go by; save it in 8 "
                         f"or 16 bits")
    return image


UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}  # what turns an image of this EXIF orientation upright


def read_image(content):
    """The RGB PIL image in a file's bytes, upright. Raises ValueError for whatever makes it unreadable."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb = to_8_bit(image).convert("RGB")
            try:
                method = UPRIGHT.get(image.getexif().get(0x112))
            except Exception:  # metadata is no reason to lose pixels
                method = None
            return rgb.transpose(Image.Transpose[method]) if method else rgb
    except Exception as error:  # damaged files of other kinds make Pillow raise almost anything
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # whose text names an address in memory
        raise ValueError(f"unreadable image ({'of no known format' if unknown else error})") from error


def clean(captions):
    """Those with text, each on one line: runs of white space, control characters and lone surrogates become a blank."""
    captions = [re.sub(r"[\s\0-\x1f\x7f-\x9f\ud800-\udfff]+", " ", caption).strip() for caption in captions]
    return [caption for caption in captions if caption]


def read_coco(path):
    """(checksum, {image's file name: captions}) of COCO's annotations, images by id, captions in the file's order."""
    captions = {}
    try:
        content = Path(path).read_bytes()
        said = json.loads(content)
        for annotation in said["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return zlib.crc32(content), {posixpath.basename(image["file_name"]): clean(captions.get(image["id"], []))
                                     for image in sorted(said["images"], key=lambda image: image["id"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: missing, damaged or of another kind ({error!r}); set CAPTIONS to COCO's "
                         f"captions_*.json") from error


def file_beside(name, suffixes, places):
    """The file of one of the suffixes that bears an image's name, whole or, as webdataset has it, up to the first dot;
    "" if there is none."""
    folder, base = posixpath.split(name)
    stems = posixpath.splitext(name)[0], posixpath.join(folder, base.split(".")[0])
    return next((stem + suffix for stem in stems for suffix in suffixes if stem + suffix in places), "")


GONE = -1, 0, -1, False  # the place of a file that is not there


class ImageFiles:
    """The images of a class-per-folder tree: a folder, a zip, a tar, or a tar (or folder) of one tar per class, as
    ImageNet downloads. Archives are read in place. Class ids follow the sorted folder names. In tars of webdataset's
    kind each image's .cls or .json ("label") file says its class. Images with captions may do without class folders, as
    in tars without labels: then there is one class, "all". Item i is an RGB PIL image, captions(i) its captions.

    captions_checksum: CAPTIONS's; 0 where captions lie beside the images, None where there are none.
    inner: the folder to take of an archive. Raises ValueError for a source without images, or one that cannot be read.
    """

    mode, captions_checksum = "RGB", None

    def __init__(self, root, inner=""):
        self.root, self.archives, places, folders = Path(root), [], {}, set()
        inner = f"{inner}/" if inner else ""
        is_folder = self.root.is_dir()
        try:
            names = list(list_folder(root)) if is_folder else [""]
            tars = names
            if is_folder:  # a class without images still has its number; tars left beside images are no part of them
                tars = [] if image_names(names) else [name for name in names if name.endswith(".tar")]
                places = {name: (-1, 0, 0, False) for name in {*names} - {*tars}}
                folders = {f"{entry.name}/" for entry in os.scandir(root) if entry.is_dir()}
            for number, name in enumerate(tars):
                path = self.root / name if name else self.root
                self.archives.append((path, not tarfile.is_tarfile(path)))  # a tar that ends in a zip looks like one
                with open(path, "rb") as file:
                    found = list_zip(file) if self.archives[-1][1] else list_tar(file)
                places.update({posixpath.join(name[:-4], each): (number, *place) for each, place in found.items()})
        except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{root}: cannot be listed ({error}); SOURCE must be a folder, a zip or an uncompressed, "
                             f"complete tar") from error

        names = self.take_captions([name for name in image_names(places) if name.startswith(inner)], places)
        names = self.take_classes(names, folders | {name for name in places if name[-1] == "/"}, inner)
        # arrays, not lists: worker processes share them without copies
        self.names = np.array([os.fsencode(name) for name in names])
        self.places = np.array([places[name] for name in names])
        self.take_webdatasets_labels(names, places)
        self.fingerprint = zlib.crc32(self.names.tobytes() + self.places[:, 1].tobytes() + self.places[:, 2].tobytes())

    def take_captions(self, names, places):
        """Notes where the captions stand, if there are any: in CAPTIONS, or beside the images. Returns the images."""
        beside, self.coco = [], None
        if CAPTIONS:
            self.captions_checksum, known = read_coco(CAPTIONS)
            found = {posixpath.basename(name): name for name in names}
            some = next((found[name] for name in known if name in found), None)
            if some is None:
                raise ValueError(f"{self.root}: has none of the {len(known):,} images of {CAPTIONS}; set SOURCE to the "
                                 f"folder or archive of these")
            names = [found.get(name, posixpath.join(posixpath.dirname(some), name)) for name in known]
            places.update({name: GONE for name in names if name not in places})
            self.coco = list(known.values())
        else:
            texts = {name for name in places if name.endswith((".txt", ".json"))}  # most trees have hardly any
            beside = [file_beside(name, (".txt", ".json"), texts) for name in names if texts]
            if not any(name.endswith(".txt") for name in beside) and \
                    not any("caption" in said for name in beside if isinstance(said := self.parse(name, places), dict)):
                beside = []
        if beside:
            self.captions_checksum = 0
            self.texts = np.array([os.fsencode(name) for name in beside])
            self.text_places = np.array([places.get(name, GONE) for name in beside])
        self.ignored = sum(name[-1] != "/" for name in places.keys() - {*names, *beside})
        return names

    def take_classes(self, names, folders, top):
        """Finds class names and labels below the folder `top`. Returns the images that have a class."""
        captioned, is_folder, inner = self.captions_checksum is not None, self.root.is_dir(), top

        def parts(names):
            return {name[len(top):].split("/")[0] for name in names if "/" in name[len(top):]}

        # an archive may hold the tree's root too, folders that all images share; without captions the last is a class
        while len(parts(names)) == 1 and all(name.count("/", len(top)) > (not captioned) for name in names):
            top += f"{parts(names).pop()}/"
        if "train" in parts(names) and parts(names) <= {"train", "val", "valid", "validation", "test"}:
            raise ValueError(f"{self.root}: {', '.join(sorted(parts(names)))} are parts of a data set, no classes; set "
                             f"SOURCE to {self.root / top / 'train'}")
        if captioned and (is_folder and self.archives or any("/" not in name[len(top):] for name in names)):
            self.unclassed, self.classes, self.labels = 0, ["all"], np.zeros(len(names), int)
            return names
        top = inner if is_folder else top
        classed = [name for name in names if "/" in name[len(top):]]
        if not classed:
            raise ValueError(f"{self.root}: no images found; SOURCE must hold one folder of images per class, or "
                             f"images with captions")
        self.unclassed = len(names) - len(classed)
        folders = {name for name in folders if name.startswith(top)}
        self.classes = sorted(name for name in parts(folders | {*classed}) if not is_hidden(name))
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([number[name[len(top):].split("/")[0]] for name in classed])
        return classed

    def take_webdatasets_labels(self, names, places):
        """Where an archive's images have a .cls or .json ("label") file beside them: the classes that these say."""
        labels = []
        for name in names:
            said = self.parse(file_beside(name, (".cls", ".json"), places), places) if places[name][0] >= 0 else None
            label = said.get("label") if isinstance(said, dict) else said
            if isinstance(label, int):
                labels.append(label)
            elif not labels and (label is None or self.captions_checksum is not None):  # none of webdataset's kind
                return
            else:
                raise ValueError(f"{self.root}: {name} has no class number in a .cls or .json file beside it")
        self.labels, self.classes = np.array(labels), [str(label) for label in range(max(labels) + 1)]

    def parse(self, name, places):
        """What a .cls or .json file says; None without one, text where it is damaged."""
        try:
            return json.loads(self.content(name, *places[name])) if name else None
        except Exception as error:  # zlib's too
            return str(error)

    def follow(self, names, labels, checksum):
        """Takes the order of an earlier listing of which images have been removed since; those cannot be read."""
        rows = {name: row for row, name in enumerate(self.names.tolist())}
        if rows.keys() <= set(names.tolist()):
            order = np.array([rows.get(name, -1) for name in names.tolist()])
            self.places = np.where(order[:, None] < 0, GONE, self.places[order])
            if self.captions_checksum == 0:
                self.texts, self.text_places = self.texts[order], self.text_places[order]
            self.names, self.labels, self.fingerprint, self.removed = names, labels, checksum, order < 0

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def content(self, name, number, start, size, deflated):
        """The bytes of a file of the folder, or at a place of an archive."""
        if size < 0:
            raise OSError("no such file, or a link to what is not there")
        if number < 0:
            return Path(self.root, name).read_bytes()
        path, is_zip = self.archives[number]
        with open(path, "rb") as file:
            file.seek(start)
            if is_zip:  # a header of 30 bytes that ends with the lengths of the two fields between it and the data
                file.seek(sum(struct.unpack("<HH", file.read(30)[26:])), os.SEEK_CUR)
            content = file.read(size)
            return zlib.decompress(content, -zlib.MAX_WBITS) if deflated else content

    def captions(self, i):
        """Raises ValueError where there are none, or none that can be read."""
        if self.coco is not None:
            captions = self.coco[i]
        else:
            name = os.fsdecode(self.texts[i])
            try:
                text = self.content(name, *self.text_places[i]).decode("utf-8-sig") if name else ""
                said = json.loads(text).get("caption") if name.endswith(".json") else re.split("[\r\n]", text)
                captions = clean([said] if isinstance(said, str) else said or [])
            except Exception as error:  # JSON of any kind
                raise ValueError(f"unreadable captions {name} ({error})") from error
        if not captions:
            raise ValueError("no caption")
        return captions

    def __getitem__(self, i):
        try:
            content = self.content(os.fsdecode(self.names[i]), *self.places[i])
        except (OSError, zlib.error, struct.error) as error:
            raise ValueError(f"unreadable image ({error})") from error
        return read_image(content)


class ParquetFiles:
    """The images of the Hugging Face hub's parquet files ("image" with its "bytes", "label", class names in the
    metadata): one file, or a folder of those of one split. Needs pyarrow. Item i is an RGB PIL image."""

    mode, ignored, unclassed, captions_checksum = "RGB", 0, 0, None

    def __init__(self, root):
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{root}: parquet files are read with pyarrow; pip install pyarrow") from error
        self.paths = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
        if len(splits := {path.name.split("-")[0] for path in self.paths}) > 1:
            raise ValueError(f"{root}: files of {', '.join(sorted(splits))}; set SOURCE to a folder with one of these")
        try:
            files = [parquet.ParquetFile(path) for path in self.paths]
            features = json.loads(files[0].schema_arrow.metadata[b"huggingface"])["info"]["features"]
            self.labels = np.concatenate([file.read(["label"])["label"].to_numpy() for file in files])
            self.classes = features["label"]["names"]
        except Exception as error:  # pyarrow's own kinds
            raise ValueError(f"{root}: no images with labels as in the hub's parquet files ({error!r})") from error
        self.groups = [(path, group) for path, file in zip(self.paths, files) for group in range(file.num_row_groups)]
        rows = [file.metadata.row_group(group).num_rows for file in files for group in range(file.num_row_groups)]
        self.ends, self.open = np.cumsum(rows), (None, None)
        self.fingerprint = zlib.crc32(self.labels.tobytes())

    def name(self, i):
        return f"{self.groups[np.searchsorted(self.ends, i, 'right')][0]}, row {i} of all"

    def __getitem__(self, i):
        from pyarrow import parquet
        group = int(np.searchsorted(self.ends, i, "right"))
        if self.open[0] != group:  # images are asked for in order, and a group holds a hundred
            path, number = self.groups[group]
            self.open = group, parquet.ParquetFile(path).read_row_group(number, ["image"], use_threads=False)["image"]
        return read_image(self.open[1][int(i - self.ends[group])]["bytes"].as_py())


class SpriteSheet:
    """One image of SHEET_TILE-sized tiles; each class has the same number of whole rows. Item i is a PIL image."""

    ignored, unclassed, captions_checksum = 0, 0, None

    def __init__(self, path):
        try:
            sheet = Image.open(path)
            sheet.load()
        except Exception as error:  # see read_image
            raise ValueError(f"{path}: unreadable image ({error}); SOURCE must be a sprite sheet, an archive, "
                             f"or a folder with one folder of images per class") from error
        sheet = to_8_bit(sheet)
        self.path, self.sheet = path, sheet if sheet.mode == "L" else sheet.convert("RGB")
        self.mode, self.classes = self.sheet.mode, list(SHEET_CLASSES)
        self.columns, rows = sheet.width // SHEET_TILE, sheet.height // SHEET_TILE
        if sheet.width % SHEET_TILE or sheet.height % SHEET_TILE or rows % len(self.classes):
            raise ValueError(f"{path}: {sheet.width} x {sheet.height} pixels are not whole rows of {SHEET_TILE}-pixel "
                             f"tiles, equally many for {len(self.classes)} classes; set SHEET_TILE and SHEET_CLASSES")
        self.labels = np.repeat(np.arange(len(self.classes)), rows // len(self.classes) * self.columns)
        self.fingerprint = zlib.crc32(self.sheet.tobytes())

    def name(self, i):
        return f"{self.path}, tile {i}"

    def __getitem__(self, i):
        left, top = i % self.columns * SHEET_TILE, i // self.columns * SHEET_TILE
        return self.sheet.crop((left, top, left + SHEET_TILE, top + SHEET_TILE))


class PublishedLatents(ImageFiles):
    """What REPA's and HASTE's preprocessing wrote: images/, vae-sd/ with moments (mean, std) as .npy, and the labels in
    vae-sd/dataset.json. Images and moments are paired in sorted order, as their loader does.

    Item i is an RGB PIL image, moments(i) its float16 [2C, h, w]. Raises ValueError where the three do not fit.
    """

    unclassed = 0

    def __init__(self, root):
        self.root, self.latents = Path(root, "images"), Path(root, "vae-sd")
        files = [name for name in list_folder(self.root) if name != "dataset.json"]
        moments = [name for name in list_folder(self.latents) if name != "dataset.json"]
        names = [sorted(name for name in names if name.lower().endswith(suffix))
                 for names, suffix in ((files, ".png"), (moments, ".npy"))]
        self.ignored = len(files) + len(moments) - sum(map(len, names))
        if len(names[0]) != len(names[1]) or not names[0]:
            raise ValueError(f"{root}: {len(names[0])} images in images/ but {len(names[1])} latents in vae-sd/; "
                             f"fetch or make the missing ones")
        try:
            labels = dict(json.loads((self.latents / "dataset.json").read_text())["labels"])
            self.labels = np.array([int(labels[name]) for name in names[1]])
            self.shape = np.load(self.latents / names[1][0]).shape
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.latents}: no label for every latent, or a damaged file ({error!r}); fetch or make "
                             f"dataset.json and the .npy files again") from error
        self.classes = [str(label) for label in range(self.labels.max() + 1)]
        self.names, self.moments_names = (np.array([os.fsencode(name) for name in part]) for part in names)
        self.places = np.tile((-1, 0, 0, False), (len(self.names), 1))  # in no archive
        self.fingerprint = zlib.crc32(self.names.tobytes() + self.moments_names.tobytes() + self.labels.tobytes())

    def moments(self, i):
        name = os.fsdecode(self.moments_names[i])
        try:
            moments = np.load(self.latents / name)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"unreadable latents {name} ({error})") from error
        if moments.shape != self.shape:
            raise ValueError(f"latents {name} of shape {moments.shape}, not {self.shape}")
        if not np.isfinite(moments := moments.astype(np.float16)).all():
            raise ValueError(f"latents {name} that are not finite in float16")
        return moments


def open_source(path):
    """The source at `path`, told apart by what it is. Raises ValueError if it is none."""
    outer = next((each for each in path.parents if each.is_file()), path)  # an archive, of which path names a folder
    if not outer.exists():
        raise ValueError(f"{path}: no such file or folder; set SOURCE to a folder with one folder of images per class, "
                         f"a tar or zip of one, or a sprite sheet")
    if (path / "vae-sd").is_dir():
        return PublishedLatents(path)
    if path.suffix == ".parquet" or any(path.glob("*.parquet")) and not any(path.glob("*.tar")):  # tables of tars
        return ParquetFiles(path)
    if path.is_dir() or zipfile.is_zipfile(outer) or tarfile.is_tarfile(outer):
        return ImageFiles(outer, "" if outer == path else path.relative_to(outer).as_posix())
    return SpriteSheet(path)


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
    info = timm.data.ImageNetInfo()
    in_order = list(classes) in (info.label_names(), info.label_descriptions())
    print(f"{SOURCE}: {len(source.labels):,} images of {len(classes):,} classes, from {classes[0]!r} ({counts[0]:,}) "
          f"to {classes[-1]!r} ({counts[-1]:,})"
          + ("" if len(classes) != 1000 else "; ImageNet's, in their order" if in_order else
             "; by their names not ImageNet's 1,000 in order"))


def pack(image):
    """The image's file in images.bin: lossless WebP, a third of PNG's time to write and half of its time to read."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, method=0, quality=0)
    return file.getvalue()


def new_batch(*shape):
    """An empty uint8 tensor; in a loader's process in memory shared with its parent, so that sending does not copy."""
    batch = torch.empty(shape, dtype=torch.uint8)
    return batch if get_worker_info() is None else batch.share_memory_()


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
        brought = hasattr(self.source, "moments")
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
            except Exception as error:  # an image's failure is its own
                notes[int(i)], targets[row] = str(error), 0
        return torch.from_numpy(moments) if brought else pixels.permute(0, 3, 1, 2), packed, notes


# ---------------------------------------------------------------------------------------------------------------------
# the prepared folder


class PreparedDataset:
    """Reads a folder written by main(). `dataset[indices]` is a batch: (moments, labels, images or None).

    latents.npy        only with a VAE: float16 [N, 2C, h, w], posterior mean and std
    latents_mirrored.npy  the same of the mirrored images, if prepared with MIRROR
    images.bin         lossless WebP files end to end; image_offsets.npy int64 [N + 1]: where each begins and ends
    labels.npy         int64 [N]
    captions.txt       only if there are: UTF-8, one a line; caption_offsets.npy int64 [N + 1]: image i has captions
                       offsets[i] .. offsets[i + 1] - 1
    meta.json          count, sizes, class names, VAE and its scale, source, versions, bytes and checksums of the files

    Without a VAE the moments are the images' pixels, uint8 [B, C, H, W] (C 1 for grayscale), decoded once for both.
    `dataset[indices, draws]`, draws in 0..1, has the number of a caption of each image, int64 [B], in place of labels.
    Index i + N is image i mirrored left to right; with a VAE only if `mirrored` is not None. Large files are
    memory-mapped, never copied to memory. With `with_images=False` images are None, and with a VAE their files are not
    opened. `captions` is None, or all, in order.
    Raises ValueError where the folder is missing, unfinished or damaged.
    """

    def __init__(self, path, with_images=True):
        self.path, self.with_images = Path(path), with_images
        meta_file = self.path / "meta.json"
        if not self.path.is_dir():
            raise ValueError(f"{path}: no such folder; set DATA_DIR to a prepared data set, or make one with "
                             f"prepare_latents.py")
        if not meta_file.exists():
            raise ValueError(f"{path}: no meta.json, so this is not a finished data set; run prepare_latents.py again, "
                             f"it goes on where it stopped")
        try:
            self.meta = json.loads(meta_file.read_text())
            expected_bytes, self.vae, self.classes = self.meta["bytes"], self.meta["vae"], self.meta["classes"]
            channels, *size = self.meta["latent_shape"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{meta_file}: damaged ({error!r}); {REMEDY}") from error
        if self.meta["format"] != FORMAT:
            raise ValueError(f"{meta_file}: format {self.meta['format']}, this version reads {FORMAT}; {REMEDY}")
        # without a VAE earlier versions stored the pixels a second time, as latents.npy
        unused = "latents" if self.vae is None else () if with_images else "image"
        for name, expected in expected_bytes.items():
            found = (self.path / name).stat().st_size if (self.path / name).exists() else 0
            if found != expected and not name.startswith(unused):
                raise ValueError(f"{self.path / name}: {found} bytes, meta.json says {expected}; {REMEDY}")
        self.latents, self.mirrored = (
            np.load(self.path / name, mmap_mode="r") if name in expected_bytes and self.vae is not None else None
            for name in ("latents.npy", "latents_mirrored.npy"))
        self.shape = (channels if self.vae is None else channels // 2, *size)  # of one latent, (C, h, w)
        self.labels = np.load(self.path / "labels.npy")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"{self.path / 'labels.npy'}: labels {self.labels.min()}..{self.labels.max()}, but "
                             f"meta.json names {len(self.classes)} classes; {REMEDY}")
        if with_images or self.vae is None:
            self.packed = np.asarray(np.memmap(self.path / "images.bin", dtype=np.uint8, mode="r"))
            self.offsets = np.load(self.path / "image_offsets.npy", mmap_mode="r")
        self.captions = self.caption_offsets = None
        if "captions.txt" in expected_bytes:
            try:
                *self.captions, rest = (self.path / "captions.txt").read_bytes().decode().split("\n")
                offsets = self.caption_offsets = np.load(self.path / "caption_offsets.npy")
                fit = not rest and [len(offsets), *offsets[[0, -1]]] == [len(self) + 1, 0, len(self.captions)]
            except (ValueError, IndexError):
                fit = False
            if not fit or np.diff(offsets).min(initial=1) < 1:
                raise ValueError(f"{self.path / 'captions.txt'}: damaged, or not the captions that caption_offsets.npy "
                                 f"gives to {len(self)} images; {REMEDY}")

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):  # a worker process opens the files itself; pickling a memory map would copy the data set
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

    def __getitem__(self, indices):
        indices, draws = indices if isinstance(indices, tuple) else (indices, None)
        indices = np.asarray(indices)
        flip, rows = indices >= len(self), indices % len(self)
        labels = torch.from_numpy(self.labels[rows])
        if draws is not None:
            first, last = self.caption_offsets[rows], self.caption_offsets[rows + 1] - 1
            labels = torch.from_numpy(np.minimum(first + (np.asarray(draws) * (last - first + 1)).astype(int), last))
        images = self.images(rows) if self.with_images or self.vae is None else None
        if images is not None and flip.any():
            images[flip] = images[flip].flip(-1)
        if self.vae is None:
            return images[:, : self.shape[0]], labels, images if self.with_images else None
        moments = torch.from_numpy(self.latents[rows])
        if flip.any():
            moments[flip] = torch.from_numpy(self.mirrored[rows[flip]])
        return moments, labels, images


def refuse_other(folder, state, found, wanted, constant="DATA_DIR"):
    """Raises ValueError that names what differs between a folder's settings and this run's."""
    differing = [f"{key} {found.get(key)!r}, now {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise ValueError(f"{folder}: {state} with other settings ({'; '.join(differing)}); "
                         f"set them back, choose another {constant} or delete the folder")


def comparable(settings):
    """The settings, but for what makes no difference: a path's spelling, and which of Stable Diffusion's two fine-tuned
    VAEs, whose encoder is the same, so that a folder serves both. What folders of earlier versions do not say is what
    these did."""
    settings = {"crop": "adm", "captions_source": None, "captions_checksum": None, **settings}
    return dict(settings, source=os.path.realpath(settings["source"]),
                captions_source=settings["captions_source"] and os.path.realpath(settings["captions_source"]),
                vae_name=str(settings["vae_name"]).replace("sd-vae-ft-mse", "sd-vae-ft-ema"))


def reserve(path, shape, dtype=np.float16):
    """A .npy of zeros with its space on the disk: a memory map that runs out of disk kills the process."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            except OSError as error:
                raise ValueError(f"{path}: no room for {os.path.getsize(path):,} bytes ({error.strerror}); make room "
                                 f"or choose another folder") from error


def check_space(folder, crops, count, latents_bytes):
    """Raises ValueError unless the disk has room for `latents_bytes` and `count` more packed images, by a sample."""
    total = len(crops.source.labels)
    _, packed, _ = crops[np.unique(np.linspace(0, total - 1, 32).astype(int))]
    sizes = [len(file) for file in packed if file] or [0]
    needed = latents_bytes + int(1.1 * count * sum(sizes) / len(sizes))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: needs {needed:,} bytes, {free:,} are free; make room or choose another DATA_DIR")


@torch.no_grad()
def encode(pixels, vae, device):
    """uint8 [B, C, H, W] to what latents.npy stores, float16 moments [B, 2C, h, w] on the device."""
    x = (pixels.to(device, non_blocking=True).float() / 127.5 - 1).expand(-1, 3, -1, -1)
    if COMPILE:  # for one shape: a smaller batch is padded
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, BATCH_SIZE - len(x)))
    with torch.autocast(device.type, torch.bfloat16, enabled=VAE_PRECISION == "bf16"):
        mean, std = vae.encode(x.contiguous(memory_format=torch.channels_last))
    return torch.cat([mean, std], dim=1)[: len(pixels)].half()


def write_chunk(folder, number, first, moments, packed, reasons, captions):
    """Writes a chunk's latents into their rows from `first` on and its packed images into a file of their own, then,
    atomically, the record that makes both count. moments: {file: float16 tensors of the chunk's batches}; captions: a
    list for each image that is kept, if there are any."""
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
    record = dict(lengths=[len(file) for file in packed], reasons=reasons, captions=captions, checksums=checksums)
    write_atomically(f"{part}.json", lambda path: path.write_text(json.dumps(record)))


def prepare_chunks(folder, crops, chunks, vae, latents_files, device, bar, world):
    """Makes the chunks {number: rows}: decoded, cropped and packed in worker processes, encoded here, written in a
    thread, so that the device waits for nobody."""
    batches = [rows[i : i + BATCH_SIZE] for rows in chunks.values() for i in range(0, len(rows), BATCH_SIZE)]
    loader = open_loader(crops, batches, WORKERS, device)
    with ThreadPoolExecutor(1) as writer:
        written = None
        for number, rows in chunks.items():
            moments, packed, reasons, captions = {name: [] for name in latents_files}, [], {}, []
            while len(packed) < len(rows):
                tensor, files, notes = next(loader)
                for name in latents_files:
                    x = tensor if name == "latents.npy" else tensor.flip(-1)
                    moments[name].append(x if x.is_floating_point() else encode(x, vae, device))
                packed += files
                reasons.update({crops.source.name(i): note for i, note in notes.items() if isinstance(note, str)})
                captions += [note for note in notes.values() if isinstance(note, list)]
                bar.update(min(len(files) * world, bar.total - bar.n))
            if written is not None:
                written.result()  # raises what the thread raised; and no more than two chunks are in memory
            written = writer.submit(write_chunk, folder, number, rows[0], moments, packed, reasons, captions)
        if written is not None:
            written.result()


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


def check(folder):
    """Compares a finished folder with its checksums, and if it has latents, CHECK_IMAGES of its images, encoded again,
    with these.

    Raises ValueError that names the file and the images where they differ.
    """
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
    vae = load_vae(data.vae["name"])[0].to(device)
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


@ends_in_one_line
def main():
    started = time.time()
    check_constants(globals(), {
        "path": "SOURCE DATA_DIR", "path or None": "CAPTIONS VAE",
        "True or False": "LEAVE_OUT_UNREADABLE MIRROR COMPILE CHECK",
        "whole number from 1": "SHEET_TILE IMAGE_SIZE BATCH_SIZE CHUNK CHECK_IMAGES", "whole number from 0": "WORKERS",
        "number from 0": "CHECK_TOLERANCE"}, CROP=("adm", "square"), VAE_PRECISION=("float32", "bf16"))
    folder = Path(DATA_DIR)
    unfinished = folder / "unfinished"
    if CHECK:
        return check(folder)
    settings = dict(source=str(SOURCE), captions_source=CAPTIONS and str(CAPTIONS), image_size=IMAGE_SIZE, crop=CROP,
                    vae_name=VAE, mirror=MIRROR, vae_precision=VAE_PRECISION if VAE else None)
    if (folder / "meta.json").exists():
        finished = PreparedDataset(folder).meta
        refuse_other(folder, "finished", comparable(finished), comparable(settings))
        shutil.rmtree(unfinished, ignore_errors=True)
        if os.environ.get("RANK", "0") == "0":
            print(f"{folder}: already finished, {finished['count']:,} images; nothing to do")
        return
    rank, world, device = start_processes()
    torch.set_float32_matmul_precision("high")  # on GPUs float32 convolutions and products may use TF32
    torch.backends.cudnn.benchmark = True  # the fastest convolutions for the one shape there is
    wait_for_all = dist.barrier if world > 1 else lambda: None

    # source, VAE, and the folder that they make, or began to make
    source = open_source(Path(SOURCE))
    plan_file, names_file, moving_file = (unfinished / name for name in ("plan.json", "names.npz", "moving"))
    begun = json.loads(plan_file.read_text()) if plan_file.exists() else None
    if begun and begun["names_checksum"] != source.fingerprint and names_file.exists():
        source.follow(**np.load(names_file), checksum=begun["names_checksum"])
    if source.labels.min() < 0:
        raise ValueError(f"{SOURCE}: has labels below 0, as test splits without labels do; choose the training images")
    count, brought = len(source.labels), isinstance(source, PublishedLatents)
    captioned = source.captions_checksum is not None
    if CAPTIONS and not captioned:
        raise ValueError(f"CAPTIONS {CAPTIONS!r}: {SOURCE} is no folder or archive of images; set CAPTIONS to None")
    if VAE is None:
        vae, vae_meta, shape = None, None, (len(source.mode), IMAGE_SIZE, IMAGE_SIZE)
    elif brought:
        vae, vae_meta, shape = None, dict(name=VAE, scale=SCALE), source.shape
        if MIRROR or source[0].size != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"{SOURCE}: brings latents of images of {source[0].size} pixels, not mirrored; set "
                             f"IMAGE_SIZE to their size and MIRROR to False")
    else:
        vae, scale = load_vae(VAE)
        vae, vae_meta = vae.to(device, memory_format=torch.channels_last), dict(name=VAE, scale=scale)
        factor = 2 ** (len(vae.encoder.down_blocks) - 1)
        if IMAGE_SIZE % factor:
            raise ValueError(f"IMAGE_SIZE {IMAGE_SIZE} is no multiple of {factor}, the VAE's reduction")
        shape = (vae.quant_conv.out_channels, IMAGE_SIZE // factor, IMAGE_SIZE // factor)
        vae.encode = torch.compile(vae.encode) if COMPILE else vae.encode
    latents_files = [] if VAE is None else ["latents.npy"] + ["latents_mirrored.npy"] * MIRROR
    crops = Crops(source, IMAGE_SIZE, shape)

    # what is done: chunks with a record; one with unreadable images is tried again, until the parts are being moved
    plan = dict(settings, images=count, names_checksum=source.fingerprint, captions_checksum=source.captions_checksum,
                chunk=CHUNK)
    moving = moving_file.exists()
    if begun:
        refuse_other(folder, "begun", comparable(begun), comparable(plan))
    chunks = [range(first, min(first + CHUNK, count)) for first in range(0, count, CHUNK)]
    records = [unfinished / f"{number:06d}.json" for number in range(len(chunks))]
    removed = getattr(source, "removed", np.zeros(count, bool))
    missing = [number for number, record in enumerate(records) if not record.exists() or not moving and (
        removed[list(chunks[number])].any() or
        not LEAVE_OUT_UNREADABLE and json.loads(record.read_text())["reasons"])]
    missing_images = sum(len(chunks[number]) for number in missing)
    wait_for_all()
    if rank == 0:
        unfinished.mkdir(parents=True, exist_ok=True)
        latents_bytes = 2 * math.prod((count, *shape)) * len(latents_files)
        lock = lock_folder(unfinished, "DATA_DIR")  # noqa: F841 - held until main() ends
        if (folder / "meta.json").exists():
            raise ValueError(f"{folder}: another process has just finished it; there is nothing to do")
        describe(source)
        check_space(folder, crops, missing_images, 0 if begun else latents_bytes)
        if not begun:
            for name in latents_files:
                reserve(folder / name, (count, *shape))
            if type(source) is ImageFiles:
                np.savez(names_file, names=source.names, labels=source.labels)
            write_atomically(plan_file, lambda path: path.write_text(json.dumps(plan)))
        elif VAE is None:
            (folder / "latents.npy").unlink(missing_ok=True)  # begun by a version that stored pixels there too
    wait_for_all()
    with tqdm(total=count, initial=count - missing_images, unit="img", desc=folder.name, disable=rank > 0) as bar:
        mine = {number: chunks[number] for number in missing[rank::world]}
        prepare_chunks(folder, crops, mine, vae, latents_files, device, bar, world)
    wait_for_all()

    # images that could not be read, or have no caption
    contents = [json.loads(record.read_text()) for record in records]
    reasons = {name: reason for content in contents for name, reason in content["reasons"].items()}
    lengths = np.concatenate([content["lengths"] for content in contents])
    kept = lengths > 0
    unreadable = folder / "unreadable.txt"
    if rank == 0:
        unreadable.unlink(missing_ok=True)
        if reasons:
            listed = "".join(f"{name}: {reason}\n" for name, reason in reasons.items())
            unreadable.write_bytes(os.fsencode(listed))  # names need not be UTF-8
    wait_for_all()
    removed = removed.sum()
    if len(reasons) > removed and not (LEAVE_OUT_UNREADABLE or moving) or not kept.any():
        raise ValueError(f"{folder}: {len(reasons) - removed:,} of {count:,} images could not be read"
                         f"{' or have no caption' * captioned}; unreadable.txt there lists them, the others are done. "
                         f"Repair or remove them and run again"
                         + (", or set LEAVE_OUT_UNREADABLE = True" if kept.any() else ""))

    # packed images to their places in images.bin; from here on, what is left out stays left out
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if rank == 0:
        moving_file.touch()
        with open(folder / "images.bin", "ab") as file:
            file.truncate(ends[-1])
    wait_for_all()
    move_parts(folder, ends[: -1 : CHUNK], rank, world)
    wait_for_all()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    for name in latents_files:
        drop_rows(folder / name, kept)
    np.save(folder / "image_offsets.npy", np.concatenate([[0], ends[1:][kept]]))
    np.save(folder / "labels.npy", source.labels[kept].astype(np.int64))
    captions = [own for content in contents for own in content.get("captions", [])]  # of each image that is kept
    if captioned:
        (folder / "captions.txt").write_bytes("".join(f"{one}\n" for own in captions for one in own).encode())
        np.save(folder / "caption_offsets.npy", np.cumsum([0, *map(len, captions)]))

    # meta.json, which makes it a data set
    for rows, content in zip(chunks, contents):
        content["checksums"]["labels.npy"] = zlib.crc32(source.labels[rows][kept[rows]].astype(np.int64))
    names = (*latents_files, "images.bin", "image_offsets.npy", "labels.npy",
             *["captions.txt", "caption_offsets.npy"] * captioned)
    meta = dict(format=FORMAT, count=int(kept.sum()), **settings, vae=vae_meta, latent_shape=shape,
                image_mode=source.mode, classes=source.classes, captions=sum(map(len, captions)) or None,
                bytes={name: (folder / name).stat().st_size for name in names},
                versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__,
                              pillow=PIL.__version__),
                chunks=[(int(kept[rows].sum()), content["checksums"]) for rows, content in zip(chunks, contents)])
    write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))
    shutil.rmtree(unfinished)
    seconds = time.time() - started
    print(f"{folder}: {meta['count']:,} images of {len(source.classes)} classes"
          + (f" with {meta['captions']:,} captions" if captioned else "")
          + f", {missing_images:,} of them in these {seconds:.0f} s ({missing_images / seconds:.0f} images/s)\n"
          f"  {list(shape)} an image: "
          + ", ".join(f"{name} {meta['bytes'][name] / 2**20:,.0f} MiB" for name in (*latents_files, "images.bin"))
          + f"\n  left out: {len(reasons)} unreadable images, {source.unclassed} images outside class folders; "
          f"ignored {source.ignored} files that are no images{' of CAPTIONS' if CAPTIONS else ''}")


if __name__ == "__main__":
    run_script(main)
