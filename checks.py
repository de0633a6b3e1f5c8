"""What scripts refuse before any work: constants that are not allowed, folders made with other ones or of other data
and networks, which are known by their checksums, wherever they lie."""

import hashlib
import importlib.util
import numbers
import os
import re
import reprlib
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

NETWORKS = ("TEACHER", "TEXT_ENCODER")  # constants that say where a network lies


def check_constants(constants, rules, **choices):
    """Checks a script's constants, globals(), before any work: {rule: names}, and for each other name its choices.
    Rules are "[two] [whole] number[s] from|above A [to B] [or None]", "True or False", "path [or None]", "list [or
    None]", "scale, (scale, shift) or None".

    Whole floats become ints, None becomes 0 where that is allowed, ~ is expanded. Raises ValueError
    that names the constant, its value and what is allowed.
    """
    for name, allowed in choices.items():
        if not any(constants[name] == choice for choice in allowed):
            raise ValueError(f"unknown {name} {constants[name]!r}; choose one of {', '.join(map(str, allowed))}")
    for rule, names in rules.items():
        for name in names.split():
            constants[name] = checked(name, constants[name], rule)


def checked(name, value, rule):
    """A constant's value as its script takes it. Raises ValueError where the rule does not allow it."""
    refused = ValueError(f"{name} = {value!r}; allowed: {rule}")
    if value is None and rule.endswith("or None"):
        return None
    if rule == "True or False":
        if not isinstance(value, bool):
            raise refused
        return value
    if rule.startswith("list"):
        if not isinstance(value, (list, tuple, range, np.ndarray)):
            raise refused
        return value
    if rule.startswith("scale"):  # becomes the pair
        pair = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, 0.0)
        if not all(isinstance(each, numbers.Real) and not isinstance(each, bool) for each in pair) or pair[0] <= 0:
            raise refused
        return list(pair)
    if rule.startswith("path"):
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            raise refused
        return os.path.expanduser(value)

    two, whole, many, bound, low, high = re.match(
        r"(two )?(whole )?number(s)? (from|above) (\S+)(?: to (\S+))?", rule).groups()
    found = list(value) if many and isinstance(value, (tuple, list)) else [value]
    if whole and low == "0":  # None stands for never, or none
        found = [0 if each is None else each for each in found]

    def is_good(number):
        if not isinstance(number, numbers.Real) or isinstance(number, bool):
            return False
        inside = float(low) <= number <= float(high or 1e300)
        return inside and (bound == "from" or number > float(low)) and (not whole or number % 1 == 0)

    if not found or (two and len(found) != 2) or not all(map(is_good, found)):
        raise refused
    found = tuple(int(each) if whole else each for each in found)
    return found if many else found[0]


def told_apart(before, now):
    """'before, now after' for a message: of long paths what begins shortly before they differ."""
    values = [reprlib.repr(before), reprlib.repr(now)]
    if isinstance(before, str) and isinstance(now, str):
        start = max(0, len(os.path.commonprefix([before, now])) - 20)
        values = [repr("..." + value[start:] if start else value) for value in (before, now)]
    return ", now ".join(values)


def refuse_other(folder, state, found, wanted, constant="DATA_DIR"):
    """Raises ValueError that names what differs between a folder's settings and this run's."""
    differing = [f"{key} {told_apart(found.get(key), wanted[key])}" for key in wanted if found.get(key) != wanted[key]]
    if differing:
        raise ValueError(f"{folder}: {state} with other settings ({'; '.join(differing)}); "
                         f"set them back, choose another {constant} or delete the folder")


def comparable(settings, other):
    """A preparation's settings beside another's, but for what makes no difference: a path's spelling, where a VAE of
    the same weights lies, and which of Stable Diffusion's two fine-tuned VAEs it is, whose encoder is the same, so that
    a folder serves both. What folders of earlier versions do not say is what these did."""
    settings = {"crop": "adm", "captions_source": None, "captions_checksum": None, "vae_scale": None, **settings}
    captions, sums = settings["captions_source"], {each.get("vae_checksum") for each in (settings, other)}
    vae = str(settings["vae_name"]).replace("sd-vae-ft-mse", "sd-vae-ft-ema")
    return dict(settings, source=os.path.realpath(settings["source"]), vae_checksum=None,
                captions_source=captions and os.path.realpath(captions),
                vae_name=vae if None in sums or len(sums) > 1 else sums.pop())


def check_space(folder, crops, count, latents_bytes):
    """Raises ValueError unless the disk has room for `latents_bytes` and `count` more packed images, by a sample."""
    total = len(crops.source.labels)
    _, packed, _ = crops[np.unique(np.linspace(0, total - 1, 32).astype(int))]
    sizes = [len(file) for file in packed if file] or [0]
    needed = latents_bytes + int(1.1 * count * sum(sizes) / len(sizes))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder}: needs {needed:,} bytes, {free:,} are free; make room or choose another DATA_DIR")


def check_sets(samples, reference, kept):
    """Raises ValueError for fid.py's ImageSets that cannot be compared, or too few images for precision and recall."""
    if reference.count and samples.size != reference.size:
        raise ValueError(f"{samples.path}: images of {samples.size[1]} x {samples.size[0]} pixels, those of "
                         f"{reference.path} have {reference.size[1]} x {reference.size[0]}; compare images of one size")
    if reference.count and kept < 4:
        raise ValueError(f"PRECISION_RECALL_IMAGES {kept}: precision and recall need 4")


def check_writable(path):
    """Raises now what writing the file after hours of work would raise."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; set OUT to a file's path")
    with open(f"{path}.tmp", "wb"):
        os.remove(f"{path}.tmp")


def is_installed(package):
    found = importlib.util.find_spec(package)
    return found is not None and bool(found.origin)  # a folder of that name is no package


def are_pairs(values):
    """Whether a constant is a list of pairs."""
    return isinstance(values, (list, tuple)) and all(
        isinstance(each, (list, tuple)) and len(each) == 2 for each in values)


def check_times(times):
    """Raises ValueError for a distribution of times that is neither uniform nor a logit-normal."""
    fit = are_pairs([times]) and all(isinstance(each, (int, float)) for each in times) and times[1] > 0
    if times != "uniform" and not fit:
        raise ValueError(f"TIMES {times!r}: \"uniform\", or (mean, std) of a logit-normal, std above 0")


def check_layers(model, depth, align_depth, pairs):
    """Raises ValueError for layers to align that a model of so many blocks has not; pairs: None if there are none."""
    if align_depth > depth:
        raise ValueError(f"ALIGN_DEPTH {align_depth} is not one of {model}'s blocks 1..{depth}; choose one of these")
    fit = pairs is None or (pairs and are_pairs(pairs) and all(student in range(depth) for student, _ in pairs))
    if not fit:
        raise ValueError(f"LAYER_PAIRS {pairs}: a list of (student, teacher) layers, the "
                         f"student's in 0..{depth - 1}; set ATTENTION_WEIGHT to 0 for none")


def check_webp():
    """Raises ValueError where Pillow cannot write and read WebP, in which images are packed."""
    Image.init()
    if "WEBP" not in Image.SAVE or "WEBP" not in Image.OPEN:
        raise ValueError("this Pillow knows no WebP, in which images are packed; install one that does: pip install "
                         "--force-reinstall pillow")


def weights_checksum(place):
    """Of a network's file, or of those in its folder; None of a name."""
    path = Path(place)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(np.memmap(file, mode="r"))
    return digest.hexdigest() if files else None


def names_alone(settings):
    """The settings without the paths of this machine, for a file that others get: each is its last part."""
    if isinstance(settings, dict):
        return {key: names_alone(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [names_alone(value) for value in settings]
    is_path = isinstance(settings, str) and (os.path.isabs(settings) or os.path.exists(settings))
    return os.path.basename(settings.rstrip("/")) if is_path else settings


def same(saved, settings, name):
    """Whether the checksum of a network or of the data says that it is the same; None where it does not say."""
    before, now = (each.get("checksums", {}).get(name) for each in (saved, settings))
    return None if before is None or now is None else before == now


def differ(key, saved, settings):
    """Whether a setting is another than it was; of a network in a file or folder its weights say so, not its place."""
    before, now = saved.get(key, settings[key]), settings[key]  # an older version's run need not have it
    if key not in NETWORKS:
        return before != now
    known = same(saved, settings, key)
    return os.path.realpath(before) != os.path.realpath(now) if known is None else not known


def too_short_for_ema(steps, decay):
    """The line that says so, "" where a run is long enough for its EMA to forget the first weights."""
    if not decay or steps >= round(3 / (1 - decay)):
        return ""
    return (f"STEPS {steps:,}: EMA_DECAY {decay} averages over more steps, so that samples still show the first "
            f"weights' noise; {max(0, 1 - 3 / max(steps, 3)):.3g} fits")
