"""Ctrl-C, SIGTERM and SIGUSR1: a stop ends the whole program in one line, whichever script's main() it meets."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, set_constants

import fid
import prepare_latents
import sample


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
    before = [signal.getsignal(each) for each in prepare_latents.STOP_SIGNALS]
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert "stopped; the same command goes on" in line
    assert [signal.getsignal(each) for each in prepare_latents.STOP_SIGNALS] == before


def test_a_second_stop_ends_at_once(tmp_path):
    """Where the first is only noted, as in train.py's loop, which saves before it ends."""
    script = """
import os, signal, prepare_latents
@prepare_latents.ends_in_one_line
def main():
    signals = prepare_latents.collect_stops()
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
import compare, late, prepare_latents
if __name__ == "__main__":
    compare.SOURCE, compare.OUT = "data/fashion_mnist_test.png", sys.argv[1]
    compare.RESULTS = Path(sys.argv[1], "rows.csv")
    compare.SEEDS, compare.STEPS, compare.STOPS, compare.STUDENT = (7,), (20_000,), (10,), late.STUDENT
    compare.RUNS = {name: dict(late.LAYERS, **changes) for name, changes in
                    dict(plain=dict(ALIGN_STEPS=0), aligned={}).items()}
    prepare_latents.run_script(compare.main)
    print("went on")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, status, whole_group", [(signal.SIGINT, 130, True), (signal.SIGTERM, 0, False)])
def test_a_stopped_comparison_saves_its_runs_and_starts_no_other(tmp_path, number, status, whole_group):
    (tmp_path / "comparison.py").write_text(COMPARISON)
    process = subprocess.Popen([sys.executable, tmp_path / "comparison.py", tmp_path / "out"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'experiments'}"})
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
