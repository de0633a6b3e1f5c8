"""Samplers equal the reference; samples depend on (seed, index); what main() writes and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from model import JiT, SiT
from sample import IndexedNoise, sample_ode, sample_sde, save_grid, to_bytes
from tests.conftest import ROOT, load_golden, set_constants, small_constants

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
        latents = sample_sde(lambda x, t, y: model(x, t, y)[0], z["z"], z["y"], randn_like=lambda x: next(noises),
                             **options)
        assert next(noises, None) is None  # every recorded draw was used
    assert latents.dtype == torch.float64
    torch.testing.assert_close(latents, z[case["key"]], rtol=meta["rtol"], atol=meta["atol"])


@pytest.mark.parametrize("case", load_golden("jit_sampler")[2]["cases"].items(), ids=lambda case: case[0])
def test_jits_sampler_equals_the_reference(case):
    (key, case), (z, _, meta), (_, state, of_network) = case, load_golden("jit_sampler"), load_golden("jit_forward")
    model = JiT(**of_network["config"], t_eps=case["t_eps"], teacher_dim=None).eval()
    model.load_state_dict(state)
    low, high = case["interval_jit"]
    images = sample_ode(lambda x, t, y: model(x, t, y)[0], case["noise_scale"] * z["noise"], z["y"], null=7,
                        steps=case["steps"], heun=case["method"] == "heun", cfg_scale=case["cfg_scale"],
                        guidance=(1 - high, 1 - low), per_call=True)
    torch.testing.assert_close(images.float(), z[key], rtol=meta["tolerance"]["all"], atol=meta["tolerance"]["all"])


def test_guidance_costs_one_call_a_step_and_only_inside_its_interval():
    sizes = []

    def velocity(x, t, y):
        sizes.append((len(x), y.tolist()))
        return torch.zeros_like(x)

    sample_ode(velocity, torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), steps=4, null=7, cfg_scale=2.0,
               guidance=(0.5, 0.75))
    assert [n for n, _ in sizes] == [2, 4, 4, 2]  # t = 1, 0.75, 0.5, 0.25: both ends are inside
    assert sizes[1][1] == [0, 1, 7, 7]


def test_ode_is_exact_for_a_straight_path():
    x, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for heun in (False, True):
        out = sample_ode(lambda x_t, t, y: noise - x, noise, torch.zeros(2, dtype=torch.long), steps=3, null=1,
                         heun=heun)
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
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, train, **{**small_constants(data_dir, teacher_file, folder), "STEPS": 4, "ALIGN_STEPS": 2})
        train.main()
    return folder


@pytest.fixture
def draw(monkeypatch, run_dir, tmp_path):
    def run(name, **constants):
        set_constants(monkeypatch, sample, **{**dict(RUN_DIR=str(run_dir), OUT=str(tmp_path / name), NUM_SAMPLES=23,
                                                     STEPS=3, BATCH_SIZE=8, GRID=(10, 3), CFG_SCALE=1.5, COMPILE=False,
                                                     CLASS_SAMPLING="balanced"), **constants})
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


def test_classes_are_drawn_at_random_or_in_turn(monkeypatch):
    classes = [3, 5, 9]
    drawn = [sample.class_of(i, classes) for i in range(3000)]
    assert (all(drawn.count(c) / 3000 == pytest.approx(1 / 3, abs=0.05) for c in classes)
            and len(set(drawn[:3] + drawn[3:9])) == 3)
    assert drawn[7] == sample.class_of(7, classes) and drawn[:30] != [classes[i % 3] for i in range(30)]
    monkeypatch.setattr(sample, "CLASS_SAMPLING", "balanced")
    assert [sample.class_of(i, classes) for i in range(5)] == [3, 5, 9, 3, 5]


def test_classes_are_drawn_as_often_as_they_were_trained_on(draw, run_dir, tmp_path):
    """By the counts in the checkpoint's header, of CLASSES alone; without counts it is refused."""
    header = tmp_path / "counted.safetensors"
    with safe_open(run_dir / "ema.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    assert settings["data"]["class_counts"] == [20] * 10
    for counts in ([5, 0, 15, 0, 30, 0, 0, 0, 0, 0], None):
        settings["data"]["class_counts"] = counts
        if counts is None:
            del settings["data"]["class_counts"]
        save_file(load_file(run_dir / "ema.safetensors"), header, metadata=dict(settings=json.dumps(settings)))
        options = dict(CHECKPOINT=str(header), CLASS_SAMPLING="data", CLASSES=[0, 1, 2], NUM_SAMPLES=200, STEPS=1,
                       CFG_SCALE=1.0, MODE="ode", BATCH_SIZE=100)
        if counts:
            draw("a", **options)
            labels = np.load(tmp_path / "a/samples.npz")["arr_1"]
            assert set(labels) == {0, 2} and (labels == 2).mean() == pytest.approx(0.75, abs=0.1)
            options["CLASSES"] = [1, 3]
        with pytest.raises(ValueError, match="CLASS_SAMPLING 'data': .*counted.safetensors does not say .*'uniform'"):
            draw("b", **options)


def test_guidance_calls_the_network_once_a_step_and_only_inside_the_interval():
    rows = []

    def velocity(x, t, y):
        rows.append((t[0].item(), len(x), y.tolist()))
        return x * 0

    noise, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    sample_ode(velocity, noise, y, steps=4, null=7, cfg_scale=1.0)
    assert [n for _, n, _ in rows] == [2] * 4
    rows.clear()
    sample_ode(velocity, noise, y, steps=4, null=7, cfg_scale=2.0, guidance=(0.3, 0.75))
    assert rows == [(1, 2, [0, 1]), (0.75, 4, [0, 1, 7, 7]), (0.5, 4, [0, 1, 7, 7]), (0.25, 2, [0, 1])]


def test_step_times_go_from_noise_to_data_as_spaced():
    for spacing in (1.0, 3.0, "log"):
        times = sample.step_times(11, 0.04, spacing)
        assert times[0] == 1 and times[-1] == pytest.approx(0.04) and (times.diff() < 0).all()
    even, shifted, log = (sample.step_times(11, 0.04, spacing).diff().abs() for spacing in (1.0, 3.0, "log"))
    assert (torch.allclose(even, even[:1].expand(10)) and shifted[0] < even[0] < shifted[-1]
            and log[-1] < even[0] < log[0])


def curved(x, t, y):
    """A velocity that turns with time and with the state."""
    return torch.sin(3 * t).view(-1, 1, 1, 1) * x + torch.cos(x) * (1 + y).view(-1, 1, 1, 1)


def test_the_adaptive_solver_is_accurate_and_no_sample_depends_on_its_batch():
    noise, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    exact = sample_ode(curved, noise, y, steps=4000, null=9, heun=True)
    for tolerance, error in ((1e-3, 1e-2), (1e-6, 1e-5)):
        assert (sample.sample_adaptive(curved, noise, y, null=9, tolerance=tolerance) - exact).abs().max() < error
    together = sample.sample_adaptive(curved, noise, y, null=9, cfg_scale=2.0, guidance=(0.2, 0.7))
    alone = sample.sample_adaptive(curved, noise[3:4], y[3:4], null=9, cfg_scale=2.0, guidance=(0.2, 0.7))
    assert torch.equal(together[3], alone[0])
    guided = sample_ode(curved, noise, y, steps=4000, null=9, cfg_scale=2.0, guidance=(0.2, 0.7))
    assert (together - guided).abs().max() < 0.02


@pytest.mark.parametrize("constants", [dict(MODE="ode", SOLVER="heun"), dict(MODE="ode", SOLVER="adaptive"),
                                       dict(MODE="ode", SPACING=2.0), dict(MODE="sde", SPACING="log", STEPS=4)])
def test_every_solver_draws(draw, constants):
    images, _ = draw("s", NUM_SAMPLES=5, GRID=(2, 1), **constants)
    assert images.shape == (5, 28, 28, 3) and images.std() > 5


def test_pictures_show_one_noise_at_several_scales_from_several_checkpoints_and_the_way(draw, run_dir, tmp_path):
    earlier = run_dir / "checkpoints/step_0000002/ema.safetensors"
    _, grid = draw("p", NUM_SAMPLES=0, GRID=(3, 1), COMPARE=(1.0, 1.5, str(earlier)), FRAMES=3, MODE="ode")
    compared, path = (np.asarray(Image.open(tmp_path / "p" / name)) for name in ("compare.png", "path.png"))
    assert compared.shape == path.shape == (84, 84, 3)
    columns = [compared[:, 28 * i : 28 * i + 28] for i in range(3)]
    assert np.array_equal(columns[1], grid) and np.array_equal(path[:, 56:], grid)  # CFG_SCALE is 1.5
    assert not np.array_equal(columns[0], grid) and not np.array_equal(columns[2], grid)
    noise = to_bytes(IndexedNoise(0, range(3)).draw((1, 28, 28))).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(path[:, :28], noise.reshape(84, 28, 3))


def test_files_are_in_adms_layout_and_named_by_their_settings(draw, tmp_path):
    images, _ = draw("f", CLASS_SAMPLING="uniform", PNGS=True)
    with np.load(tmp_path / "f/samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"] and file["arr_1"].tolist() == [sample.class_of(i, list(range(10)))
                                                                              for i in range(23)]
    assert len(list((tmp_path / "f/png").iterdir())) == 23 and not (tmp_path / "f/unfinished").exists()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "f/png/000007.png")), images[7])
    described = json.loads((tmp_path / "f/samples.json").read_text())
    assert (described["CLASS_SAMPLING"] == "uniform" and described["CFG_SCALE"] == 1.5
            and len(described["weights_sha256"]) == 64)


def test_finished_samples_are_left_alone_and_other_settings_are_refused(draw, tmp_path, capsys):
    draw("d", NUM_SAMPLES=5)
    before = (tmp_path / "d/samples.npz").read_bytes()
    draw("d", NUM_SAMPLES=5)
    assert "already drawn" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has samples with other settings \(SEED 0, now 1\); set them back, choose "
                                         r"another OUT"):
        draw("d", NUM_SAMPLES=5, SEED=1)
    assert (tmp_path / "d/samples.npz").read_bytes() == before


DRAWING = """
import json, os, signal, sys
import sample
for name, value in json.loads(sys.argv[1]).items():
    setattr(sample, name, value)
draw, drawn = sample.Sampler.draw, []
def counted(self, indices, classes, **options):
    drawn.append(indices)
    if len(drawn) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, indices, classes, **options)
sample.Sampler.draw = counted
sample.main()
"""


@pytest.fixture
def draw_process(run_dir, tmp_path):
    """Runs sample.main() in processes of its own; each kills itself at its n-th call of the sampler."""
    (tmp_path / "drawing.py").write_text(DRAWING)

    def run(name, kill_at=0, processes=None, **constants):
        constants = dict(dict(RUN_DIR=str(run_dir), OUT=str(tmp_path / name), NUM_SAMPLES=23, STEPS=3, BATCH_SIZE=4,
                              GRID=(1, 1)), **constants)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
        return subprocess.run([sys.executable, *launch, str(tmp_path / "drawing.py"), json.dumps(constants),
                               str(kill_at)], cwd=ROOT, text=True, capture_output=True, timeout=300,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return run


IN_PROCESS = dict(BATCH_SIZE=4, GRID=(1, 1), CFG_SCALE=sample.CFG_SCALE, CLASS_SAMPLING="uniform")


def test_two_processes_draw_what_one_draws(draw, draw_process, tmp_path):
    two = draw_process("two", processes=2)
    assert two.returncode == 0, two.stderr
    a, b = draw("one", **IN_PROCESS)[0].astype(int), np.load(tmp_path / "two/samples.npz")["arr_0"]
    assert a.shape == (23, 28, 28, 3) and np.abs(a - b).max() <= 1


def test_killed_it_goes_on_where_it_was(draw, draw_process, tmp_path):
    killed = draw_process("run", kill_at=4)  # the grid, and two batches are drawn
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run/samples.npz").exists()
    unfinished = tmp_path / "run/unfinished"
    assert np.load(unfinished / "done.npy").tolist() == [True] * 8 + [False] * 15
    np.load(unfinished / "images.npy", mmap_mode="r+")[3] = 77  # would be another if it were drawn again
    with pytest.raises(ValueError, match=r"unfinished: was begun with other settings \(STEPS 3, now 4\)"):
        draw("run", STEPS=4, **IN_PROCESS)
    resumed, whole = draw("run", STEPS=3, **IN_PROCESS)[0], draw("whole", STEPS=3, **IN_PROCESS)[0].astype(int)
    assert (resumed[3] == 77).all() and np.abs(resumed - whole)[[0, 1, 2, *range(4, 23)]].max() <= 1


def test_bad_input_is_refused(draw, run_dir, tmp_path):
    with pytest.raises(ValueError, match="ema.safetensors: no such file; train first"):
        draw("x", RUN_DIR=str(tmp_path / "absent"))
    for name, source in (("ema.safetensors", run_dir / "ema.safetensors"),
                         ("c.pt", run_dir / "checkpoints/step_0000004/ema.safetensors")):
        (tmp_path / name).write_bytes(source.read_bytes()[:3000])
        with pytest.raises(ValueError, match=f"{name}: not a SiT checkpoint, or damaged"):
            draw("x", CHECKPOINT=str(tmp_path / name))
    for constants, message in ((dict(CLASSES=[10]), r"CLASSES \[10\] must name .* classes 0\.\.9"),
                               (dict(MODE="pde"), "unknown MODE 'pde'"), (dict(SOLVER="rk"), "unknown SOLVER 'rk'"),
                               (dict(CLASS_SAMPLING="some"), "unknown CLASS_SAMPLING 'some'"),
                               (dict(SPACING=0), "SPACING 0 is neither"),
                               (dict(FRAMES=2, MODE="ode", SOLVER="adaptive"), "FRAMES needs steps at the same times")):
        with pytest.raises(ValueError, match=message):
            draw("x", **{"CHECKPOINT": None, "CLASSES": None, "MODE": "sde", "SOLVER": "euler",
                         "CLASS_SAMPLING": "uniform", "SPACING": 1.0, **constants})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("constants, message", [
    (dict(STEPS=0), "STEPS = 0; allowed: whole number from 1"),
    (dict(GUIDANCE=(0.7, 0.3)), "GUIDANCE .* the interval's lower end comes first"),
    (dict(GUIDANCE=(0, 250)), "GUIDANCE = .*allowed: two numbers from 0 to 1"),
    (dict(CFG_SCALE="1.5"), "CFG_SCALE = '1.5'; allowed: number from 0"),
    (dict(NUM_SAMPLES=-1), "NUM_SAMPLES = -1; allowed: whole number from 0"),
    (dict(BATCH_SIZE=0), "BATCH_SIZE = 0; allowed: whole number from 1"),
    (dict(CLASSES=[1.5]), r"CLASSES \[1.5\] must name"),
    (dict(GRID=8), "GRID = 8; allowed: two whole numbers from 0 or None"),
])
def test_settings_out_of_range_are_refused(draw, constants, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw("x", **constants)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("grid", [None, (0, 8)])
def test_no_grid(draw, grid, tmp_path, monkeypatch, run_dir):
    set_constants(monkeypatch, sample, RUN_DIR=str(run_dir), OUT=str(tmp_path / "n"), NUM_SAMPLES=2, STEPS=2, GRID=grid,
                  COMPILE=False)
    sample.main()
    assert sorted(path.name for path in (tmp_path / "n").iterdir()) == ["samples.json", "samples.npz"]


def test_samples_lie_beside_their_run_unless_told(monkeypatch, tmp_path, run_dir):
    shutil.copytree(run_dir, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, sample, RUN_DIR="mine", OUT=None, NUM_SAMPLES=2, STEPS=2, GRID=(2, 2), COMPILE=False)
    sample.main()
    assert (tmp_path / "mine/samples/samples.npz").exists() and [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_no_room_for_the_last_file_is_said_before_drawing(draw, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(sample, "save_pictures", lambda *_: pytest.fail("it drew"))
    with pytest.raises(ValueError, match="no room for .* bytes of samples.npz beside what is drawn; make room"):
        draw("x")


def test_guidance_needs_a_model_that_knows_no_label(draw, tmp_path):
    from safetensors.torch import save_file
    sit = dict(input_size=28, patch_size=4, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10,
               class_dropout_prob=0.0, teacher_dim=None)
    settings = dict(sit=sit, PATH="linear", data=dict(vae=None))
    save_file(SiT(**sit).state_dict(), tmp_path / "ema.safetensors", metadata=dict(settings=json.dumps(settings)))
    with pytest.raises(ValueError, match="CFG_SCALE 1.5 needs a model trained with LABEL_DROPOUT"):
        draw("x", CHECKPOINT=str(tmp_path / "ema.safetensors"))
    assert draw("y", CHECKPOINT=str(tmp_path / "ema.safetensors"), CFG_SCALE=1.0)[0].shape == (23, 28, 28, 3)


@pytest.mark.parametrize("constants, message", [
    (dict(COMPARE=3), "COMPARE = 3; allowed: list"), (dict(CLASSES="cat"), "CLASSES = 'cat'; allowed: list or None"),
    (dict(CLASSES=3), "CLASSES = 3; allowed: list or None")])
def test_a_single_value_where_a_list_is_meant(constants, message, monkeypatch):
    set_constants(monkeypatch, sample, **constants)
    with pytest.raises(ValueError, match=message):
        sample.main()


def test_half_a_character_in_a_prompt_is_refused_before_anything_is_drawn(monkeypatch):
    set_constants(monkeypatch, sample, PROMPTS=["a \ud83d cat"])
    with pytest.raises(ValueError, match="has half a character .a lone surrogate., which no file can hold"):
        sample.read_prompts()
