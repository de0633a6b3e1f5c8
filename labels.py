"""Labels and captions as people write them: names of classes and of a data set's parts, COCO's annotations, texts."""

import json
import posixpath
import re
import zlib
from collections import defaultdict
from pathlib import Path

from archives import normal

SPLITS = dict(train="train", training="train", val="val", valid="val", validation="val", dev="val",
              test="test", testing="test", eval="test")


def split_in(name):
    """(the part of a data set that a file's or folder's name says, or None; the name's other words)."""
    words = re.findall("[a-z]+", posixpath.splitext(name)[0].lower())
    split = next((SPLITS[word] for word in words if word in SPLITS), None)
    return split, " ".join(word for word in words if word not in (*SPLITS, "set", "split", "data", "images"))


def check_no_splits(root, names):
    """Raises ValueError where the names, of folders or tars, are those of a data set's parts."""
    found = {name: split_in(name) for name in sorted(names)}
    splits, rests = ({each[i] for each in found.values()} for i in (0, 1))
    if None in splits or len(rests) != 1 or (len(splits) < 2 and (len(found) > 1 or rests != {""})):
        return
    training = min(found, key=lambda name: found[name][0] != "train")
    raise ValueError(f"{root}: {', '.join(found)} are parts of a data set, no classes; set SOURCE to "
                     f"{Path(root, training)}")


def clean(captions):
    """Those with text, each on one line: runs of white space, control characters and lone surrogates become a blank."""
    captions = [re.sub(r"[\s\0-\x1f\x7f-\x9f\ud800-\udfff]+", " ", caption).strip() for caption in captions]
    return [caption for caption in captions if caption]


def texts_of(said):
    """The captions in what a file or column says: a str, or a list of str. Raises ValueError for anything else."""
    said = [said] if isinstance(said, str) else [] if said is None else said
    if not isinstance(said, (list, tuple)) or not all(isinstance(each, str) for each in said):
        raise ValueError(f"a caption that is no text: {str(said)[:60]}")
    return clean(said)


def read_coco(path):
    """(checksum, {image's file name: captions}) of COCO's annotations, images by id, captions in the file's order; of
    two entries of one file the captions of both. What is no text is no caption."""
    captions, of_file = defaultdict(list), defaultdict(list)
    try:
        content = Path(path).read_bytes()
        said = json.loads(content)
        for annotation in said["annotations"]:
            if isinstance(annotation["caption"], str):
                captions[annotation["image_id"]].append(annotation["caption"])
        for image in sorted(said["images"], key=lambda image: image["id"]):
            of_file[normal(image["file_name"])] += clean(captions[image["id"]])
        return zlib.crc32(content), dict(of_file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: missing, damaged or of another kind ({error!r}); set CAPTIONS "
                         "to COCO's captions_*.json") from error


def match_names(wanted, names, said_by):
    """{each wanted name: the one of `names` that ends with it, or with its longest end that any has; or None}. Raises
    ValueError where two do, or where one does for two. said_by: the file that wants them."""
    ending, found = defaultdict(list), {}
    for name in names:
        parts = normal(name).split("/")
        for i in range(len(parts)):
            ending["/".join(parts[i:])].append(name)
    for file in wanted:
        parts = file.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        fitting = next((ending[end] for end in ends if end in ending), [None])
        if len(fitting) > 1:
            raise ValueError(f"{said_by}: {file} may be {fitting[0]} or {fitting[1]}; name it there with its folder")
        found[file] = fitting[0]
    taken = {}
    for file, name in found.items():
        if name and taken.setdefault(name, file) != file:
            raise ValueError(f"{said_by}: {taken[name]} and {file} may both be {name}; give each its folder there")
    return found


def is_label(said):
    return isinstance(said, int) and not isinstance(said, bool)


def are_shards(tars, names):
    """Whether tars are numbered parts of one set: their names differ in digits alone, and do not
    begin the names of the images in them, as ImageNet's classes' do."""
    numbered = len(tars) > 1 and len({re.sub(r"\d", "", tar) for tar in tars}) == 1
    return numbered and not all(posixpath.basename(name).startswith(posixpath.basename(posixpath.dirname(name)))
                                for name in names)


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


def by_numbers(name):
    """What sorts names by their words and numbers."""
    parts = [re.split(r"([0-9]+)", folder) for folder in name.split("/")]
    return [[int(part) if i % 2 else part for i, part in enumerate(folder)] for folder in parts]
