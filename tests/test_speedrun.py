"""experiments/speedrun.py: what an attempt pays, and who judges it."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

import model
import train
from experiments import compare, draw, pixels, speedrun
from tests.conftest import ROOT, set_constants

ATTEMPTS = {"plain": dict(ALIGN_STEPS=0), "haste": dict(ALIGN_STEPS=100), "never": {}}


@pytest.fixture
def results(monkeypatch, tmp_path):
    """The file of RESULTS; a function writes distances into it, {attempt: {seed: {step: distance}}}, whose steps cost
    twice and half of plain SiT's, by the report's judge; by the search's they are a tenth."""
    set_constants(monkeypatch, speedrun, RESULTS=tmp_path / "speedrun.csv", ATTEMPTS=ATTEMPTS, TARGET=("plain", 400),
                  SEARCH=(0,), REPORT=(10, 11))

    def write(distances, phase_1=2.0, phase_2=0.5, preparation=20.0):
        speedrun.write([dict(run=name, seed=seed, step=step, distance="" if seed in speedrun.SEARCH else distance,
                             search_distance=distance / 10, phase_1=phase_1, phase_2=phase_2, preparation=preparation)
                        for name, seeds in distances.items() for seed, steps in seeds.items()
                        for step, distance in steps.items()])
        return tmp_path / "speedrun.csv"
    return write


def test_cost_to_quality_is_what_was_paid_until_the_target(results, capsys):
    results({"plain": {seed: {200: 16, 400: 4 + change} for seed, change in ((0, 0), (10, -1), (11, 1))}})
    results({"haste": {0: {50: 16, 100: 8, 200: 4}, 10: {50: 16, 100: 8, 200: 2}, 11: {50: 16, 100: 4, 200: 2}}})
    results({"never": {10: {50: 16, 200: 1}, 11: {50: 16, 200: 4.01}}})
    speedrun.table()
    plain, haste, never = capsys.readouterr().out.splitlines()[2:]
    first = (20 + 100 * 2 + (100 * 2**0.5 - 100) * 0.5) / 400  # half way from 8 to 2, in logarithms, after the stop
    assert haste == (f"| haste | {(first + 0.55) / 2:.2f} (0.55 to {first:.2f}) | 2.00 (2.00 to 2.00) | "
                     f"{(first + 0.55) / 2:.2f} (0.55 to {first:.2f}) | {270 / 400:.2f} | 0.40 |")
    assert never == "| never | not reached in 1 of 2 seeds | 2.50 (1.00 to 4.01) | not reached in 1 of 2 seeds |  |  |"
    assert plain == "| plain | 1.00 (1.00 to 1.00) | 4.00 (3.00 to 5.00) | 1.00 (1.00 to 1.00) | 1.00 | 0.40 |"


def test_rows_take_the_place_of_those_of_the_same_seeds_alone(results):
    path = results({"haste": {0: {100: 5}, 10: {100: 6}}, "plain": {10: {100: 7}}})
    results({"haste": {10: {100: 3, 50: 4}}})
    with open(path, newline="") as file:
        rows = [(row["run"], row["seed"], row["step"], row["distance"]) for row in csv.DictReader(file)]
    assert rows == [("plain", "10", "100", "7"), ("haste", "0", "100", ""), ("haste", "10", "50", "4"),
                    ("haste", "10", "100", "3")]


def test_emoji_have_one_judge_and_rows_of_their_own(results, monkeypatch, capsys):
    set_constants(monkeypatch, speedrun, OUT="out", COMMON=speedrun.COMMON, OWN_SETTINGS=None, JUDGE=None, PREPARE=None)
    path = results({"plain": {0: {200: 16, 400: 4}}})
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "emoji", "haste"])
    monkeypatch.setattr(speedrun, "run_attempt", None)
    with pytest.raises(ValueError, match=r"speedrun_emoji.csv has no rows.*speedrun emoji plain 10 11"):
        speedrun.main()
    assert speedrun.JUDGE is pixels.judge and speedrun.COMMON["MODEL"] == "velocity"
    results({"plain": {seed: {200: 16, 400: 3} for seed in (10, 11)}}, phase_1=1, phase_2=1, preparation=0)
    speedrun.table()
    assert capsys.readouterr().out.splitlines() == [
        "| attempt | cost to quality | distance at the end |", "|---|---|---|",
        "| plain | 1.00 (1.00 to 1.00) | 3.00 (3.00 to 3.00) |"]
    assert path.read_bytes() == before


def test_a_rate_and_a_batch_are_by_the_data_sets_own(restored, monkeypatch, tmp_path):
    monkeypatch.setitem(model.MODELS, "student", None)  # taken back afterwards
    speedrun.settings(tmp_path, 3, dict(RATE=2, WARMUP_STEPS=100, BATCH=0.5))
    assert (train.LEARNING_RATE, train.WARMUP_STEPS, train.BATCH_SIZE, train.SEED) == (6e-3, 100, 16, 3)


@pytest.mark.parametrize("changes", [dict(RATE=2, WARMUP_STEPS=100), dict(TIMES=(0.0, 1.0), BETAS=(0.9, 0.95)), {}])
def test_what_changes_no_step_costs_nothing(changes):
    assert speedrun.costs({"it": speedrun.PLAIN | changes}) == {"it": dict(phase_2=1, preparation=0)}


def test_what_says_how_to_align_changes_the_steps_of_phase_1_alone():
    irepa, reg = (speedrun.kinds_of_steps(speedrun.ATTEMPTS[name]) for name in ("irepa", "reg"))
    assert irepa["phase_2"] == speedrun.PLAIN and irepa["phase_1"]["PROJECTOR"] == "conv"
    assert reg["phase_2"] == dict(ALIGN_STEPS=0, CLASS_WEIGHT=0.03)
    assert "phase_1" not in speedrun.kinds_of_steps(speedrun.ATTEMPTS["batch-half"])
    haste, longer = (speedrun.kinds_of_steps(speedrun.ATTEMPTS[name]) for name in ("haste", "haste-third+logit-normal"))
    assert haste == longer  # measured once


def test_costs_of_all_attempts_are_measured_in_turn_into_their_rows(results, restored, monkeypatch, tmp_path, capsys):
    """A kind of step once, though two attempts take it; of a machine that slows down their ratios say nothing."""
    path = results({"plain": {10: {400: 4}}, "haste": {0: {100: 5}, 10: {100: 6}}, "never": {10: {100: 7}}},
                   phase_1="")
    monkeypatch.setitem(ATTEMPTS, "half", dict(ALIGN_STEPS=0, BATCH=0.5, STEPS=800))
    results({"half": {10: {800: 4}}}, phase_1="")
    measured = []

    def cpu_seconds(folder, changes, step):
        measured.append(changes)
        a_step = 0.5 if "BATCH" in changes else 1 if changes == speedrun.PLAIN else 1.25
        return 3 + a_step * (step % (speedrun.ROUND + 1) or speedrun.ROUND) * (1 + (len(measured) - 1) // 6)

    set_constants(monkeypatch, speedrun, OUT=str(tmp_path), PREPARE=lambda: None, cpu_seconds=cpu_seconds, ROUNDS=3)
    set_constants(monkeypatch, compare, OUT=None, SETTINGS=None)
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "costs"])
    for _ in range(2):  # anew each time
        measured.clear()
        speedrun.main()
        assert measured[:6] == [speedrun.PLAIN] * 2 + [{}] * 2 + [dict(speedrun.PLAIN, BATCH=0.5)] * 2
        assert len(measured) == 3 * 6
    assert "haste: phase_2 1.000, preparation 0.000, phase_1 1.250\n" in capsys.readouterr().out
    with open(path, newline="") as file:
        rows = [[row[name] for name in ("run", "seed", "distance", *speedrun.COLUMNS[-3:])]
                for row in csv.DictReader(file)]
    assert rows == [["plain", "10", "4", "", "1.0", "0"], ["haste", "0", "", "1.25", "1.0", "0"],
                    ["haste", "10", "6", "1.25", "1.0", "0"], ["never", "10", "7", "1.25", "1.0", "0"],
                    ["half", "10", "4", "", "0.5", "0"]]


@pytest.mark.parametrize("search", [(0,), ()])
def test_the_figure_is_drawn_of_the_rows(results, monkeypatch, tmp_path, search):
    monkeypatch.setattr(speedrun, "SEARCH", search)
    pytest.importorskip("matplotlib", reason="draws with it")
    results({"plain": {seed: {200: 16, 400: 4} for seed in (*search, 10, 11)}, "haste": {10: {50: 16, 200: 3}}})
    speedrun.draw_attempts(tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").width > 500


def several(numbers, digits=2):
    return f"{min(numbers):,.{digits}f} to {max(numbers):,.{digits}f}"


def test_what_the_page_says_of_attempts_is_in_the_committed_rows():
    runs, _ = draw.read(speedrun.RESULTS)
    page = " ".join((ROOT / "experiments/README.md").read_text().split())
    ends = lambda name, seed, column: float(runs[name][seed][max(runs[name][seed])][column])
    mean_end = lambda name: f"{np.mean([ends(name, seed, 'distance') for seed in speedrun.REPORT]):.2f}"
    target = np.mean([ends("plain", seed, "distance") for seed in speedrun.REPORT])
    steps_to_target = lambda name: several([draw.first_below(runs[name][seed], target, "distance")
                                            for seed in speedrun.REPORT], digits=0)
    searched = {name: speedrun.costs_to_quality(runs, name, (0,), "search_distance")[0] for name in runs}
    best, lowest = "haste+logit-normal", "haste+irepa+logit-normal"
    found, by_the_other = ({name: several(speedrun.costs_to_quality(runs, name, speedrun.REPORT, column))
                            for name in ("attention", "haste", "haste-never", best, lowest)}
                           for column in ("distance", "search_distance"))
    last = several([ends(best, seed, "distance") / ends("plain", seed, "distance") for seed in speedrun.REPORT])
    assert f"committed: {speedrun.report(runs, best, speedrun.REPORT, 'distance')[0]}`" in page
    assert (f"HASTE costs {found['haste']} of what plain SiT pays, both {found[best]}, and after 2,400 steps they are "
            f"at {last} of the distance that plain has after 3,000. In the search it is {searched['haste']:.2f} and "
            f"{searched[best]:.2f};") in page
    assert (f"after half of the steps {found['haste']}, never {found['haste-never']}; in the search after a third of "
            f"them {searched['haste-third']:.2f}, after half {searched['haste']:.2f}, never "
            f"{searched['haste-never']:.2f}.") in page
    paid = {name: {column: float(next(iter(seeds[0].values()))[column] or 0) for column in speedrun.COLUMNS[-3:]}
            for name, seeds in runs.items()}
    assert f"costs {paid['haste']['phase_1']:.2f} of one without" in page
    missed, *reached = sorted(speedrun.costs_to_quality(runs, "repa", speedrun.REPORT, "distance"), key=bool)
    all_steps = paid["repa"]["phase_1"] * speedrun.STEPS / speedrun.TARGET[1]
    assert missed is None
    assert (f"alone it costs {found['attention']} in the report, where both losses cost {found['haste']} (after "
            f"{steps_to_target('attention')} and {steps_to_target('haste')} steps); features alone (REPA) cost "
            f"{min(reached):.2f} and {max(reached):.2f} from two seeds, and from the third 2,400 such steps, which "
            f"cost {all_steps:.2f}, do not suffice. In the search attention costs {searched['attention']:.2f}, both "
            f"{searched['haste']:.2f}, REPA {searched['repa']:.2f}:") in page
    assert (f"without attention, cost {searched['irepa']:.2f} in the search, at {paid['irepa']['phase_1']:.2f} a step, "
            f"and with the times {searched['irepa+logit-normal']:.2f}. With them HASTE with the times is at the target "
            f"after {steps_to_target(lowest)} steps, in the report, and without them after {steps_to_target(best)}; at "
            f"the end nothing is left, {mean_end(lowest)} and {mean_end(best)}. That it costs {found[lowest]} ") in page
    with open(ROOT / "experiments/speedrun_costs.csv", newline="") as file:
        measured = {(row["measured"], row["run"]): row for row in csv.DictReader(file)}
    first, second, third = ([f"{float(measured[how, name]['phase_1']):.2f}" for name in ("repa", "attention", "haste")]
                            for how in ("one by one", "three in turn", "all in turn"))
    assert "REPA's came out at {}, attention's alone at {}, HASTE's at {};".format(*first) in page
    assert "these three in turn at {}, {} and {};".format(*second) in page
    with_parts = float(measured["all in turn", lowest]["phase_1"])
    assert "at {}, {} and {}, but {:.2f} with iREPA's parts, which cannot".format(*third, with_parts) in page
    by_the_third = {}
    for name in ("haste", "attention", best, lowest):
        phase_1 = measured["all in turn", lowest if name == lowest else name.removesuffix("+logit-normal")]["phase_1"]
        rows = {seed: {step: dict(row, phase_1=phase_1) for step, row in runs[name][seed].items()}
                for seed in speedrun.REPORT}
        by_the_third[name] = several(speedrun.costs_to_quality(runs | {name: rows}, name, speedrun.REPORT, "distance"))
    assert ("By the third HASTE costs {haste}, attention alone {attention}, HASTE with times from a logit-normal "
            "{haste+logit-normal}, and with iREPA's parts {haste+irepa+logit-normal}.".format(**by_the_third)) in page
    for (how, name), row in measured.items():
        if how == ("three in turn" if name in ("repa", "attention") else "one by one"):
            assert paid[name]["phase_1"] == pytest.approx(float(row["phase_1"] or 0), abs=1e-4)
            assert paid[name]["phase_2"] == pytest.approx(float(row["phase_2"]), abs=1e-4)
    assert f"2,400 without a teacher cost {speedrun.STEPS / speedrun.TARGET[1]:.2f}, and" in page
    tokens = paid["reg"]["preparation"] / speedrun.TARGET[1]
    assert f"costs {searched['reg']:.2f}, more than REPA, which it has inside; {tokens:.2f} of it are" in page
    assert searched["reg"] > searched["repa"]
    assert f"each of which costs {paid['batch-half']['phase_2']:.2f}." in page
    plain_takes = {name: draw.first_below(runs["plain"][0], ends(name, 0, "search_distance"), "search_distance")
                   for name in runs if searched[name] is None}
    assert 2999.5 < plain_takes.pop("logit-normal") < 3000
    assert (f"each at {paid['batch-double']['phase_2']:.2f}, is worse: plain is there after "
            f"{plain_takes.pop('batch-double'):,.0f}.") in page
    failed = sorted(plain_takes.values())
    assert set(plain_takes) == {"rate-1.5", "rate-2", "betas", "ema", "shift", "batch-half"}
    assert f"plain is after {failed[0]:,.0f} to {failed[-1]:,.0f}: in one seed" in page
    assert (f"HASTE with the times costs {searched[best]:.2f} from the seed and by the judge that chose it, "
            f"{by_the_other[best]} by this judge from other seeds, and {found[best]} by the other judge; HASTE alone, "
            f"which was there to compare with, {searched['haste']:.2f}, {by_the_other['haste']}, and {found['haste']}."
            ) in page


def test_what_the_page_says_of_attempts_on_emoji_is_in_the_committed_rows():
    runs, _ = draw.read(ROOT / "experiments/speedrun_emoji.csv")
    page = " ".join((ROOT / "experiments/README.md").read_text().split())
    found = {name: speedrun.costs_to_quality(runs, name, speedrun.REPORT, "distance") for name in runs}
    at = lambda name, step: several([float(rows[step]["distance"]) for rows in runs[name].values()], digits=0)
    assert (f"after 2,400 HASTE is at {at('haste', 2400)}, the times alone at {at('logit-normal', 2400)} (plain SiT is "
            f"at {at('plain', 2500)} after 2,500), both at {at('haste+logit-normal', 2400)}.") in page
    clothes, _ = draw.read(speedrun.RESULTS)
    clothes = several(speedrun.costs_to_quality(clothes, "haste+logit-normal", speedrun.REPORT, "distance"))
    by_the_times, = (cost for cost in found["logit-normal"] if cost)
    assert found["haste"] == [None] * 3
    assert (f"both reach the target at {several(found['haste+logit-normal'])}, where it was {clothes}, and one "
            f"of three seeds reaches it by the times alone, at {by_the_times:.2f}, which is all that their") in page
    assert f"costs {float(runs['haste'][10][400]['phase_1']):.2f} of one without, as the student is smaller" in page


@pytest.mark.parametrize("words", [(), ("fast",), ("haste", "ten"), ("haste", "-1")])
def test_what_is_no_attempt_is_refused_in_one_line(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *words])
    with pytest.raises(ValueError, match=r"say which attempt, and from which seeds if not \(10, 11, 12\): plain, repa"):
        speedrun.main()


def test_without_a_target_nothing_is_begun(results, monkeypatch):
    results({"plain": {0: {200: 16, 400: 4}}})
    monkeypatch.setattr(speedrun, "run_attempt", None)
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "haste"])
    with pytest.raises(ValueError, match=r"no rows of plain from the seeds \(10, 11\).*speedrun plain 10 11"):
        speedrun.main()


@pytest.mark.slow
def test_an_attempt_in_short(restored, monkeypatch, tmp_path, capsys):
    """Its report's judge is not asked of the search's seed; another seed is set beside the committed ones."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(model.MODELS, "student", None)  # taken back afterwards
    set_constants(monkeypatch, compare, SOURCE=str(ROOT / "data/fashion_mnist_test.png"), PROCESSES=2, IMAGES=10,
                  STUDENT=dict(depth=4), SEEDS=None, STEPS=None, OUT=None, RUNS=None, STOPPED=None, SETTINGS=None,
                  JUDGE=None, FILES=None)
    set_constants(monkeypatch, speedrun, OUT=str(tmp_path / "out"), RESULTS=tmp_path / "speedrun.csv",
                  ROUNDS=2, ROUND=12, STEPS=4, TARGET=("plain", 4), JUDGED=2,
                  ATTEMPTS={"plain": dict(ALIGN_STEPS=0, STEPS=4), "reg": dict(CLASS_WEIGHT=0.03, ALIGN_STEPS=2)},
                  JUDGES=dict(speedrun.JUDGES, report=str(ROOT / "data/teacher.safetensors")))
    for words in (["plain"], ["plain", "0"], ["reg", "0"], ["reg", "12"]):
        monkeypatch.setattr(sys, "argv", ["speedrun.py", *words])
        speedrun.main()
    said = capsys.readouterr().out
    with open(tmp_path / "speedrun.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["step"], bool(row["distance"])) for row in rows] == [
        *(("plain", seed, step, seed != "0") for seed in ("0", "10", "11", "12") for step in "24"),
        *(("reg", "0", step, False) for step in "24")]
    assert {(row["phase_1"], row["phase_2"], row["preparation"]) for row in rows if row["run"] == "plain"} == {
        ("", "1", "0")}
    paid, = {tuple(float(row[name]) for name in speedrun.COLUMNS[-3:]) for row in rows if row["run"] == "reg"}
    assert paid[0] > paid[1] > 0.5 and paid[2] > 0
    assert said.count("\ncost to quality: ") == said.count("\nelapsed: ") == 4
