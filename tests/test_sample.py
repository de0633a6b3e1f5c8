"""Samplers equal the reference; samples depend on (seed, index); what main() writes and refuses."""

import json

import numpy as np
import pytest
import torch
from conftest import load_golden, set_constants
from PIL import Image

import sample
import train
from model import SiT, build
from sample import IndexedNoise, sample_ode, sample_sde, save_grid, to_bytes

CASES = load_golden("samplers")[2]["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['key']}-{case['path']}-{case['cfg_scale']}")
def test_samplers_equal_the_reference(case):
    z, state, meta = load_golden("samplers")
    model = SiT(**meta["config"]).eval()
    model.load_state_dict(state)
    options = dict(steps=case["steps"], null=meta["null"], cfg_scale=case["cfg_scale"], guidance=case["guidance"],
                   path=case["path"])
    if case["kind"] == "ode":
        latents = sample_ode(lambda x, t, y: model(x, t, y)[0], z["z"], z["y"], heun=case["heun"], **options)
    else:
        noises = iter(z[f"{case['key']}_noise"])
        latents = sample_sde(lambda x, t, y: model(x, t, y)[0], z["z"], z["y"], randn_like=lambda x: next(noises), **options)
        assert next(noises, None) is None  # every recorded draw was used
    assert latents.dtype == torch.float64
    torch.testing.assert_close(latents, z[case["key"]], rtol=meta["rtol"], atol=meta["atol"])


def test_guidance_costs_one_call_a_step_and_only_inside_its_interval():
    sizes = []

    def velocity(x, t, y):
        sizes.append((len(x), y.tolist()))
        return torch.zeros_like(x)

    sample_ode(velocity, torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), steps=4, null=7, cfg_scale=2.0, guidance=(0.5, 0.75))
    assert [n for n, _ in sizes] == [2, 4, 4, 2]  # t = 1, 0.75, 0.5, 0.25: both ends are inside
    assert sizes[1][1] == [0, 1, 7, 7]


def test_ode_is_exact_for_a_straight_path():
    x, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for heun in (False, True):
        out = sample_ode(lambda x_t, t, y: noise - x, noise, torch.zeros(2, dtype=torch.long), steps=3, null=1, heun=heun)
        torch.testing.assert_close(out.float(), x)


def test_noise_depends_on_seed_and_index_alone():
    together = IndexedNoise(5, range(4))
    first, second = together.draw((3, 2)), together.randn_like(torch.zeros(4, 3, 2))
    alone = IndexedNoise(5, [2])
    assert torch.equal(alone.draw((3, 2))[0], first[2]) and torch.equal(alone.draw((3, 2))[0], second[2])
    assert not torch.equal(IndexedNoise(6, [2]).draw((3, 2))[0], first[2])


def test_bytes_are_truncated_not_rounded():
    pixels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 1.5]).view(1, 1, 1, 6)
    assert to_bytes(pixels)[0, :, 0].tolist() == [[0, 0, 127, 254, 255, 255]] * 3


def test_grid_is_row_by_row(tmp_path):
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2) * 40
    save_grid(images, 3, tmp_path / "grid.png")
    assert np.asarray(Image.open(tmp_path / "grid.png"))[::2, ::2, 0].tolist() == [[0, 40, 80], [120, 160, 200]]


@pytest.fixture(scope="module")
def run_dir(data_dir, teacher_file, tmp_path_factory):
    """A finished run of four steps."""
    from conftest import small_constants
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, train, **{**small_constants(data_dir, teacher_file, folder), "STEPS": 4, "ALIGN_STEPS": 2})
        train.main()
    return folder


@pytest.fixture
def draw(monkeypatch, run_dir, tmp_path):
    def run(name, **constants):
        set_constants(monkeypatch, sample, **{**dict(RUN_DIR=str(run_dir), OUT=str(tmp_path / name), NUM_SAMPLES=23, STEPS=3,
                                                     BATCH_SIZE=8, GRID=(10, 3), CFG_SCALE=1.5), **constants})
        sample.main()
        out = tmp_path / name
        npz = np.load(out / "samples.npz")["arr_0"] if (out / "samples.npz").exists() else None
        return npz, np.asarray(Image.open(out / "samples.png"))
    return run


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_samples_do_not_depend_on_the_batch_size_or_their_number(draw, mode):
    many, grid = draw("a", MODE=mode)
    few, _ = draw("b", MODE=mode, NUM_SAMPLES=7, BATCH_SIZE=5)
    assert many.shape == (23, 28, 28, 3) and many.dtype == np.uint8 and grid.shape == (280, 84, 3)
    assert np.abs(many[:7].astype(int) - few).max() <= 1  # matrix products round differently in other batch sizes
    assert not np.array_equal(many[0], many[10])  # the same class, another index
    # row r, column c of the grid is sample c * 10 + r
    assert np.array_equal(grid[5 * 28 : 6 * 28, 28:56], many[15])
    other, _ = draw("c", MODE=mode, SEED=1)
    assert not np.array_equal(many, other)


def test_grid_alone(draw):
    npz, grid = draw("g", NUM_SAMPLES=0, CLASSES=[3, 7], GRID=(10, 4))
    assert npz is None and grid.shape == (56, 112, 3)


def test_a_checkpoint_of_the_run_gives_the_same_samples(draw, run_dir):
    expected, _ = draw("a")
    assert np.array_equal(draw("b", CHECKPOINT=str(run_dir / "checkpoints/step_0000004/ema.safetensors"))[0], expected)


def test_published_checkpoints_load(tmp_path):
    """The layout of the SiT, REPA and HASTE releases: a state dict, bare or under "ema", with or without projectors."""
    torch.manual_seed(0)
    for name, settings, wrap in (("SiT-S/4", dict(learn_sigma=True, teacher_dim=None), lambda state: state),
                                 ("SiT-S/2", dict(), lambda state: dict(ema=state, steps=400_000))):
        theirs = build(name, **settings)
        torch.save(wrap(theirs.state_dict()), tmp_path / "published.pt")
        ours, found = sample.load_model(tmp_path / "published.pt")
        assert found["PATH"] == "linear" and found["data"]["vae"]["scale"] == 0.18215
        x, t, y = torch.randn(1, 4, 32, 32), torch.rand(1), torch.tensor([1000])
        assert torch.equal(ours(x, t, y)[0], theirs(x, t, y)[0])


def test_bad_input_is_refused(draw, run_dir, tmp_path):
    with pytest.raises(ValueError, match="ema.safetensors: no such file; train first"):
        draw("x", RUN_DIR=str(tmp_path / "absent"))
    for name, source in (("ema.safetensors", run_dir / "ema.safetensors"), ("c.pt", run_dir / "checkpoints/step_0000004/ema.safetensors")):
        (tmp_path / name).write_bytes(source.read_bytes()[:3000])
        with pytest.raises(ValueError, match=f"{name}: not a SiT checkpoint, or damaged"):
            draw("x", CHECKPOINT=str(tmp_path / name))
    for constants, message in ((dict(CLASSES=[10]), r"CLASSES \[10\] must name .* classes 0\.\.9"),
                               (dict(MODE="pde"), "unknown MODE 'pde'")):
        with pytest.raises(ValueError, match=message):
            draw("x", **{"CHECKPOINT": None, "CLASSES": None, **constants})
    assert not (tmp_path / "x").exists()


def test_guidance_needs_a_model_that_knows_no_label(draw, tmp_path):
    from safetensors.torch import save_file
    sit = dict(input_size=28, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10,
               class_dropout_prob=0.0, teacher_dim=None)
    settings = dict(sit=sit, PATH="linear", data=dict(vae=None))
    save_file(SiT(**sit).state_dict(), tmp_path / "ema.safetensors", metadata=dict(settings=json.dumps(settings)))
    with pytest.raises(ValueError, match="CFG_SCALE 1.5 needs a model trained with LABEL_DROPOUT"):
        draw("x", CHECKPOINT=str(tmp_path / "ema.safetensors"))
    assert draw("y", CHECKPOINT=str(tmp_path / "ema.safetensors"), CFG_SCALE=1.0)[0].shape == (23, 28, 28, 3)
