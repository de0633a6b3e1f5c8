"""INIT_FROM: a run begins with weights that exist, ours or published; what of them is adapted, what is refused."""

import json
import re
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from init_from import initial_weights
from model import MODELS, build, make_network
from tests.conftest import ROOT
from tests.test_train import assert_same_state, final_state


def randomized(network):
    """The network with every weight drawn anew: a fresh one's output is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in network.state_dict().items():
        if name != "pos_embed":
            weight.normal_(std=0.1, generator=generator)
    return network.eval()


def written(path, network, arguments, **settings):
    """A run's ema.safetensors of a network."""
    settings = dict(PATH="linear", NOISE_SCALE=1.0, data=dict(vae=None)) | settings
    save_file(network.state_dict(), path, metadata=dict(settings=json.dumps(dict(settings, sit=arguments))))
    return path


def arguments(name="SiT-T/4", **changes):
    return dict(MODELS[name], input_size=28, in_channels=1, num_classes=10, class_dropout_prob=0.1,
                teacher_dim=None) | changes


SETTINGS = dict(MODEL="a model", PATH="linear", NOISE_SCALE=1.0, data=dict(vae=None))


def test_a_run_that_learns_nothing_is_its_source(small_run, tmp_path):
    source = small_run(STEPS=4, ALIGN_STEPS=2)
    train.main()
    run = small_run(RUN_DIR=str(tmp_path / "second"), INIT_FROM=str(source), LEARNING_RATE=0.0, STEPS=2, ALIGN_STEPS=1)
    train.main()
    before, after = (load_file(folder / "ema.safetensors") for folder in (source, run))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    said = f"{source}: {len(before)} tensors to start from; fresh: projector"
    assert said in (run / "log.txt").read_text().splitlines()


@pytest.mark.slow
def test_a_run_that_has_begun_resumes_itself_after_a_kill(run_process, small_run, tmp_path):
    source = small_run(RUN_DIR=str(tmp_path / "source"), STEPS=2)
    train.main()
    whole = run_process(tmp_path / "whole", INIT_FROM=str(source))
    assert whole.returncode == 0, whole.stderr
    assert run_process(tmp_path / "killed", signal.SIGKILL, 7, INIT_FROM=str(source)).returncode == -signal.SIGKILL
    resumed = run_process(tmp_path / "killed", INIT_FROM=str(tmp_path / "gone"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))


def test_the_first_release_is_turned_to_our_time(tmp_path):
    theirs = randomized(build("SiT-T/4", learn_sigma=True, teacher_dim=None))
    torch.save(theirs.state_dict(), tmp_path / "SiT-T.pt")
    network = dict(MODELS["SiT-T/4"], num_classes=1000, teacher_dim=None)
    weights, said = initial_weights(tmp_path / "SiT-T.pt", network, dict(SETTINGS, data=dict(vae=dict(name="other"))))
    ours = make_network(network).eval()
    ours.load_state_dict(weights)
    x, t, y = torch.randn(4, 4, 32, 32), torch.rand(4), torch.tensor([0, 3, 999, 1000])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t, y)[0], -theirs(x, 1 - t, y)[0], rtol=1e-4, atol=1e-5)
    assert "differs: VAE" in said and "other" in said


@pytest.mark.parametrize("name", ["SiT-T/4", "JiT-T/4"])
def test_another_number_of_classes_a_grid_and_channels_are_adapted(tmp_path, name):
    before = arguments(name, num_classes=3)
    source = randomized(make_network(before))
    path = written(tmp_path / "ema.safetensors", source, before, NOISE_SCALE=2.0)

    weights, said = initial_weights(path, arguments(name), SETTINGS)
    table = weights["y_embedder.embedding_table.weight"]
    assert table.shape[0] == 11 and torch.equal(table, source.y_embedder.embedding_table.weight[3:].expand(11, -1))
    assert "adapted: 3 classes to 10; fresh: projector; differs: NOISE_SCALE 2.0" in said

    same = dict(before, input_size=56)
    weights, said = initial_weights(path, same, SETTINGS)
    assert "7 x 7 positions to 14 x 14" in said
    larger = make_network(same).eval()
    larger.load_state_dict(weights)
    means = larger.pos_embed.detach().unflatten(1, (7, 2, 7, 2)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(means, source.pos_embed.detach(), rtol=0, atol=0.25)

    weights, said = initial_weights(path, dict(before, in_channels=3), SETTINGS)
    assert "fresh: x_embedder, final_layer.linear, projector" in said
    assert not any(key.startswith(("x_embedder", "final_layer.linear")) for key in weights)
    begun = make_network(dict(before, in_channels=3))
    missing, unexpected = begun.load_state_dict(weights, strict=False)
    assert not unexpected and all(key.startswith(("x_embedder", "final_layer.linear")) for key in missing)


@pytest.mark.parametrize("changes, words", [
    (dict(hidden_size=64), "blocks of width 64"), (dict(depth=4), "SiT of 4 blocks"), (dict(num_heads=2), "2 heads"),
    (dict(patch_size=2), "patch 2"), (dict(qk_norm=True), "network in blocks.0.attn.q_norm.weight"),
    (dict(mlp_ratio=2.0), "network in blocks.0.mlp.fc1.weight"),
    (dict(bottleneck_dim=32), "JiT of 6 blocks"), (dict(context_dim=16), "MMDiT of 6 blocks")])
def test_another_kind_of_network_is_refused(tmp_path, changes, words):
    path = written(tmp_path / "ema.safetensors", make_network(arguments()), arguments())
    wanted = arguments(**changes)
    if "context_dim" in changes:
        del wanted["num_classes"], wanted["class_dropout_prob"]
    with pytest.raises(ValueError, match="INIT_FROM .*ema.safetensors: (SiT of 6|differs)") as refused:
        initial_weights(path, wanted, SETTINGS)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_what_cannot_be_is_refused_before_anything_is_written(small_run, tmp_path):
    run = small_run(INIT_FROM=str(tmp_path / "gone"), TEACHER="no such teacher.safetensors")
    with pytest.raises(ValueError, match="gone: no such file; .* INIT_FROM"):
        train.main()
    path = written(tmp_path / "ema.safetensors", make_network(arguments()), arguments(), PATH="cosine")
    small_run(INIT_FROM=str(path))
    with pytest.raises(ValueError, match="path 'cosine', but this run's is SiT .* path 'linear'"):
        train.main()
    assert not run.exists()


def test_readmes_recipe_is_made_of_constants_that_there_are():
    recipe = (ROOT / "README.md").read_text().partition("train.INIT_FROM")[2].partition("```")[0]
    names = re.findall(r"train\.(\w+)", recipe)
    assert set(names) == {"MODEL", "LEARNING_RATE", "WARMUP_STEPS", "EMA_DECAY"}
    assert all(hasattr(train, name) for name in names)
