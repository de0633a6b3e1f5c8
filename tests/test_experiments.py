"""experiments/: how they are started, the comparison in short, and what draw.py makes of its rows."""

import csv
import json
import re
import subprocess
import sys
import textwrap
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import demo
import fid
import model
import prepare_latents
import sample
import train
from experiments import (
    attention,
    compare,
    compare_small,
    draw,
    imagenet512,
    irepa,
    jit,
    late,
    minimal,
    release,
    speedrun,
    vavae,
)
from tests.conftest import ROOT, read_log, set_constants, small_constants

MODULES = [path.relative_to(ROOT) for path in (*sorted((ROOT / "experiments").glob("*.py")), ROOT / "tests/bench.py",
                                               ROOT / "tests/gpu.py") if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_started_as_a_file_it_says_how_to_start_it(path):
    ended = subprocess.run([sys.executable, path], cwd=ROOT, text=True, capture_output=True)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 1 and f"python -m {path.parent.name}.{path.stem}" in line and not ended.stdout


def test_compare_in_short(restored, monkeypatch, tmp_path):
    """A run that stops begins as the aligned one and is then, to the bit, what it had been from the start; late.py's
    student and layers."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(model.MODELS, "student", None)  # taken back afterwards
    (tmp_path / "out").mkdir()
    set_constants(monkeypatch, compare, SOURCE=str(ROOT / "data/fashion_mnist_test.png"), OUT=str(tmp_path / "out"),
                  RESULTS=tmp_path / "results.csv", SEEDS=(7,), STEPS=(2, 4), STOPS=(2,), IMAGES=10, PROCESSES=1,
                  STUDENT=late.STUDENT,
                  RUNS={"plain": dict(late.LAYERS, ALIGN_STEPS=0),
                        "aligned": dict(late.LAYERS, CHECKPOINT_EVERY=2, KEEP_EVERY=2)})
    compare.main()
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"]) for row in rows] == [("real images", "")] + [
        (run, step) for run in ("plain", "aligned", "stopped at 2") for step in "24"]
    plain, aligned, stopped = ([row for row in rows if row["run"] == run] for run in ("plain", "aligned",
                                                                                      "stopped at 2"))
    assert {**stopped[0], "run": "aligned"} == aligned[0] and float(stopped[1]["distance"]) > 0
    assert stopped[1]["denoising_loss"] != aligned[1]["denoising_loss"] != plain[1]["denoising_loss"]
    changed = (tmp_path / "results.csv").stat().st_mtime_ns

    compare.settings(tmp_path / "straight", 7, dict(late.LAYERS, ALIGN_STEPS=2, STEPS=4))
    train.main()
    straight, forked = (load_file(folder / "ema.safetensors")
                        for folder in (tmp_path / "straight", tmp_path / "out/stopped at 2/7"))
    assert all((forked[key] == value).all() for key, value in straight.items())

    compare.main()  # again: nothing is trained or judged anew, the same rows are written
    with open(tmp_path / "results.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert (tmp_path / "results.csv").stat().st_mtime_ns > changed


def shrink(monkeypatch, experiment, teacher_file, network, size, **of_train):
    """Lets an experiment's settings() be followed by constants that a test has time for."""
    settings = experiment.settings

    def small_settings():
        settings()
        small = small_constants(prepare_latents.DATA_DIR, teacher_file, train.RUN_DIR)
        for kept in ("STEPS", "ALIGN_STEPS", "CHECKPOINT_EVERY", "DATA_DIR", "RUN_DIR"):
            small.pop(kept)
        for module, constants in {
                prepare_latents: dict(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), IMAGE_SIZE=size, WORKERS=0),
                train: dict(small, MODEL=network, **of_train),
                sample: dict(NUM_SAMPLES=8, STEPS=2, BATCH_SIZE=8, GRID=None),
                fid: dict(FEATURES=str(ROOT / "data/judge.safetensors"), REFERENCE=prepare_latents.DATA_DIR, WORKERS=0)
                }.items():
            set_constants(monkeypatch, module, **constants)

    monkeypatch.setattr(experiment, "settings", small_settings)


def run_parts(monkeypatch, experiment, *parts):
    for part in parts:
        monkeypatch.setattr(sys, "argv", [experiment.__file__, part])
        experiment.main()


def test_the_loop_on_one_screen_is_train_mains(restored, monkeypatch, tmp_path):
    """The same constants, weights, images, noise and order: the same losses through the switch."""
    monkeypatch.chdir(ROOT)
    set_constants(monkeypatch, demo, OUT=str(tmp_path))
    demo.settings()
    prepare_latents.main()
    settings = dict(STEPS=20, ALIGN_STEPS=12)
    set_constants(monkeypatch, train, TIMES="uniform", LOG_EVERY=1, PREVIEW_EVERY=0, CONFLICT_EVERY=0, **settings)
    train.main()
    # weights and draws as train.main's; its pixels are rounded as earlier versions stored them
    set_constants(monkeypatch, minimal, SEED=sample.seed_from(train.SEED, 3), **settings)

    def draws_of_train(count, shape):
        for step in range(minimal.STEPS):
            rows = torch.from_numpy(train.batch_indices(step, count, 0, 1))
            yield rows, *train.draw_noise(step, shape, 0, 1, torch.device("cpu"), of_pixels=True)[1:]

    monkeypatch.setattr(minimal, "draw_steps", draws_of_train)
    x, labels, images = minimal.load_data()
    ema, losses = minimal.train(x.half().float(), labels, images)
    expected = read_log(tmp_path / "run")
    assert [len(each) for each in losses] == [3] * 12 + [1] * 8
    for row, (denoising, *aligned) in zip(expected, losses, strict=True):
        assert denoising == pytest.approx(float(row["denoising_loss"]), rel=1e-4)
        if aligned:
            weighted = float(row["feature_loss"]) / 2, float(row["attention_loss"]) / 2
            assert aligned == pytest.approx(weighted, rel=1e-4)
    kept = load_file(tmp_path / "run/ema.safetensors")
    torch.testing.assert_close({key: ema.state_dict()[key] for key in kept}, kept, rtol=1e-2, atol=1e-4)


def test_all_on_one_screen_in_short(restored, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    set_constants(monkeypatch, minimal, OUT=str(tmp_path / "out"), STEPS=50, ALIGN_STEPS=1, SAMPLE_STEPS=1)
    few = [each[::20] for each in minimal.load_data()]
    monkeypatch.setattr(minimal, "load_data", lambda: few)
    minimal.main()
    assert len((ROOT / "experiments/minimal.py").read_text().splitlines()) <= 100
    assert re.search(r"step 50: losses \[0\.\d+\]\n(.*\n)*distance \d+\.\d{3}; now open", capsys.readouterr().out)
    assert Image.open(tmp_path / "out/samples.png").size == (280, 280)


def test_the_landing_page_shows_the_loop_as_it_is():
    readme, source = ((ROOT / name).read_text() for name in ("README.md", "experiments/minimal.py"))
    loop = readme.partition("```python\nfor step,")[2].partition("```")[0]
    assert loop.count("\n") >= 15 and textwrap.indent(f"for step,{loop}", "    ") in source


@pytest.mark.slow
def test_attention_in_short(restored, monkeypatch, tmp_path):
    """Measures each run at each step, and draws what teacher and students attend to: rows of probabilities."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(model.MODELS, "student", None)  # taken back afterwards
    set_constants(monkeypatch, compare, SOURCE=str(ROOT / "data/fashion_mnist_test.png"), OUT=str(tmp_path / "out"),
                  PROCESSES=1, STUDENT=dict(depth=4), MEASURE=None, SETTINGS=None, COLUMNS=None, FILES=(), RESULTS=None)
    set_constants(monkeypatch, attention, LOSSES=tmp_path / "loss_by_time.csv", STEPS=(4,), IMAGES=20)
    compare.prepare()
    shown = attention.train_runs(compare.OUT, 2, (2, 4), (7,), compare.settings, tmp_path / "attention.csv")
    runs, _ = draw.read(tmp_path / "attention.csv")
    assert list(runs) == ["plain", "features", "aligned", "stopped at 2"]
    found = {run: [rows[7][step] for step in (2, 4)] for run, rows in runs.items()}
    assert found["aligned"][0] | dict(run="stopped at 2") == found["stopped at 2"][0]
    for rows in found.values():
        assert all(float(row["t_0.5"]) > float(row["teacher"]) > 1 for row in rows)
    assert len({rows[1]["t_0.5"] for rows in found.values()}) == 4
    np.testing.assert_allclose(shown["attention"].sum(axis=-1), 1, rtol=1e-5)
    losses = shown["cross_entropy"]
    assert shown["attention"].shape == (4, 5, 49) and (losses[:, 1:] > losses[:, :1]).all()
    for image, patch in zip(shown["images"], shown["patches"]):
        parts = image.reshape(7, 4, 7, 4, 3).astype(float).std(axis=(1, 3)).mean(axis=-1)
        assert parts.flat[patch] == parts.max()
    attention.write_losses()
    losses, _ = draw.read(tmp_path / "loss_by_time.csv")
    row = losses["plain"][7][4]
    assert all(0.1 < float(row[name]) < 3 for name in train.LOGS["loss_by_time.csv"][1:]) and len(losses) == 4


def test_plateau_fires_where_the_reference_says():
    golden = json.loads((ROOT / "tests/golden/plateau.json").read_text())
    decays = golden["meta"]["parameters"]
    for name, series in golden["series"].items():
        residuals = (1 + np.array(series["feature_loss"])) / 2
        fires, averages = release.plateau(residuals, **decays)
        assert fires == series["fires_at"], name
        for step, each in series["averages"].items():
            error = np.abs(averages[:, int(step) - 1] - (each["slow"], each["fast"])).max()
            assert error < golden["meta"]["tolerance"]["averages"]


def test_corrected_averages_are_those_of_what_there_was_alone():
    residuals = np.random.default_rng(0).random(50)
    _, averages = release.plateau(residuals, 0.95, 0.8, 10, corrected=True)
    for step in (1, 7, 50):
        for average, decay in zip(averages, (0.95, 0.8)):
            weights = decay ** np.arange(step)[::-1]
            assert average[step - 1] == pytest.approx((weights * residuals[:step]).sum() / weights.sum())


@pytest.mark.slow
def test_release_in_short(restored, monkeypatch, tmp_path, capsys):
    """Measures each comparison's aligned run at every time, in every block; of finished runs nothing is made anew."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(model.MODELS, "student", None)  # taken back afterwards
    set_constants(monkeypatch, compare, SOURCE=str(ROOT / "data/fashion_mnist_test.png"), SEEDS=(7,), PROCESSES=1)
    layers = dict(late.LAYERS, LOG_EVERY=1, CONFLICT_IMAGES=32)
    set_constants(monkeypatch, release, OUT=str(tmp_path / "out"), RESULTS=tmp_path / "release.csv", TIMES=(0.1, 0.9),
                  COMPARISONS={"late": (compare.prepare, compare.settings, late.STUDENT, layers, 8, (1, 3))},
                  WINDOWS=((4, 2),))
    release.main()
    with open(tmp_path / "release.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["block"], row["time"]) for row in rows if row["block"]] == [
        (step, block, time) for step in "2468" for block in "13" for time in ("0.1", "0.9")]
    assert all(-1 < float(row["cosine"]) < 1 for row in rows if row["block"]) and len(rows) == 2 + 16
    assert len({row["cosine"] for row in rows if row["block"]}) == 16
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| late, block")]
    monkeypatch.setattr(compare, "run_in_process", None)
    release.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| late, block")] == said


@pytest.mark.slow
def test_the_jit_experiment_in_short(restored, monkeypatch, tmp_path, teacher_file):
    """Runs that stop go on from what is kept of the aligned one, and all are judged where they differ."""
    monkeypatch.chdir(tmp_path)
    jit.settings()
    assert (train.MODEL, train.STEPS, train.KEEP_EVERY, train.TIMES) == ("JiT-B/16", 250_200, 62_550, (0.8, 0.8))
    assert train.KEEP_EVERY % train.CHECKPOINT_EVERY == 0 and train.WARMUP_STEPS == 6_255
    set_constants(monkeypatch, jit, EPOCH=6, JUDGED=(1, 2, 3), SCALES=(1.0, 2.0),
                  RUNS={"plain": 0, "aligned": 3, "stopped_1": 1, "stopped_2": 2})
    shrink(monkeypatch, jit, teacher_file, "JiT-T/4", 28)
    run_parts(monkeypatch, jit, "prepare", "plain", "aligned", "branch", "stopped_1", "stopped_2", "judge")
    judged = sorted(path.parent.relative_to(tmp_path / "runs").as_posix()
                    for path in tmp_path.glob("runs/*/*/fid.json"))
    assert judged == sorted(f"jit-b-{run}/samples_{epoch}_{scale}" for run, epochs in (
        ("plain", "123"), ("aligned", "123"), ("stopped_1", "23"), ("stopped_2", "3")) for epoch in epochs
        for scale in (1.0, 2.0))
    phases = [[row["phase"] for row in csv.DictReader(open(tmp_path / f"runs/jit-b-{run}/log.csv"))][-1]
              for run in jit.RUNS]
    assert phases == ["2", "1", "2", "2"]
    with pytest.raises(ValueError, match="say which part to run: prepare, branch, judge, plain, aligned, stopped_1"):
        run_parts(monkeypatch, jit, "train")


@pytest.mark.slow
def test_the_512_run_in_short(restored, monkeypatch, tmp_path, teacher_file, vae_folder):
    monkeypatch.chdir(tmp_path)
    imagenet512.settings()
    assert (prepare_latents.IMAGE_SIZE, train.ALIGN_STEPS, train.STEPS, sample.CFG_SCALE, sample.GUIDANCE) == \
        (512, 300_000, 500_000, 1.25, (0.0, 1.0))
    set_constants(monkeypatch, prepare_latents, VAE=str(vae_folder[0]), COMPILE=False)
    shrink(monkeypatch, imagenet512, teacher_file, "SiT-T/4", 32, STEPS=2)
    run_parts(monkeypatch, imagenet512, "prepare", "train", "sample", "fid")
    assert json.loads((tmp_path / "runs/haste-xl-512/fid.json").read_text())["sample_count"] == 8


@pytest.mark.slow
def test_the_run_on_va_vaes_latents_in_short(restored, monkeypatch, tmp_path, teacher_file, vae_folder):
    monkeypatch.chdir(tmp_path)
    vavae.settings()
    assert prepare_latents.VAE.startswith("hustvl/") and (train.MODEL, train.ALIGN_STEPS) == ("SiT-XL/1", 250_000)
    with torch.device("meta"):
        assert model.build(train.MODEL, in_channels=32, input_size=16).pos_embed.shape[1] == 256
    set_constants(monkeypatch, vavae, VAE=str(vae_folder[0]))
    set_constants(monkeypatch, prepare_latents, COMPILE=False)
    shrink(monkeypatch, vavae, teacher_file, "SiT-T/4", 32, STEPS=2)
    run_parts(monkeypatch, vavae, "prepare", "train", "sample", "fid")
    assert json.loads((tmp_path / "runs/haste-xl-vavae/fid.json").read_text())["sample_count"] == 8


HASTE = "stopped at 2000"


def results(path, distances):
    """A results file of one seed: {run: [distance at 100, 1000]}."""
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, compare.COLUMNS)
        table.writeheader()
        for run, pair in distances.items():
            for step, distance in zip((100, 1000), pair):
                table.writerow(dict(run=run, seed=0, step=step, distance=distance, precision=0.5, recall=0.5,
                                    teacher_distance=1, denoising_loss=0.3,
                                    gradient_cosine="0.1" if run == "aligned" else ""))
    return draw.read(path)[0]


def test_draw_says_what_the_rows_say(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws with it")
    path = tmp_path / "results.csv"
    set_constants(monkeypatch, draw, FIGURES={str(tmp_path / "figure.png"): ({"a student": path}, HASTE)})
    distances = {"plain": (10, 2), "features": (8, 1.5), "aligned": (5, 1.25), HASTE: (5, 1)}
    results(path, distances)
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, compare.COLUMNS).writerow(dict(run="real images", distance=0.24, precision=0.9, recall=0.8,
                                                            teacher_distance=0.1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    draw.main()
    drawn = ["attention.png", "cross_entropy.png", "evidence.png", "loss_by_time.png"]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == drawn
    said = capsys.readouterr().out.partition("| run | t = 0.1")[0]  # of the rest: the committed rows' test
    assert "| plain | 10.00 | 2.00 |" in said
    assert "step 1,000: HASTE's distance by plain's 0.50; plain needs" in said
    assert "many times the steps: more than 1.00" in said
    assert "features: distance by plain's, all steps and seeds 0.78 (0.75 to 0.80); denoising loss" in said
    assert [line for line in said.splitlines() if "cosine" in line] == [
        "aligned: gradient cosine 100: 0.100; 1,000: 0.100; "
        "the conflict trigger stops at no step"]
    assert f"{HASTE} by the better of plain and aligned, seed by seed: step 100: 1.00; step 1,000: 0.80" in said
    table = [line.count("|") for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(distances) + 1 and len(set(table)) == 1
    assert Image.open(tmp_path / "figure.png").width > 500


@pytest.mark.parametrize("haste, expected", [(10, 1.0), (1, 10.0), (10**0.5, 10**0.5), (0.5, None), (20, 1.0)])
def test_speed_up_reads_plains_curve(tmp_path, haste, expected):
    runs = results(tmp_path / "results.csv", {"plain": (10, 1), HASTE: (haste, haste)})
    assert draw.speed_up(runs, HASTE, 0, 100) == (expected if expected is None else pytest.approx(expected))


TABLES = [path for path in sorted((ROOT / "experiments").glob("*.csv")) if path.stem != "speedrun_costs"]


@pytest.mark.parametrize("results", TABLES, ids=lambda path: path.stem)
def test_the_readme_here_shows_the_committed_rows(results, monkeypatch, capsys):
    if results.stem == "release":
        release.tables()
    elif results.stem.startswith("speedrun"):
        searched = () if "emoji" in results.stem else speedrun.SEARCH
        set_constants(monkeypatch, speedrun, RESULTS=results, SEARCH=searched)
        speedrun.table()
    elif results.stem == "attention":
        draw.attention_table(draw.read(results)[0])
    elif results.stem == "loss_by_time":
        draw.loss_table(draw.read(results)[0])
    else:
        runs, floor = draw.read(results)
        assert all(len(seeds) >= 3 for seeds in runs.values())
        draw.table(runs, floor)
    if results.stem.startswith("irepa"):
        irepa.effects(results)
    readme = (ROOT / "experiments/README.md").read_text()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in readme] == []


def test_effects_are_those_that_the_distances_were_made_of(tmp_path, capsys):
    sizes = {"aligned": 0.5, "conv": 0.8, "norm": 1.1, "stopped": 0.9}
    endings = "", ", stopped at 1000"
    names = ["".join(each).removeprefix("aligned, ") for each in product(irepa.LOSSES, irepa.PARTS, endings)]
    assert len(set(names)) == 16 and {"stopped at 1000", "aligned conv norm, stopped at 1000"} < set(names)
    with open(tmp_path / "irepa.csv", "w", newline="") as file:
        table = csv.DictWriter(file, compare.COLUMNS)
        table.writeheader()
        for seed, name in product((0, 1), names):
            changed = [size * (1 + seed * (word == "norm")) for word, size in sizes.items()
                       if word in name or word == "aligned" and "features" not in name]
            table.writerow(dict(run=name, seed=seed, step=irepa.STEPS, distance=10 * np.prod(changed)))
    irepa.effects(tmp_path / "irepa.csv")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| attention | 0.50 (0.50 to 0.50) | 0.50 (0.50 to 0.50) |",
        "| conv | 0.80 (0.80 to 0.80) | 0.80 (0.80 to 0.80) |",
        "| norm | 1.65 (1.10 to 2.20) | 1.65 (1.10 to 2.20) |", "| stopping |  | 0.90 (0.90 to 0.90) |"]


PAGES = "README.md", "experiments/README.md"
TO_THE_END = [loss + part for loss in irepa.LOSSES for part in irepa.PARTS]


def stopped(*names, at=1000):
    """The same runs stopped, each beside the one that is not."""
    return [(f"{name}, stopped at {at}".removeprefix("aligned, "), name) for name in names]


@pytest.mark.parametrize("results, pairs, said", [
    ("irepa", [("features conv", "features")], "conv ends at {} of REPA's distance"),
    ("irepa", [("features norm", "features")], "norm at {}, both at"),
    ("irepa", [("features conv norm", "features")], "both at {}. iREPA's paper"),
    ("irepa", [("aligned conv", "aligned")], "conv {} of HASTE's"),
    ("irepa", [("aligned norm", "aligned")], "norm {}, both"),
    ("irepa", [("aligned conv norm", "aligned")], "both {}. Nor does"),
    ("irepa", [("aligned conv norm", "features conv norm")], "both of them ({});"),
    ("irepa", [("aligned", "features")], "to REPA it does ({})."),
    ("irepa", stopped("features conv", "features norm", "features conv norm"), "costs iREPA's runs {%} (both"),
    ("irepa", stopped("features conv norm"), "(both parts {%});"),
    ("irepa", stopped(*TO_THE_END[4:]), "with attention nothing ({})."),
    ("irepa", [("aligned conv norm, stopped at 1000", "features conv norm, stopped at 1000")],
     "attention is worth {} beside both parts"),
    ("irepa_pixels", [(name, "plain") for name in TO_THE_END], "ends below plain, at {} of its distance."),
    ("irepa_pixels", [("features conv", "features")], "conv ends at {} of REPA's, norm"),
    ("irepa_pixels", [("features norm", "features")], "of REPA's, norm at {}, both"),
    ("irepa_pixels", [("features conv norm", "features")], "both at {}; with attention"),
    ("irepa_pixels", [("aligned conv", "aligned")], "conv at {} of HASTE's"),
    ("irepa_pixels", [("aligned norm", "aligned")], "of HASTE's, norm at {}, both"),
    ("irepa_pixels", [("aligned conv norm", "aligned")], "both at {}. - Attention"),
    ("irepa_pixels", [("aligned", "features")], "Attention brings REPA to {}, both"),
    ("irepa_pixels", [("aligned conv norm", "features conv norm")], "both parts to {}. - Stopping"),
    ("irepa_pixels", stopped(*TO_THE_END[4:]), "run with attention something, {%}."),
    ("irepa_pixels", stopped("features conv norm"), "it costs both parts {%}, conv less"),
    ("irepa_pixels", stopped("features conv"), "conv less ({}), REPA"),
    ("irepa_pixels", stopped("features", "features norm"), "nothing that shows ({})."),
    ("irepa_pixels", [(aligned, features) for (aligned, _), (features, _) in
                      zip(stopped(*TO_THE_END[4:]), stopped(*TO_THE_END[:4]))], "nothing here ({} over all parts)"),
    ("reg", [("reg aligned", "reg features")], "ends at {} of REPA's distance with REG"),
    ("reg", [("aligned", "features")], "with REG, at {} without. Stopped"),
    ("reg", [("reg aligned, stopped at 1000", "reg features, stopped at 1000")], "Stopped it is {} and"),
    ("reg", [("stopped at 1000", "features, stopped at 1000")], "and {}. - *Does a stop"),
    ("reg", stopped("reg features"), "with REG it costs REPA {%} and"),
    ("reg", stopped("reg aligned"), "and HASTE {%}, without"),
    ("reg", stopped("features"), "without REG {%} and"),
    ("reg", stopped("aligned"), "and {%}. (Here"),
    ("reg", [("reg", "plain")], "Nothing that shows: {} of plain's distance"),
    ("reg", [("reg", "plain")], "adds nothing here, alone ({} of plain's distance)"),
    ("reg", [("reg features", "features", 500)], "costs at first, {} of REPA's"),
    ("reg", [("reg aligned", "aligned", 500)], "and {} of HASTE's distance after 500 steps"),
    ("reg", [("reg features", "features")], "less at the end ({},"),
    ("reg", [("reg aligned", "aligned")], ", {}). A reason"),
    ("reg_emoji", [("reg aligned", "reg features")], "ends at {} of REPA's distance with REG and at"),
    ("reg_emoji", [("aligned", "features")], "with REG and at {} without."),
    ("reg_emoji", [("reg aligned, stopped at 1500", "reg features, stopped at 1500")], "Stopped it is {} there"),
    ("reg_emoji", [("stopped at 1500", "features, stopped at 1500")], "there and {} here."),
    ("reg_emoji", stopped("reg features", at=1500), "at {} of never stopping for REPA,"),
    ("reg_emoji", stopped("reg aligned", at=1500), "for REPA, {} for HASTE."),
    ("reg_emoji", stopped("aligned", at=1500), "helps HASTE a little ({}) and REPA"),
    ("reg_emoji", stopped("features", at=1500), "and REPA not ({})."),
    ("reg_emoji", [("reg", "plain")], "Nothing at the end, {} of plain's distance"),
    ("reg_emoji", [("reg", "plain", 1500)], "slower start ({} after 1,500 steps)."),
    ("reg_emoji", [("reg features", "features")], "costs REPA something ({}) and HASTE"),
    ("reg_emoji", [("reg aligned", "aligned")], "in two of three seeds ({})."),
])
def test_what_the_pages_say_of_irepa_and_reg_is_in_the_committed_rows(results, pairs, said):
    """pairs: two runs, whose last distances are compared, or those at a step."""
    runs, _ = draw.read(ROOT / f"experiments/{results}.csv")
    last = draw.judged_at(runs)[-1:]
    ratios = np.concatenate([draw.values(runs, name, *step or last) / draw.values(runs, by, *step or last)
                             for name, by, *step in pairs])
    said = said.replace("{}", f"{ratios.min():.2f} to {ratios.max():.2f}")
    said = said.replace("{%}", f"{100 * ratios.min() - 100:.0f} to {100 * ratios.max() - 100:.0f} %")
    assert said in " ".join(((ROOT / "README.md").read_text() + (ROOT / "experiments/README.md").read_text()).split())


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_pages_point_to_files_that_are_there(page):
    text = (ROOT / page).read_text()
    targets = set(re.findall(r'src="([^"]+)"', text) + re.findall(r"\]\((?!https?:)([^)#]+)", text))
    assert targets and [each for each in targets if not (ROOT / page).parent.joinpath(each).exists()] == []


def test_what_the_pages_say_of_the_papers_run_follows_from_its_steps():
    hours = lambda steps, seconds: 8 * steps * seconds / 3600  # of 8 cards
    first, whole = hours(250_000, 0.062), hours(250_000, 0.062) + hours(250_000, 0.058)
    landing, page = ((ROOT / name).read_text() for name in ("README.md", "experiments/README.md"))
    assert f"{first:.0f} H100-hours, of {whole:.0f} for its whole run" in landing
    assert f"{whole:.0f} H100-hours" in page and f"58 ms would take {hours(7_000_000, 0.058):.0f}" in page
    assert f"| {256 / 0.058 / 8:.0f}; {256 / 0.062 / 8:.0f}: *estimates* |" in page


def test_what_the_page_says_of_starting_from_weights_is_in_the_committed_rows():
    runs, _ = draw.read(draw.HERE / "fine_tune.csv")
    ratio = lambda run, step, other: draw.values(runs, run, step) / draw.values(runs, "scratch", other)
    said = [(ratio(*each).min(), ratio(*each).max()) for each in (
        ("weights", 250, 250), ("weights", 500, 500), ("weights", 250, 500),
        ("weights, a fifth of the rate", 500, 500))]
    first, last, half, slower = (" to ".join(dict.fromkeys(f"{number:.2f}" for number in pair)) for pair in said)
    page = " ".join((ROOT / PAGES[1]).read_text().split())
    assert f"is {first} of scratch's after 250 steps and {last} after 500, when" in page
    assert f"lead to {half} of what scratch" in page and f"slower: {slower} after 500." in page


def test_what_the_landing_page_says_of_the_four_comparisons():
    """Aligned ends below plain in every seed; stopping helps one, harms one, and shows nothing in two."""
    by_stopping = []
    for results, haste, step in draw.EVIDENCE.values():
        runs, _ = draw.read(draw.HERE / results)
        plain = draw.values(runs, "plain", step)
        aligned = [draw.values(runs, run, step) for run in ("features", "aligned", haste) if run in runs]
        assert len(plain) == 3 and all((each < plain).all() for each in aligned)
        by_stopping.append(draw.values(runs, haste, step) / draw.values(runs, "aligned", step))
    larger, smaller, text, pixels = by_stopping
    assert (smaller < 1).all() and (pixels > 1).all()
    assert all(min(each) < 1 < max(each) for each in (larger, text))
    assert "Aligned ends below plain in every seed of all four comparisons" in (ROOT / "README.md").read_text()


def test_what_the_pages_say_of_attention_follows_from_the_committed_rows():
    runs, _ = draw.read(draw.HERE / "attention.csv")
    at = lambda run, step, t=0.5: draw.values(runs, run, step, f"t_{t}")
    haste, pages = "stopped at 1000", [" ".join((ROOT / name).read_text().split()) for name in PAGES]
    switch, later, plain = at(haste, 1000), at(haste, 2000), at("plain", 2000)
    said = (f"rises from {draw.spread(switch)} to {draw.spread(later)}, a twentieth of the way to plain's "
            f"{draw.spread(plain)}; nearer to the data it forgets more, nearer to the noise less.")
    assert said in pages[1] and f"than plain: {draw.spread(at('features', 2000))}. Uniform" in pages[1]
    means = f"from {switch.mean():.2f} to {later.mean():.2f}, a twentieth of the way to plain's {plain.mean():.2f}"
    assert means in pages[0]
    assert ((later - switch) / (plain - switch)).mean() == pytest.approx(1 / 20, abs=0.005)
    forgotten = [(at(haste, 2000, t) - at(haste, 1000, t)).mean() for t in (0.1, 0.5, 0.9)]
    assert forgotten == sorted(forgotten, reverse=True) and np.log(49) == pytest.approx(3.89, abs=0.005)
    assert all((at(run, 2000, t) > np.log(49)).all() for run in ("plain", "features") for t in (0.1, 0.5, 0.9))


def test_what_the_pages_say_of_the_loss_by_time_follows_from_the_committed_rows():
    runs, _ = draw.read(draw.HERE / "loss_by_time.csv")
    bins = train.LOGS["loss_by_time.csv"][1:]
    table = lambda run: np.stack([draw.values(runs, run, 2000, column) for column in bins])  # [10, seeds]
    ratios = {run: table(run) / table("plain") for run in runs}
    percent = lambda found: f"{100 * abs(found - 1).min():.1f} to {100 * abs(found - 1).max():.1f} %"
    aligned, stopped = ratios["aligned"], ratios["stopped at 1000"]
    front, page = (" ".join((ROOT / page).read_text().split()) for page in PAGES)
    assert (f"is {percent(aligned[0])} above plain's in the tenth of times next to the data, {percent(aligned[1])} in "
            f"the next, and {percent(aligned[5:8])} below it between t = 0.5 and 0.8") in page
    assert (aligned[:2] > 1).all() and (aligned[5:8] < 1).all() and (stopped[0] > 1).all() and (stopped[1:] < 1).all()
    assert f"({percent(stopped[0])} above plain's in the first tenth)" in page
    assert f"in every tenth and seed, by {percent(stopped[1:])}." in page
    assert f"no more than {100 * abs(ratios['features'] - 1).max():.1f} % either way" in page
    assert "costs 4 % of the loss near the data and gains 2 to 3 % at t = 0.5 to 0.8" in front


def test_the_landing_page_shows_the_committed_means():
    larger, floor = draw.read(ROOT / "experiments/compare.csv")
    smaller, _ = draw.read(ROOT / "experiments/late.csv")
    attempts, _ = draw.read(speedrun.RESULTS)
    reported = lambda name: speedrun.report(attempts, name, speedrun.REPORT, "distance")[0]
    searched = [speedrun.report(attempts, name, speedrun.SEARCH, "search_distance")[0] for name in attempts
                if name != "plain"]
    readme = (ROOT / "README.md").read_text()
    for run, name, cost in (("plain", "plain SiT", "1"),
                            ("features", "features alone (REPA)", reported("repa")),
                            ("attention", "attention alone", reported("attention")),
                            ("aligned", "both, to the end", reported("haste-never")),
                            (HASTE, "both, stopped at 2,000 (HASTE)", f"{reported('haste')}, at 1,200")):
        cells = [f"{draw.values(larger, run, step).mean():.2f}" for step in (1000, 3000)]
        cells += [cost, f"{draw.values(smaller, run, 8000).mean():.2f}" if run in smaller else ""]
        assert " ".join(f"| {name} | {' | '.join(cells)} |".split()) in readme, name
    assert (f"| HASTE, times from a logit-normal; with iREPA's parts | | | {reported('haste+logit-normal')}; "
            f"{reported('haste+irepa+logit-normal')} | |") in readme
    assert f"| real images | | {float(floor['distance']):.2f} | | {float(floor['distance']):.2f} |" in readme
    assert f"of one seed {searched.count('not reached')} of {len(searched)} missed the target" in readme


def test_reduced_form_says_what_lies_outside_the_committed_table(capsys):
    committed, found = (draw.read(ROOT / "experiments/compare_small.csv")[0] for _ in range(2))
    compare_small.beside(found, committed)
    assert capsys.readouterr().out.count("outside") == 0
    found["aligned"][0][500]["distance"] = found["plain"][0][500]["distance"]
    compare_small.beside(found, committed)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "outside" in line] == ["aligned"]
