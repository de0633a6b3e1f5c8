"""train.py: the two-phase loop, bit-exact resume, what phase II must not do, bad input, several processes."""

import csv
import importlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import warnings
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

import checkpoint
import prepare_latents
import runtime
import sample
import train
from checkpoint import load_model
from dataset import PreparedDataset
from teacher import Teacher
from tests.conftest import ROOT, read_log, set_constants, small_constants, with_latents
from tests.test_model import ShapeRecorder
from vae import sample_latents


def test_times_are_spread_towards_the_noise_as_the_reference_says(monkeypatch):
    times = json.loads((ROOT / "tests/golden/times.json").read_text())
    u, many = torch.tensor(times["meta"]["u"]), (torch.arange(200_000) + 0.5) / 200_000
    for case in times["cases"].values():
        if "mean" in case:
            monkeypatch.setattr(train, "TIMES", (case["mean"], case["std"]))
        else:
            monkeypatch.setattr(train, "TIMES", "uniform")
        monkeypatch.setattr(train, "TIME_SHIFT", case["shift"])
        torch.testing.assert_close(train.spread_times(u), torch.tensor(case["t"]), rtol=0, atol=5e-5)
        t = train.spread_times(many)
        assert abs(t.mean().item() - case["expectation"]) < 1e-3
        assert abs((t < 0.5).float().mean().item() - case["below_0_5"]) < 1e-3
    monkeypatch.setattr(train, "TIMES", "uniform")
    monkeypatch.setattr(train, "TIME_SHIFT", 1.0)
    assert torch.equal(train.spread_times(many), many)
    monkeypatch.setattr(train, "TIMES", (0.0, 1.0))
    assert train.spread_times(torch.zeros(1)).item() == 0  # as rand() may draw it


def read_losses(run):
    with open(run / "loss_by_time.csv", newline="") as file:
        return [[float(value) if value else None for value in row] for row in list(csv.reader(file))[1:]]


def test_the_loss_is_logged_by_time(small_run):
    """Each step's bins, weighted by how many of its times lie there, make its loss; a bin of no image is empty."""
    run = small_run(LOG_EVERY=1, MICRO_BATCHES=2)
    train.main()
    for step, (row, (logged, *means)) in enumerate(zip(read_log(run), read_losses(run), strict=True)):
        t = train.draw_noise(step, (1, 28, 28), 0, 1, torch.device("cpu"), of_pixels=True)[2]
        counts = np.histogram(t, bins=10, range=(0, 1))[0]
        assert logged == step + 1 and [mean is None for mean in means] == [count == 0 for count in counts]
        total = sum(mean * count for mean, count in zip(means, counts) if count)
        assert total / counts.sum() == pytest.approx(float(row["denoising_loss"]), rel=1e-5)
    header = (run / "loss_by_time.csv").read_text().partition("\n")[0]
    assert header.startswith("step,t 0.0 to 0.1,") and header.endswith(",t 0.9 to 1.0")


def final_state(run, step=12):
    """A checkpoint as {"model": {name: tensor}, "optimizer": ..., "ema": ..., "progress": ...}, whoever wrote it."""
    folder = Path(run) / f"checkpoints/step_{step:07d}"
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype)
               for key, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs in one process
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    state = {"progress": json.loads((folder / "progress.json").read_text())}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        state.setdefault(group, {})[name] = tensor
    return state


def assert_same_state(a, b, path="state"):
    """Bit for bit: weights, optimiser, EMA, meters, phase."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"settings"}:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_state(x, y, f"{path}.{i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_close_models(a, b):
    """Equal but for rounding. Adam turns the rounding of a gradient near zero into a step of the learning rate, so
    single weights may differ; eight steps move the whole by several per cent."""
    assert a.keys() == b.keys()
    a, b = (torch.cat([state[name].flatten() for name in sorted(state)]) for state in (a, b))
    assert (a - b).norm() < 1e-3 * a.norm()


def test_run_through_both_phases(small_run, capsys):
    run = small_run(PREVIEW_EVERY=6, PREVIEW_STEPS=2, WORKERS=2, KEEP_EVERY=6)
    train.main()
    log = read_log(run)
    assert ([row["step"] for row in log] == ["3", "6", "9", "12"]
            and [row["phase"] for row in log] == ["1", "1", "2", "2"])
    assert all(float(row["attention_loss"]) > 1 and float(row["feature_loss"]) != 0 for row in log[:2])
    assert all(float(row["attention_loss"]) == 0 == float(row["feature_loss"]) for row in log[2:])
    assert float(log[3]["denoising_loss"]) < float(log[0]["denoising_loss"])
    for row in log:
        assert float(row["images_per_s"]) == pytest.approx(8 / float(row["step_ms"]) * 1000)
        assert 0 < float(row["mfu"]) < 1 and 0.1 < float(row["peak_gib"]) < 16
    text = capsys.readouterr().out
    assert text.count("phase II, plain SiT") == 1 and "step 6: phase II" in text
    assert (run / "log.txt").read_text().count("phase II, plain SiT") == 1
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step_0000006.png", "step_0000012.png"]
    settings = json.loads((run / "settings.json").read_text())
    assert settings["ALIGN_STEPS"] == 6 and settings["sit"]["num_classes"] == 10 and settings["data"]["count"] == 200
    assert (run / "train.py").read_text() == (ROOT / "train.py").read_text()
    state = final_state(run)
    assert (not any("projectors" in key for key in [*state["model"], *state["ema"]])
            and not state["progress"]["aligning"])
    assert any("projectors" in key for key in final_state(run, 6)["model"])
    # the last three, and every sixth for good
    assert sorted(path.name[-2:] for path in (run / "checkpoints").iterdir()) == ["06", "08", "10", "12"]
    model, _ = sample.load_model(run / "ema.safetensors")
    assert all(torch.equal(value, state["ema"][key]) for key, value in model.state_dict().items())
    assert not torch.equal(state["ema"]["final_layer.linear.weight"], state["model"]["final_layer.linear.weight"])


def test_resume_is_bit_exact_after_kills_in_both_phases_and_at_the_switch(run_process, tmp_path):
    constants = dict(MIRROR=True, CONFLICT_FROM=4, CONFLICT_EVERY=2, CONFLICT_IMAGES=16)
    whole = run_process(tmp_path / "whole", **constants)
    assert whole.returncode == 0, whole.stderr
    for at in (3, 6, 9):  # phase I; the first step after the switch; phase II. Checkpoints are written every 2 steps.
        killed = run_process(tmp_path / "killed", signal.SIGKILL, at, **constants)
        assert killed.returncode == -signal.SIGKILL
    resumed = run_process(tmp_path / "killed", **constants)
    assert resumed.returncode == 0 and "phase II from step 8" in resumed.stdout
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    timeless = [[{k: v for k, v in row.items() if k not in ("images_per_s", "step_ms", "mfu", "peak_gib")}
                 for row in read_log(tmp_path / name)] for name in ("whole", "killed")]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 4


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_the_whole_program(run_process, tmp_path, number, status):
    stopped = run_process(tmp_path / "run", number, 4, after="print('went on')", CHECKPOINT_EVERY=100, WORKERS=1)
    assert stopped.returncode == status and "Traceback" not in stopped.stderr, stopped.stderr
    assert "went on" not in stopped.stdout
    assert "step 5: stopped by a signal and saved; the same command resumes" in stopped.stdout
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000005"]


def test_interrupted_between_log_lines_resumes_bit_exact(small_run, monkeypatch, tmp_path):
    small_run(RUN_DIR=str(tmp_path / "whole"))
    train.main()
    small_run(RUN_DIR=str(tmp_path / "parts"), WORKERS=1)
    draw_noise = train.draw_noise
    monkeypatch.setattr(train, "draw_noise",
                        lambda step, *args: (step in (4, 7) and os.kill(os.getpid(), signal.SIGINT),
                                             draw_noise(step, *args))[1])
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            train.main()
        assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(train, "draw_noise", draw_noise)
    train.main()
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_phase_two_has_no_teacher_reads_no_image_and_computes_no_logits(small_run, latents_dir, monkeypatch):
    """Watched from inside the run: objects alive, files mapped into memory, shapes of every tensor computed."""
    small_run(DATA_DIR=str(latents_dir), WORKERS=0, CHECKPOINT_EVERY=100)
    seen, recorder, draw_noise, made = {}, ShapeRecorder(), train.draw_noise, weakref.WeakSet()
    init = Teacher.__init__
    monkeypatch.setattr(Teacher, "__init__", lambda self, *args, **options: init(self, *args, **options) or
                        made.add(self))

    def watch(step, *args):
        seen[step] = dict(teachers=len(made), images="images.bin" in Path("/proc/self/maps").read_text(),
                          logits_before=any(shape[-2:] == (49, 49) for shape in recorder.shapes))
        recorder.shapes.clear()
        return draw_noise(step, *args)

    monkeypatch.setattr(train, "draw_noise", watch)
    with recorder:
        train.main()
    assert seen[3] == dict(teachers=1, images=True, logits_before=True)
    for step in range(7, 12):
        assert seen[step] == dict(teachers=0, images=False, logits_before=False)
    assert seen[6]["teachers"] == 0 and not seen[6]["images"]  # gone before the first step of phase II


def copy_without_images(latents_dir, folder):
    return str(shutil.copytree(latents_dir, folder, ignore=shutil.ignore_patterns("image*")))


def test_plain_sit_needs_neither_images_nor_teacher(small_run, latents_dir, tmp_path):
    data = copy_without_images(latents_dir, tmp_path / "d")
    run = small_run(ALIGN_STEPS=0, TEACHER="absent.safetensors", DATA_DIR=data)
    train.main()
    assert [row["phase"] for row in read_log(run)] == ["2"] * 4


def test_a_run_resumed_in_phase_two_never_loads_the_teacher(small_run, monkeypatch):
    small_run(STEPS=8)
    train.main()
    small_run(STEPS=12)
    monkeypatch.setattr(train, "teacher_for_grid", lambda *args, **options: pytest.fail("the teacher was loaded"))
    train.main()


def test_repa_is_attention_weight_zero(small_run):
    run = small_run(ATTENTION_WEIGHT=0, STEPS=3, LAYER_PAIRS=[(99, 99)])
    with ShapeRecorder() as recorder:
        train.main()
    assert not any(shape[-2:] == (49, 49) for shape in recorder.shapes)
    (row,) = read_log(run)
    assert float(row["attention_loss"]) == 0 and float(row["feature_loss"]) != 0


def test_attention_alone_builds_no_projector(small_run):
    run = small_run(FEATURE_WEIGHT=0, STEPS=3, CHECKPOINT_EVERY=3)
    train.main()
    assert not any("projectors" in key for key in final_state(run, 3)["model"])
    assert float(read_log(run)[0]["attention_loss"]) > 0


def test_gradient_accumulation_changes_nothing_but_rounding(small_run, tmp_path):
    states = []
    for parts in (1, 4):
        run = small_run(RUN_DIR=str(tmp_path / str(parts)), MICRO_BATCHES=parts, STEPS=8, CHECKPOINT_EVERY=8)
        train.main()
        states.append(final_state(run, 8)["model"])
    assert_close_models(*states)


def test_activation_checkpointing_and_cosine_path_run(small_run, tmp_path):
    states = []
    for flag in (False, True):
        run = small_run(RUN_DIR=str(tmp_path / str(flag)), ACTIVATION_CHECKPOINTING=flag, PATH="cosine", STEPS=8)
        train.main()
        states.append(final_state(run, 8))
    assert_same_state(*states)


@pytest.mark.parametrize("network, at_most", [
    (dict(), 6), pytest.param(dict(MODEL="JiT-T/4", TIMES=(0.8, 0.8)), 8, marks=pytest.mark.slow)])
def test_one_compilation_a_phase_without_graph_breaks(small_run, monkeypatch, network, at_most):
    """By the compiler's own counters. The gradients' cosine in phase I compiles nothing either."""
    counters, graphs, draw_noise = torch._dynamo.utils.counters, {}, train.draw_noise

    def watch(step, *args, **options):
        graphs.setdefault(step, counters["stats"]["unique_graphs"])
        return draw_noise(step, *args, **options)

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(train, "draw_noise", watch)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    run = small_run(COMPILE=True, MICRO_BATCHES=2, CONFLICT_FROM=4, CONFLICT_EVERY=2, CONFLICT_IMAGES=8, **network)
    train.main()
    # a block with and without queries (JiT's: and with and without class tokens), final layer, teacher, losses
    assert graphs[0] == 0 and 0 < graphs[1] <= at_most
    assert all(graphs[step] == graphs[1] for step in range(1, 7))
    assert graphs[7] <= graphs[6] + 1 and all(graphs[step] == graphs[7] for step in range(7, 12))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs[11]
    monkeypatch.undo()
    eager = small_run(RUN_DIR=f"{run}-eager", MICRO_BATCHES=2, **network)
    train.main()
    for a, b in zip(read_log(run), read_log(eager), strict=True):
        assert float(a["denoising_loss"]) == pytest.approx(float(b["denoising_loss"]), rel=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the run of one process that others are compared with, made by the first test that asks."""
    return tmp_path_factory.mktemp("alone") / "run"


PARALLEL = dict(WORKERS=1, LOG_EVERY=1, MIRROR=True, LABEL_DROPOUT=0.5, CONFLICT_FROM=4, CONFLICT_EVERY=4,
                CONFLICT_IMAGES=16)


@pytest.mark.parametrize("processes, nodes, sharding", [
    (2, 2, "zero2"), pytest.param(4, 1, "zero3", marks=pytest.mark.slow),
    pytest.param(2, 1, "replicate", marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_alike(run_process, tmp_path, alone, processes, nodes, sharding):
    """Noise, times, dropped labels, mirrored images, the gradients' cosine: all are the global batch's."""
    if not alone.exists():
        assert run_process(alone, **PARALLEL).returncode == 0
    ended = run_process(tmp_path / "run", processes=processes, nodes=nodes, SHARDING=sharding, **PARALLEL)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("phase II, plain SiT") == 1  # rank 0 speaks
    one, several = read_log(alone), read_log(tmp_path / "run")
    assert len(one) == len(several) == 12
    for key in ("denoising_loss", "feature_loss", "attention_loss", "grad_norm"):
        assert float(several[0][key]) == pytest.approx(float(one[0][key]), rel=3e-6), key
        assert [float(row[key]) for row in several] == pytest.approx([float(row[key]) for row in one], rel=1e-3), key
    for x, y in zip(one, several):
        assert x["gradient_cosine"] == y["gradient_cosine"] == "" or \
            float(x["gradient_cosine"]) == pytest.approx(float(y["gradient_cosine"]), abs=1e-3)
    for x, y in zip(read_losses(alone), read_losses(tmp_path / "run"), strict=True):
        assert [value or 0 for value in x] == pytest.approx([value or 0 for value in y], rel=1e-3)
    for part in ("model", "ema"):
        assert_close_models(final_state(alone)[part], final_state(tmp_path / "run")[part])


@pytest.mark.slow
def test_one_process_as_a_group_of_one_trains_alike(run_process, small_run, tmp_path):
    """As on one GPU, where FSDP casts the weights once a step; its checkpoints are those of one without a group."""
    group = "import torch.distributed as dist; " \
            "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())"
    for steps in (8, 12):  # the switch, after 6, is in the first part
        ended = run_process(tmp_path / "run", extra=group, STEPS=steps, MICRO_BATCHES=2)
        assert ended.returncode == 0, ended.stderr
    whole = small_run(MICRO_BATCHES=2)
    train.main()
    for part in ("model", "ema", "optimizer"):
        assert_close_models(final_state(whole)[part], final_state(tmp_path / "run")[part])


@pytest.mark.slow
def test_a_run_of_four_processes_goes_on_in_two_and_in_one(run_process, tmp_path, alone):
    if not alone.exists():
        assert run_process(alone, **PARALLEL).returncode == 0
    for processes, steps in ((4, 4), (2, 8), (None, 12)):  # the switch, after 6, is in the second part
        ended = run_process(tmp_path / "run", processes=processes, STEPS=steps, **PARALLEL)
        assert ended.returncode == 0, ended.stderr
    for part in ("model", "ema", "optimizer"):
        assert_close_models(final_state(alone)[part], final_state(tmp_path / "run")[part])
    assert [row["step"] for row in read_log(tmp_path / "run")] == [str(step) for step in range(1, 13)]


@pytest.mark.slow
def test_torchrun_resumes_by_itself_after_one_of_two_processes_is_killed(run_process, small_run, tmp_path):
    killed = run_process(tmp_path / "killed", signal.SIGKILL, 9, rank=1, processes=2, restarts=1, WORKERS=1)
    assert killed.returncode == 0 and "phase II from step 8" in killed.stdout, killed.stderr
    whole = small_run()
    train.main()
    for part in ("model", "ema", "optimizer"):
        assert_close_models(final_state(whole)[part], final_state(tmp_path / "killed")[part])


def test_a_signal_to_torchrun_saves(run_process, tmp_path):
    """It passes SIGTERM on to the process group of each process, loaders included."""
    told = """
signal_or_not = train.draw_noise
def tell_torchrun(step, *args, **options):
    if step == 3 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    return signal_or_not(step, *args, **options)
train.draw_noise = tell_torchrun
"""
    stopped = run_process(tmp_path / "run", processes=2, extra=told, STEPS=4000, ALIGN_STEPS=20, CHECKPOINT_EVERY=5000,
                          WORKERS=1)
    assert "stopped by a signal and saved" in stopped.stdout, stopped.stderr
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(run_process, tmp_path):
    stopped = run_process(tmp_path / "run", signal.SIGUSR1, 3, rank=1, processes=2, STEPS=40, ALIGN_STEPS=20,
                          CHECKPOINT_EVERY=100)
    assert stopped.returncode == 0 and "step 10: stopped by a signal and saved" in stopped.stdout, stopped.stderr
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000010"]


COUNT_OBJECTS = """
import gc
from collections import Counter
draw, counts = train.draw_noise, {}
def count(step, *args, **options):
    if step in (100, 300):
        gc.collect()
        counts[step] = Counter(type(each).__name__ for each in gc.get_objects())
        if step == 300:
            more = sum(counts[300].values()) - sum(counts[100].values())
            most = (counts[300] - counts[100]).most_common(9)
            os.write(1, f"MORE {more} {most}\\n".encode())  # of two processes, whole
    return draw(step, *args, **options)
train.draw_noise = count
"""


@pytest.mark.slow
def test_no_object_is_left_behind_by_a_step(run_process, tmp_path):
    """torch 2.10 and 2.11 leak 1,500 a step of a fused AdamW on DTensors."""
    ended = run_process(tmp_path / "run", processes=2, extra=COUNT_OBJECTS, STEPS=302, ALIGN_STEPS=0, WORKERS=0,
                        LOG_EVERY=50, CHECKPOINT_EVERY=1000)
    assert ended.returncode == 0, ended.stderr
    more = re.findall(r"MORE (-?\d+)", ended.stdout)
    assert len(more) == 2 and max(map(int, more)) < 200, ended.stdout


TWO = pytest.param(2, marks=pytest.mark.slow)


@pytest.mark.parametrize("processes", [None, TWO])
def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(run_process, tmp_path, processes):
    killed = run_process(tmp_path / "run", at=-8, processes=processes, STEPS=8)
    assert killed.returncode != 0
    assert (sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-2:]
            == ["step_0000006", "step_0000008.tmp"])
    resumed = run_process(tmp_path / "run", processes=processes, STEPS=8)
    assert resumed.returncode == 0 and "phase II from step 6" in resumed.stdout, resumed.stderr
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == "step_0000008"


# From the middle of step 3 to that of step 7 every file is cut at 1 MB, as by a full disk; shards and EMA are larger.
FULL_DISK = """
import resource
signal_or_not = train.draw_noise
def limit_files(step, *args, **options):
    if step in (3, 7):
        assert os.listdir(train.RUN_DIR + "/checkpoints") == ["step_0000002"]
        limit = 10**6 if step == 3 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return signal_or_not(step, *args, **options)
train.draw_noise = limit_files
"""


@pytest.mark.parametrize("processes", [None, TWO])
def test_out_of_disk_the_run_goes_on_says_so_and_the_older_checkpoint_stays(run_process, tmp_path, processes):
    constants = dict(processes=processes, STEPS=8, KEEP_EVERY=2)
    full = run_process(tmp_path / "run", extra=FULL_DISK, **constants)
    assert full.returncode == 0, full.stderr
    for step in (4, 6):
        assert full.stdout.count(f"step {step}: checkpoint not written") == 1
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_0000002", "step_0000008"]
    assert run_process(tmp_path / "whole", **constants).returncode == 0
    assert_same_state(final_state(tmp_path / "run", 8), final_state(tmp_path / "whole", 8))


def test_a_run_whose_last_checkpoint_finds_no_room_ends_with_an_error(small_run, capsys):
    run = small_run(STEPS=2)
    train.main()
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    small_run(STEPS=4)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, unlimited[1]))
    try:
        with pytest.raises(OSError, match="step 4: checkpoint not written .* make room in .* it resumes from the "
                                          "checkpoint"):
            train.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert before == {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    train.main()  # room again
    assert "phase I from step 2" in capsys.readouterr().out


def test_a_run_folder_that_not_all_nodes_see_is_refused(run_process, tmp_path):
    ended = run_process(tmp_path / "run", processes=2, extra="train.RUN_DIR += os.environ['RANK']")
    assert (ended.returncode != 0
            and "rank 1 does not see what rank 0 wrote there; put RUN_DIR on a disk" in ended.stderr)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(run_process, tmp_path):
    constants = dict(processes=2, STEPS=60, ALIGN_STEPS=30, WORKERS=1, LOG_EVERY=5)
    assert run_process(tmp_path / "whole", **constants).returncode == 0
    moments = random.Random(0)
    for kill in range(20):
        extra = f"import threading; threading.Timer({moments.uniform(0, 4)}, os.kill, (os.getpid(), 9)).start()"
        killed = run_process(tmp_path / "killed", extra=extra, **constants)
        done = (tmp_path / "killed/checkpoints/step_0000060").exists()
        assert done or killed.returncode != 0, kill
    assert run_process(tmp_path / "killed", **constants).returncode == 0
    assert_same_state(final_state(tmp_path / "whole", 60), final_state(tmp_path / "killed", 60))


def poisoned_data(latents_dir, folder, poisoned):
    """A copy of the data set in which the given latents are not finite."""
    shutil.copytree(latents_dir, folder)
    np.load(folder / "latents.npy", mmap_mode="r+")[poisoned] = np.nan
    return str(folder)


def test_a_loss_that_is_not_finite_skips_its_step(small_run, latents_dir, tmp_path):
    victim = train.permutation(0, 0, 200)[2 * 8 + 5]  # in the batch of step 2
    data = poisoned_data(latents_dir, tmp_path / "d", [victim])
    run = small_run(DATA_DIR=data, STEPS=4, CHECKPOINT_EVERY=1, LOG_EVERY=4)
    train.main()
    before, after = final_state(run, 2), final_state(run, 3)
    assert_same_state(before["model"], after["model"])
    assert_same_state(before["optimizer"], after["optimizer"])
    assert not torch.equal(after["model"]["final_layer.linear.weight"],
                           final_state(run, 4)["model"]["final_layer.linear.weight"])
    (row,) = read_log(run)
    assert row["skipped"] == "1" and np.isfinite(float(row["denoising_loss"]))
    (_, *by_time), = read_losses(run)
    assert all(loss is None or np.isfinite(loss) for loss in by_time)
    shutil.rmtree(run / "checkpoints/step_0000004")
    train.main()  # resumed, it has the losses since then
    (_, *of_one_step), = read_losses(run)
    assert sum(loss is None for loss in of_one_step) > sum(loss is None for loss in by_time)


@pytest.mark.slow
def test_two_processes_skip_a_step_and_end_phase_one_alike(run_process, latents_dir, tmp_path):
    victim = train.permutation(0, 0, 200)[2 * 8 + 5]  # the second process has it, in step 2
    constants = dict(DATA_DIR=poisoned_data(latents_dir, tmp_path / "d", [victim]), TRIGGER="conflict", CONFLICT_FROM=4,
                     CONFLICT_EVERY=4, CONFLICT_IMAGES=8, CONFLICT_BELOW=1.0, ALIGN_STEPS=100, CHECKPOINT_EVERY=1)
    both = run_process(tmp_path / "run", processes=2, STEPS=5, KEEP_EVERY=1, LOG_EVERY=5, **constants)
    assert both.returncode == 0 and "step 4: phase II" in both.stdout, both.stderr
    before, after = final_state(tmp_path / "run", 2), final_state(tmp_path / "run", 3)
    assert_same_state(before["model"], after["model"])
    assert_same_state(before["optimizer"], after["optimizer"])
    assert read_log(tmp_path / "run")[0]["skipped"] == "1"
    alone = run_process(tmp_path / "run", STEPS=6, **constants)
    assert alone.returncode == 0 and "phase II from step 5" in alone.stdout  # the decision is in the checkpoint


def test_too_many_skipped_steps_in_a_row_stop_the_run(small_run, latents_dir, tmp_path):
    data = poisoned_data(latents_dir, tmp_path / "d", train.permutation(0, 0, 200)[5 * 8 : 9 * 8 : 8])  # steps 5..8
    run = small_run(DATA_DIR=data, MAX_SKIPPED=3, LOG_EVERY=10, STEPS=20, CHECKPOINT_EVERY=5)
    with pytest.raises(FloatingPointError, match="step 10: the loss was not finite in 4 steps in a row"):
        train.main()
    assert (run / "checkpoints/step_0000005").exists()


def test_conflict_trigger_ends_phase_one_once(small_run, capsys):
    run = small_run(TRIGGER="conflict", ALIGN_STEPS=100, CONFLICT_FROM=2, CONFLICT_EVERY=2, CONFLICT_IMAGES=20,
                    CONFLICT_BELOW=1.0)
    train.main()
    text = capsys.readouterr().out
    assert "step 2: gradient cosine" in text and "step 2: phase II" in text and text.count("gradient cosine") == 1
    assert [row["phase"] for row in read_log(run)] == ["2"] * 4
    small_run(RUN_DIR=str(run) + "2", TRIGGER="conflict", CONFLICT_FROM=2, CONFLICT_EVERY=2, CONFLICT_IMAGES=20,
              CONFLICT_BELOW=-1.0)
    train.main()  # never in conflict: ALIGN_STEPS ends it
    assert [row["phase"] for row in read_log(train.RUN_DIR)] == ["1", "1", "2", "2"]


def test_every_epoch_is_a_fresh_permutation_and_every_rank_takes_its_part(monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 8)
    order = np.concatenate([train.batch_indices(step, 20, 0, 1) for step in range(5)])  # two epochs of 20 in 5 batches
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and not np.array_equal(order[:20], order[20:])
    for step in range(5):
        parts = np.concatenate([train.batch_indices(step, 20, rank, 4) for rank in range(4)])
        assert np.array_equal(parts, order[step * 8 : step * 8 + 8])
    noise = train.draw_noise(3, (2, 4, 4), 0, 1, "cpu")
    parts = [train.draw_noise(3, (2, 4, 4), rank, 4, "cpu") for rank in range(4)]
    for i in range(4):
        assert torch.equal(noise[i], torch.cat([part[i] for part in parts]))
    assert not torch.equal(noise[1], train.draw_noise(4, (2, 4, 4), 0, 1, "cpu")[1])


def test_mirroring_turns_half_of_the_images_alike_for_any_number_of_ranks(monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 400)
    plain = train.batch_indices(2, 1000, 0, 1)
    monkeypatch.setattr(train, "MIRROR", True)
    mirrored = train.batch_indices(2, 1000, 0, 1)
    assert np.array_equal(mirrored % 1000, plain) and (mirrored >= 1000).mean() == pytest.approx(0.5, abs=0.1)
    assert np.array_equal(np.concatenate([train.batch_indices(2, 1000, rank, 4) for rank in range(4)]), mirrored)


def test_mirroring_without_mirrored_latents_is_refused(small_run, latents_dir):
    run = small_run(DATA_DIR=str(latents_dir), MIRROR=True)
    with pytest.raises(ValueError, match="holds no latents of mirrored images; prepare it again with"):
        train.main()
    assert not run.exists()


def test_labels_are_dropped_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(train, "BATCH_SIZE", 10_000)
    *_, t, drop = train.draw_noise(0, (1, 1, 1), 0, 1, "cpu")
    assert (drop < 0.1).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_train_to_the_same_bits_as_when_they_were_stored_in_float16(mode, small_run, tmp_path, monkeypatch):
    """A new folder, one of an earlier version, and float16 pixels read as such: means without a deviation."""
    sheet = Image.open(ROOT / "data/fashion_mnist_test.png").crop((0, 0, 20 * 28, 10 * 28))
    rgb = Image.merge("RGB", (sheet, sheet.rotate(180), sheet.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    (rgb if mode == "RGB" else sheet).save(tmp_path / "sheet.png")
    new, old, means = (tmp_path / name for name in ("new", "old", "means"))
    set_constants(monkeypatch, prepare_latents, SOURCE=str(tmp_path / "sheet.png"), DATA_DIR=str(new), IMAGE_SIZE=28,
                  VAE=None, WORKERS=0)
    prepare_latents.main()
    x = sample_latents(PreparedDataset(new)[np.arange(4)][0], None, None)
    assert x.is_contiguous()  # as float16 lay on the disk: GPUs choose their kernels by it
    with_latents(new, old)
    with_latents(new, means, vae=dict(name="of/tests", scale=1.0))
    states = []
    for folder in (new, old, means):
        small_run(DATA_DIR=str(folder), RUN_DIR=f"{folder}_run", WORKERS=1 if folder is new else 0)
        train.main()
        states.append(final_state(train.RUN_DIR))
    assert_same_state(states[0], states[1])
    assert_same_state(states[0], states[2])


@pytest.mark.parametrize("constants, message", [
    (dict(DATA_DIR="/nowhere"), "/nowhere: no such folder; set DATA_DIR to a prepared data set"),
    (dict(MODEL="SiT-XXL/2"), "unknown MODEL 'SiT-XXL/2'; choose one of SiT-S/1"),
    (dict(MODEL="SiT-S/8", TEACHER="absent.safetensors"),
     r"'SiT-S/8' does not fit the pixels of .*, \(1, 28, 28\); its patch must divide the side"),
    (dict(PATH="straight"), "unknown PATH 'straight'"),
    (dict(TRIGGER="moon"), "unknown TRIGGER 'moon'"),
    (dict(BATCH_SIZE=9, MICRO_BATCHES=2),
     "BATCH_SIZE 9 does not divide among 1 processes times 2 MICRO_BATCHES; the nearest that does is 8"),
    (dict(LAYER_PAIRS=[(6, 2)]),
     r"LAYER_PAIRS \[\(6, 2\)\]: a list of .student, teacher. layers, the student's in 0\.\.5"),
    (dict(LAYER_PAIRS=[(1, 4)]), r"teacher layers \[4\] must lie in 0\.\.3; change LAYER_PAIRS"),
    (dict(ALIGN_DEPTH=7), r"ALIGN_DEPTH 7 is not one of SiT-T/4's blocks 1\.\.6"),
    (dict(ALIGN_DEPTH=8, FEATURE_WEIGHT=0), "ALIGN_DEPTH 8 is not one of"),
    (dict(STEPS=-1), "STEPS = -1; allowed: whole number from 0"),
    (dict(STEPS=1.5), "STEPS = 1.5; allowed: whole number from 0"),
    (dict(MICRO_BATCHES=0), "MICRO_BATCHES = 0; allowed: whole number from 1"),
    (dict(LEARNING_RATE="1e-4"), "LEARNING_RATE = '1e-4'; allowed: number from 0"),
    (dict(LABEL_DROPOUT=10), "LABEL_DROPOUT = 10; allowed: number from 0 to 1"),
    (dict(COMPILE="no"), "COMPILE = 'no'; allowed: True or False"),
    (dict(CONFLICT_TIMES=(0.5, 20)), "CONFLICT_TIMES = .*allowed: numbers from 0 to 1"),
    (dict(PREVIEW_GRID=8), "PREVIEW_GRID = 8; allowed: two whole numbers from 1"),
    (dict(LAYER_PAIRS=[4, 5]), "a list of .student, teacher. layers"),
    (dict(TEACHER="absent.safetensors"), "absent.safetensors: no such file"),
    (dict(TEACHER="resnet18"), "'resnet18' could not be fetched"),
    (dict(TRACKER="abacus"), "unknown TRACKER 'abacus'"),
    (dict(TRIGGER="conflict"), "TRIGGER 'conflict' measures the gradients' cosine; set CONFLICT_EVERY"),
    (dict(TIMES="normal"), r"TIMES 'normal': \"uniform\", or \(mean, std\) of a logit-normal, std above 0"),
    (dict(TIMES=(0.8, 0)), r"TIMES \(0.8, 0\): "), (dict(TIMES=(0.8, 0.8, 1)), "TIMES "),
    (dict(TIMES=("a", 1)), "TIMES "),
    (dict(TIME_SHIFT=0), "TIME_SHIFT = 0; allowed: number above 0"),
    (dict(NOISE_SCALE=-1), "NOISE_SCALE = -1; allowed: number above 0"),
    (dict(WARMUP_STEPS=0.5), "WARMUP_STEPS = 0.5; allowed: whole number from 0"),
    (dict(PROJECTOR="linear"), "unknown PROJECTOR 'linear'; choose one of mlp, conv"),
    (dict(SPATIAL_NORM=True), "SPATIAL_NORM = True; allowed: number from 0"),
    (dict(MODEL="JiT-T/4"), r"'JiT-T/4' predicts images, .*; set PATH to 'linear', and TIMES to JiT's \(0.8, 0.8\)"),
    (dict(MODEL="JiT-T/4", TIMES=(0.8, 0.8), PATH="cosine"), "'JiT-T/4' predicts images"),
    (dict(MODEL="JiT-B/16", TIMES=(0.8, 0.8)), "'JiT-B/16' does not fit the pixels of"),
])
def test_bad_settings_are_refused_before_the_run_folder_is_touched(small_run, constants, message):
    run = small_run(**constants)
    with pytest.raises(ValueError, match=message):
        train.main()
    assert not run.exists()


def test_jit_is_not_trained_on_latents(small_run, data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "latents")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(dict(meta, vae=dict(name="stabilityai/sd-vae-ft-mse", scale=0.18215))))
    run = small_run(DATA_DIR=str(folder), MODEL="JiT-T/4", TIMES=(0.8, 0.8))
    with pytest.raises(ValueError, match="'JiT-T/4' does not fit the latents.* a JiT needs prepare_latents.VAE = None"):
        train.main()
    assert not run.exists()


@pytest.mark.parametrize("constant, first, second", [
    ("PROJECTOR", "mlp", "conv"), ("SPATIAL_NORM", 0.0, 0.6), ("TIMES", "uniform", (0.0, 1.0)),
    ("TIME_SHIFT", 1.0, 2.0), ("NOISE_SCALE", 1.0, 2.0), ("CLASS_WEIGHT", 0.0, 0.03)])
def test_a_run_keeps_what_shapes_it(small_run, constant, first, second):
    """A run of an earlier version, which had none of these settings, is as one with the first value."""
    run = small_run(STEPS=2, **{constant: first})
    train.main()
    progress = run / "checkpoints/step_0000002/progress.json"
    saved = json.loads(progress.read_text())
    for remove in (False, True):
        if remove:
            del saved["settings"][constant]
            progress.write_text(json.dumps(saved))
        small_run(STEPS=3, **{constant: second})
        with pytest.raises(ValueError, match=f"was made with other settings .*{constant} .*set them back"):
            train.main()
    small_run(STEPS=3, **{constant: first})
    train.main()


def test_the_learning_rate_rises_to_its_value(small_run, tmp_path):
    """AdamW's first steps move each weight by the learning rate, whatever its gradient: by 1/3, 2/3 and 3/3 of it."""
    moved = []
    for warmup in (0, 2):
        run = small_run(RUN_DIR=str(tmp_path / str(warmup)), WARMUP_STEPS=warmup, BETAS=(0.0, 0.0), ALIGN_STEPS=0,
                        STEPS=4, CHECKPOINT_EVERY=1, CHECKPOINTS_KEPT=4)
        train.main()
        biases = [final_state(run, step)["model"]["final_layer.linear.bias"] for step in range(1, 5)]
        moved.append([change.abs().median().item() for change in torch.diff(torch.stack(biases), dim=0, prepend=
                                                                            torch.zeros(1, len(biases[0])))])
    assert moved[0] == pytest.approx([1e-3] * 4, rel=0.01)
    assert moved[1] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3], rel=0.01)


VARIANT = dict(MODEL="JiT-T/4", TIMES=(0.8, 0.8), TIME_SHIFT=1.5, NOISE_SCALE=2.0, WARMUP_STEPS=5, PROJECTOR="conv",
               SPATIAL_NORM=0.6, CONFLICT_FROM=4, CONFLICT_EVERY=4, CONFLICT_IMAGES=16, PREVIEW_EVERY=12,
               PREVIEW_GRID=(2, 2), PREVIEW_STEPS=2, MIRROR=True)


@pytest.mark.slow
def test_jit_trains_through_the_switch_and_resumes_bit_exact_after_a_kill(run_process, tmp_path, monkeypatch):
    dropout = "from model import MODELS; MODELS['JiT-T/4']['dropout'] = 0.2"
    for folder, kills in (("whole", ()), ("killed", (5,))):
        for at in kills:
            assert (run_process(tmp_path / folder, signal.SIGKILL, at, extra=dropout, **VARIANT).returncode
                    == -signal.SIGKILL)
        ended = run_process(tmp_path / folder, extra=dropout, **VARIANT)
        assert ended.returncode == 0 and (tmp_path / folder / "previews/step_0000012.png").exists(), ended.stderr
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
    log = read_log(tmp_path / "whole")
    assert all(np.isfinite(float(row["denoising_loss"])) for row in log) and float(log[0]["attention_loss"]) > 1

    for name, value in dict(RUN_DIR=str(tmp_path / "whole"), NUM_SAMPLES=3, STEPS=2, MODE="ode", GRID=None).items():
        monkeypatch.setattr(sample, name, value)
    sample.main()
    with np.load(tmp_path / "whole/samples/samples.npz") as file:
        assert file["arr_0"].shape == (3, 28, 28, 3)
    monkeypatch.setattr(sample, "MODE", "sde")
    with pytest.raises(ValueError, match="MODE 'sde' knows noise of scale 1 alone, .* has 2.0; set it to 'ode'"):
        sample.main()


@pytest.mark.slow
def test_two_processes_train_jit_alike(run_process, tmp_path):
    for folder, processes in (("one", None), ("two", 2)):
        ended = run_process(tmp_path / folder, processes=processes, LOG_EVERY=1, **VARIANT)
        assert ended.returncode == 0, ended.stderr
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in ("denoising_loss", "feature_loss", "attention_loss", "grad_norm"):
            assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-3), key
    assert_close_models(final_state(tmp_path / "one")["ema"], final_state(tmp_path / "two")["ema"])


def test_steps_below_what_is_done_say_so(small_run, capsys):
    small_run(STEPS=4)
    train.main()
    small_run(STEPS=3)
    train.main()
    assert "step 4: done; raise STEPS to train on" in capsys.readouterr().out


def test_more_steps_than_seven_digits(tmp_path):
    for step in (9_999_999, 10_000_000):
        (tmp_path / f"checkpoints/step_{step:07d}").mkdir(parents=True)
    (tmp_path / "checkpoints/step_10000001.tmp").mkdir()
    assert [path.name for path in checkpoint.finished(tmp_path)] == ["step_9999999", "step_10000000"]


def test_nothing_of_others_is_removed(small_run):
    run = small_run(STEPS=2)
    for name in ("thesis.tmp/chapter.tex", "config.tmpl.yaml", "other/checkpoints/step_0000400.tmp/shard",
                 "checkpoints/notes.tmp/x"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("precious")
    (run / "checkpoints/step_0000400.tmp").mkdir()  # what a killed run was writing
    train.main()
    assert len([path for path in run.rglob("*")
                if path.is_file() and path.read_text(errors="ignore") == "precious"]) == 4
    assert not (run / "checkpoints/step_0000400.tmp").exists()


def test_a_teacher_under_another_spelling_is_the_same(small_run, teacher_file, monkeypatch):
    monkeypatch.chdir(teacher_file.parent)
    small_run(STEPS=2, TEACHER=teacher_file.name)
    train.main()
    small_run(STEPS=4, TEACHER=f"./{teacher_file.name}")
    train.main()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_whoever_reads_it(small_run, data_dir, tmp_path, workers):
    folder = shutil.copytree(data_dir, tmp_path / "damaged")
    offsets, packed = np.load(folder / "image_offsets.npy"), bytearray((folder / "images.bin").read_bytes())
    for at in offsets[:-1]:
        packed[at : at + 8] = b"garbage!"
    (folder / "images.bin").write_bytes(packed)
    small_run(DATA_DIR=str(folder), WORKERS=workers)
    with pytest.raises(ValueError, match=r"^[^\n]*images.bin: image \d+ is damaged [^\n]*$"):
        train.main()


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_readmes_experiment_needs_no_guard_where_pythons_default_is_not_to_fork(run_process, tmp_path, method):
    extra = f"import multiprocessing; multiprocessing.set_start_method({method!r}, force=True)"
    ended = run_process(tmp_path / "run", extra=extra, WORKERS=2, STEPS=2)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr


WANDB = """
import os
def init(**settings):
    print("WANDB", settings["id"], set(settings["id"]) <= set("0123456789abcdef"))
    if os.environ.get("NO_KEY"):
        raise KeyError("No API key configured")
    return type("Run", (), dict(step=int(os.environ.get("STEP", 0))))
def log(values, step):
    print("LOGGED", step, *("PICTURE" for value in values.values() if isinstance(value, Image)))
class Image:
    def __init__(self, path):
        assert open(path, "rb").read(4) == b"\\x89PNG"
"""


def stand_in_for_wandb(text, tmp_path, monkeypatch):
    (tmp_path / "site/wandb").mkdir(parents=True)
    (tmp_path / "site/wandb/__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_wandb(small_run, monkeypatch, tmp_path, capsys):
    """By a stand-in for the package: its errors in one line, an id by the folder's place, no step twice."""
    stand_in_for_wandb(WANDB, tmp_path, monkeypatch)
    for name in ("lr=1; a/base", "b/base"):
        small_run(TRACKER="wandb", STEPS=3, RUN_DIR=str(tmp_path / name))
        train.main()
    said = re.findall("WANDB (.*)", capsys.readouterr().out)
    assert len(set(said)) == 2 and all(line.endswith("True") for line in said)
    monkeypatch.setenv("STEP", "9")
    small_run(TRACKER="wandb", STEPS=12, PREVIEW_EVERY=6, PREVIEW_GRID=(2, 2), PREVIEW_STEPS=1)
    train.main()
    assert re.findall("LOGGED (.*)", capsys.readouterr().out) == ["9", "12", "12 PICTURE"]
    monkeypatch.setenv("NO_KEY", "1")
    small_run(TRACKER="wandb", RUN_DIR=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="TRACKER 'wandb': .*No API key configured.*set it to None"):
        train.main()
    shutil.rmtree(tmp_path / "site/wandb")
    (tmp_path / "site/wandb").mkdir()  # a folder of that name is no package
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="package not installed; pip install wandb"):
        train.main()


def test_half_written_data_set_is_refused(small_run, latents_dir, tmp_path):
    folder = copy_without_images(latents_dir, tmp_path / "d")
    small_run(DATA_DIR=folder)
    with pytest.raises(ValueError, match="images.bin: 0 bytes, meta.json says"):
        train.main()
    Path(folder, "meta.json").unlink()
    with pytest.raises(ValueError, match="no meta.json, so this is not a finished data set; run prepare_latents.py "
                                         "again"):
        train.main()


def test_a_damaged_checkpoint_is_named_and_nothing_is_touched(small_run):
    run = small_run(STEPS=4)
    train.main()
    newest = run / "checkpoints/step_0000004"
    for name, size in (("__0_0.distcp", 10_000), (".metadata", 1000), ("progress.json", 300), ("progress.json", 0)):
        file, intact = newest / name, (newest / name).read_bytes()
        file.write_bytes(intact[:size])
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match="step_0000004: damaged checkpoint .* delete it to resume from the one "
                                             "before"):
            train.main()
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        file.write_bytes(intact)
    shutil.rmtree(newest)
    train.main()
    assert newest.exists()


def test_other_settings_or_data_are_refused_on_resume(small_run, data_dir, tmp_path):
    small_run(STEPS=2)
    train.main()
    small_run(STEPS=4, SEED=1)
    with pytest.raises(ValueError, match=r"made with other settings \(SEED 0, now 1\); set them back, or choose "
                                         r"another"):
        train.main()
    folder = tmp_path / "fewer"
    folder.mkdir()
    for path in data_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    meta = json.loads((folder / "meta.json").read_text())
    meta["classes"].append("hat")
    (folder / "meta.json").write_text(json.dumps(meta))
    small_run(STEPS=4, DATA_DIR=str(folder))
    with pytest.raises(ValueError, match=r"other settings \(SEED 0, now 1; the data's classes \['T-shirt/top'"):
        train.main()
    small_run(STEPS=4, LEARNING_RATE=1e-5, SEED=0)  # may change in mid-run, and takes effect
    train.main()
    before, after = (final_state(train.RUN_DIR, step)["model"] for step in (2, 4))
    assert 0 < max((after[name] - before[name]).abs().max() for name in before) < 1e-4


def test_tensorboard_gets_the_log(small_run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = small_run(TRACKER="tensorboard", STEPS=6, PREVIEW_EVERY=6, PREVIEW_GRID=(2, 2), PREVIEW_STEPS=1)
    train.main()
    shutil.rmtree(run / "checkpoints/step_0000006")  # as if killed before it: steps 5 and 6 are made again
    train.main()
    loaded = EventAccumulator(str(run)).Reload()
    (picture,) = loaded.Images("preview")
    assert picture.step == 6
    assert np.array_equal(Image.open(io.BytesIO(picture.encoded_image_string)),
                          Image.open(run / "previews/step_0000006.png").convert("RGB"))
    events = loaded.Scalars("denoising_loss")
    assert [event.step for event in events] == [3, 6]
    logged = {event.step: event.value for event in events}
    assert logged == {int(row["step"]): pytest.approx(float(row["denoising_loss"])) for row in read_log(run)}


def test_preview_samples_the_ema_not_the_model(small_run):
    from PIL import Image
    run = small_run(STEPS=2, PREVIEW_EVERY=2, PREVIEW_STEPS=3, PREVIEW_GRID=(2, 2))
    train.main()
    model, _ = sample.load_model(run / "ema.safetensors")
    noise, y = sample.IndexedNoise(0, range(4)).draw((1, 28, 28)), torch.tensor([0, 0, 9, 9])
    latents = torch.cat([sample.sample_ode(lambda x, t, y: model(x, t, y)[0], noise[i : i + 2], y[i : i + 2], steps=3,
                                           null=10) for i in (0, 2)])
    sample.save_grid(sample.to_bytes(latents), 2, run / "expected.png")
    preview, expected = (np.asarray(Image.open(path)).astype(int)
                         for path in (run / "previews/step_0000002.png", run / "expected.png"))
    assert preview.shape == (56, 56, 3) and np.abs(preview - expected).max() <= 1


@pytest.mark.gpu
def test_loop_runs_on_a_gpu_in_bf16_and_compiled(small_run):
    run = small_run(COMPILE=True, BATCH_SIZE=64)
    train.main()
    log = read_log(run)
    assert float(log[3]["denoising_loss"]) < float(log[0]["denoising_loss"])
    assert "torch.bfloat16" in (run / "log.txt").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_the_loop_waits_for_the_gpu_only_to_log(small_run, monkeypatch, compile):
    waits, draw_noise = {}, train.draw_noise
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def watch(step, *args, **options):
            torch.cuda.set_sync_debug_mode("warn")
            waits[step] = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
            return draw_noise(step, *args, **options)

        monkeypatch.setattr(train, "draw_noise", watch)
        small_run(COMPILE=compile, STEPS=24, ALIGN_STEPS=12, LOG_EVERY=6, CHECKPOINT_EVERY=100, WORKERS=2)
        train.main()
        torch.cuda.set_sync_debug_mode("default")
    for steps in (range(7, 12), range(19, 24)):  # in each phase, between two log lines, when all is compiled
        assert waits[steps[0]] == waits[steps[-1]]


# ---- identity is content; what does nothing is said; what is open is closed


def test_a_run_goes_on_where_data_and_teacher_were_moved(small_run, data_dir, teacher_file, tmp_path):
    shutil.copyfile(teacher_file, tmp_path / "teacher.safetensors")
    shutil.copytree(data_dir, tmp_path / "data")
    small_run(STEPS=2, TEACHER=str(tmp_path / "teacher.safetensors"), DATA_DIR=str(tmp_path / "data"))
    train.main()
    (tmp_path / "teacher.safetensors").rename(tmp_path / "elsewhere.safetensors")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    (tmp_path / "data/meta.json").write_text(json.dumps(dict(meta, source="/another/disk/sheet.png")))
    (tmp_path / "data").rename(tmp_path / "moved")
    small_run(STEPS=4, TEACHER=str(tmp_path / "elsewhere.safetensors"), DATA_DIR=str(tmp_path / "moved"))
    train.main()
    assert read_log(tmp_path / "run")[-1]["step"] == "4"


def test_a_teacher_of_the_same_name_and_other_weights_is_refused(small_run, teacher_file, tmp_path):
    place = shutil.copyfile(teacher_file, tmp_path / "teacher.safetensors")
    small_run(STEPS=2, TEACHER=str(place))
    train.main()
    with safe_open(place, "pt") as file:
        header, state = file.metadata(), {key: file.get_tensor(key) + 1 for key in file.keys()}
    save_file(state, place, metadata=header)
    small_run(STEPS=4, TEACHER=str(place))
    with pytest.raises(ValueError, match=r"was made with other settings \(TEACHER "):
        train.main()


def test_a_network_that_changed_under_its_name_is_refused_and_not_called_damaged(small_run, monkeypatch):
    small_run(STEPS=2)
    train.main()
    monkeypatch.setitem(train.MODELS, "SiT-T/4", dict(train.MODELS["SiT-T/4"], hidden_size=64))
    small_run(STEPS=4)
    with pytest.raises(ValueError, match=r"other settings \(the network's hidden_size 128, now 64\); set them back"):
        train.main()


def test_raising_align_steps_after_phase_one_is_said(small_run, capsys):
    small_run(STEPS=8)
    train.main()
    said = capsys.readouterr().out
    assert "changes nothing" not in said and "STEPS 8: EMA_DECAY 0.9 averages over more steps" in said
    small_run(STEPS=10)
    train.main()
    assert "changes nothing" not in capsys.readouterr().out
    small_run(STEPS=12, ALIGN_STEPS=20)
    train.main()
    assert "phase I has ended before step 10, for good: ALIGN_STEPS 20 changes nothing" in capsys.readouterr().out


ACTIVE_WANDB = """
import os
active = None
class Run:
    def __init__(self, settings):
        self.id, self.step = settings["id"], 0
        print("PROJECT", settings["project"], settings["name"])
    def log(self, values, step):
        print("LOGGED", self.id, step)
    def finish(self):
        global active
        active = None
        print("FINISHED", self.id)
def init(**settings):
    global active
    active = active or Run(settings)
    return active
def log(values, step):
    active.log(values, step)
"""


def test_each_run_has_a_wandb_run_of_its_own_that_ends_with_it(small_run, monkeypatch, tmp_path, capsys):
    """By a stand-in for the package, in which init() gives the run that is active, as wandb's does."""
    stand_in_for_wandb(ACTIVE_WANDB, tmp_path, monkeypatch)
    for name in ("first", "second"):
        small_run(TRACKER="wandb", STEPS=3, ALIGN_STEPS=0, RUN_DIR=str(tmp_path / name))
        train.main()
        monkeypatch.setenv("WANDB_PROJECT", "thesis")
        monkeypatch.setenv("WANDB_NAME", "mine")
    said = capsys.readouterr().out
    assert re.findall("PROJECT (.*)", said) == ["nanohaste first", "thesis mine"]
    assert len(set(re.findall("LOGGED (.*) 3", said))) == 2 == len(set(re.findall("FINISHED (.*)", said)))
    small_run(TRACKER="wandb", RUN_DIR=str(tmp_path / "third"), MAX_SKIPPED=1, LOG_EVERY=1, LEARNING_RATE=1e30)
    with pytest.raises(FloatingPointError):
        train.main()
    assert "FINISHED" in capsys.readouterr().out  # however it ends


def test_the_run_keeps_the_file_that_ran_and_its_ema_no_path(small_run, tmp_path, monkeypatch):
    copy = tmp_path / "train_mine.py"
    text = (ROOT / "train.py").read_text().replace('"""Trains', '"""My own: trains')
    copy.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("train_mine")
    run = small_run(STEPS=2, ALIGN_STEPS=0)
    set_constants(monkeypatch, mine, **{name: getattr(train, name) for name in small_constants("", "", "")})
    mine.main()
    assert (run / "train_mine.py").read_text() == text and not (run / "train.py").exists()
    with safe_open(run / "ema.safetensors", "pt") as file:
        settings = file.metadata()["settings"]
    assert str(tmp_path) not in settings and json.loads(settings)["RUN_DIR"] == "run"
    assert load_model(run)[1]["RUN_DIR"] == str(run)  # which beside the run is still known


def test_a_checkpoint_that_is_in_place_is_not_called_unwritten(small_run, monkeypatch, capsys):
    def fail(path, *_, **__):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(runtime.shutil, "rmtree", fail)
    run = small_run(STEPS=4, ALIGN_STEPS=0, CHECKPOINTS_KEPT=1)
    train.main()
    said = capsys.readouterr().out
    assert "not written" not in said and "step_0000002: could not be removed (Directory not empty), and may be" in said
    assert (run / "checkpoints/step_0000004/ema.safetensors").exists()


def test_a_full_disk_is_called_so(small_run, monkeypatch, capsys):
    def fail(*_, **__):
        raise CheckpointException("enforce fail at inline_container.cc", {})

    monkeypatch.setattr(checkpoint.dcp, "save", fail)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    small_run(STEPS=2, ALIGN_STEPS=0)
    with pytest.raises(OSError, match="checkpoint not written .the disk is full: 0 MiB are free.; make room"):
        train.main()


def test_large_noise_is_drawn_by_those_who_need_it_alike_for_any_number(monkeypatch):
    set_constants(monkeypatch, train, BATCH_SIZE=48, NOISE_SCALE=2.0)
    shape, drawn = (3, 256, 256), []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: drawn.append(size[0]) or randn(*size, **options))
    posterior, noise, *uniform = train.draw_noise(3, shape, 0, 1, "cpu", 1, True)
    assert posterior is None and noise.shape == (48, *shape) and noise.std().item() == pytest.approx(2, abs=0.01)
    for world in (2, 3, 8):
        drawn.clear()
        parts = [train.draw_noise(3, shape, rank, world, "cpu", 1, True) for rank in range(world)]
        assert torch.equal(torch.cat([part[1] for part in parts]), noise) and set(drawn) == {16}
        assert len(drawn) <= 2 * 48 / 16 + world  # blocks of 16, few of them twice
        assert all(torch.equal(torch.cat([part[2 + i] for part in parts]), uniform[i]) for i in (0, 1))
    assert not torch.equal(noise[:16], noise[16:32])
    assert train.draw_noise(3, shape, 0, 48, "cpu")[0] is not None  # latents: as ever


def test_many_runs_in_one_process_each_compile_as_the_first_did(small_run, monkeypatch, tmp_path):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, **{**options, "backend": "eager"}))
    for batch in range(1, 11):  # PyTorch compiles a function 8 times
        small_run(RUN_DIR=str(tmp_path / str(batch)), BATCH_SIZE=batch, STEPS=1, ALIGN_STEPS=0, COMPILE=True)
        train.main()
    assert (tmp_path / "10/ema.safetensors").exists()
