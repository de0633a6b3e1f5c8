"""tables.py: parquet files as the hub serves them, and others of their kind."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from dataset import PreparedDataset
from images import open_source


@pytest.fixture
def write(tmp_path):
    """A function that writes a parquet file of columns, with the hub's metadata for `features`."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, features=None, **columns):
        table = pyarrow.table(columns)
        if features:
            table = table.replace_schema_metadata({"huggingface": json.dumps(dict(info=dict(features=features)))})
        (tmp_path / "src").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "src" / name, row_group_size=2)
        return tmp_path / "src"
    return write


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def structs(*values):
    return [dict(bytes=png(value), path=None) for value in values]


def seen(source):
    return [source[i].getpixel((0, 0))[0] for i in range(len(source.labels))]


CLASSES = dict(label=dict(names=["tench", "goldfish"], _type="ClassLabel"))


def test_the_column_of_images_is_found_by_its_kind(write):
    folder = write("train-00000-of-00001.parquet", dict(img=dict(_type="Image"), **CLASSES),
                   img=structs(1, 2, 3), label=[1, 0, 1])
    source = open_source(folder)
    assert source.classes == ["tench", "goldfish"] and source.labels.tolist() == [1, 0, 1] and seen(source) == [1, 2, 3]


def test_bytes_without_metadata_and_labels_without_names(write):
    source = open_source(write("a.parquet", image=[png(5), png(6)], label=[2, 0]))
    assert source.classes == ["0", "1", "2"] and source.labels.tolist() == [2, 0] and seen(source) == [5, 6]


@pytest.mark.parametrize("captions", [["a cat", "a dog"], [["a cat", "so"], ["a dog"]]])
def test_texts_are_captions(write, prepare, captions):
    data = prepare(SOURCE=str(write("a.parquet", image=structs(1, 2), text=captions)))
    assert data.classes == ["all"]
    assert data.captions == [text for own in captions for text in ([own] if isinstance(own, str) else own)]


def test_labels_and_captions_together(write):
    source = open_source(write("a.parquet", CLASSES, image=structs(1, 2), label=[1, 1], caption=["x", "y"]))
    assert source.labels.tolist() == [1, 1] and [source.captions(i) for i in (0, 1)] == [["x"], ["y"]]


def test_images_without_a_label_or_bytes_are_listed(write, prepare, tmp_path):
    images = [*structs(10, 20), dict(bytes=None, path="x.png"), *structs(40)]
    folder = write("a.parquet", CLASSES, image=images, label=[0, None, 1, 1])
    with pytest.raises(ValueError, match="2 of 4 images could not be read or have no label; unreadable.txt there"):
        prepare(SOURCE=str(folder))
    listed = (tmp_path / "out/unreadable.txt").read_text()
    assert "row 1 of all: no label\n" in listed
    assert "row 2 of all: unreadable image (there are no bytes of it)" in listed
    data = prepare(SOURCE=str(folder), LEAVE_OUT_UNREADABLE=True)
    assert data.labels.tolist() == [0, 1] and np.round(data.images([0, 1])[:, 0].float().mean(dim=(1, 2))).tolist() == \
        [10, 40]


def test_files_that_do_not_belong_together_are_refused(write):
    write("train-0.parquet", CLASSES, image=structs(1), label=[0])
    other = dict(label=dict(names=["goldfish", "tench"], _type="ClassLabel"))
    folder = write("train-1.parquet", other, image=structs(2), label=[0])
    with pytest.raises(ValueError, match="train-1.parquet: has other columns or class names than .*train-0.parquet"):
        open_source(folder)
    write("test-0.parquet", CLASSES, image=structs(1), label=[0])
    with pytest.raises(ValueError, match="files of test, train; set SOURCE to a folder with one of these"):
        open_source(folder)


def test_a_missing_or_broken_file_is_named(write):
    folder = write("train-00000-of-00003.parquet", CLASSES, image=structs(1), label=[0])
    write("train-00002-of-00003.parquet", CLASSES, image=structs(1), label=[0])
    (folder / "._train-00000-of-00009.parquet").write_bytes(b"of macOS")
    with pytest.raises(ValueError, match="train-00001-of-00003.parquet is missing"):
        open_source(folder)
    (folder / "train-00001-of-00003.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="train-00001-of-00003.parquet: damaged, or no images with labels"):
        open_source(folder)


def test_a_table_without_images_says_its_columns(write):
    with pytest.raises(ValueError, match=r"a.parquet: damaged, or no images .*\(columns pixels, label\)"):
        open_source(write("a.parquet", pixels=[[1, 2], [3, 4]], label=[0, 1]))


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="parquet files are read with pyarrow; pip install pyarrow"):
        open_source(tmp_path)


def test_parquet_files_as_the_hub_serves_them(write, prepare):
    features = dict(image=dict(_type="Image"), **CLASSES)
    for number, labels in enumerate(([0, 1, 1], [1, 0])):
        folder = write(f"train-0000{number}-of-00002.parquet", features, image=structs(*(100 * x for x in labels)),
                       label=labels)
    data = prepare(SOURCE=str(folder), WORKERS=1)
    assert isinstance(data, PreparedDataset) and data.classes == ["tench", "goldfish"]
    assert data.labels.tolist() == [0, 1, 1, 1, 0]
    assert [round(image[0].float().mean().item(), -2) for image in data.images(range(5))] == [0, 100, 100, 100, 0]
