"""The crop, preparing trees and sheets, and what PreparedDataset refuses."""

import gzip
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from bench import write_prepared
from conftest import ROOT, set_constants, with_latents
from PIL import Image
from safetensors.torch import load_file, save_file

import fid
import prepare_latents
import train
from prepare_latents import PreparedDataset, center_crop, square_crop
from vae import load_vae


def adm_center_crop(image, size):
    """guided-diffusion's image_datasets.py in numpy slices: an independent statement of the same crop."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    ratio = size / min(*image.size)
    image = image.resize(tuple(round(x * ratio) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size]


@pytest.mark.parametrize("width, height", [(64, 64), (65, 200), (131, 77), (500, 333), (20, 31), (256, 128)])
def test_center_crop_is_adms(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(center_crop(image, 64)), adm_center_crop(image, 64))


@pytest.mark.parametrize("width, height", [(64, 64), (65, 200), (131, 77), (20, 31)])
def test_square_crop_is_cocos(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = min(width, height)
    y, x = (height - square) // 2, (width - square) // 2
    wanted = Image.fromarray(pixels[y : y + square, x : x + square]).resize((48, 48), Image.LANCZOS)
    assert np.array_equal(np.asarray(square_crop(Image.fromarray(pixels), 48)), np.asarray(wanted))


def test_sprite_sheet_is_prepared_without_loss(data_dir):
    data = PreparedDataset(data_dir)
    sheet = np.asarray(Image.open(data_dir.parent / "sheet.png"))
    assert len(data) == 200 and data.classes[9] == "ankle boot" and data.vae is None
    assert (np.bincount(data.labels) == 20).all()
    moments, labels, images = data[np.array([0, 21, 199])]
    assert labels.tolist() == [0, 1, 9] and images.dtype == torch.uint8 and images.shape == (3, 3, 28, 28)
    for row, (top, left) in enumerate(((0, 0), (28, 28), (9 * 28, 19 * 28))):
        tile = sheet[top : top + 28, left : left + 28]
        assert np.array_equal(images[row, 1].numpy(), tile)
        assert np.array_equal(moments[row, 0].numpy(), tile)
    assert data.shape == (1, 28, 28) and moments.shape == (3, 1, 28, 28)
    assert sorted(path.name for path in data_dir.iterdir()) == ["image_offsets.npy", "images.bin", "labels.npy",
                                                                "meta.json"]  # nothing stored twice


def photograph(rng, width, height):
    """Smooth colours with fine noise, RGB."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-8, 9, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def tree(tmp_path):
    """Two classes of photograph-like images of mixed sizes and kinds, with a file that is no image."""
    rng = np.random.default_rng(0)
    for name, sizes in (("n02", [(80, 60), (33, 90)]), ("n01", [(64, 64), (200, 150), (40, 41)])):
        (tmp_path / "tree" / name / "deep").mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            folder = tmp_path / "tree" / name / ("deep" if i == 1 else "")
            picture = photograph(rng, width, height).convert("L" if i == 0 else "RGB")
            picture.save(folder / f"{i}.{'JPEG' if i == 2 else 'png'}")
    (tmp_path / "tree/n01/notes.txt").write_text("no image")
    return tmp_path / "tree"


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    def run(**constants):
        set_constants(monkeypatch, prepare_latents, **{**dict(DATA_DIR=str(tmp_path / "out"), IMAGE_SIZE=32, VAE=None,
                                                             WORKERS=0, BATCH_SIZE=2, COMPILE=False, CAPTIONS=None,
                                                             CROP="adm", LEAVE_OUT_UNREADABLE=False), **constants})
        prepare_latents.main()
        return PreparedDataset(prepare_latents.DATA_DIR)
    return run


def test_tree_with_vae(tree, prepare, vae_folder, capsys):
    data = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), WORKERS=2)
    assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.vae == dict(name=str(vae_folder[0]), scale=0.25)
    moments, _, images = data[np.arange(5)]
    assert moments.shape == (5, 8, 8, 8) and moments.dtype == torch.float16
    first = Image.open(tree / "n01/0.png").convert("RGB")
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), adm_center_crop(first, 32))
    with torch.no_grad():
        mean, std = load_vae(vae_folder[0])[0].encode(images.float() / 127.5 - 1)
    torch.testing.assert_close(moments.float(), torch.cat([mean, std], dim=1), rtol=2e-3, atol=1e-3)
    assert "5 images of 2 classes" in (summary := capsys.readouterr().out) and "ignored 1 files" in summary


def test_finished_folder_is_left_alone(tree, prepare, capsys):
    prepare(SOURCE=str(tree))
    before = {path.name: path.read_bytes() for path in (tree.parent / "out").iterdir()}
    prepare(SOURCE=str(tree))
    assert "already finished, 5 images; nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"finished with other settings \(image_size 32, now 64\)"):
        prepare(SOURCE=str(tree), IMAGE_SIZE=64)
    assert before == {path.name: path.read_bytes() for path in (tree.parent / "out").iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_listed_and_the_rest_is_kept(tree, prepare, workers, capsys):
    broken = tree / "n02/0.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    with pytest.raises(ValueError, match=r"1 of 5 images could not be read; unreadable\.txt there lists them.* "
                                         r"Repair or remove them and run again, or set LEAVE_OUT_UNREADABLE = True"):
        prepare(SOURCE=str(tree), WORKERS=workers, CHUNK=2)
    folder = tree.parent / "out"
    assert re.fullmatch(r".*/n02/0\.png: unreadable image \(.*\)\n", (folder / "unreadable.txt").read_text())
    with pytest.raises(ValueError, match="no meta.json, so this is not a finished data set"):
        PreparedDataset(folder)
    broken.write_bytes(whole)
    capsys.readouterr()
    data = prepare(SOURCE=str(tree), WORKERS=workers, CHUNK=2)
    assert "5 images of 2 classes, 2 of them in these" in capsys.readouterr().out  # only the chunk that had it
    assert len(data) == 5 and not (folder / "unreadable.txt").exists() and not (folder / "unfinished").exists()


def test_unreadable_images_are_left_out_when_allowed(tree, prepare, vae_folder, capsys):
    whole = prepare(SOURCE=str(tree), CHUNK=2, VAE=str(vae_folder[0]), MIRROR=True, DATA_DIR=str(tree.parent / "whole"))
    (tree / "n01/2.JPEG").write_bytes(b"no image")
    data = prepare(SOURCE=str(tree), CHUNK=2, VAE=str(vae_folder[0]), MIRROR=True, LEAVE_OUT_UNREADABLE=True)
    assert "left out: 1 unreadable images" in capsys.readouterr().out
    rows = [i for i, name in enumerate(["n01/0.png", "n01/2.JPEG", "n01/deep/1.png", "n02/0.png", "n02/deep/1.png"])
            if name != "n01/2.JPEG"]
    assert data.labels.tolist() == [0, 0, 1, 1]
    for indices, wanted in ((np.arange(4), np.array(rows)), (np.arange(4) + 4, np.array(rows) + 5)):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(data[indices], whole[wanted]))
    prepare(CHECK=True)
    assert "4 images are what was written; 4 of them, encoded again, differ by at most 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("constants, message", [
    (dict(SOURCE="/nowhere"), "/nowhere: no such file or folder; set SOURCE"),
    (dict(SOURCE=str(ROOT / "tests/golden")), "no images found; SOURCE must hold one folder of images per class"),
    (dict(SOURCE=str(ROOT / "LICENSE")), "LICENSE: unreadable image .* SOURCE must be a sprite sheet, an archive"),
    (dict(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), SHEET_TILE=27), "not whole rows of 27-pixel"),
    (dict(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), VAE="no-such/vae"), "VAE 'no-such/vae' is no local file"),
    (dict(SOURCE=str(ROOT / "data"), VAE_PRECISION="fp8"), "unknown VAE_PRECISION 'fp8'; choose one of float32, bf16"),
])
def test_bad_sources_are_refused(prepare, constants, message):
    with pytest.raises(ValueError, match=message):
        prepare(**constants)


def damage(folder, change, name="meta.json"):
    """Applies a change to a JSON file of a copy."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / "meta.json").unlink(), "no meta.json, so this is not a finished data set"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json: damaged"),
    (lambda f: damage(f, lambda meta: meta.update(format=99)), "format 99, this version reads 1"),
    (lambda f: (f / "latents.npy").write_bytes((f / "latents.npy").read_bytes()[:-1]),
     r"latents.npy: \d+ bytes, meta.json"),
    (lambda f: (f / "images.bin").unlink(), r"images.bin: 0 bytes, meta.json says \d+"),
    (lambda f: damage(f, lambda meta: meta.update(classes=["a", "b"])),
     r"labels 0\.\.9, but meta.json names 2 classes"),
])
def test_unfinished_or_damaged_folder_is_refused(latents_dir, tmp_path, harm, message):
    folder = shutil.copytree(latents_dir, tmp_path / "copy")
    harm(folder)
    with pytest.raises(ValueError, match=message):
        PreparedDataset(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder; set DATA_DIR"):
        PreparedDataset(tmp_path / "absent")


def test_damaged_packed_image_is_named(data_dir, tmp_path):
    for path in data_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    packed, begin = tmp_path / "images.bin", int(np.load(tmp_path / "image_offsets.npy")[7])
    content = bytearray(packed.read_bytes())
    content[begin : begin + 20] = bytes(20)
    packed.write_bytes(content)
    with pytest.raises(ValueError, match="images.bin: image 7 is damaged"):
        PreparedDataset(tmp_path)[np.array([6, 7])]


def test_a_worker_opens_the_files_itself(data_dir):
    data = PreparedDataset(data_dir)
    assert len(pickle.dumps(data)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(data))[np.array([5])][2], data[np.array([5])][2])


@pytest.mark.parametrize("with_images", [True, False])
def test_pixels_are_decoded_once_for_student_and_teacher(data_dir, with_images, monkeypatch):
    data, opened, open_image = PreparedDataset(data_dir, with_images), [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or open_image(*args, **options))
    moments, _, images = data[np.array([3, 7, 200 + 7, 200 + 3])]
    assert len(opened) == 4 and torch.equal(moments[[2, 3]], moments[[1, 0]].flip(-1)) and not torch.equal(*moments[:2])
    assert torch.equal(images, moments.expand(-1, 3, -1, -1)) if with_images else images is None


@pytest.mark.parametrize("harm", [lambda path: None, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_pixels_of_earlier_versions_are_read(data_dir, tmp_path, prepare, harm, capsys):
    """Which stored them once more, as latents.npy: it is not needed."""
    old = with_latents(data_dir, tmp_path / "old")
    harm(old / "latents.npy")
    for with_images in (True, False):
        pairs = zip(*(PreparedDataset(folder, with_images)[np.arange(0, 400, 7)] for folder in (old, data_dir)))
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    prepare(DATA_DIR=str(old), CHECK=True)
    assert capsys.readouterr().out == f"{old}: 200 images are what was written\n"


def test_pixels_that_an_earlier_version_began_are_finished(tree, prepare, tmp_path):
    whole = (tree / "n02/0.png").read_bytes()
    (tree / "n02/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 5 images could not be read"):
        prepare(SOURCE=str(tree), CHUNK=2)
    np.save(tmp_path / "out/latents.npy", np.zeros((5, 3, 32, 32), np.float16))
    for record in (tmp_path / "out/unfinished").glob("0*.json"):
        damage(record.parent, lambda content: content["checksums"].update({"latents.npy": 0}), record.name)
    (tree / "n02/0.png").write_bytes(whole)
    prepare(SOURCE=str(tree), CHUNK=2)
    prepare(SOURCE=str(tree), CHUNK=2, DATA_DIR=str(tmp_path / "straight"))
    assert contents(tmp_path / "out")[0] == contents(tmp_path / "straight")[0]
    prepare(CHECK=True)


def test_packed_images_are_lossless_webp(data_dir):
    data = PreparedDataset(data_dir)
    first = Image.open(io.BytesIO(data.packed[: data.offsets[1]]))
    assert first.format == "WEBP" and data.offsets[-1] == len(data.packed)


# ---------------------------------------------------------------------------------------------------------------------
# sources of all kinds


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of 80 photographs each, JPEGs and PNGs of mixed sizes."""
    root, rng = tmp_path_factory.mktemp("photographs") / "train", np.random.default_rng(1)
    for name in ("n03", "n01", "n02"):
        (root / name).mkdir(parents=True)
        for i in range(80):
            image = photograph(rng, *rng.integers(30, 140, 2))
            image.save(root / name / (f"{name}_{i}.JPEG" if i % 2 else f"{name}_{i}.png"))
    return root


def contents(folder):
    """{file: bytes} of a prepared folder; of meta.json what does not name the source."""
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    meta = json.loads(files.pop("meta.json"))
    meta.pop("source")
    return files, meta


def copy_with_captions(root, path):
    shutil.copytree(root, path)
    for i, image in enumerate(sorted(path.rglob("*.*"))):
        image.with_suffix(".txt").write_text("".join(f"{image.stem}, caption {n}\n" for n in range(1 + i % 3)))


def archive(kind, root, path):
    if kind == "tar of tars":
        with tarfile.open(path, "w") as outer:
            for folder in sorted(root.iterdir()):
                inner = io.BytesIO()
                with tarfile.open(fileobj=inner, mode="w") as tar:
                    for file in sorted(folder.iterdir()):
                        tar.add(file, file.name)
                info = tarfile.TarInfo(f"{folder.name}.tar")
                info.size = inner.tell()
                inner.seek(0)
                outer.addfile(info, inner)
    elif kind == "tar":
        (root / "n03/zzz.zip").write_bytes(b"PK\5\6" + bytes(18))  # a tar that also looks like a zip
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            tar.add(root, "./train")
        (root / "n03/zzz.zip").unlink()
        assert zipfile.is_zipfile(path)
    else:
        compression = zipfile.ZIP_DEFLATED if kind == "deflated zip" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", compression) as file:
            for image in root.rglob("*.*"):
                file.write(image, image.relative_to(root.parent))


@pytest.mark.parametrize("kind", ["tar of tars", "tar", "stored zip", "deflated zip"])
def test_an_archive_gives_what_its_tree_gives(kind, photographs, prepare, tmp_path):
    tree = prepare(SOURCE=str(photographs), DATA_DIR=str(tmp_path / "tree"))
    assert tree.classes == ["n01", "n02", "n03"] and len(tree) == 240
    archive(kind, photographs, tmp_path / "archive")
    prepare(SOURCE=str(tmp_path / "archive"), DATA_DIR=str(tmp_path / "of_archive"), WORKERS=2)
    assert contents(tmp_path / "of_archive") == contents(tmp_path / "tree")


def test_images_of_every_kind(prepare, tmp_path):
    """Grayscale, palette, alpha, CMYK, 16 bits, EXIF rotation, odd suffixes: all become the crop of their RGB."""
    rng, folder = np.random.default_rng(2), tmp_path / "zoo" / "a" / "deep" / "deeper"
    folder.mkdir(parents=True)
    (tmp_path / "zoo/b").mkdir()  # a class without images keeps its number
    base = photograph(rng, 60, 40)
    gray16 = np.asarray(base.convert("L")).astype(np.uint16) * 256 + 7
    rotated = base.getexif()
    rotated[274] = 6  # to be seen turned clockwise by a quarter
    wanted = {"01.PNG": base, "02.png": base.convert("L"), "03.png": base.quantize(32), "04.png": base.convert("RGBA"),
              "05.png": base.convert("LA"), "06.png": base.convert("1"), "07.bmp": base, "08.TIFF": base,
              "09.gif": base.quantize(32), "10.webp": base, "11.png": Image.fromarray(gray16)}
    for name, image in wanted.items():
        image.save(folder / name, **(dict(lossless=True) if name.endswith("webp") else {}))
    wanted["11.png"] = base.convert("L")
    base.convert("CMYK").save(folder / "12.jpg", quality=95)
    wanted["12.jpg"] = Image.open(folder / "12.jpg")
    base.save(folder / "13.jpg", exif=rotated, quality=95)
    wanted["13.jpg"] = Image.open(folder / "13.jpg").convert("RGB").transpose(Image.ROTATE_270)
    for name in ("notes.txt", "._01.PNG", "README"):
        (folder / name).write_text("no image")
    (tmp_path / "zoo/stray.png").write_bytes((folder / "01.PNG").read_bytes())

    data = prepare(SOURCE=str(tmp_path / "zoo"))
    assert data.classes == ["a", "b"] and len(data) == len(wanted)
    for row, (name, image) in enumerate(sorted(wanted.items())):
        crop = adm_center_crop(image.convert("RGB"), 32)
        assert np.array_equal(data.images([row])[0].permute(1, 2, 0).numpy(), crop), name


def test_what_is_left_out_is_counted(tree, prepare, capsys):
    (tree / "stray.png").write_bytes((tree / "n01/0.png").read_bytes())
    (tree / "n01/.DS_Store").write_text("")
    prepare(SOURCE=str(tree))
    assert "left out: 0 unreadable images, 1 images outside class folders; ignored 2 files that are no images" in \
        capsys.readouterr().out


@pytest.mark.parametrize("harm, message", [
    (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "archive: cannot be listed .* an uncompressed"),
    (lambda path: os.truncate(path, 20_000), r"archive: cannot be listed \(.*an uncompressed, complete tar"),
    (lambda path: os.truncate(path, path.read_bytes().index(b"./train/n02/") + 100),
     r"archive: cannot be .*complete tar"),
])
def test_compressed_or_truncated_tar_is_refused(harm, message, photographs, prepare, tmp_path):
    archive("tar", photographs, tmp_path / "archive")
    harm(tmp_path / "archive")
    with pytest.raises(ValueError, match=message):
        prepare(SOURCE=str(tmp_path / "archive"))


def test_zip_of_an_unusual_kind_is_refused(tree, prepare, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as file:
        file.write(tree / "n01/0.png", "n01/0.png")
    with pytest.raises(ValueError, match=r"a.zip: cannot be listed \(n01/0.png is encrypted or packed in an unusual "
                                         r"way"):
        prepare(SOURCE=str(tmp_path / "a.zip"))


def test_size_that_the_vae_cannot_reduce_is_refused(tree, prepare, vae_folder):
    with pytest.raises(ValueError, match="IMAGE_SIZE 30 is no multiple of 4, the VAE's reduction"):
        prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), IMAGE_SIZE=30)


@pytest.fixture
def published(tmp_path):
    """Six images as REPA's and HASTE's preprocessing leaves them, with latents that no VAE made."""
    root, rng, labels = tmp_path / "published", np.random.default_rng(3), []
    for i in range(6):
        for part, name, write in (("images", f"img{i:08d}.png", lambda file: photograph(rng, 32, 32).save(file, "PNG")),
                                  ("vae-sd", f"img-mean-std-{i:08d}.npy",
                                   lambda file: np.save(file, rng.normal(size=(8, 4, 4)).astype(np.float32)))):
            (root / part / "00000").mkdir(parents=True, exist_ok=True)
            with open(root / part / "00000" / name, "wb") as file:
                write(file)
        labels.append([f"00000/img-mean-std-{i:08d}.npy", i % 3])
    for part in ("images", "vae-sd"):
        (root / part / "dataset.json").write_text(json.dumps(dict(labels=labels)))
    return root


def test_published_layout_is_brought_over(published, prepare, capsys):
    data = prepare(SOURCE=str(published), VAE="stabilityai/sd-vae-ft-mse")
    moments, labels, images = data[np.arange(6)]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2] and data.vae == dict(name="stabilityai/sd-vae-ft-mse", scale=0.18215)
    for i in range(6):
        stored = np.load(published / f"vae-sd/00000/img-mean-std-{i:08d}.npy").astype(np.float16)
        assert np.array_equal(moments[i].numpy(), stored)
        picture = np.asarray(Image.open(published / f"images/00000/img{i:08d}.png"))
        assert np.array_equal(images[i].permute(1, 2, 0).numpy(), picture)
    assert "ignored 0 files" in capsys.readouterr().out


@pytest.mark.parametrize("harm, constants, message", [
    (lambda root: (root / "images/00000/img00000003.png").unlink(), {}, "5 images in images/ but 6 latents in vae-sd/"),
    (lambda root: (root / "vae-sd/dataset.json").write_text('{"labels": null}'), {}, "no label for every latent"),
    (lambda root: None, dict(IMAGE_SIZE=64), r"latents of images of \(32, 32\) pixels.*set IMAGE_SIZE to their size"),
    (lambda root: (root / "vae-sd/00000/img-mean-std-00000002.npy").write_bytes(b"x"), {}, "1 of 6 images could not"),
])
def test_incomplete_published_layout_is_refused(harm, constants, message, published, prepare):
    harm(published)
    with pytest.raises(ValueError, match=message):
        prepare(SOURCE=str(published), VAE="stabilityai/sd-vae-ft-mse", **constants)


# ---------------------------------------------------------------------------------------------------------------------
# resuming, several processes, checking


def test_other_source_or_setting_than_the_half_made_folders_is_refused(tree, prepare):
    broken = tree / "n02/0.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="could not be read"):
        prepare(SOURCE=str(tree))
    with pytest.raises(ValueError, match=r"begun with other settings \(image_size 32, now 64\)"):
        prepare(SOURCE=str(tree), IMAGE_SIZE=64)
    (tree / "n02/new.png").write_bytes((tree / "n01/0.png").read_bytes())
    with pytest.raises(ValueError, match=r"begun with other settings \(images 5, now 6; names_checksum \d+, now \d+\)"):
        prepare(SOURCE=str(tree))


@pytest.mark.parametrize("packed", [False, True])
def test_who_removes_a_bad_image_goes_on_where_he_was(tree, prepare, tmp_path, packed, capsys):
    (tree / "n02/0.png").write_bytes(b"no image")

    def source():
        if packed:
            shutil.make_archive(str(tmp_path / "tree"), "tar", tree)
        return str(tmp_path / "tree.tar") if packed else str(tree)

    with pytest.raises(ValueError, match="1 of 5 images could not be read"):
        prepare(SOURCE=source(), CHUNK=2)
    (tree / "n02/0.png").unlink()
    (tree / "n01/0.png").unlink()  # of a chunk that is done
    data = prepare(SOURCE=source(), CHUNK=2)
    assert "3 images of 2 classes, 4 of them in these" in capsys.readouterr().out  # two chunks of three
    straight = prepare(SOURCE=source(), DATA_DIR=str(tmp_path / "straight"))
    for name in ("images.bin", "image_offsets.npy", "labels.npy"):
        assert (data.path / name).read_bytes() == (straight.path / name).read_bytes()


def save(path, value, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (value, 0, 0)).save(path, **options)


def values(source):
    """{class name: red values of its images} of a source."""
    found = {name: [] for name in source.classes}
    for i, label in enumerate(source.labels):
        found[source.classes[label]].append(source[i].getpixel((0, 0))[0])
    return found


def test_links_and_newer_versions_in_archives_are_what_unpacking_gives(tmp_path):
    root = tmp_path / "src"
    for i in range(3):
        save(root / f"a/{i}.png", 10 + i)
    (root / "b").mkdir()
    os.link(root / "a/0.png", root / "b/hard.png")
    os.symlink("../a/1.png", root / "b/soft.png")
    os.symlink("soft.png", root / "b/twice.png")
    os.symlink("a", root / "c")  # a class that is a link to another
    os.symlink("..", root / "b/up")  # to a folder it lies in: no images of others
    os.symlink("nowhere.png", root / "b/z.png")
    (root / "empty").mkdir()
    with tarfile.open(tmp_path / "src.tar", "w") as tar:
        tar.add(root, "src")
    save(root / "a/2.png", 99)  # a newer version, appended
    with tarfile.open(tmp_path / "src.tar", "a") as tar:
        tar.add(root / "a/2.png", "src/a/2.png")
    if shutil.which("zip"):
        subprocess.run(["zip", "-qry", tmp_path / "src.zip", "src"], cwd=tmp_path, check=True)
    wanted = dict(a=[10, 11, 99], b=[10, 11, 11], c=[10, 11, 99], empty=[])
    for name in ("src", "src.tar", "src.zip"):
        if (tmp_path / name).exists():
            source = prepare_latents.ImageFiles(tmp_path / name)
            broken = [i for i in range(len(source.labels)) if source.name(i).endswith("z.png")]
            assert len(broken) == 1
            with pytest.raises(ValueError, match="unreadable image"):
                source[broken[0]]
            found = {key: [] for key in source.classes}
            for row, label in enumerate(source.labels):
                if row not in broken:
                    found[source.classes[label]].append(source[row].getpixel((0, 0))[0])
            assert found == wanted, name


def test_a_sparse_tar_is_refused(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(10**6)
    made = subprocess.run(["tar", "--sparse", "-cf", tmp_path / "s.tar", "a.png"], cwd=tmp_path)
    with pytest.raises(ValueError, match="a.png is packed as a sparse file; pack it again without --sparse"):
        assert made.returncode == 0 and prepare_latents.ImageFiles(tmp_path / "s.tar")


def test_folders_of_systems_are_no_classes_and_their_files_no_images(tmp_path):
    for name in ("n01", "n02"):
        save(tmp_path / f"src/{name}/0.png", 1)
    for name in ("lost+found", "$RECYCLE.BIN", "System Volume Information", ".Trash"):
        (tmp_path / "src" / name).mkdir()
    for name in ("@eaDir/thumb.jpg", "n01/@eaDir/0.png/thumb.jpg", "__MACOSX/n01/._0.png", "n01/.hidden.png"):
        save(tmp_path / "src" / name, 9)
    source = prepare_latents.ImageFiles(tmp_path / "src")
    assert source.classes == ["n01", "n02"] and len(source.labels) == 2
    assert len(fid.ImageFolder(tmp_path / "src")) == 2  # one listing for both


def test_kaggles_imagenet(tmp_path, prepare, capsys):
    inside = "ILSVRC/Data/CLS-LOC"
    for part in ("train/n01", "train/n02", "val", "test"):
        save(tmp_path / inside / part / "0.JPEG", 50)
    (tmp_path / "ILSVRC/Annotations").mkdir()
    (tmp_path / "ILSVRC/Annotations/0.xml").write_text("<annotation/>")
    with zipfile.ZipFile(tmp_path / "imagenet.zip", "w") as file:
        for path in (tmp_path / "ILSVRC").rglob("*.*"):
            file.write(path, path.relative_to(tmp_path))
    (tmp_path / "tree").mkdir()
    (tmp_path / "ILSVRC").rename(tmp_path / "tree/ILSVRC")
    for name in ("imagenet.zip", "tree", f"tree/{inside}"):
        where = tmp_path / ("imagenet.zip" if name == "imagenet.zip" else "tree") / inside / "train"
        with pytest.raises(ValueError, match="test, train, val are parts of a data set, no classes; set SOURCE to "
                                             f"{where}"):
            prepare(SOURCE=str(tmp_path / name))
        data = prepare(SOURCE=str(where), DATA_DIR=str(tmp_path / f"of {name}".replace("/", " ")))
        assert data.classes == ["n01", "n02"] and len(data) == 2
    assert f"{where}: 2 images of 2 classes, from 'n01' (1) to 'n02' (1)" in capsys.readouterr().out


@pytest.mark.parametrize("sidecar", [".cls", ".json"])
def test_webdatasets_tars(tmp_path, sidecar):
    labels, number = [3, 0, 3, 1, 2], 0
    for shard in (labels[:3], labels[3:]):
        with tarfile.open(tmp_path / f"train-{number:04d}.tar", "w") as tar:
            for label in shard:
                save(tmp_path / "x/x.jpg", 10 * label)
                (tmp_path / "x/x.cls").write_text(str(label) if sidecar == ".cls" else json.dumps(dict(label=label)))
                tar.add(tmp_path / "x/x.jpg", f"n0{label}_{number}.jpg")
                tar.add(tmp_path / "x/x.cls", f"n0{label}_{number}{sidecar}")
                number += 1
    shutil.rmtree(tmp_path / "x")
    source = prepare_latents.open_source(tmp_path)
    assert source.classes == ["0", "1", "2", "3"] and sorted(source.labels) == sorted(labels)
    assert all(abs(source[i].getpixel((0, 0))[0] - 10 * label) < 3 for i, label in enumerate(source.labels))


def test_webdatasets_images_without_a_class_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0000.tar", "w") as tar:
        for name, label in (("a", "3"), ("b", None)):
            save(tmp_path / "x/x.jpg", 1)
            tar.add(tmp_path / "x/x.jpg", f"{name}.jpg")
            if label:
                (tmp_path / "x/x.cls").write_text(label)
                tar.add(tmp_path / "x/x.cls", f"{name}.cls")
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(ValueError, match="0000/b.jpg has no class number in a .cls or .json file beside it"):
        prepare_latents.open_source(tmp_path)


def test_a_tar_left_beside_what_was_unpacked_is_no_class(tmp_path):
    save(tmp_path / "src/n01/0.png", 1)
    shutil.make_archive(str(tmp_path / "ILSVRC2012_img_train"), "tar", tmp_path / "src")
    (tmp_path / "ILSVRC2012_img_train.tar").rename(tmp_path / "src/ILSVRC2012_img_train.tar")
    assert values(prepare_latents.open_source(tmp_path / "src")) == dict(n01=[1])


def test_a_test_split_without_labels_is_refused(prepare, published):
    labels = json.loads((published / "vae-sd/dataset.json").read_text())["labels"]
    (published / "vae-sd/dataset.json").write_text(json.dumps(dict(labels=[(name, -1) for name, _ in labels])))
    with pytest.raises(ValueError, match="has labels below 0, as test splits without labels do"):
        prepare(SOURCE=str(published), VAE="any")


def test_a_folder_of_one_tar_per_class(tmp_path):
    for name in ("n01", "n02"):
        save(tmp_path / f"src/{name}/{name}_0.png", int(name[1:]))
        shutil.make_archive(str(tmp_path / "tars" / name), "tar", tmp_path / "src" / name)
    assert values(prepare_latents.open_source(tmp_path / "tars")) == dict(n01=[1], n02=[2])


def test_parquet_files_as_the_hub_serves_them(tmp_path, prepare):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    features = dict(image=dict(_type="Image"), label=dict(names=["tench", "goldfish"], _type="ClassLabel"))
    for number, labels in enumerate(([0, 1, 1], [1, 0])):
        images = []
        for label in labels:
            save(tmp_path / "x.jpg", 100 * label)
            images.append(dict(bytes=(tmp_path / "x.jpg").read_bytes(), path="x.jpg"))
        table = pyarrow.table(dict(image=images, label=labels))
        table = table.replace_schema_metadata({"huggingface": json.dumps(dict(info=dict(features=features)))})
        parquet.write_table(table, tmp_path / f"train-0000{number}-of-00002.parquet", row_group_size=2)
    (tmp_path / "x.jpg").unlink()
    data = prepare(SOURCE=str(tmp_path), DATA_DIR=str(tmp_path / "out"), WORKERS=1)
    assert data.classes == ["tench", "goldfish"] and data.labels.tolist() == [0, 1, 1, 1, 0]
    assert [round(image[0].float().mean().item(), -2) for image in data.images(range(5))] == [0, 100, 100, 100, 0]


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="parquet files are read with pyarrow; pip install pyarrow"):
        prepare_latents.open_source(tmp_path)


def test_sound_pixels_survive_odd_metadata_names_and_shapes(tmp_path, prepare):
    """A resolution of -1 / 0 beside a rotation, a name that is not UTF-8, 1 pixel by 40,000."""
    tiff = b"II*\0\x08\0\0\0\x02\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\x1a\x01\x0a\0\x01\0\0\0\x26\0\0\0" \
        + bytes(4) + b"\xff\xff\xff\xff" + bytes(4)
    save(tmp_path / "src/a/0.jpg", 40, exif=b"Exif\0\0" + tiff)
    save(tmp_path / "src/a/1.png", 50)
    os.rename(tmp_path / "src/a/1.png", os.fsencode(tmp_path) + b"/src/a/caf\xe9.png")
    Image.new("RGB", (1, 40_000), (60, 0, 0)).save(tmp_path / "src/a/2.png")
    data = prepare(SOURCE=str(tmp_path / "src"), IMAGE_SIZE=256)
    assert sorted(round(image[0].float().mean().item(), -1) for image in data.images(range(3))) == [40, 50, 60]
    open(os.fsencode(tmp_path) + b"/src/a/\xe9.jpg", "wb").close()
    with pytest.raises(ValueError, match="1 of 4 images could not be read"):
        prepare(SOURCE=str(tmp_path / "src"), IMAGE_SIZE=256, DATA_DIR=str(tmp_path / "second"))
    assert b"\xe9.jpg: unreadable image" in (tmp_path / "second/unreadable.txt").read_bytes()


def test_ranges_that_cannot_be_known_are_refused_and_16_bits_understood(tmp_path):
    ramp = np.linspace(0, 1, 40 * 40).reshape(40, 40)
    for name, array in (("a/int.tif", (ramp * 255).astype(np.int32)), ("a/float.tif", ramp.astype(np.float32)),
                        ("a/u16.png", (ramp * 65535).astype(np.uint16))):
        (tmp_path / "src/a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / "src" / name)
    source = prepare_latents.ImageFiles(tmp_path / "src")
    for row in (0, 1):
        with pytest.raises(ValueError, match="have no range to go by; save it in 8 or 16 bits"):
            source[row]
    assert np.asarray(source[2]).mean() == pytest.approx(127, abs=2)


@pytest.mark.parametrize("harm", ["nan", "large"])
def test_latents_that_are_not_finite_stop_the_run_and_do_not_pass_the_check(tree, prepare, vae_folder, tmp_path, harm):
    shutil.copytree(vae_folder[0], tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["quant_conv.weight"] = state["quant_conv.weight"] * (float("nan") if harm == "nan" else 1e9)
    save_file(state, file)
    with pytest.raises(ValueError, match="latents.npy: the VAE makes values that are not finite, or beyond float16"):
        prepare(SOURCE=str(tree), VAE=str(tmp_path / "vae"))
    data = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), DATA_DIR=str(tmp_path / "finished"))
    rows = np.load(data.path / "latents.npy")
    rows[1] = np.nan
    np.save(data.path / "latents.npy", rows)
    meta = json.loads((data.path / "meta.json").read_text())
    meta["chunks"][0][1]["latents.npy"] = zlib.crc32(rows)  # as an earlier version would have written it
    (data.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="latents.npy: damaged somewhere"):
        prepare(DATA_DIR=str(data.path), CHECK=True)


def test_nothing_of_others_is_removed_and_paths_may_be_spelled_otherwise(tree, prepare, tmp_path, monkeypatch, capsys):
    (tmp_path / "out/notes").mkdir(parents=True)
    for name in ("notes/letter.tmpl", "photo.tmp.png"):
        (tmp_path / "out" / name).write_text("precious")
    prepare(SOURCE=str(tree))
    assert all((tmp_path / "out" / name).exists() for name in ("notes/letter.tmpl", "photo.tmp.png"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spelling in ("tree", "./tree", "~/tree"):
        prepare(SOURCE=spelling, DATA_DIR="~/out")
    assert capsys.readouterr().out.count("already finished") == 3


def test_a_folder_at_which_another_process_works_is_refused(tree, prepare, tmp_path):
    (tmp_path / "out/unfinished").mkdir(parents=True)
    script = f"import prepare_latents, pathlib; lock = prepare_latents.lock_folder(pathlib.Path({str(tmp_path)!r}, " \
             f"'out/unfinished'), 'x'); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match=rf"unfinished: process {other.pid} on .* is at work here; wait for its end, "
                                         rf"or choose another DATA_DIR"):
        prepare(SOURCE=str(tree))
    other.kill()
    other.wait()
    assert len(prepare(SOURCE=str(tree))) == 5


def test_a_folder_prepared_with_the_other_decoder_stays_valid(tree, prepare, vae_folder, tmp_path, capsys):
    """sd-vae-ft-mse and sd-vae-ft-ema have the same encoder."""
    for name in ("sd-vae-ft-mse", "sd-vae-ft-ema"):
        shutil.copytree(vae_folder[0], tmp_path / name)
    prepare(SOURCE=str(tree), VAE=str(tmp_path / "sd-vae-ft-mse"))
    made = (tmp_path / "out/meta.json").read_bytes()
    prepare(SOURCE=str(tree), VAE=str(tmp_path / "sd-vae-ft-ema"))
    assert "already finished" in capsys.readouterr().out and (tmp_path / "out/meta.json").read_bytes() == made
    with pytest.raises(ValueError, match="finished with other settings"):
        prepare(SOURCE=str(tree), VAE=str(vae_folder[0]))


def test_full_disk_is_refused_before_work_starts(tree, prepare, vae_folder, monkeypatch):
    usage, needed = shutil.disk_usage(tree), []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    for vae in (str(vae_folder[0]), None):
        with pytest.raises(ValueError, match=r"needs [\d,]+ bytes, 1,234 are free; make room or choose") as full:
            prepare(SOURCE=str(tree), VAE=vae, DATA_DIR=str(tree.parent / f"out{vae is None}"))
        needed.append(int(re.search("needs ([0-9,]+)", str(full.value))[1].replace(",", "")))
    assert needed[0] - needed[1] == 5 * 8 * 8 * 8 * 2  # without a VAE no room for latents
    assert not list(tree.parent.glob("out*/latents.npy"))


def test_mirrored_images_and_their_latents_belong_together(tree, prepare, vae_folder):
    data = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), MIRROR=True)
    vae = load_vae(vae_folder[0])[0]
    both = np.array([3, 5 + 3])
    moments, labels, images = data[both]
    assert labels.tolist() == [1, 1] and torch.equal(images[1], images[0].flip(-1)) and not torch.equal(*images)
    with torch.no_grad():
        mean, std = vae.encode(images.float() / 127.5 - 1)
    torch.testing.assert_close(moments.float(), torch.cat([mean, std], dim=1), rtol=2e-3, atol=1e-3)
    pixels = prepare(SOURCE=str(tree), DATA_DIR=str(tree.parent / "pixels"))
    moments, _, _ = pixels[both]
    assert torch.equal(moments[1], moments[0].flip(-1))


@pytest.mark.parametrize("name", ["latents.npy", "labels.npy", "images.bin"])
def test_check_finds_a_changed_byte(name, tree, prepare, vae_folder):
    prepare(SOURCE=str(tree), CHUNK=2, VAE=str(vae_folder[0]))
    prepare(CHECK=True)
    with open(tree.parent / "out" / name, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(ValueError, match=rf"{name}(: damaged somewhere in images 4..4|: labels)"):
        prepare(CHECK=True)


def test_check_finds_latents_of_other_images(tree, prepare, vae_folder):
    prepare(SOURCE=str(tree), VAE=str(vae_folder[0]))
    out = tree.parent / "out"
    latents = np.load(out / "latents.npy", mmap_mode="r+")
    latents[:] = latents[::-1].copy()
    latents.flush()
    damage(out, lambda meta: [checks.update({"latents.npy": zlib.crc32(latents)}) for _, checks in meta["chunks"]])
    with pytest.raises(ValueError, match=r"latents.npy: image \d, encoded again, differs by \d+"):
        prepare(CHECK=True, VAE=str(vae_folder[0]))


def test_compiled_vae_gives_the_same_moments(tree, prepare, vae_folder):
    plain = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]))
    compiled = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), COMPILE=True, DATA_DIR=str(tree.parent / "compiled"))
    torch.testing.assert_close(*(torch.tensor(data.latents).float() for data in (compiled, plain)), rtol=2e-3,
                               atol=1e-4)


def test_bf16_moments_are_close(tree, prepare, vae_folder):
    exact = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]))
    rough = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), VAE_PRECISION="bf16", DATA_DIR=str(tree.parent / "bf16"))
    difference = np.asarray(exact.latents, np.float32) - np.asarray(rough.latents, np.float32)
    assert 0 < np.sqrt(np.mean(difference**2) / np.mean(np.asarray(exact.latents, np.float32) ** 2)) < 0.02


def test_a_data_set_of_imagenets_size_opens_at_once(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", lossless=True)
    write_prepared(tmp_path / "large", [file.getvalue()], np.zeros((1_281_167, 8, 1, 1), np.float16))
    tracemalloc.start()
    started = time.perf_counter()
    data = PreparedDataset(tmp_path / "large")
    assert time.perf_counter() - started < 1
    assert len(train.permutation(0, 0, len(data))) == 1_281_167 and data[np.array([1_281_166])][2].shape == (1, 3, 8, 8)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


SCRIPT = """
import sys
import prepare_latents
for name, value in {constants!r}.items():
    setattr(prepare_latents, name, value)
prepare_latents.main()
"""


def test_two_processes_make_the_same_folder_as_one(photographs, prepare, vae_folder, tmp_path):
    copy_with_captions(photographs, tmp_path / "train")
    constants = dict(SOURCE=str(tmp_path / "train"), IMAGE_SIZE=32, VAE=str(vae_folder[0]), WORKERS=1, BATCH_SIZE=4,
                     CHUNK=8, COMPILE=False)
    prepare(**constants)
    (tmp_path / "two.py").write_text(SCRIPT.format(constants=dict(constants, DATA_DIR=str(tmp_path / "two"))))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", tmp_path / "two.py"],
                   check=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=120)
    two, one = PreparedDataset(tmp_path / "two"), PreparedDataset(tmp_path / "out")
    torch.testing.assert_close(torch.tensor(two.latents).float(), torch.tensor(one.latents).float(), rtol=2e-3,
                               atol=1e-4)
    for name in ("images.bin", "image_offsets.npy", "labels.npy", "captions.txt", "caption_offsets.npy"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


KILLER = """
import os, random, signal, sys, time
import prepare_latents
for name, value in {constants!r}.items():
    setattr(prepare_latents, name, value)
sys.stderr = open(os.devnull, "w")
rng, kills, lives = random.Random(4), 0, []
for folder in ["whole"] + ["killed_%d" % i for i in range(100)]:
    prepare_latents.DATA_DIR, status, life = os.path.join({out!r}, folder), 1, 0
    while status != 0 and kills < 1000:
        child = os.fork()  # of a process that has imported everything but computed nothing
        if child == 0:
            prepare_latents.main()
            os._exit(0)
        if folder != "whole":
            time.sleep(rng.uniform(0.02, 0.3))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        life += status != 0
    kills += life
    lives.append(life)
    if kills >= 20:
        break
print(kills, lives)
"""


def test_killed_at_any_moment_ends_in_the_same_bytes(photographs, vae_folder, tmp_path):
    """kill -9 at random moments, at least 20 times, each followed by the same command."""
    source = tmp_path / "train"
    copy_with_captions(photographs, source)
    (source / "n02/n02_1.JPEG").write_bytes(b"no image")  # so that rows have to be dropped at the end
    (source / "n02/n02_2.txt").write_text("")
    constants = dict(SOURCE=str(source), IMAGE_SIZE=32, VAE=str(vae_folder[0]), WORKERS=0, BATCH_SIZE=4, CHUNK=4,
                     COMPILE=False, LEAVE_OUT_UNREADABLE=True)
    (tmp_path / "killer.py").write_text(KILLER.format(constants=constants, out=str(tmp_path)))
    result = subprocess.run([sys.executable, tmp_path / "killer.py"], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=200)
    assert int(result.stdout.splitlines()[-1].split()[0]) >= 20
    folders = list(tmp_path.glob("killed_*"))
    assert folders and all(contents(folder) == contents(tmp_path / "whole") for folder in folders)
    whole = PreparedDataset(tmp_path / "whole")
    assert len(whole) == 238 and len(whole.captions) == whole.caption_offsets[-1] > 238


def test_imagenets_classes_are_recognised(tmp_path, monkeypatch, capsys):
    names = timm.data.ImageNetInfo().label_names()
    for name in names:
        save(tmp_path / name / "0.bmp", 1)
    source = prepare_latents.ImageFiles(tmp_path)
    prepare_latents.describe(source)
    (tmp_path / names[-1]).rename(tmp_path / "zebra")
    prepare_latents.describe(prepare_latents.ImageFiles(tmp_path))
    source.classes = timm.data.ImageNetInfo().label_descriptions()  # the hub's names
    prepare_latents.describe(source)
    said = capsys.readouterr().out.splitlines()
    assert ("1,000 images of 1,000 classes, from 'n01440764' (1) to 'n15075141' (1); ImageNet's, in their order"
            in said[0])
    assert "not ImageNet's 1,000 in order" in said[1] and "ImageNet's, in their order" in said[2]


# ---------------------------------------------------------------------------------------------------------------------
# captions


LONG = " ".join(f"word{i}" for i in range(300))
SAID = {  # {number: (its captions as written, as they should be kept)}
    30: (["a red bus", "Ein gr\u00fcner Bus \U0001f68c", "a red bus"],
         ["a red bus", "Ein gr\u00fcner Bus \U0001f68c", "a red bus"]),
    7: (["  two\nlines\u2028and \x0b a\x00third\x85", " \n"], ["two lines and a third"]),
    12: ([LONG], [LONG]),
    25: (["\ud800 half of a character"], ["half of a character"]),
    40: (["", "\t"], []),
    41: ([], []),
}


def write_coco(folder, archive=None):
    """A fake COCO: (its images' folder or archive, its captions_*.json). Item number i has the red value i."""
    for number in SAID:
        save(folder / f"train/COCO_{number:03d}.png", number)
    save(folder / "train/unknown.png", 1)
    captions = [(number, texts[i]) for i in range(3)  # those of an image need not stand together
                for number, (texts, _) in SAID.items() if i < len(texts)]
    annotations = [dict(image_id=number, id=i, caption=text) for i, (number, text) in enumerate(captions)]
    images = [dict(id=number, file_name=f"COCO_{number:03d}.png") for number in SAID]
    (folder / "captions.json").write_text(json.dumps(dict(images=images, annotations=annotations)))
    if archive:
        shutil.make_archive(str(folder / "images"), archive, folder, "train")
        shutil.rmtree(folder / "train")
    source = folder / (f"images.{archive}" if archive else "train")
    return dict(SOURCE=str(source), CAPTIONS=str(folder / "captions.json"))


def captions_of(data):
    """{red value of the image: its captions}"""
    offsets = data.caption_offsets
    return {int(image[0, 0, 0]): data.captions[offsets[row] : offsets[row + 1]]
            for row, image in enumerate(data.images(range(len(data))))}


@pytest.mark.parametrize("kind", [None, "zip", "tar"])
def test_coco(prepare, tmp_path, capsys, kind):
    coco = write_coco(tmp_path / "coco", kind)
    with pytest.raises(ValueError, match=r"2 of 6 images could not be read or have no caption; unreadable\.txt "):
        prepare(**coco, CROP="square")
    name = f"{coco['SOURCE']}/{'train/' if kind else ''}"
    listed = "".join(f"{name}COCO_{number:03d}.png: no caption\n" for number in (40, 41))
    assert (tmp_path / "out/unreadable.txt").read_text() == listed
    assert "6 images with 6 captions, from 'two lines and a third'" in capsys.readouterr().out
    data = prepare(**coco, CROP="square", LEAVE_OUT_UNREADABLE=True)
    assert "4 images of 1 classes with 6 captions" in (said := capsys.readouterr().out) and "ignored 1 files" in said
    wanted = {number: kept for number, (_, kept) in sorted(SAID.items()) if kept}
    assert captions_of(data) == wanted and list(captions_of(data)) == list(wanted)  # in order of COCO's ids
    assert data.classes == ["all"] and data.labels.tolist() == [0] * 4 and data.meta["captions"] == 6
    lines = (data.path / "captions.txt").read_bytes()
    assert lines == "".join(f"{one}\n" for own in wanted.values() for one in own).encode()
    assert data.caption_offsets.dtype == np.int64 and data.caption_offsets.tolist() == [0, 1, 2, 3, 6]
    prepare(CHECK=True)


def test_an_image_that_coco_names_and_nobody_has_is_unreadable(prepare, tmp_path):
    for kind in (None, "tar"):
        coco = write_coco(tmp_path / f"coco_{kind}")
        (tmp_path / f"coco_{kind}/train/COCO_012.png").unlink()
        if kind:
            shutil.make_archive(str(tmp_path / "images"), kind, tmp_path / f"coco_{kind}", "train")
            coco["SOURCE"] = str(tmp_path / "images.tar/train")
        with pytest.raises(ValueError, match="3 of 6 images could not be read or have no caption"):
            prepare(**coco, DATA_DIR=str(tmp_path / f"out_{kind}"))
        listed = (tmp_path / f"out_{kind}/unreadable.txt").read_text()
        assert re.search(r"train/COCO_012\.png: unreadable image \(.*no such file", listed, re.IGNORECASE)
        assert 12 not in captions_of(prepare(**coco, DATA_DIR=str(tmp_path / f"out_{kind}"), LEAVE_OUT_UNREADABLE=True))


@pytest.mark.parametrize("harm, message", [
    (lambda file: file.unlink(), r"captions\.json: missing, damaged or .*No such file.*; set CAPTIONS to COCO's"),
    (lambda file: file.write_text(file.read_text()[:-9]), r"captions\.json: .*JSONDecodeError.*; set CAPTIONS to"),
    (lambda file: file.write_bytes(b"\xff\xfe\xfa"), r"captions\.json: .*UnicodeDecodeError.*; set CAPTIONS to"),
    (lambda file: file.write_text("[1]"), r"captions\.json: .*TypeError.*; set CAPTIONS to"),
    (lambda file: file.write_text(file.read_text().replace('"caption"', '"bbox"')), r"KeyError\('caption'\).*; set"),
    (lambda file: file.write_text(file.read_text().replace("COCO_", "x")), "train: has none of the 6 images .*; set"),
])
def test_what_are_no_captions_of_coco_is_one_line(harm, message, prepare, tmp_path):
    coco = write_coco(tmp_path)
    harm(tmp_path / "captions.json")
    with pytest.raises(ValueError, match=message):
        prepare(**coco)


def test_captions_for_a_sprite_sheet_are_refused(prepare, tmp_path):
    coco = write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"captions\.json': .*test\.png is no folder or archive of images; set"):
        prepare(**dict(coco, SOURCE=str(ROOT / "data/fashion_mnist_test.png")), IMAGE_SIZE=28)


def write_captioned(root, names, suffix):
    """Images of red values 10, 20, .. with two captions each beside them."""
    for number, name in enumerate(names, 1):
        save(root / f"{name}.png", 10 * number)
        captions = [f"picture {number}", f"\u00dcbersicht {number}"]
        text = "\r\n\r\n".join(captions) if suffix == ".txt" else json.dumps(dict(caption=captions))
        (root / f"{name}{suffix}").write_text(text, encoding="utf-8-sig" if number == 1 else "utf-8")


@pytest.mark.parametrize("suffix", [".txt", ".json"])
@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "shards"])
def test_captions_beside_the_images(prepare, tmp_path, kind, suffix, capsys):
    root = tmp_path / "src"
    write_captioned(root, ["a", "c.v1", "b", "deep/d"] if kind != "shards" else ["1/a", "1/c.v1", "1/b", "2/d"], suffix)
    if kind == "shards":
        for shard in (1, 2):
            shutil.make_archive(str(tmp_path / f"shards/{shard:05d}"), "tar", root / str(shard))
        (tmp_path / "shards/00001.parquet").write_bytes(b"img2dataset's table of a tar")
        root = tmp_path / "shards"
    elif kind != "folder":
        shutil.make_archive(str(root), kind, root)
        root = f"{root}.{kind}"
    data = prepare(SOURCE=str(root))
    assert captions_of(data) == {10 * i: [f"picture {i}", f"\u00dcbersicht {i}"] for i in range(1, 5)}
    assert data.classes == ["all"] and data.labels.tolist() == [0] * 4
    said = capsys.readouterr().out
    assert "4 images with captions beside them, from 'picture 1'" in said
    assert "4 images of 1 classes with 8 captions" in said and f"ignored {int(kind == 'shards')} files" in said


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_folders_with_captions_keep_their_labels(prepare, tmp_path, kind):
    root = tmp_path / "src"
    write_captioned(root, ["n02/a", "n01/b", "n01/deep/c"], ".txt")
    if kind != "folder":
        shutil.make_archive(str(root), kind, root)
    data = prepare(SOURCE=str(root if kind == "folder" else f"{root}.{kind}"))
    assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 0, 1]
    assert [own[0] for own in captions_of(data).values()] == ["picture 2", "picture 3", "picture 1"]


def test_webdatasets_labels_and_captions_together(prepare, tmp_path):
    for number, label in enumerate((1, 0, 1)):
        save(tmp_path / f"src/{number}.png", 10 + number)
        (tmp_path / f"src/{number}.json").write_text(json.dumps(dict(caption=f"number {number}", label=label)))
    shutil.make_archive(str(tmp_path / "shards/00000"), "tar", tmp_path / "src")
    data = prepare(SOURCE=str(tmp_path / "shards"))
    assert data.classes == ["0", "1"] and data.labels.tolist() == [1, 0, 1]
    assert data.captions == ["number 0", "number 1", "number 2"]
    (tmp_path / "src/0.json").write_text("{")  # without labels a damaged file costs its image alone
    (tmp_path / "src/2.json").write_text('{"caption": ["number 2", 2]}')
    shutil.make_archive(str(tmp_path / "shards/00000"), "tar", tmp_path / "src")
    data = prepare(SOURCE=str(tmp_path / "shards"), DATA_DIR=str(tmp_path / "damaged"), LEAVE_OUT_UNREADABLE=True)
    assert data.classes == ["all"] and data.captions == ["number 1"]
    assert len((data.path / "unreadable.txt").read_text().splitlines()) == 2


def test_captions_that_cannot_be_read_are_repaired_or_left_out(prepare, tmp_path, capsys):
    names = "abcdef"
    write_captioned(tmp_path / "src", names, ".txt")
    (tmp_path / "src/b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "src/c.txt").unlink()
    (tmp_path / "src/d.txt").rename(tmp_path / "src/d.json")
    (tmp_path / "src/e.txt").unlink()
    (tmp_path / "src/e.json").write_text('{"caption": null}')
    with pytest.raises(ValueError, match="4 of 6 images could not be read or have no caption"):
        prepare(SOURCE=str(tmp_path / "src"), CHUNK=2)
    listed = (tmp_path / "out/unreadable.txt").read_text().splitlines()
    for line, wanted in zip(listed, (r"b\.png: unreadable captions b\.txt \('utf-8' codec can't decode byte 0xe9.*\)",
                                     r"c\.png: no caption", r"d\.png: unreadable captions d\.json \(.*\)",
                                     r"e\.png: no caption"), strict=True):
        assert re.fullmatch(f".*/{wanted}", line)
    capsys.readouterr()
    (tmp_path / "src/c.txt").write_text("repaired")
    data = prepare(SOURCE=str(tmp_path / "src"), CHUNK=2, LEAVE_OUT_UNREADABLE=True, DATA_DIR=str(tmp_path / "second"))
    assert captions_of(data) == {10: ["picture 1", "\u00dcbersicht 1"], 30: ["repaired"],
                                 60: ["picture 6", "\u00dcbersicht 6"]}
    write_captioned(tmp_path / "src", names, ".txt")
    data = prepare(SOURCE=str(tmp_path / "src"), CHUNK=2)
    assert list(captions_of(data)) == [10, 20, 30, 40, 50, 60] and "6 of them in these" in capsys.readouterr().out


def test_who_removes_images_keeps_the_captions_of_the_others(prepare, tmp_path):
    write_captioned(tmp_path / "src", "abcd", ".txt")
    (tmp_path / "src/d.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 4 images could not be read or have no caption"):
        prepare(SOURCE=str(tmp_path / "src"), CHUNK=2)
    for name in "ad":
        (tmp_path / f"src/{name}.png").unlink()
    assert captions_of(prepare(SOURCE=str(tmp_path / "src"), CHUNK=2)) == {
        10 * i: [f"picture {i}", f"\u00dcbersicht {i}"] for i in (2, 3)}


def test_a_folder_begun_with_other_captions_is_refused(prepare, tmp_path):
    coco = write_coco(tmp_path)
    with pytest.raises(ValueError, match="have no caption"):
        prepare(**coco)
    with open(coco["CAPTIONS"], "a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match=r"begun with other settings \(captions_checksum \d+, now \d+\)"):
        prepare(**coco)
    with pytest.raises(ValueError, match="begun with other settings .*crop 'adm', now 'square'"):
        prepare(**coco, CROP="square")


def test_a_folder_of_an_earlier_version_is_recognised(tree, prepare, capsys):
    data = prepare(SOURCE=str(tree))
    assert data.captions is None and data.caption_offsets is None and data.meta["captions"] is None
    damage(data.path, lambda meta: [meta.pop(key) for key in ("captions", "captions_source", "crop")])
    old = prepare(SOURCE=str(tree))
    assert "already finished, 5 images; nothing to do" in capsys.readouterr().out and old.captions is None
    with pytest.raises(ValueError, match=r"finished with other settings \(crop 'adm', now 'square'\)"):
        prepare(SOURCE=str(tree), CROP="square")
    (tree / "n02/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 5 images could not be read; unreadable"):
        prepare(SOURCE=str(tree), DATA_DIR=str(tree.parent / "begun"))
    for file in (tree.parent / "begun/unfinished").glob("*.json"):
        file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items()
                                    if key not in ("captions", "captions_source", "captions_checksum", "crop")}))
    assert len(prepare(SOURCE=str(tree), DATA_DIR=str(tree.parent / "begun"), LEAVE_OUT_UNREADABLE=True)) == 4


def test_a_draw_says_which_caption(prepare, tmp_path):
    data = prepare(**write_coco(tmp_path), LEAVE_OUT_UNREADABLE=True)  # with 1, 1, 1 and 3 captions
    rows, draws = np.array([0, 3, 3, 3, 3, 2, 3 + 4]), torch.tensor([0.99, 0, 0.34, 0.67, 1, 0.5, 0.5])
    moments, captions, images = data[rows, draws]
    assert captions.dtype == torch.int64 and captions.tolist() == [0, 3, 4, 5, 5, 2, 4]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip((moments, images), data[rows][::2]))
    assert data[rows][1].tolist() == [0] * 7
    loader = prepare_latents.open_loader(data, [(rows, draws)], 1, torch.device("cpu"))
    assert next(loader)[1].tolist() == captions.tolist()
    assert pickle.loads(pickle.dumps(data)).captions == data.captions


OTHER = "captions.txt: damaged, or not the captions that caption_offsets.npy gives to 4 images"


@pytest.mark.parametrize("harm, message", [
    (lambda text: text.replace(b"red", b"rad", 1), r"captions.txt: damaged somewhere in images 2\.\.3"),
    (lambda text: text.replace(b" red", b"\nred", 1), OTHER),
    (lambda text: text.replace(b"red", b"r\xffd", 1), OTHER),
    (lambda text: text[1:], r"captions.txt: \d+ bytes, meta.json says \d+"),
    ([0, 2, 3, 4, 6], r"captions.txt: damaged somewhere in images 0\.\.1"),
    ([0, 1, 1, 3, 6], OTHER),
    ([0, 1, 2, 3, 7], OTHER),
    ([1, 2, 3, 4, 6], OTHER),
])
def test_damaged_captions_are_noticed(prepare, tmp_path, harm, message):
    data = prepare(**write_coco(tmp_path), LEAVE_OUT_UNREADABLE=True, CHUNK=2)
    if callable(harm):
        (data.path / "captions.txt").write_bytes(harm((data.path / "captions.txt").read_bytes()))
    else:
        np.save(data.path / "caption_offsets.npy", harm)
    with pytest.raises(ValueError, match=message):
        prepare(CHECK=True)
