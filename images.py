"""Images as people have them: folders, archives, parquet files, sprite sheets; their labels and captions; crops.

Every source has class names in order, `classes`; `labels`, int64 [N]; `name(i)`; `[i]`, a PIL image
of `mode` "RGB" or "L"; unless `captions_checksum` is None, `captions(i)`, a list of str;
`fingerprint`, a checksum of what it lists; how many files it `ignored`, and how many images it left
out as `unclassed`. Of one image's fault they raise ValueError, of a source that is gone OSError.
"""

import io
import json
import os
import posixpath
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from archives import GONE, is_hidden, list_files, list_folder, normal, read_place
from labels import are_shards, check_no_splits, clean, folders_in, is_label, match_names, read_coco, texts_of, tree_root

Image.MAX_IMAGE_PIXELS = None  # the user's own: a large one is no attack


# ----- crops --------------------------------------------------------------------------------------
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
        middle = left * x, top * y, (left + size) * x, (top + size) * y
        return image.resize((size, size), Image.BICUBIC, middle)
    return image.resize((width, height), Image.BICUBIC).crop((left, top, left + size, top + size))


def square_crop(image, size):
    """MS-COCO's published preprocessing: the largest centred square, scaled to size (Lanczos)."""
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    return image.crop((left, top, left + square, top + square)).resize((size, size), Image.LANCZOS)


# ----- one image ----------------------------------------------------------------------------------
NO_PIXELS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # of these kinds Pillow reads no pixels by itself


def image_names(names):
    """Those of the names that are of images, by suffix, and neither hidden nor in a system's folder; in order."""
    kinds = Image.registered_extensions()
    suffixes = {suffix for suffix, kind in kinds.items() if kind in Image.OPEN and kind not in NO_PIXELS}
    found = [name for name in names if os.path.splitext(name)[1].lower() in suffixes]
    return sorted((name for name in found if not is_hidden(name)), key=lambda name: name.split("/"))


UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}  # what turns an image of this EXIF orientation upright


def to_8_bit(image):
    """A PIL image whose channels have 8 bits: of 16, the low ones are dropped (Pillow would clip at 255)."""
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"{kind} have no range to go by; save it in 8 or 16 bits")
    return image


def turned(image):
    """The name of what turns a PIL image upright, or None."""
    try:
        return UPRIGHT.get(image.getexif().get(0x112))
    except Exception:  # metadata is no reason to lose pixels
        return None


def upright_size(image):
    """(height, width) of a PIL image once upright, from its header."""
    return image.size if turned(image) in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90") else image.size[::-1]


def read_image(content):
    """The RGB PIL image in a file's bytes, upright. Raises ValueError for whatever makes it unreadable."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            rgb, method = to_8_bit(image).convert("RGB"), turned(image)
            return rgb.transpose(Image.Transpose[method]) if method else rgb
    except MemoryError:
        raise  # no fault of the image's
    except Exception as error:  # damaged files of other kinds make Pillow raise almost anything
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # whose text names an address in memory
        raise ValueError(f"unreadable image ({'of no known format' if unknown else error})") from error


def pack(image):
    """The image's file in images.bin: lossless WebP, a third of PNG's time to write and half of its time to read."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, method=0, quality=0)
    return file.getvalue()


# ----- folders and archives -----------------------------------------------------------------------
class Source:
    """What sources have that do not say otherwise."""

    mode, ignored, unclassed, captions_checksum, coco, removed = "RGB", 0, 0, None, None, None

    def captions_state(self, rows):
        """A number that changes with the files that hold the captions of these images."""
        return 0


class ImageFiles(Source):
    """The images of a class-per-folder tree: a folder, a zip, a tar, or a tar (or folder) of one tar per class, as
    ImageNet downloads. Class ids follow the sorted folder names. In archives of webdataset's kind each image's .cls or
    .json ("label") file says its class; StyleGAN's dataset.json says all. Images with captions may do without class
    folders, as in tars without labels: then there is one class, "all".

    inner: the folder to take of an archive. captions: COCO's captions_*.json; else .txt or .json ("caption") files
    beside the images count, if most have one. captions_checksum: of that file; 0 where captions lie beside the images,
    None where there are none. Raises ValueError for a source without images, or one whose labels are not certain.
    """

    texts, texts_found = None, 0

    def __init__(self, root, inner="", captions=None):
        self.root, top = Path(root), f"{inner}/" if inner else ""
        self.archives, self.listed, folders = list_files(self.root)
        names = [name for name in image_names(self.listed) if name.startswith(top)]
        names = self.without_unpacked(names)
        tars = [path.relative_to(self.root).as_posix() for path, _ in self.archives if self.root.is_dir()]
        check_no_splits(self.root, tars)
        self.beside = [name for name in self.listed if name.lower().endswith((".txt", ".json", ".cls"))]
        texts = []
        if captions:
            names = self.take_coco(names, captions)
        else:
            texts = self.find_texts(names)
            if texts:
                self.captions_checksum, self.texts = 0, np.array([os.fsencode(name) for name in texts])
                self.text_places = np.array([self.listed.get(name, GONE) for name in texts])
        self.ignored = sum(name[-1] != "/" for name in self.listed.keys() - {*names, *texts})

        labels = self.said_by_dataset_json(names, top) or self.said_beside(names)
        if labels:
            self.unclassed, self.labels = 0, np.array(labels)
            self.classes = [str(label) for label in range(max(labels) + 1)]
        else:
            folders |= {name for name in self.listed if name[-1] == "/"}
            names = self.take_folders(names, folders, top, tars)
        # arrays, not lists: worker processes share them without copies
        self.names = np.array([os.fsencode(name) for name in names])
        self.places = np.array([self.listed[name] for name in names])
        self.fingerprint = zlib.crc32(self.names.tobytes() + self.places[:, 1].tobytes() + self.places[:, 2].tobytes())
        del self.listed, self.beside

    def without_unpacked(self, names):
        """The images, where tars lie beside what was unpacked of them without those in the tars."""
        unpacked = [name for name in names if self.listed[name][0] < 0]
        if not unpacked or len(unpacked) == len(names):
            return names
        there = {posixpath.basename(name) for name in unpacked}
        if all(posixpath.basename(name) in there for name in names):
            self.archives, self.listed = [], {name: place for name, place in self.listed.items() if place[0] < 0}
            return unpacked
        tar, _ = self.archives[0]
        raise ValueError(f"{self.root}: holds {len(self.archives)} tars ({tar.name}) and {len(unpacked):,} images "
                         f"beside them ({unpacked[0]}); move the ones or the others elsewhere")

    # captions

    def take_coco(self, names, path):
        """Takes the captions of COCO's annotations. Returns the images that these name, each where
        it lies, or, if nowhere, where the others do."""
        self.captions_checksum, known = read_coco(path)
        found = match_names(known, names, path)
        some = next((name for name in found.values() if name), None)
        if some is None:
            raise ValueError(f"{self.root}: has none of the {len(known):,} images of {path}; set "
                             "SOURCE to the folder or archive of these")
        self.coco = list(known.values())
        folder = posixpath.dirname(some)
        names = [name or posixpath.join(folder, posixpath.basename(file)) for file, name in found.items()]
        self.listed.update({name: GONE for name in names if name not in self.listed})
        return names

    def in_tar(self, name):
        number = self.listed[name][0]
        return number >= 0 and not self.archives[number][1]

    def files_beside(self, names, suffixes):
        """For each image the file of one of the suffixes, the first if there are several, that bears its name: whole,
        or in tars, as webdataset has it, up to the first dot. "" where there is none."""
        def key(name):
            return normal(posixpath.splitext(name)[0])

        def until_dot(name):
            folder, base = posixpath.split(normal(name))
            return posixpath.join(folder, base.split(".")[0])

        whole, dotted = {}, {}
        for suffix in suffixes:
            for name in self.beside:
                if name.lower().endswith(suffix):
                    whole.setdefault(key(name), name)
                    if self.in_tar(name):
                        dotted.setdefault(until_dot(name), name)
        if not whole:
            return [""] * len(names)
        return [whole.get(key(name)) or (self.in_tar(name) and dotted.get(until_dot(name))) or "" for name in names]

    def find_texts(self, names):
        """The file with each image's captions, "" for one without; [] where most images have none."""
        files = self.files_beside(names, (".txt", ".json"))
        texts = [name if name.lower().endswith(".txt") or "caption" in self.read_json(name) else "" for name in files]
        self.texts_found = sum(map(bool, texts))
        return files if self.texts_found > len(names) / 2 else []

    def read_json(self, name):
        """What a .json file says, or as "label" what a .cls file does, or why it cannot be read; {} without one."""
        try:
            said = json.loads(read_place(self.root, self.archives, name, *self.listed[name])) if name else {}
        except (ValueError, RecursionError) as error:
            said = str(error)
        return said if isinstance(said, dict) else dict(label=said)

    def captions(self, i):
        """Raises ValueError where there are none, or none that can be read."""
        captions = self.read_captions(i) if self.coco is None else self.coco[i]
        if not captions:
            raise ValueError("no caption")
        return captions

    def read_captions(self, i):
        """Those in the file beside the image."""
        name = os.fsdecode(self.texts[i])
        if not name:
            return []
        try:
            text = read_place(self.root, self.archives, name, *self.text_places[i]).decode("utf-8-sig")
            if not name.lower().endswith(".json"):
                return clean(re.split("[\r\n]", text))
            said = json.loads(text)
            return texts_of(said.get("caption") if isinstance(said, dict) else said)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"unreadable captions {name} ({error})") from error

    def captions_state(self, rows):
        if self.texts is None:
            return 0
        files = [path for path, _ in self.archives] or [Path(self.root, os.fsdecode(self.texts[i])) for i in rows]
        states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
        return zlib.crc32(repr(states).encode())

    # labels

    def said_by_dataset_json(self, names, top):
        """Each image's label by StyleGAN's dataset.json, None where there is none."""
        files = [name for name in self.beside if posixpath.basename(name) == "dataset.json" and name.startswith(top)]
        file = min(files, key=lambda name: name.count("/"), default="")
        said = self.read_json(file).get("labels", "")
        if said is None and self.captions_checksum is None:
            raise ValueError(f"{self.root}: {file} has no labels, so the folders beside it are no classes; make it "
                             f"with labels, or move it elsewhere if they are classes")
        if not isinstance(said, (list, dict)):
            return None
        folder = posixpath.dirname(file)
        labels = {normal(posixpath.join(folder, name)): label for name, label in dict(said).items()}
        return self.whole_labels([labels.get(normal(name)) for name in names], names, file)

    def said_beside(self, names):
        """Each archived image's label by the .cls or .json ("label") file beside it, None where there are none."""
        archived = self.archives and all(self.listed[name][0] >= 0 or self.listed[name] == GONE for name in names)
        if not archived or not self.beside:
            return None
        files = self.files_beside(names, (".cls", ".json"))
        labels = [self.read_json(file).get("label") for file in files]
        labelled = sum(map(is_label, labels))
        if not labelled and not any(file.lower().endswith(".cls") for file in files):
            return None
        if self.captions_checksum is not None and labelled < len(names):
            return None  # captions serve as well
        return self.whole_labels(labels, names, ".cls or .json file beside it")

    def whole_labels(self, labels, names, where):
        """The labels, if every image has one."""
        lacking = next((name for name, label in zip(names, labels) if not is_label(label)), None)
        if lacking:
            count = sum(map(is_label, labels))
            raise ValueError(f"{self.root}: {lacking} has no class number in a {where}, as "
                             f"{count:,} of {len(names):,} images have")
        return labels

    def take_folders(self, names, folders, inner, tars):
        """Finds class names and labels below the folder `inner`. Returns the images that have a class."""
        captioned = self.captions_checksum is not None
        top = tree_root(names, inner, captioned)
        if self.coco is None:
            check_no_splits(self.root / top, folders_in(names, top))
        if captioned and (tars or any("/" not in name[len(top):] for name in names)):
            self.unclassed, self.classes, self.labels = 0, ["all"], np.zeros(len(names), int)
            return names
        if tars and are_shards(tars, names):
            keys = Counter(posixpath.basename(name).partition(".")[2] for name in self.listed if name[-1] != "/")
            raise ValueError(f"{self.root}: {', '.join(tars[:3])} look like shards, whose images have no labels "
                             f"beside them (.cls, or .json with \"label\"), only {', '.join(sorted(keys)[:6])}; add "
                             f"labels, or name each tar after its class")

        if self.root.is_dir() and top != inner:
            check_no_splits(self.root / inner, folders_in(names, inner))
            top = inner
        classed = [name for name in names if "/" in name[len(top):]]
        if not classed:
            raise self.no_images(names)
        self.unclassed = len(names) - len(classed)
        folders = {name for name in folders if name.startswith(top)}  # a class without images keeps its number
        self.classes = sorted(name for name in folders_in(folders | {*classed}, top) if not is_hidden(name))
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([number[name[len(top):].split("/")[0]] for name in classed])
        return classed

    def no_images(self, names):
        """The ValueError for a source without images of a class or with captions: what was found in their place."""
        others = [name for name in self.listed.keys() - {*names} if name[-1] != "/" and not is_hidden(name)]
        kinds = Counter(posixpath.splitext(name)[1].lower() or name for name in others)
        found = [f"{len(names):,} images in no folder of a class, {self.texts_found:,} with captions"] * bool(names)
        found += [f"{count:,} {kind} files" for kind, count in kinds.most_common(4)]
        return ValueError(f"{self.root}: no images found; SOURCE must hold one folder of images per class, or images "
                          f"most of which have a .txt or .json of their name with captions, or be the folder of "
                          f"uncompressed tars or of parquet files itself. Found: {'; '.join(found) or 'nothing'}")

    # reading

    def follow(self, names, labels, checksum):
        """Takes the order of an earlier listing of which images have been removed since; those cannot be read."""
        rows = {name: row for row, name in enumerate(self.names.tolist())}
        if rows.keys() <= set(names.tolist()):
            order = np.array([rows.get(name, -1) for name in names.tolist()])
            self.places = np.where(order[:, None] < 0, GONE, self.places[order])
            if self.texts is not None:
                self.texts, self.text_places = self.texts[order], self.text_places[order]
            self.names, self.labels, self.fingerprint, self.removed = names, labels, checksum, order < 0

    def name(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def __getitem__(self, i):
        try:
            content = read_place(self.root, self.archives, os.fsdecode(self.names[i]), *self.places[i])
        except ValueError as error:
            raise ValueError(f"unreadable image ({error})") from error
        return read_image(content)


# ----- other sources ------------------------------------------------------------------------------
class SpriteSheet(Source):
    """One image of square tiles of `tile` pixels; each class has the same number of whole rows.
    classes: their names in order; None: one class, "all"."""

    def __init__(self, path, tile=28, classes=None):
        try:
            sheet = Image.open(path)
            sheet.load()
        except Exception as error:  # see read_image
            raise ValueError(f"{path}: unreadable image ({error}); SOURCE must be a sprite sheet, an archive, "
                             f"or a folder with one folder of images per class") from error
        sheet = to_8_bit(sheet)
        self.path, self.tile, self.sheet = path, tile, sheet if sheet.mode == "L" else sheet.convert("RGB")
        self.mode, self.classes = self.sheet.mode, ["all"] if classes is None else list(classes)
        self.columns, rows = sheet.width // tile, sheet.height // tile
        if sheet.width % tile or sheet.height % tile or rows % len(self.classes):
            raise ValueError(f"{path}: {sheet.width} x {sheet.height} pixels are not whole rows of {tile}-pixel "
                             f"tiles, equally many for {len(self.classes)} classes; set SHEET_TILE and SHEET_CLASSES")
        self.labels = np.repeat(np.arange(len(self.classes)), rows // len(self.classes) * self.columns)
        self.fingerprint = zlib.crc32(self.sheet.tobytes())

    def name(self, i):
        return f"{self.path}, tile {i}"

    def __getitem__(self, i):
        left, top = i % self.columns * self.tile, i // self.columns * self.tile
        return self.sheet.crop((left, top, left + self.tile, top + self.tile))


class PublishedLatents(ImageFiles):
    """What REPA's and HASTE's preprocessing wrote: images/, vae-sd/ with moments (mean, std) as .npy, and the labels in
    vae-sd/dataset.json. Images and moments are paired in sorted order, as their loader does.

    moments(i): float16 [2C, h, w]. Raises ValueError where the three do not fit.
    """

    def __init__(self, root):
        self.root, self.latents, self.archives = Path(root, "images"), Path(root, "vae-sd"), []
        files = [name for name in list_folder(self.root) if name != "dataset.json"]
        moments = [name for name in list_folder(self.latents) if name != "dataset.json"]
        names = sorted(name for name in files if name.lower().endswith(".png"))
        moments_names = sorted(name for name in moments if name.lower().endswith(".npy"))
        self.ignored = len(files) + len(moments) - len(names) - len(moments_names)
        if len(names) != len(moments_names) or not names:
            raise ValueError(f"{root}: {len(names)} images in images/ but {len(moments_names)} "
                             "latents in vae-sd/; fetch or make the missing ones")
        try:
            labels = dict(json.loads((self.latents / "dataset.json").read_text())["labels"])
            self.labels = np.array([int(labels[name]) for name in moments_names])
            self.shape = np.load(self.latents / moments_names[0]).shape
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.latents}: no label for every latent, or a damaged file ({error!r}); fetch or make "
                             f"dataset.json and the .npy files again") from error
        self.classes = [str(label) for label in range(self.labels.max() + 1)]
        self.names, self.moments_names = (np.array([os.fsencode(name) for name in some])
                                          for some in (names, moments_names))
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
        moments = moments.astype(np.float16)
        if not np.isfinite(moments).all():
            raise ValueError(f"latents {name} that are not finite in float16")
        return moments


def open_source(path, captions=None, tile=28, classes=None):
    """The source at `path`, told apart by what it is. Raises ValueError if it is none.

    captions: COCO's captions_*.json, for images in a folder or an archive. tile, classes: of a
    sprite sheet, the edge of its tiles in pixels and its classes' names in order.
    """
    path = Path(path)
    outer = next((each for each in path.parents if each.is_file()), path)  # an archive, of which path names a folder
    if not outer.exists():
        raise ValueError(f"{path}: no such file or folder; set SOURCE to a folder with one folder "
                         "of images per class, a tar or zip of one, or a sprite sheet")
    if (path / "vae-sd").is_dir():
        return PublishedLatents(path)
    has = lambda pattern: any(not is_hidden(each.name) for each in path.glob(pattern))
    if path.suffix == ".parquet" or has("*.parquet") and not has("*.tar"):  # beside tars they are img2dataset's tables
        from tables import ParquetFiles  # which is built on what is here
        return ParquetFiles(path)
    if path.is_dir() or zipfile.is_zipfile(outer) or tarfile.is_tarfile(outer):
        inner = "" if outer == path else path.relative_to(outer).as_posix()
        return ImageFiles(outer, inner, captions)
    return SpriteSheet(path, tile, classes)
