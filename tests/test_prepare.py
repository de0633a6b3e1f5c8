"""The SD-VAE's numbers, the crop, preparing trees and sheets, and what PreparedDataset refuses."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import ROOT, set_constants
from PIL import Image
from safetensors.torch import load_file, save_file

import prepare_latents
from prepare_latents import AutoencoderKL, PreparedDataset, center_crop, load_vae


def test_vae_equals_the_reference(golden):
    z, state, meta = golden("sd_vae")
    vae = AutoencoderKL(**meta["config"])
    vae.load_state_dict(state)
    tolerance = dict(rtol=meta["rtol"], atol=meta["atol"])
    with torch.no_grad():
        mean, std = vae.encode(z["x"])
        torch.testing.assert_close(mean, z["mean"], **tolerance)
        torch.testing.assert_close(std, z["std"], **tolerance)
        torch.testing.assert_close(vae.decode(z["z"]), z["decoded"], **tolerance)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A small VAE with random weights, written by diffusers itself."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    theirs = diffusers.AutoencoderKL(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1,
                                     down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                                     scaling_factor=0.25)
    theirs.save_pretrained(folder)
    return folder, theirs


def test_vae_equals_diffusers_on_random_weights(vae_folder):
    folder, theirs = vae_folder
    ours, scale = load_vae(folder)
    assert scale == 0.25
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        posterior, (mean, std) = theirs.encode(x).latent_dist, ours.encode(x)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(std, posterior.std, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=1e-3, atol=1e-4)


def test_default_vae_has_the_keys_and_shapes_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours = AutoencoderKL().state_dict()
        theirs = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                                         down_block_types=["DownEncoderBlock2D"] * 4,
                                         up_block_types=["UpDecoderBlock2D"] * 4).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_oldest_attention_names_load(vae_folder, tmp_path):
    folder, _ = vae_folder
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    old = {}
    for key, value in state.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, _ = load_vae(tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_vae_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="VAE 'stabilityai/sd-vae-ft-mse' is no local file or folder and could not be"):
        load_vae("stabilityai/sd-vae-ft-mse")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not the weights of a diffusers AutoencoderKL"):
        load_vae(tmp_path)


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
        assert np.array_equal(((moments[row, 0].float() + 1) * 127.5).round().numpy(), tile)


@pytest.fixture
def tree(tmp_path):
    """Two classes of photograph-like images of mixed sizes and kinds, with a file that is no image."""
    rng = np.random.default_rng(0)
    for name, sizes in (("n02", [(80, 60), (33, 90)]), ("n01", [(64, 64), (200, 150), (40, 41)])):
        (tmp_path / "tree" / name / "deep").mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
            folder = tmp_path / "tree" / name / ("deep" if i == 1 else "")
            coarse.convert("L" if i == 0 else "RGB").save(folder / f"{i}.{'JPEG' if i == 2 else 'png'}")
    (tmp_path / "tree/n01/notes.txt").write_text("no image")
    return tmp_path / "tree"


@pytest.fixture
def prepare(monkeypatch, tmp_path):
    def run(**constants):
        set_constants(monkeypatch, prepare_latents, **{**dict(DATA_DIR=str(tmp_path / "out"), IMAGE_SIZE=32, VAE=None,
                                                             WORKERS=0, BATCH_SIZE=2), **constants})
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
def test_unreadable_image_is_named(tree, prepare, workers):
    broken = tree / "n02/0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"n02/0\.png: unreadable image .*; repair or remove it"):
        prepare(SOURCE=str(tree), WORKERS=workers)
    with pytest.raises(ValueError, match="no meta.json, so this is not a finished data set"):
        PreparedDataset(tree.parent / "out")
    broken.unlink()
    assert len(prepare(SOURCE=str(tree))) == 4


@pytest.mark.parametrize("constants, message", [
    (dict(SOURCE="/nowhere"), "/nowhere: no such file or folder; set SOURCE"),
    (dict(SOURCE=str(ROOT / "tests/golden")), "no images found; SOURCE must hold one folder of images per class"),
    (dict(SOURCE=str(ROOT / "LICENSE")), "LICENSE: unreadable image .* SOURCE must be a sprite sheet"),
    (dict(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), SHEET_TILE=27), "not whole rows of 27-pixel"),
    (dict(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), VAE="no-such/vae"), "VAE 'no-such/vae' is no local file"),
])
def test_bad_sources_are_refused(prepare, constants, message):
    with pytest.raises(ValueError, match=message):
        prepare(**constants)


def damage(folder, change):
    """Applies a change to the meta.json of a copy."""
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("harm, message", [
    (lambda f: (f / "meta.json").unlink(), "no meta.json, so this is not a finished data set"),
    (lambda f: (f / "meta.json").write_text("{"), "meta.json: damaged"),
    (lambda f: damage(f, lambda meta: meta.update(format=99)), "format 99, this version reads 1"),
    (lambda f: (f / "latents.npy").write_bytes((f / "latents.npy").read_bytes()[:-1]), r"latents.npy: \d+ bytes, meta.json"),
    (lambda f: (f / "images.bin").unlink(), r"images.bin: 0 bytes, meta.json says \d+"),
    (lambda f: damage(f, lambda meta: meta.update(classes=["a", "b"])), r"labels 0\.\.9, but meta.json names 2 classes"),
])
def test_unfinished_or_damaged_folder_is_refused(data_dir, tmp_path, harm, message):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in data_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
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


def test_packed_images_are_png(data_dir):
    data = PreparedDataset(data_dir)
    first = data.packed[: data.offsets[1]].tobytes()
    assert Image.open(io.BytesIO(first)).format == "PNG" and data.offsets[-1] == len(data.packed)
