"""runtime.py: stops and errors that end in one line, whichever script's main() they meet; locks; processes that are
joined more than once."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import fid
import prepare_latents
import runtime
import sample
import train
from runtime import STOP_SIGNALS
from tests.conftest import ROOT, set_constants

# ---- stops


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
@pytest.mark.parametrize("script, function, constants", [
    (prepare_latents, "open_source", dict(SOURCE="anything")), (fid, "open_images", {}), (sample, "Sampler", {})])
def test_a_stop_leaves_main_for_good(script, function, constants, number, status, monkeypatch, tmp_path, capsys):
    def stop(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)
        pytest.fail("it went on")

    monkeypatch.chdir(tmp_path)
    set_constants(monkeypatch, script, **constants)
    monkeypatch.setattr(script, function, stop)
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped; the same command goes on" in line
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_a_second_stop_ends_at_once(tmp_path):
    """Where the first is only noted, as in train.py's loop, which saves before it ends."""
    script = """
import os, signal
from runtime import collect_stops, ends_in_one_line
@ends_in_one_line
def main():
    signals = collect_stops()
    os.kill(os.getpid(), signal.SIGINT)
    print("first", signals, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("second", flush=True)
main()
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT and ended.stdout == "first [2]\n" and not ended.stderr


COMPARISON = """
import sys
from pathlib import Path
from experiments import compare, late
from runtime import run_script
compare.SOURCE, compare.OUT = "data/fashion_mnist_test.png", sys.argv[1]
compare.RESULTS = Path(sys.argv[1], "rows.csv")
compare.SEEDS, compare.STEPS, compare.STOPS, compare.STUDENT = (7,), (20_000,), (10,), late.STUDENT
compare.RUNS = {name: dict(late.LAYERS, **changes) for name, changes in
                dict(plain=dict(ALIGN_STEPS=0), aligned={}).items()}
run_script(compare.main)
print("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, status, whole_group", [(signal.SIGINT, 130, True), (signal.SIGTERM, 0, False)])
def test_a_stopped_comparison_saves_its_runs_and_starts_no_other(tmp_path, number, status, whole_group):
    process = subprocess.Popen([sys.executable, "-c", COMPARISON, tmp_path / "out"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    outputs = [tmp_path / "out" / run / "7/output.txt" for run in ("plain", "aligned")]
    deadline = time.time() + 120
    while not all(path.exists() and "estimate" in path.read_text() for path in outputs) and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(2)  # in their loops
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "went on" not in out and "Traceback" not in err, err
    for path in outputs:
        assert "stopped by a signal and saved" in path.read_text()
        assert len(list(path.parent.glob("checkpoints/step_*[0-9]"))) == 1
    assert not (tmp_path / "out/stopped at 10").exists()


# ---- errors


@pytest.mark.parametrize("error, remedy", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
     "GPU's memory is full; set a smaller BATCH"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "set fewer WORKERS, or 0"),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "no room in /dev/shm"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "install one, or set COMPILE = False"),
])
def test_what_libraries_raise_becomes_one_line_with_a_remedy(small_run, monkeypatch, error, remedy):
    def fail(*_):
        raise error

    small_run()
    monkeypatch.setattr(train, "compute_losses", fail)
    with pytest.raises(OSError, match=re.escape(remedy)):
        train.main()


def test_our_own_mistakes_keep_their_kind(small_run, monkeypatch):
    small_run()
    monkeypatch.setattr(train, "compute_losses", lambda *_: {}["a mistake"])
    with pytest.raises(KeyError):
        train.main()


def test_scripts_end_bad_input_with_one_line(tmp_path):
    commands = {name: [ROOT / name] for name in ("train.py", "prepare_latents.py", "sample.py", "fid.py")}
    commands["train_network.py"] = ["-m", "experiments.train_network"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = {name: subprocess.Popen([sys.executable, *command], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
                                      env=environment) for name, command in commands.items()}
    for name, process in started.items():  # the constants' data is not there
        _, said = process.communicate()
        assert process.returncode == 1 and said.startswith(f"{name}: "), said
        assert said.count("\n") == 1 and "no such" in said


# ---- locks and processes


def test_a_run_in_which_another_process_works_is_refused(small_run, tmp_path):
    run = small_run(STEPS=4)
    train.main()
    script = f"import pathlib, runtime; lock = runtime.lock_folder(pathlib.Path({str(run)!r}), 'x'); " \
             f"print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    small_run(STEPS=6)
    with pytest.raises(ValueError, match=f"process {other.pid} on .* is at work here; wait for its end, or choose "
                                         "another RUN"):
        train.main()
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other.kill()  # the lock dies with its process
    other.wait()
    train.main()
    assert (run / "checkpoints/step_0000006").exists()


def test_a_folder_at_which_another_process_works_is_refused(tree, prepare, tmp_path):
    (tmp_path / "out/unfinished").mkdir(parents=True)
    script = f"import pathlib, runtime; lock = runtime.lock_folder(pathlib.Path({str(tmp_path)!r}, " \
             f"'out/unfinished'), 'x'); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match=rf"unfinished: process {other.pid} on .* is at work here; wait for its end, "
                                         rf"or choose another DATA_DIR"):
        prepare(SOURCE=str(tree))
    other.kill()
    other.wait()
    assert len(prepare(SOURCE=str(tree))) == 5


@pytest.mark.slow
def test_one_script_prepares_trains_and_draws_in_two_processes(run_process, tmp_path, data_dir):
    """README's own images, under torchrun: every main() joins the processes anew."""
    before = f"""
import prepare_latents as p, sample
p.SOURCE, p.DATA_DIR, p.IMAGE_SIZE = {str(data_dir.parent / "sheet.png")!r}, train.DATA_DIR, 28
p.VAE, p.WORKERS = None, 0
p.main()
"""
    after = """
sample.RUN_DIR, sample.OUT, sample.NUM_SAMPLES, sample.STEPS = train.RUN_DIR, train.RUN_DIR + "/samples", 9, 2
sample.main()
"""
    ended = run_process(tmp_path / "run", processes=2, extra=before, after=after, DATA_DIR=str(tmp_path / "data"))
    assert ended.returncode == 0, ended.stderr
    assert np.load(tmp_path / "run/samples/samples.npz")["arr_0"].shape == (9, 28, 28, 3)


# ---- how processes are started, and what is open


@pytest.mark.parametrize("environment, message", [
    (dict(SLURM_NTASKS="2", SLURM_PROCID="1"), "Slurm has 2 tasks .*torchrun .*HOST:29500 .*, or unset SLURM_NTASKS"),
    (dict(RANK="0", WORLD_SIZE="2"), "RANK is set but LOCAL_RANK is not; start with torchrun")])
def test_processes_that_know_nothing_of_each_other_are_refused(small_run, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run = small_run()
    with pytest.raises(ValueError, match=message):
        train.main()
    assert not run.exists()


def test_torchrun_under_slurm_is_no_srun(monkeypatch):
    for name, value in dict(SLURM_NTASKS="2", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    assert runtime.start_processes()[:2] == (0, 1)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="LOCAL_RANK 1: this machine has 1 GPUs; set --nproc_per_node to so many"):
        runtime.start_processes()


def test_main_runs_in_any_thread(small_run):
    run, raised = small_run(STEPS=2, ALIGN_STEPS=0), []

    def work():
        try:
            train.main()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not raised and (run / "ema.safetensors").exists()


def test_what_main_opens_it_closes_however_it_ends(small_run, tmp_path):
    run = small_run(STEPS=2, ALIGN_STEPS=0)
    for _ in range(2):  # a lock that were still held would refuse the second
        train.main()
    assert not runtime.opened
    runtime.lock_folder(run, "RUN_DIR").close()
    runtime.opened.clear()


def test_a_folder_that_cannot_be_removed_is_a_line(tmp_path, monkeypatch, capsys):
    def fail(_):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(runtime.shutil, "rmtree", fail)
    file = runtime.lock_folder(tmp_path, "OUT")
    runtime.remove_folder(tmp_path)
    assert file.closed and "could not be removed (Directory not empty), and may be deleted" in capsys.readouterr().out


def test_what_cannot_be_closed_is_a_line(capsys):
    def fail():
        raise KeyError("no network")

    runtime.opened["tracker"] = fail
    runtime.close("tracker")
    runtime.close("tracker")
    assert capsys.readouterr().out == "tracker: could not be closed ('no network')\n" and not runtime.opened
