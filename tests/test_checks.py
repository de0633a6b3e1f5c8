"""checks.py: constants that are not allowed, names that are mistyped, and what is the same wherever it lies."""

import json

import pytest
import torch
from safetensors.torch import save_file

import fid
import prepare_latents
import sample
import train
from checks import names_alone, told_apart, too_short_for_ema, weights_checksum
from tests.conftest import read_log

SCRIPTS = (fid, prepare_latents, sample, train)
ELSEWHERE = {"F", "FROZEN", "LOGS", "MODELS", "SCALE", "FORMAT", "REMEDY", "MALFORMED", "STORED",
             "INCEPTION_URL", "RK45", "PIL", "TIMES", "SPACING", "PROMPTS"}  # no constants, or checked elsewhere


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_constant_has_a_rule(script, monkeypatch):
    asked = set()

    def note(constants, rules, **choices):
        asked.update(choices, *(names.split() for names in rules.values()))
        raise ValueError("enough")

    monkeypatch.setattr(script, "check_constants", note)
    with pytest.raises(ValueError, match="enough"):
        script.main()
    assert {name for name in vars(script) if name.isupper()} - asked - ELSEWHERE == set()


@pytest.mark.parametrize("script, name, nearest", [
    (train, "LEARNINGRATE", "LEARNING_RATE"), (sample, "CFGSCALE", "CFG_SCALE"), (fid, "REFERENCES", "REFERENCE"),
    (prepare_latents, "CAPTION", "CAPTIONS")])
def test_a_mistyped_constant_is_refused_with_the_nearest(script, name, nearest, monkeypatch):
    monkeypatch.setattr(script, name, 3, raising=False)
    with pytest.raises(ValueError, match=f"^{name} = 3: there is no such constant; {nearest} is the nearest$"):
        script.main()


@pytest.mark.parametrize("script, name", [
    (sample, "COMPARE"), (train, "LAYER_PAIRS"), (prepare_latents, "SHEET_CLASSES"), (train, "CONFLICT_TIMES")])
def test_a_single_value_where_a_list_is_meant_is_one_line(script, name, monkeypatch):
    monkeypatch.setattr(script, name, "x" if name == "CONFLICT_TIMES" else 3)
    with pytest.raises(ValueError, match=f"^{name} = .*; allowed: "):
        script.main()


def test_long_values_are_told_apart_by_where_they_differ():
    before, now = "/" + "long/" * 40 + "a", "/" + "long/" * 40 + "b"
    assert told_apart(before, now) == "'...long/long/long/long/a', now '...long/long/long/long/b'"
    assert told_apart(3, None) == "3, now None" and told_apart("MMDiT/2", "SiT-B/2") == "'MMDiT/2', now 'SiT-B/2'"
    assert told_apart(list("abcdefgh"), ["a"]) == "['a', 'b', 'c', 'd', 'e', 'f', ...], now ['a']"


def test_a_network_is_known_by_its_weights(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, value in (("a", 1), ("b", 1), ("c", 2), ("folder/a", 1)):
        save_file(dict(w=torch.full((3,), float(value))), tmp_path / f"{name}.safetensors")
    sums = [weights_checksum(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c.safetensors", "folder")]
    assert sums[0] == sums[1] == sums[3] != sums[2] and weights_checksum("openai/clip-vit-large-patch14") is None


def test_what_others_get_has_no_paths_of_this_machine(tmp_path):
    settings = dict(RUN_DIR=str(tmp_path), TEXT_ENCODER="openai/clip-vit-large-patch14", SEED=3,
                    data=dict(source="/far/away/x.tar"), classes=["a/b", "c"], STEPS=None)
    found = names_alone(settings)
    assert found == dict(settings, RUN_DIR=tmp_path.name, data=dict(source="x.tar")) and json.dumps(found)


def test_a_run_shorter_than_its_emas_memory_is_said():
    assert too_short_for_ema(30_000, 0.9999) == too_short_for_ema(1, 0) == ""
    assert "STEPS 150: EMA_DECAY 0.9999 averages over more steps" in too_short_for_ema(150, 0.9999)
    assert too_short_for_ema(150, 0.9999).endswith("0.98 fits") and too_short_for_ema(150, 0.98) == ""


def test_whole_floats_and_none_are_taken_as_users_mean_them(small_run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    small_run(STEPS=4.0, ALIGN_STEPS=2e0, LOG_EVERY=None, CHECKPOINT_EVERY=0, CHECKPOINTS_KEPT=0, PREVIEW_EVERY=None,
              RUN_DIR="~/home run")
    train.main()
    run = tmp_path / "home run"
    assert [row["step"] for row in read_log(run)] == ["2", "4"]  # the switch and the end alone
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000004"]
    small_run(STEPS=8, CHECKPOINT_EVERY=2, CHECKPOINTS_KEPT=None, KEEP_EVERY=None, RUN_DIR="~/home run")
    train.main()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_0000008"]
