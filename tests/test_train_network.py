"""experiments/train_network.py: the file it writes, repeatable training, a second pass."""

import json

import pytest
import timm
import torch
from safetensors import safe_open

from experiments import train_network
from teacher import Teacher, load_network


def test_trained_file_builds_the_network_again(teacher_file):
    network = load_network(teacher_file)
    with safe_open(teacher_file, "pt") as file:
        header = json.loads(file.metadata()["network"])
        assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())
    assert header["images"] == 200 and header["num_classes"] == 10 and 0 < header["accuracy"] < 1
    config = timm.data.resolve_model_data_config(network)
    assert list(config["mean"]) == pytest.approx(header["input"]["mean"]) and config["input_size"][-1] == 28
    tokens, logits = Teacher(str(teacher_file), (3,), 28)(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))
    assert tokens.shape == (2, 49, 32) and logits[0].shape == (2, 2, 49, 49)


def test_training_is_repeatable(teacher_file, data_dir, monkeypatch, tmp_path):
    for name, value in dict(DATA_DIR=str(data_dir), TEST_DIR=None, OUT=str(tmp_path / "t.safetensors"), EPOCHS=1,
                            BATCH_SIZE=20, ARCHITECTURE_SETTINGS=dict(img_size=28, patch_size=4, embed_dim=32, depth=4,
                                                                      num_heads=2)).items():
        monkeypatch.setattr(train_network, name, value)
    train_network.main()
    again, before = load_network(tmp_path / "t.safetensors").state_dict(), load_network(teacher_file).state_dict()
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_shift_moves_each_image_and_black_moves_in():
    torch.manual_seed(0)
    images = torch.randint(1, 256, (200, 3, 5, 6), dtype=torch.uint8)
    moved, seen = train_network.shift(images, 1), set()
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    for before, after in zip(images, moved):
        padded = torch.nn.functional.pad(before, (1,) * 4)
        offsets = [(top, left) for top in range(3) for left in range(3)
                   if torch.equal(padded[:, top : top + 5, left : left + 6], after)]
        assert len(offsets) == 1
        seen |= set(offsets)
    assert len(seen) == 9  # every offset occurs


def test_a_second_pass_goes_on_and_keeps_the_average(teacher_file, data_dir, monkeypatch, tmp_path):
    for name, value in dict(DATA_DIR=str(data_dir), TEST_DIR=None, START_FROM=str(teacher_file), EPOCHS=1,
                            BATCH_SIZE=20, SHIFT=1, OUT=None, EMA_DECAY=0,
                            ARCHITECTURE_SETTINGS=dict(img_size=28, patch_size=4, embed_dim=32, depth=4,
                                                       num_heads=2)).items():
        monkeypatch.setattr(train_network, name, value)
    weights = {}
    for train_network.EMA_DECAY in (0.0, 0.999, 1.0):  # the last weights, a slow average, the first step's weights
        train_network.OUT = str(tmp_path / f"{train_network.EMA_DECAY}.safetensors")
        train_network.main()
        weights[train_network.EMA_DECAY] = load_network(train_network.OUT).state_dict()["head.weight"]
    started = load_network(teacher_file).state_dict()["head.weight"]
    distance = {decay: (weight - started).norm().item() for decay, weight in weights.items()}
    assert 0 < distance[1.0] < distance[0.999] < distance[0.0]
