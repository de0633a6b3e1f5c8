"""prepare_latents.py: what a preparation writes, goes on with, leaves out, checks and refuses. The kinds of sources are
in test_images.py."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import prepare_latents
from dataset import PreparedDataset
from images import ImageFiles
from tests.conftest import ROOT, adm_center_crop, contents, damage, photograph, save, with_latents, write_coco
from vae import load_vae


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


# ---- latents that others made


def copy_with_captions(root, path):
    shutil.copytree(root, path)
    for i, image in enumerate(sorted(path.rglob("*.*"))):
        image.with_suffix(".txt").write_text("".join(f"{image.stem}, caption {n}\n" for n in range(1 + i % 3)))


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


def test_a_test_split_without_labels_is_refused(prepare, published):
    labels = json.loads((published / "vae-sd/dataset.json").read_text())["labels"]
    (published / "vae-sd/dataset.json").write_text(json.dumps(dict(labels=[(name, -1) for name, _ in labels])))
    with pytest.raises(ValueError, match="has labels below 0, as test splits without labels do"):
        prepare(SOURCE=str(published), VAE="any")


# ---- resuming, several processes, checking


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


def test_a_folder_prepared_with_the_other_decoder_stays_valid(tree, prepare, vae_folder, tmp_path, capsys):
    """sd-vae-ft-mse and sd-vae-ft-ema have the same encoder."""
    for name in ("sd-vae-ft-mse", "sd-vae-ft-ema"):
        shutil.copytree(vae_folder[0], tmp_path / name)
    prepare(SOURCE=str(tree), VAE=str(tmp_path / "sd-vae-ft-mse"))
    made = (tmp_path / "out/meta.json").read_bytes()
    prepare(SOURCE=str(tree), VAE=str(tmp_path / "sd-vae-ft-ema"))
    assert "already finished" in capsys.readouterr().out and (tmp_path / "out/meta.json").read_bytes() == made
    other = Path(shutil.copytree(vae_folder[0], tmp_path / "other"), "diffusion_pytorch_model.safetensors")
    save_file({name: weight + 1 for name, weight in load_file(other).items()}, other)
    with pytest.raises(ValueError, match="finished with other settings"):
        prepare(SOURCE=str(tree), VAE=str(other.parent))


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
    script = KILLER.format(constants=constants, out=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert int(result.stdout.splitlines()[-1].split()[0]) >= 20
    folders = list(tmp_path.glob("killed_*"))
    assert folders and all(contents(folder) == contents(tmp_path / "whole") for folder in folders)
    whole = PreparedDataset(tmp_path / "whole")
    assert len(whole) == 238 and len(whole.captions) == whole.caption_offsets[-1] > 238


def test_imagenets_classes_are_recognised(tmp_path, monkeypatch, capsys):
    names = timm.data.ImageNetInfo().label_names()
    for name in names:
        save(tmp_path / name / "0.bmp", 1)
    source = ImageFiles(tmp_path)
    prepare_latents.describe(source)
    (tmp_path / names[-1]).rename(tmp_path / "zebra")
    prepare_latents.describe(ImageFiles(tmp_path))
    source.classes = timm.data.ImageNetInfo().label_descriptions()  # the hub's names
    prepare_latents.describe(source)
    said = capsys.readouterr().out.splitlines()
    assert ("1,000 images of 1,000 classes, from 'n01440764' (1) to 'n15075141' (1); ImageNet's, in their order"
            in said[0])
    assert "not ImageNet's 1,000 in order" in said[1] and "ImageNet's, in their order" in said[2]


# ---- captions


def test_captions_for_a_sprite_sheet_are_refused(prepare, tmp_path):
    coco = write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"captions\.json': .*test\.png is no folder or archive of images; set"):
        prepare(**dict(coco, SOURCE=str(ROOT / "data/fashion_mnist_test.png")), IMAGE_SIZE=28)


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


# ---- "unreadable" is said of content alone; what changed between two runs is noticed


def test_a_source_that_goes_away_ends_the_run_and_the_same_command_goes_on(tree, prepare, monkeypatch):
    read, calls = ImageFiles.__getitem__, []

    def unmount(source, i):
        calls.append(i)
        if len(calls) == 36:  # after those by which the room is measured
            tree.rename(tree.with_name("gone"))
        return read(source, i)

    monkeypatch.setattr(ImageFiles, "__getitem__", unmount)
    for name in ("n01", "n02"):
        for i in range(10, 20):
            shutil.copyfile(next(tree.glob("n01/*.png")), tree / name / f"{i}.png")
    total = len([path for path in tree.rglob("*.*") if path.suffix != ".txt"])
    settings = dict(SOURCE=str(tree), CHUNK=4, BATCH_SIZE=2, LEAVE_OUT_UNREADABLE=True)
    with pytest.raises(OSError, match="No such file"):
        prepare(**settings)
    tree.with_name("gone").rename(tree)
    assert len(prepare(**settings)) == total


@pytest.mark.parametrize("error", [MemoryError("of this image"), RuntimeError("a mistake of ours")])
def test_what_is_no_images_fault_leaves_none_out(tree, prepare, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(prepare_latents, "pack", fail)
    with pytest.raises((OSError, RuntimeError), match="memory is full; set fewer WORKERS|a mistake of ours"):
        prepare(SOURCE=str(tree), LEAVE_OUT_UNREADABLE=True)


@pytest.mark.parametrize("kinds", ["SAVE", "OPEN"])
def test_a_pillow_without_webp_is_named_before_any_work(tree, prepare, monkeypatch, kinds):
    Image.init()
    monkeypatch.delitem(getattr(Image, kinds), "WEBP")
    with pytest.raises(ValueError, match="this Pillow knows no WebP, in which images are packed; install one"):
        prepare(SOURCE=str(tree))


def test_captions_changed_between_two_runs_are_the_new_ones(tree, prepare, monkeypatch):
    for path in [path for path in tree.rglob("*.*") if path.suffix != ".txt"]:
        path.with_suffix(".txt").write_text(f"of {path.name}")
    changed, whole = tree / "n02/0.txt", prepare_latents.move_parts

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_latents, "move_parts", killed)
    monkeypatch.setattr(Path, "touch", lambda *_, **__: None)  # killed just before the parts are moved
    with pytest.raises(KeyboardInterrupt):
        prepare(SOURCE=str(tree), CHUNK=2)
    monkeypatch.undo()
    assert whole is prepare_latents.move_parts
    changed.write_text("a new caption")
    assert "a new caption" in prepare(SOURCE=str(tree), CHUNK=2, DATA_DIR=str(tree.parent / "out")).captions


def test_captions_corrected_after_the_end_are_said(prepare, tmp_path):
    coco = write_coco(tmp_path / "coco")
    prepare(**coco, LEAVE_OUT_UNREADABLE=True)
    prepare(**coco, LEAVE_OUT_UNREADABLE=True)  # nothing to do
    file = Path(coco["CAPTIONS"])
    file.write_text(file.read_text().replace("third", "fourth"))
    with pytest.raises(ValueError, match=r"finished with other settings \(captions_checksum \d+, now \d+\)"):
        prepare(**coco, LEAVE_OUT_UNREADABLE=True)


@pytest.mark.parametrize("beside", [".txt", ".json", None])
def test_a_finished_folder_with_captions_is_left_alone(tree, prepare, capsys, beside):
    for path in [path for path in tree.rglob("*.*") if beside and path.suffix != ".txt"]:
        path.with_suffix(beside).write_text("x" if beside == ".txt" else '{"caption": "x"}')
    for _ in range(2):
        prepare(SOURCE=str(tree))
    assert "already finished, 5 images; nothing to do" in capsys.readouterr().out


def test_a_vae_that_was_moved_is_the_same(tree, prepare, vae_folder, tmp_path, capsys):
    (tree / "n01/bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="could not be read"):
        prepare(SOURCE=str(tree), VAE=str(shutil.copytree(vae_folder[0], tmp_path / "vae")))
    moved = (tmp_path / "vae").rename(tmp_path / "moved")
    prepare(SOURCE=str(tree), VAE=str(moved), LEAVE_OUT_UNREADABLE=True)
    prepare(SOURCE=str(tree), VAE=str(vae_folder[0]), LEAVE_OUT_UNREADABLE=True)
    assert "already finished, 5 images" in capsys.readouterr().out


def test_a_source_that_was_moved_is_the_same(tree, prepare):
    (tree / "n01/bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="could not be read"):
        prepare(SOURCE=str(tree))
    moved = tree.rename(tree.with_name("moved"))
    assert len(prepare(SOURCE=str(moved), LEAVE_OUT_UNREADABLE=True)) == 5


def test_published_images_are_prepared_without_their_latents(published, prepare):
    data = prepare(SOURCE=str(published), VAE=None)
    assert data.vae is None and data.latents is None and data.images([0]).shape[1:] == (3, 32, 32)


def test_captions_that_the_console_cannot_print_end_nothing(tree, prepare, monkeypatch, tmp_path):
    (tree / "n01").rename(tree / "\u732b")
    with open(tmp_path / "console", "w", encoding="ascii") as console:
        monkeypatch.setattr(sys, "stdout", console)
        prepare(SOURCE=str(tree))
    assert "\\u732b" in (tmp_path / "console").read_text()
