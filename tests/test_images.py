"""images.py: crops, sources of every layout, odd images, the captions beside them; in part through
prepare_latents.main(), which reads them all."""

import io
import json
import os
import re
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

import fid
from images import ImageFiles, center_crop, image_names, open_source, read_image, square_crop, upright_size
from tests.conftest import SAID, adm_center_crop, photograph, save, write_coco


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


# ---- layouts


def test_what_is_left_out_is_counted(tree, prepare, capsys):
    (tree / "stray.png").write_bytes((tree / "n01/0.png").read_bytes())
    (tree / "n01/.DS_Store").write_text("")
    prepare(SOURCE=str(tree))
    assert "left out: 0 unreadable images, 1 images outside class folders; ignored 2 files that are no images" in \
        capsys.readouterr().out


def values(source):
    """{class name: red values of its images} of a source."""
    found = {name: [] for name in source.classes}
    for i, label in enumerate(source.labels):
        found[source.classes[label]].append(source[i].getpixel((0, 0))[0])
    return found


def test_folders_of_systems_are_no_classes_and_their_files_no_images(tmp_path):
    for name in ("n01", "n02"):
        save(tmp_path / f"src/{name}/0.png", 1)
    for name in ("lost+found", "$RECYCLE.BIN", "System Volume Information", ".Trash"):
        (tmp_path / "src" / name).mkdir()
    for name in ("@eaDir/thumb.jpg", "n01/@eaDir/0.png/thumb.jpg", "__MACOSX/n01/._0.png", "n01/.hidden.png"):
        save(tmp_path / "src" / name, 9)
    source = ImageFiles(tmp_path / "src")
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
    source = open_source(tmp_path)
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
        open_source(tmp_path)


def test_a_tar_left_beside_what_was_unpacked_is_no_class(tmp_path):
    save(tmp_path / "src/n01/0.png", 1)
    shutil.make_archive(str(tmp_path / "ILSVRC2012_img_train"), "tar", tmp_path / "src")
    (tmp_path / "ILSVRC2012_img_train.tar").rename(tmp_path / "src/ILSVRC2012_img_train.tar")
    assert values(open_source(tmp_path / "src")) == dict(n01=[1])


def test_a_folder_of_one_tar_per_class(tmp_path):
    for name in ("n01", "n02"):
        save(tmp_path / f"src/{name}/{name}_0.png", int(name[1:]))
        shutil.make_archive(str(tmp_path / "tars" / name), "tar", tmp_path / "src" / name)
    assert values(open_source(tmp_path / "tars")) == dict(n01=[1], n02=[2])


# ---- images of every kind


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
    source = ImageFiles(tmp_path / "src")
    for row in (0, 1):
        with pytest.raises(ValueError, match="have no range to go by; save it in 8 or 16 bits"):
            source[row]
    assert np.asarray(source[2]).mean() == pytest.approx(127, abs=2)


# ---- captions


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


# ---- labels: from where the source says, or refused


def write_tar(path, contents):
    """A tar of {name: bytes, str, or an int, the red value of an image}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            if isinstance(content, int):
                file = io.BytesIO()
                Image.new("RGB", (40, 40), (content, 0, 0)).save(file, "PNG")
                content = file.getvalue()
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("sample", [
    lambda i: {f"s{i}.input.png": 10 * i, f"s{i}.target.cls": str(i)},
    lambda i: {f"{i}.PNG": 10 * i, f"{i}.CLS": str(i)},
    lambda i: {f"{i}.png": 10 * i, f"{i}.json": json.dumps(dict(label=i))}], ids=["dotted", "capitals", "json"])
def test_webdatasets_labels_under_any_key(tmp_path, sample):
    for shard in range(2):
        write_tar(tmp_path / f"{shard:05d}.tar", {**sample(2 * shard), **sample(2 * shard + 1)})
    source = open_source(tmp_path)
    assert source.classes == ["0", "1", "2", "3"] and values(source) == {str(i): [10 * i] for i in range(4)}


def test_labels_of_some_images_are_refused_wherever_the_others_are(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": 1, "b.png": 2, "b.cls": "1", "c.png": 3, "c.cls": "0"})
    with pytest.raises(ValueError, match=r"0/a.png has no class number in a .cls or .json .*, as 2 of 3 images have"):
        open_source(tmp_path)


@pytest.mark.parametrize("more", [{}, {"a.json": '{"class_id": 3}'}])
def test_shards_without_labels_are_no_classes(tmp_path, more):
    for shard in range(3):
        write_tar(tmp_path / f"set-{shard:04d}.tar", {"a.png": 1, **more})
    with pytest.raises(ValueError, match="set-0000.tar, .* look like shards, whose images have no labels .*only .*png"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "zip", "images of REPA's"])
def test_stylegans_dataset_json_says_the_labels(tmp_path, kind):
    root = tmp_path / ("src/images" if kind == "images of REPA's" else "src")
    labels = {"00000/img0.png": 2, "00000/img1.png": 0, "00001/img2.png": 1}
    for name, label in labels.items():
        save(root / name, 10 * label)
    (root / "dataset.json").write_text(json.dumps(dict(labels=list(labels.items()))))
    if kind == "zip":
        root = shutil.make_archive(str(tmp_path / "src"), "zip", root)
    assert values(open_source(root)) == {"0": [0], "1": [10], "2": [20]}


@pytest.mark.parametrize("labels, message", [
    ([["0/a.png", 0]], "0/b.png has no class number in a dataset.json, as 1 of 2 images have"),
    (None, "dataset.json has no labels, so the folders beside it are no classes")])
def test_a_dataset_json_without_all_labels_is_refused(tmp_path, labels, message):
    for name in "ab":
        save(tmp_path / f"0/{name}.png", 1)
    (tmp_path / "dataset.json").write_text(json.dumps(dict(labels=labels)))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("picture", ["teaser.png", "assets/teaser.png"])
def test_pictures_beside_tars_are_refused_with_what_to_move(tmp_path, picture):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {"a.png": 1, "a.cls": "0"})
    save(tmp_path / picture, 1)
    with pytest.raises(ValueError, match=rf"holds 2 tars \(0.tar\) and 1 images beside them \({picture}\); move"):
        open_source(tmp_path)


def test_the_only_folder_of_a_tree_may_be_a_part_of_a_data_set(tmp_path):
    for name in ("train/n01/0.png", "train/n02/0.png"):
        save(tmp_path / name, 1)
    with pytest.raises(ValueError, match=f"train are parts of a data set, no classes; set SOURCE to {tmp_path}/train"):
        open_source(tmp_path)
    assert open_source(tmp_path / "train").classes == ["n01", "n02"]


# ---- captions: of most images


def test_names_in_folders_match_whole(tmp_path):
    for value, name in enumerate(("1", "1.5", "2.0"), 1):
        save(tmp_path / f"{name}.png", value)
    for name, text in (("1", "one"), ("2.0", "two"), ("2", "of no image")):
        (tmp_path / f"{name}.txt").write_text(text)
    source = open_source(tmp_path)  # 1.5, 1, 2.0
    assert source.captions(1) == ["one"] and source.captions(2) == ["two"]
    with pytest.raises(ValueError, match="no caption"):
        source.captions(0)


def test_a_stray_text_in_a_class_tree_is_no_caption(tmp_path):
    for name in ("n01/0.png", "n01/1.png", "n02/0.png", "n02/1.png"):
        save(tmp_path / name, 1)
    (tmp_path / "n01/0.txt").write_text("taken in Rome")
    source = open_source(tmp_path)
    assert source.captions_checksum is None and source.classes == ["n01", "n02"] and source.ignored == 1


@pytest.mark.parametrize("files, found", [
    ({}, "2 images in no folder of a class, 0 with captions"), ({"a.txt": "x"}, "2 images .* 1 with captions"),
    ({"a.caption": "x", "b.caption": "y"}, "2 .caption files"), ({"metadata.jsonl": "{}"}, "1 .jsonl files")])
def test_no_images_found_says_what_was(tmp_path, files, found):
    for name in "ab":
        save(tmp_path / f"{name}.png", 1)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"no images found; SOURCE must hold one folder .*Found: .*{found}"):
        open_source(tmp_path)


def test_what_pillow_opens_no_pixels_of_is_no_image(tmp_path):
    for name in ("a.mpg", "b.h5", "c.hdf", "d.wmf", "e.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert image_names(os.listdir(tmp_path)) == ["e.jpg"]


@pytest.mark.parametrize("orientation, size", [(1, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))])
def test_the_upright_size_is_that_of_the_upright_image(orientation, size):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (30, 20)).save(file, "JPEG", exif=exif)
    assert upright_size(Image.open(file)) == size == read_image(file.getvalue()).size[::-1]
