"""Images as people have them: folders, archives, parquet files, sprite sheets, and the captions beside them; crops.

Every source has class names in order, `classes`; `labels`, int64 [N]; `name(i)`; `[i]`, a PIL image of `mode` "RGB" or
"L"; unless `captions_checksum` is None, `captions(i)`, a list of str; `fingerprint`, a checksum of what it lists; how
many files it `ignored`, and how many images it left out as `unclassed`.
"""

import io
import json
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

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


# ----- listing ------------------------------------------------------------------------------------
SYSTEM = {"__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}  # folders
GONE = -1, 0, -1, False  # the place of a file that is not there


def list_folder(root):
    """Path relative to root of every file below it. Links are followed, but for those to a folder they lie in."""
    def walk(folder, prefix, above):
        real = os.path.realpath(folder)
        if real in above:
            return
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
    found = [name for name in names if os.path.splitext(name)[1].lower() in suffixes]
    return sorted((name for name in found if not is_hidden(name)), key=lambda name: name.split("/"))


def follow_links(places, links):
    """{name: place} of an archive, with its links {name: target}: to a file, or to a folder and all below it."""
    for name, target in links.items():
        for _ in links:  # a link to a link
            target = links.get(target, target)
        if target in places:
            places[name] = places[target]
        elif target != "." and not name.startswith(f"{target}/"):
            below = [each for each in places if each.startswith(f"{target}/")]
            found = {name + each[len(target):]: places[each] for each in below}
            places.update(found or {name: (0, -1, False)})
    return places


def list_tar(file):
    """{name: (first byte, bytes, False)} of every file in a tar, folders' names ending with /. A tar inside it counts
    as a folder of its own name; of several files of one name the last counts, as in unpacking."""
    places, links = {}, {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep a kilobyte for each
            name = posixpath.normpath(member.name.lstrip("/"))
            places.pop(name, None)
            links.pop(name, None)
            if member.sparse is not None:
                raise ValueError(f"{name} is packed as a sparse file; pack it again without --sparse")
            if member.isdir():
                places[f"{name}/"] = 0, 0, False
            elif member.issym():
                links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            elif member.islnk():
                links[name] = posixpath.normpath(member.linkname)
            elif member.isreg() and name.endswith(".tar"):
                inside = list_tar(tar.extractfile(member))
                places.update({f"{name[:-4]}/{inner}": (member.offset_data + start, size, False)
                               for inner, (start, size, _) in inside.items()})
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
            target = os.fsdecode(archive.read(info))
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        else:
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            places[f"{name}/" if info.is_dir() else name] = info.header_offset, info.compress_size, deflated
    return follow_links(places, links)


def list_files(root):
    """(archives, {name: place}, folders' names) of a folder, a zip or a tar, or a folder of tars.

    archives: (path, whether it is a zip) of each. A place is (the archive's number, or -1; first
    byte; bytes; whether deflated). Raises ValueError for what cannot be listed.
    """
    archives, places, folders, tars = [], {}, set(), [""]
    try:
        if root.is_dir():
            names = list(list_folder(root))
            # tars left beside images are no part of them
            tars = [] if image_names(names) else [name for name in names if name.endswith(".tar")]
            places = {name: (-1, 0, 0, False) for name in {*names} - {*tars}}
            folders = {f"{entry.name}/" for entry in os.scandir(root) if entry.is_dir()}
        for number, name in enumerate(tars):
            path = root / name if name else root
            is_zip = not tarfile.is_tarfile(path)  # a tar that ends in a zip looks like one
            archives.append((path, is_zip))
            with open(path, "rb") as file:
                found = list_zip(file) if is_zip else list_tar(file)
            places.update({posixpath.join(name[:-4], each): (number, *place) for each, place in found.items()})
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{root}: cannot be listed ({error}); SOURCE must be a folder, a zip or "
                         "an uncompressed, complete tar") from error
    return archives, places, folders | {name for name in places if name[-1] == "/"}


# ----- reading ------------------------------------------------------------------------------------
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


def read_place(root, archives, name, number, start, size, deflated):
    """The bytes of a file of a folder, or at a place of an archive: see list_files."""
    if size < 0:
        raise OSError("no such file, or a link to what is not there")
    if number < 0:
        return Path(root, name).read_bytes()
    path, is_zip = archives[number]
    with open(path, "rb") as file:
        file.seek(start)
        if is_zip:  # a header of 30 bytes that ends with the lengths of the two fields between it and the data
            file.seek(sum(struct.unpack("<HH", file.read(30)[26:])), os.SEEK_CUR)
        content = file.read(size)
        return zlib.decompress(content, -zlib.MAX_WBITS) if deflated else content


# ----- captions and classes -----------------------------------------------------------------------
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
        images = sorted(said["images"], key=lambda image: image["id"])
        return zlib.crc32(content), {posixpath.basename(image["file_name"]): clean(captions.get(image["id"], []))
                                     for image in images}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: missing, damaged or of another kind ({error!r}); set CAPTIONS "
                         "to COCO's captions_*.json") from error


def file_beside(name, suffixes, places):
    """The file of one of the suffixes that bears an image's name, whole or, as webdataset has it,
    up to the first dot; "" if there is none."""
    folder, base = posixpath.split(name)
    stems = posixpath.splitext(name)[0], posixpath.join(folder, base.split(".")[0])
    return next((stem + suffix for stem in stems for suffix in suffixes if stem + suffix in places), "")


def folders_in(names, top):
    """Names of the folders right below `top` that the names lie in."""
    return {name[len(top):].split("/")[0] for name in names if "/" in name[len(top):]}


def tree_root(names, top, captioned):
    """The deepest folder that all images share, where class folders lie: an archive may hold the
    tree's root too. Without captions the last folder above the images is a class."""
    while len(shared := folders_in(names, top)) == 1:
        if any(name.count("/", len(top)) <= (not captioned) for name in names):
            break
        top += f"{shared.pop()}/"
    return top


class ImageFiles:
    """The images of a class-per-folder tree: a folder, a zip, a tar, or a tar (or folder) of one
    tar per class, as ImageNet downloads. Class ids follow the sorted folder names. In tars of
    webdataset's kind each image's .cls or .json ("label") file says its class. Images with captions
    may do without class folders, as in tars without labels: then there is one class, "all".

    inner: the folder to take of an archive. captions: COCO's captions_*.json; else .txt or .json files beside the
    images count. captions_checksum: of that file; 0 where captions lie beside the images, None where there are none.
    Raises ValueError for a source without images, or one that cannot be read.
    """

    mode, captions_checksum, coco = "RGB", None, None

    def __init__(self, root, inner="", captions=None):
        self.root = Path(root)
        self.archives, places, folders = list_files(self.root)
        top = f"{inner}/" if inner else ""
        names = [name for name in image_names(places) if name.startswith(top)]
        texts = []
        if captions:
            names = self.take_coco(names, places, captions)
        else:
            texts = self.find_texts(names, places)
        if texts:
            self.captions_checksum, self.texts = 0, np.array([os.fsencode(name) for name in texts])
            self.text_places = np.array([places.get(name, GONE) for name in texts])
        self.ignored = sum(name[-1] != "/" for name in places.keys() - {*names, *texts})
        names = self.take_classes(names, folders, top)
        # arrays, not lists: worker processes share them without copies
        self.names = np.array([os.fsencode(name) for name in names])
        self.places = np.array([places[name] for name in names])
        self.take_webdatasets_labels(names, places)
        self.fingerprint = zlib.crc32(self.names.tobytes() + self.places[:, 1].tobytes() + self.places[:, 2].tobytes())

    def take_coco(self, names, places, path):
        """Takes the captions of COCO's annotations. Returns the images that these name, each where
        it lies, or, if nowhere, where the others do."""
        self.captions_checksum, known = read_coco(path)
        found = {posixpath.basename(name): name for name in names}
        some = next((found[name] for name in known if name in found), None)
        if some is None:
            raise ValueError(f"{self.root}: has none of the {len(known):,} images of {path}; set "
                             "SOURCE to the folder or archive of these")
        self.coco = list(known.values())
        names = [found.get(name, posixpath.join(posixpath.dirname(some), name)) for name in known]
        places.update({name: GONE for name in names if name not in places})
        return names

    def find_texts(self, names, places):
        """The file with each image's captions, "" for one without; [] where these files hold no captions."""
        texts = {name for name in places if name.endswith((".txt", ".json"))}
        if not texts:  # as in most trees
            return []
        beside = [file_beside(name, (".txt", ".json"), texts) for name in names]
        captioned = any(name.endswith(".txt") for name in beside) or \
            any("caption" in self.read_json(name, places) for name in beside)
        return beside if captioned else []

    def take_classes(self, names, folders, inner):
        """Finds class names and labels below the folder `inner`. Returns the images that have a class."""
        captioned, is_folder = self.captions_checksum is not None, self.root.is_dir()
        top = tree_root(names, inner, captioned)
        parts = folders_in(names, top)
        if "train" in parts and parts <= {"train", "val", "valid", "validation", "test"}:
            raise ValueError(f"{self.root}: {', '.join(sorted(parts))} are parts of a data set, no "
                             f"classes; set SOURCE to {self.root / top / 'train'}")
        in_tars = is_folder and self.archives
        if captioned and (in_tars or any("/" not in name[len(top):] for name in names)):
            self.unclassed, self.classes, self.labels = 0, ["all"], np.zeros(len(names), int)
            return names

        top = inner if is_folder else top
        classed = [name for name in names if "/" in name[len(top):]]
        if not classed:
            raise ValueError(f"{self.root}: no images found; SOURCE must hold one folder of images "
                             "per class, or images with captions")
        self.unclassed = len(names) - len(classed)
        folders = {name for name in folders if name.startswith(top)}  # a class without images keeps its number
        self.classes = sorted(name for name in folders_in(folders | {*classed}, top) if not is_hidden(name))
        number = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([number[name[len(top):].split("/")[0]] for name in classed])
        return classed

    def take_webdatasets_labels(self, names, places):
        """Where an archive's images have a .cls or .json ("label") file beside them: the classes that these say."""
        labels = []
        for name in names:
            in_archive = places[name][0] >= 0
            beside = file_beside(name, (".cls", ".json"), places) if in_archive else ""
            label = self.read_json(beside, places).get("label")
            if isinstance(label, int):
                labels.append(label)
            elif not labels and (label is None or self.captions_checksum is not None):  # none of webdataset's kind
                return
            else:
                raise ValueError(f"{self.root}: {name} has no class number in a .cls or .json file beside it")
        self.labels, self.classes = np.array(labels), [str(label) for label in range(max(labels) + 1)]

    def read_json(self, name, places):
        """What a .json file says, or as "label" what a .cls file does, or why it cannot be read; {} without one."""
        try:
            said = json.loads(read_place(self.root, self.archives, name, *places[name])) if name else {}
        except Exception as error:  # zlib's too
            said = str(error)
        return said if isinstance(said, dict) else dict(label=said)

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
            said = json.loads(text).get("caption") if name.endswith(".json") else re.split("[\r\n]", text)
            return clean([said] if isinstance(said, str) else said or [])
        except Exception as error:  # JSON of any kind
            raise ValueError(f"unreadable captions {name} ({error})") from error

    def __getitem__(self, i):
        try:
            content = read_place(self.root, self.archives, os.fsdecode(self.names[i]), *self.places[i])
        except (OSError, zlib.error, struct.error) as error:
            raise ValueError(f"unreadable image ({error})") from error
        return read_image(content)


# ----- other sources ------------------------------------------------------------------------------
class ParquetFiles:
    """The images of the Hugging Face hub's parquet files ("image" with its "bytes", "label", class
    names in the metadata): one file, or a folder of those of one split. Needs pyarrow."""

    mode, ignored, unclassed, captions_checksum = "RGB", 0, 0, None

    def __init__(self, root):
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{root}: parquet files are read with pyarrow; pip install pyarrow") from error
        self.paths = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
        splits = {path.name.split("-")[0] for path in self.paths}
        if len(splits) > 1:
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
            table = parquet.ParquetFile(path).read_row_group(number, ["image"], use_threads=False)
            self.open = group, table["image"]
        return read_image(self.open[1][int(i - self.ends[group])]["bytes"].as_py())


class SpriteSheet:
    """One image of square tiles of `tile` pixels; each class has the same number of whole rows.
    classes: their names in order; None: one class, "all"."""

    ignored, unclassed, captions_checksum = 0, 0, None

    def __init__(self, path, tile, classes):
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

    unclassed = 0

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
    if path.suffix == ".parquet" or any(path.glob("*.parquet")) and not any(path.glob("*.tar")):  # tables of tars
        return ParquetFiles(path)
    if path.is_dir() or zipfile.is_zipfile(outer) or tarfile.is_tarfile(outer):
        inner = "" if outer == path else path.relative_to(outer).as_posix()
        return ImageFiles(outer, inner, captions)
    return SpriteSheet(path, tile, classes)
