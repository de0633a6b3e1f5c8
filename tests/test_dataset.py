"""dataset.py: what PreparedDataset reads, draws and refuses."""

import io
import pickle
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import train
from dataset import PreparedDataset, open_loader
from tests.bench import write_prepared
from tests.conftest import damage, write_coco


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


def test_a_draw_says_which_caption(prepare, tmp_path):
    data = prepare(**write_coco(tmp_path), LEAVE_OUT_UNREADABLE=True)  # with 1, 1, 1 and 3 captions
    rows, draws = np.array([0, 3, 3, 3, 3, 2, 3 + 4]), torch.tensor([0.99, 0, 0.34, 0.67, 1, 0.5, 0.5])
    moments, captions, images = data[rows, draws]
    assert captions.dtype == torch.int64 and captions.tolist() == [0, 3, 4, 5, 5, 2, 4]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip((moments, images), data[rows][::2]))
    assert data[rows][1].tolist() == [0] * 7
    loader = open_loader(data, [(rows, draws)], 1, torch.device("cpu"))
    assert next(loader)[1].tolist() == captions.tolist()
    assert pickle.loads(pickle.dumps(data)).captions == data.captions


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
