"""REG (arXiv 2507.01467), CLASS_WEIGHT: the reference's numbers, class tokens stored once, both phases, files."""

import argparse
import csv
import json
import re
import shutil
import signal
from itertools import product

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import class_tokens
import costs
import sample
import train
from checkpoint import load_model
from class_tokens import WithClassTokens, clean_state
from dataset import PreparedDataset
from experiments import compare, draw, reg
from init_from import initial_weights
from model import MODELS, SiT, build, interpolate, pack, unpack
from teacher import Teacher, teacher_for_grid
from tests.conftest import ROOT, read_log, set_constants
from tests.test_init_from import SETTINGS, arguments, randomized, written
from tests.test_train import assert_close_models, assert_same_state, final_state, read_losses


@pytest.fixture
def reference(golden):
    """(REG's network of the goldens, the arrays and meta of one of them) by its name."""
    def load(name):
        state, config = golden("reg_forward")[1], golden("reg_forward")[2]["config"]
        model = SiT(**config, cls_dim=config["teacher_dim"]).eval()
        assert torch.equal(model.pos_embed, state["pos_embed"])
        model.load_state_dict(state)
        z, _, meta = golden(name)
        return model, z, meta
    return load


def test_forward_equals_the_reference(reference):
    model, z, meta = reference("reg_forward")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0], output[0]]))
    packed, logits, features = model(pack(z["x"], z["cls"]), z["t"], z["y"], (3, 0, 1, 2), return_features=True)
    velocity, cls_velocity = unpack(packed, z["x"].shape[1:])
    pairs = [(velocity, z["velocity"]), (cls_velocity, z["cls_velocity"]), (features, z["features"])]
    pairs += [(ours, z[f"logits/{layer}"]) for ours, layer in zip(logits, (3, 0, 1, 2), strict=True)]
    pairs += [(seen[0], z["tokens_in"]), *((tokens, z[f"tokens/{i}"]) for i, tokens in enumerate(seen[1::2]))]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **meta["tolerance"])


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_losses_and_their_gradients_equal_the_reference(reference, monkeypatch, path):
    """On the cosine path what is meant; what the published code computes there meets every image's target."""
    model, z, meta = reference("reg_loss")
    set_constants(monkeypatch, train, CLASS_WEIGHT=0.03, ATTENTION_WEIGHT=0, PATH=path)
    x, noise = pack(z["image"], z["cls_clean"]), pack(z["noise"], z["cls_noise"])
    latents, cls = unpack(interpolate(x, noise, z["t"], path)[0], model.shape)
    denoising, feature, attention, each, of_class = train.compute_losses(
        model, lambda images, return_qk: (z["teacher_tokens"], []), x, noise, z["t"], z["y"], None)
    total = denoising + 0.5 * feature + 0.03 * of_class
    total.backward()
    found = dict(x_t=latents, cls_t=cls, denoising=each, feature=feature, total=total)
    for name, ours in found.items():
        torch.testing.assert_close(ours, z[f"{path}_{name}"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_class, z[f"{path}_cls_denoising"].mean(), rtol=1e-5, atol=1e-5)
    assert attention == 0
    if path == "cosine":
        assert abs(of_class - z["cosine_cls_denoising_published"].mean()) > 0.1
    gradients = {key: value for key, value in z.items() if key.startswith(f"{path}_grad/")}
    for key, theirs in gradients.items():
        ours = model.get_parameter(key.partition("/")[2]).grad
        assert (ours - theirs).abs().max() < meta["tolerance"]["gradients"] * theirs.abs().max(), key
    assert len(gradients) == 10


def test_samplers_equal_the_reference(reference):
    """But for cases in which class token and latents are guided by two scales."""
    model, z, meta = reference("reg_sampler")
    velocity, checked = lambda x, t, y: model(x, t, y)[0], 0
    for case in meta["cases"]:
        if case["cfg_scale"] != case["cls_cfg_scale"]:
            continue
        options = dict(steps=case["steps"], null=meta["null"], cfg_scale=case["cfg_scale"], guidance=case["guidance"],
                       path=case["path"])
        key, x = case["key"], pack(z["z"], z["cls_z"])
        if case["kind"] == "sde":
            replay = iter([pack(a, b).double() for a, b in zip(z[f"{key}_noise"], z[f"{key}_cls_noise"])])
            x = sample.sample_sde(velocity, x, z["y"], randn_like=lambda _, replay=replay: next(replay), **options)
        else:
            x = sample.sample_ode(velocity, x, z["y"], heun=case.get("heun", False), **options)
        for ours, theirs in zip(unpack(x, model.shape), (z[key], z[f"{key}_cls"])):
            torch.testing.assert_close(ours, theirs, **meta["tolerance"])
        checked += 1
    assert checked == 8


def test_what_is_packed_is_unpacked():
    latents, cls = torch.randn(3, 4, 2, 6), torch.randn(3, 5)
    packed = pack(latents, cls)
    assert packed.shape == (3, 1, 1, 53)
    assert all(torch.equal(a, b) for a, b in zip(unpack(packed, (4, 2, 6)), (latents, cls)))
    alone, nothing = unpack(latents, (4, 2, 6))  # latents that were not packed
    assert torch.equal(alone, latents) and nothing.shape == (3, 0)


def test_a_new_network_is_as_the_published_one():
    for name, count in (("SiT-B/2", 131_683_600), ("SiT-L/2", 459_664_144), ("SiT-XL/2", 676_886_032)):
        with torch.device("meta"):
            model = build(name, cls_dim=768, teacher_dim=None)
        assert sum(p.numel() for p in model.parameters()) == count
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()
              if key.startswith(("cls_", "wg_", "pos_", "final_layer.linear_cls"))}
    assert shapes == {"cls_projectors2.weight": (1152, 768), "cls_projectors2.bias": (1152,), "wg_norm.bias": (1152,),
                      "wg_norm.weight": (1152,), "final_layer.linear_cls.weight": (768, 1152),
                      "final_layer.linear_cls.bias": (768,), "pos_embed": (1, 257, 1152)}
    model = build("SiT-T/4", cls_dim=5, teacher_dim=None)
    assert (model.pos_embed[0, 0] == 0).all() and torch.equal(model.pos_embed[:, 1:], build("SiT-T/4").pos_embed)
    x, t, y = torch.randn(2, *model.state_shape), torch.rand(2), torch.tensor([3, 1000])
    assert (model(x, t, y)[0] == 0).all() and model.wg_norm.eps == 1e-6
    with pytest.raises(ValueError, match=r"x is \[2, 4, 32, 32\]; this model takes \[B, 1, 1, 4101\]"):
        model(torch.randn(2, 4, 32, 32), t, y)


def test_costs_count_one_token_more():
    with torch.device("meta"):
        plain, reg = build("SiT-XL/2", teacher_dim=None), build("SiT-XL/2", teacher_dim=None, cls_dim=768)
    teacher = Teacher("vit_tiny_patch16_224", (), 64, pretrained=False)
    assert costs.tokens_per_block(plain, None) == [256] * 28 and costs.tokens_per_block(reg, None) == [257] * 28
    for of_teacher in (None, teacher):  # which sees the image's patches and its own class token all the same
        more = costs.flops_per_image(reg, of_teacher) - costs.flops_per_image(plain, of_teacher)
        assert more == 3 * 28 * (24 * 1152**2 + 4 * 1152 * (257**2 - 256**2))
    assert costs.bytes_of_an_image(reg, None, None, torch.bfloat16) \
        == 257 / 256 * costs.bytes_of_an_image(plain, None, None, torch.bfloat16)


@pytest.mark.parametrize("settings", [dict(reg_tokens=4, no_embed_class=True, init_values=0.5), dict(),
                                      dict(class_token=False, global_pool="avg")])
def test_a_teachers_class_token_is_its_networks_own(settings):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, depth=3, **settings)
    teacher, images = Teacher(network, (1,), 64), torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        x = (images / 255 - teacher.mean.view(3, 1, 1)) / teacher.std.view(3, 1, 1)
        theirs = network.forward_features(x)
    own = theirs[:, 0]
    if "class_token" in settings:  # by fc_norm, each, as Teacher does
        own = teacher(images)[0].mean(dim=1)
    assert teacher.has_class_token == ("class_token" not in settings)
    torch.testing.assert_close(teacher.class_token(images), own, rtol=1e-4, atol=1e-5)


# ---- training


@pytest.fixture
def folder(data_dir, tmp_path):
    """A prepared folder of the test's own, as class tokens are stored in it."""
    return shutil.copytree(data_dir, tmp_path / "prepared")


def stored(folder):
    """{what a file of class tokens is called but for its teacher: the array}"""
    return {"_".join(part for part in file.stem.split("_") if len(part) != 16): np.load(file)
            for file in folder.glob("*_7x7*.npy")}


def test_the_class_tokens_of_all_images_are_stored_once(small_run, folder, teacher_file, monkeypatch):
    run = small_run(CLASS_WEIGHT=0.03, MIRROR=True, DATA_DIR=str(folder), STEPS=1, CHECKPOINT_EVERY=0)
    train.main()
    data, teacher = PreparedDataset(folder), Teacher(str(teacher_file), (), 28)
    files = stored(folder)
    assert sorted(files) == ["class_tokens_7x7", "class_tokens_7x7_mirrored"]
    assert not [path for path in folder.iterdir() if "unfinished" in path.name]
    for name, indices in (("class_tokens_7x7", np.arange(200)), ("class_tokens_7x7_mirrored", np.arange(200, 400))):
        tokens = teacher.class_token(data[indices][2]).half()
        torch.testing.assert_close(torch.from_numpy(files[name]), tokens, rtol=1e-2, atol=2e-3)
    paths = [next(folder.glob("class*_7x7.npy")), next(folder.glob("class*_mirrored.npy"))]
    *_, cls = WithClassTokens(paths, folder, with_images=False)[np.array([7, 203, 399])]
    expected = [files["class_tokens_7x7"][7], *files["class_tokens_7x7_mirrored"][[3, 199]]]
    assert np.array_equal(cls, expected)

    monkeypatch.setattr(class_tokens, "teacher_for_grid", lambda *_: pytest.fail("the teacher was loaded"))
    small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), RUN_DIR=f"{run}2", STEPS=1, ALIGN_STEPS=0)
    train.main()
    paths[0].write_bytes(paths[0].read_bytes()[:1000])
    small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), RUN_DIR=f"{run}3", STEPS=1)
    with pytest.raises(ValueError, match="_7x7.npy: damaged, or not the class tokens of 200 images .* delete it"):
        train.main()

    monkeypatch.undo()
    paths[0].unlink()
    leftover = paths[0].with_suffix(".unfinished")  # as of a kill when all was done
    leftover.mkdir()
    np.save(leftover / "done.npy", np.ones(4, dtype=bool))
    small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), RUN_DIR=f"{run}3", STEPS=1)
    train.main()
    assert np.array_equal(stored(folder)["class_tokens_7x7"], files["class_tokens_7x7"]) and not leftover.exists()


def test_a_teacher_without_a_class_token_gives_the_mean_of_its_patches(small_run, folder, tmp_path):
    shape = dict(img_size=28, patch_size=4, embed_dim=32, depth=4, num_heads=2, class_token=False, global_pool="avg")
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **shape)
    header = dict(architecture="vit_tiny_patch16_224", num_classes=10, settings=shape,
                  input=dict(input_size=(3, 28, 28), mean=(0.5,) * 3, std=(0.5,) * 3))
    save_file(network.state_dict(), tmp_path / "means.safetensors", metadata=dict(network=json.dumps(header)))
    for name in ("first", "second"):  # which finds them
        run = small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), TEACHER=str(tmp_path / "means.safetensors"), STEPS=1,
                        RUN_DIR=str(tmp_path / name), ALIGN_STEPS=int(name == "first"))
        train.main()
        said = [line for line in (run / "log.txt").read_text().splitlines() if "has no class token" in line]
        assert said == ["TEACHER has no class token: the mean of its patch tokens is denoised in its place"]
    assert list(stored(folder)) == ["patch_means_7x7"]


def test_both_losses_are_logged_through_both_phases(small_run, folder):
    """The first step's by hand: a new network's velocity is zero. Of loss_by_time.csv only the latents' is part."""
    run = small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), LOG_EVERY=1, NOISE_SCALE=2.0, MICRO_BATCHES=2)
    train.main()
    log = read_log(run)
    assert list(log[0])[-2:] == ["peak_gib", "class_loss"] and [row["phase"] for row in log] == ["1"] * 6 + ["2"] * 6
    data = WithClassTokens([next(folder.glob("class*.npy"))], folder)
    moments, _, _, cls = data[train.batch_indices(0, 200, 0, 1)]
    posterior, noise, _, _ = train.draw_noise(0, (1, 1, 28 * 28 + 32), 0, 1, "cpu", of_pixels=True)
    velocity = noise - clean_state(data, moments, posterior, cls)
    for part, name in zip(unpack(velocity, (1, 28, 28)), ("denoising_loss", "class_loss")):
        assert float(log[0][name]) == pytest.approx(part.square().mean().item(), rel=1e-5)
    assert torch.equal(clean_state(data, moments, None, cls)[:, 0, 0, 784:], cls.float())
    t = train.draw_noise(0, (1, 1, 28 * 28 + 32), 0, 1, "cpu", of_pixels=True)[2]
    counts = np.histogram(t, bins=10, range=(0, 1))[0]
    total = sum(mean * count for mean, count in zip(read_losses(run)[0][1:], counts) if count)
    assert total / 8 == pytest.approx(float(log[0]["denoising_loss"]), rel=1e-5)
    assert float(log[-1]["class_loss"]) < float(log[0]["class_loss"])

    state = final_state(run)
    assert state["ema"]["pos_embed"].shape == (1, 50, 128) and (state["ema"]["pos_embed"][0, 0] == 0).all()
    assert len(final_state(run)["meters"][""]) == 9


def test_without_class_weight_nothing_is_otherwise(small_run, folder):
    before = sorted(path.name for path in folder.iterdir())
    run = small_run(DATA_DIR=str(folder), STEPS=2)
    train.main()
    assert sorted(path.name for path in folder.iterdir()) == before and "class_loss" not in read_log(run)[0]
    state, settings = final_state(run, 2), json.loads((run / "settings.json").read_text())
    assert "cls_dim" not in settings["sit"] and len(state["meters"][""]) == 8
    assert not [name for name in state["model"] if "cls" in name or "wg_norm" in name]
    small_run(DATA_DIR=str(folder), STEPS=3, CLASS_WEIGHT=0.03)
    with pytest.raises(ValueError, match=r"made with other settings \(CLASS_WEIGHT 0.0, now 0.03\); set them back"):
        train.main()
    assert sorted(path.name for path in folder.iterdir()) == before  # refused before class tokens are computed


KILL_IN_THE_TOKEN_PASS = """
from teacher import Teacher
class_token, calls = Teacher.class_token, []
def kill_at_the_third(self, images):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return class_token(self, images)
Teacher.class_token = kill_at_the_third
"""


def test_kills_in_the_token_pass_and_at_the_switch_change_nothing(run_process, data_dir, tmp_path):
    results = {}
    for name in ("whole", "killed"):
        data = shutil.copytree(data_dir, tmp_path / f"{name}_data")
        constants = dict(DATA_DIR=str(data), CLASS_WEIGHT=0.03, STEPS=8, ALIGN_STEPS=4, MIRROR=True)
        if name == "killed":
            in_pass = run_process(tmp_path / name, extra=KILL_IN_THE_TOKEN_PASS, **constants)
            assert in_pass.returncode == -signal.SIGKILL and not (tmp_path / name).exists()
            (unfinished,) = data.glob("*.unfinished")
            assert np.load(unfinished / "done.npy").tolist() == [True, True, False, False]
            assert run_process(tmp_path / name, signal.SIGKILL, 4, **constants).returncode == -signal.SIGKILL
        ended = run_process(tmp_path / name, **constants)
        assert ended.returncode == 0, ended.stderr
        assert not list(data.glob("*.unfinished"))
        class_losses = [row["class_loss"] for row in read_log(tmp_path / name)]
        results[name] = stored(data), final_state(tmp_path / name, 8), class_losses
    (whole_tokens, whole, losses), (tokens, killed, losses_again) = results.values()
    assert losses == losses_again and len(losses) == 4 and all(losses)  # at 3, at the switch, at 6 and 8
    assert sorted(tokens) == ["class_tokens_7x7", "class_tokens_7x7_mirrored"]
    assert all(np.array_equal(whole_tokens[kind], tokens[kind]) for kind in tokens)
    assert_same_state(whole, killed)


def test_phase_two_needs_neither_the_teacher_nor_the_images(small_run, latents_dir, teacher_file, tmp_path):
    """Nor does what goes on from what went on without them."""
    data = shutil.copytree(latents_dir, tmp_path / "prepared")
    teacher = shutil.copyfile(teacher_file, tmp_path / "teacher.safetensors")
    constants = dict(DATA_DIR=str(data), TEACHER=str(teacher), CLASS_WEIGHT=0.03, ALIGN_STEPS=1)
    run = small_run(STEPS=2, **constants)
    train.main()
    (data / "images.bin").unlink()
    teacher.unlink()
    for steps in (4, 6):
        small_run(STEPS=steps, **constants)
        train.main()
    assert [row["phase"] for row in read_log(run)][1:] == ["2"] * (len(read_log(run)) - 1)
    assert read_log(run)[-1]["step"] == "6" and float(read_log(run)[-1]["class_loss"]) > 0


@pytest.mark.slow
def test_two_processes_agree_with_one(run_process, data_dir, tmp_path):
    for name, processes in (("one", None), ("two", 2)):
        data = shutil.copytree(data_dir, tmp_path / f"{name}_data")
        ended = run_process(tmp_path / name, processes=processes, DATA_DIR=str(data), CLASS_WEIGHT=0.03, LOG_EVERY=1,
                            MIRROR=True, CONFLICT_FROM=4, CONFLICT_EVERY=4, CONFLICT_IMAGES=16)
        assert ended.returncode == 0, ended.stderr
    (a, b), (one, two) = ([function(tmp_path / f"{name}{end}") for name in ("one", "two")]
                          for function, end in ((stored, "_data"), (read_log, "")))
    assert a.keys() == b.keys() and len(a) == 2 and all(np.array_equal(a[name], b[name]) for name in a)
    for x, y in zip(one, two, strict=True):
        for key in ("denoising_loss", "feature_loss", "attention_loss", "class_loss", "grad_norm"):
            assert float(y[key]) == pytest.approx(float(x[key]), rel=1e-3), key
        assert x["gradient_cosine"] == y["gradient_cosine"] == "" or \
            float(x["gradient_cosine"]) == pytest.approx(float(y["gradient_cosine"]), abs=1e-3)
    for part in ("model", "ema"):
        assert_close_models(final_state(tmp_path / "one")[part], final_state(tmp_path / "two")[part])


def test_the_conflict_trigger_counts_the_class_loss_as_denoising(small_run, folder, teacher_file):
    small_run(CLASS_WEIGHT=3.0, DATA_DIR=str(folder), STEPS=1, CONFLICT_IMAGES=8, CONFLICT_TIMES=(0.4,), ALIGN_DEPTH=2)
    train.main()
    data = WithClassTokens([next(folder.glob("class*.npy"))], folder)
    teacher = Teacher(str(teacher_file), (2, 3), 28)
    model = randomized(build("SiT-T/4", input_size=28, in_channels=1, num_classes=10, align_depth=2, teacher_dim=32,
                             cls_dim=32))
    moments, labels, images, cls = data[train.batch_indices(0, 200, 0, 1)]
    _, noise, _, _ = train.draw_noise(0, model.state_shape, 0, 1, torch.device("cpu"), 2, True)
    x, t = clean_state(data, moments, None, cls), torch.full((8,), 0.4)
    denoising, feature, attention, _, of_class = train.compute_losses(model, teacher, x, noise, t, labels, images)
    block = list(model.blocks[1].parameters())

    def gradient(loss):
        found = torch.autograd.grad(loss, block, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, block)])

    by_hand = [torch.cosine_similarity(gradient(loss), gradient(0.5 * feature + 0.5 * attention), dim=0).item()
               for loss in (denoising + 3 * of_class, denoising)]
    measured = train.gradient_cosine(model, teacher, train.alignment_losses, data, lambda y: y, 0, 1,
                                     torch.device("cpu"), lambda: torch.autocast("cpu", enabled=False))
    assert measured == pytest.approx(by_hand[0], abs=1e-4) and abs(by_hand[0] - by_hand[1]) > 1e-2


def test_irepas_convolution_leaves_the_class_token_out(small_run, folder):
    run = small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), PROJECTOR="conv", SPATIAL_NORM=0.6, STEPS=3)
    train.main()
    assert float(read_log(run)[0]["feature_loss"]) != 0
    model = build("SiT-T/4", cls_dim=5, teacher_dim=7, projector="conv")
    x, t, y = torch.randn(2, *model.state_shape), torch.rand(2), torch.tensor([0, 1])
    features, projectors = model(x, t, y, return_features=True)[2], model.projectors
    model.projectors = torch.nn.ModuleList([torch.nn.Identity()])
    tokens = model(x, t, y, return_features=True)[2]
    assert tokens.shape == (2, 65, 128) and torch.equal(features, projectors[0](tokens[:, 1:]))


@pytest.mark.slow
def test_compiled_it_is_itself(small_run, folder, monkeypatch):
    rows = []
    for compiled in (False, True):
        run = small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), COMPILE=compiled, LOG_EVERY=1,
                        RUN_DIR=str(folder.parent / str(compiled)))
        train.main()
        rows.append(read_log(run))
    for a, b in zip(*rows, strict=True):
        for key in ("denoising_loss", "class_loss", "feature_loss"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("constants, message", [
    (dict(CLASS_WEIGHT=-1), "CLASS_WEIGHT = -1; allowed: number from 0"),
    (dict(CLASS_WEIGHT=0.03, MODEL="MMDiT-T/4"), "CLASS_WEIGHT 0.03: a SiT alone denoises a class token, not 'MMDiT-T"),
    (dict(CLASS_WEIGHT=0.03, MODEL="JiT-T/4", TIMES=(0.8, 0.8)), "a SiT alone denoises a class token, not 'JiT-T/4'"),
    (dict(CLASS_WEIGHT=0.03, TEACHER="absent.safetensors"), "absent.safetensors: no such file")])
def test_bad_settings_are_one_line(small_run, constants, message):
    run = small_run(**constants)
    with pytest.raises(ValueError, match=message):
        train.main()
    assert not run.exists()


def test_a_folder_that_cannot_be_written_is_one_line(small_run, folder, monkeypatch):
    small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(class_tokens, "reserve", refuse)
    with pytest.raises(ValueError, match=r"unfinished: class tokens cannot be written there \(Permission denied\); "
                                         r"make DATA_DIR writable"):
        train.main()


# ---- samples, and weights of others


def test_samples_and_previews_are_the_latents_part(small_run, folder, monkeypatch, tmp_path):
    run = small_run(CLASS_WEIGHT=0.03, DATA_DIR=str(folder), STEPS=2, PREVIEW_EVERY=2, PREVIEW_STEPS=3,
                    PREVIEW_GRID=(2, 2))
    train.main()
    model, _ = load_model(run / "ema.safetensors")
    velocity = lambda x, t, y: model(x, t, y)[0]
    noise, y = sample.IndexedNoise(0, range(4)), torch.tensor([0, 0, 9, 9])
    x = sample.sample_ode(velocity, noise.draw((1, 1, 28 * 28 + 32)), y, steps=3, null=10)
    sample.save_grid(sample.to_bytes(unpack(x, (1, 28, 28))[0]), 2, tmp_path / "expected.png")
    preview, expected = (np.asarray(Image.open(path)).astype(int)
                         for path in (run / "previews/step_0000002.png", tmp_path / "expected.png"))
    assert preview.shape == (56, 56, 3) and np.abs(preview - expected).max() <= 1

    set_constants(monkeypatch, sample, RUN_DIR=str(run), NUM_SAMPLES=3, STEPS=4, CFG_SCALE=2.3, GUIDANCE=(0, 0.85),
                  GRID=(2, 2), FRAMES=3, CLASS_SAMPLING="balanced", BATCH_SIZE=2)
    sample.main()
    noise, y = sample.IndexedNoise(0, range(3)), torch.arange(3)
    x = sample.sample_sde(velocity, noise.draw((1, 1, 816)), y, steps=4, null=10, cfg_scale=2.3, guidance=(0, 0.85),
                          randn_like=noise.randn_like)
    with np.load(run / "samples/samples.npz") as file:
        drawn = file["arr_0"].astype(int)
    expected = sample.to_bytes(unpack(x, (1, 28, 28))[0]).permute(0, 2, 3, 1).numpy().astype(int)
    assert drawn.shape == (3, 28, 28, 3) and np.abs(drawn - expected).max() <= 1
    assert Image.open(run / "samples/path.png").size == (3 * 28, 2 * 28)
    for solver in ("heun", "adaptive"):
        set_constants(monkeypatch, sample, OUT=str(tmp_path / solver), MODE="ode", SOLVER=solver, FRAMES=0, GRID=None)
        sample.main()
        assert (tmp_path / solver / "samples.npz").exists()


def test_a_published_file_loads_and_samples(tmp_path):
    """Its layout: model, ema, opt, args and steps; projectors; one place more than patches, the first zero."""
    theirs = randomized(build("SiT-S/2", cls_dim=768))
    state = theirs.state_dict()
    torch.save(dict(model=state, ema=state, opt={}, args=argparse.Namespace(cls=0.03), steps=4_000_000),
               tmp_path / "published.pt")
    ours, settings = load_model(tmp_path / "published.pt")
    assert settings["sit"] == dict(input_size=32, patch_size=2, in_channels=4, hidden_size=384, depth=12, num_heads=6,
                                   num_classes=1000, class_dropout_prob=0.1, qk_norm=False, learn_sigma=False,
                                   cls_dim=768)
    velocity = sample.velocity_of(ours, settings, torch.device("cpu"))
    x, y = torch.randn(1, *ours.state_shape), torch.tensor([3])
    assert torch.equal(velocity(x, torch.tensor([0.5]), y), theirs(x, torch.tensor([0.5]), y)[0])
    drawn = sample.sample_sde(velocity, x, y, steps=2, null=1000, cfg_scale=2.3, guidance=(0, 0.85))
    assert unpack(drawn, ours.shape)[0].shape == (1, 4, 32, 32) and drawn.isfinite().all()


def test_weights_go_between_runs_with_and_without_a_class_token(tmp_path):
    plain, reg = arguments(), arguments(cls_dim=5)
    networks = {name: randomized(build("SiT-T/4", **{k: v for k, v in given.items() if k != "projector"}))
                for name, given in (("plain", plain), ("reg", reg))}
    files = {name: written(tmp_path / f"{name}.safetensors", network, given)
             for (name, network), given in zip(networks.items(), (plain, reg))}

    weights, said = initial_weights(files["reg"], reg, SETTINGS)
    assert said.endswith("; fresh: projector\n") and weights.keys() == networks["reg"].state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in networks["reg"].state_dict().items())
    weights, said = initial_weights(files["plain"], reg, SETTINGS)
    assert said.endswith("; fresh: cls_projectors2, wg_norm, final_layer.linear_cls, projector\n")
    assert torch.equal(weights["pos_embed"], networks["reg"].pos_embed)
    assert torch.equal(weights["final_layer.linear.weight"], networks["plain"].final_layer.linear.weight)
    missing, unexpected = build("SiT-T/4", **reg).load_state_dict(weights, strict=False)
    assert not unexpected and {key.rpartition(".")[0] for key in missing} == \
        {"cls_projectors2", "wg_norm", "final_layer.linear_cls"}
    weights, said = initial_weights(files["reg"], plain, SETTINGS)
    assert "left out: cls_projectors2, wg_norm, final_layer.linear_cls" in said
    build("SiT-T/4", **plain).load_state_dict(weights)
    weights, said = initial_weights(files["reg"], arguments(cls_dim=7, input_size=56), SETTINGS)
    assert weights["pos_embed"].shape == (1, 197, 128) and (weights["pos_embed"][0, 0] == 0).all()
    assert "7 x 7 positions to 14 x 14; fresh: cls_projectors2, final_layer.linear_cls, projector" in said


@pytest.mark.slow
def test_reg_in_short(restored, monkeypatch, tmp_path, capsys):
    """The reduced form: with REG every run reads the same class tokens, written before any begins."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(MODELS, "student", None)  # taken back afterwards
    set_constants(monkeypatch, compare, SOURCE=str(ROOT / "data/fashion_mnist_test.png"), HERE=tmp_path, PROCESSES=2,
                  STUDENT=dict(depth=4), SEEDS=None, STEPS=None, STOPS=None, OUT=None, RUNS=None, STOPPED=None,
                  RESULTS=None, IMAGES=10)
    set_constants(monkeypatch, reg, OUT=str(tmp_path / "out"), STEPS=(4, 8))
    with open(tmp_path / "reg.csv", "w") as file:  # what it is set beside
        file.writelines(["run,seed,step,distance\n",
                         *(f"{run},{seed},4,{seed}\n" for run in reg.LOSSES for seed in (1, 2))])
    reg.small()
    runs, _ = draw.read(tmp_path / "out_small/results.csv")
    assert list(runs) == list(reg.LOSSES) and capsys.readouterr().out.count("1.50 +-") == 6
    assert len({runs[run][0][4]["distance"] for run in runs}) == 6
    for run in runs:
        row = read_log(tmp_path / "out_small" / run / "0")[-1]
        assert ("class_loss" in row) == ("reg" in run) and row["phase"] == ("2" if run in ("plain", "reg") else "1")
    assert len(list((tmp_path / "out_small/data").glob("patch_means_*"))) == 1


def test_a_label_tells_most_of_what_the_class_token_says(prepare):
    """On the test images that come with the project, as the page says it of the training images."""
    data = prepare(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), IMAGE_SIZE=28)
    teacher = teacher_for_grid(str(ROOT / "data/teacher.safetensors"), [], 7)
    tokens, labels = teacher.class_token(data.images(range(len(data)))).numpy(), np.asarray(data.labels)
    assert reg.between_classes(tokens, labels) == pytest.approx(0.80, abs=0.02)
    assert reg.between_classes(np.eye(10)[labels], labels) == pytest.approx(1)
    assert reg.between_classes(tokens[np.random.default_rng(0).permutation(len(tokens))], labels) < 0.05


def test_the_answers_about_reg_are_those_that_the_distances_were_made_of(restored, monkeypatch, tmp_path, capsys):
    set_constants(monkeypatch, compare, RUNS=None, STOPPED=None, STOPS=None, STEPS=None, OUT=None, RESULTS=None)
    path = tmp_path / "reg.csv"
    reg.settings(tmp_path, path, reg.STEPS, reg.STOP)
    names = [*compare.RUNS, *compare.stopped_runs()]
    sizes = {"features": 0.9, "aligned": 0.6, "reg": 0.5, "stopped": 1.1}
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, compare.COLUMNS)
        table.writeheader()
        for seed, name in product((0, 1), names):
            words = {*name.replace(",", "").split(), *["aligned"] * name.startswith("stopped")}
            changed = [size + 0.1 * seed * (word == "reg") for word, size in sizes.items() if word in words]
            table.writerow(dict(run=name, seed=seed, step=reg.STEPS[-1], distance=10 * np.prod(changed)))
    reg.answers(path)
    said = [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    ratios = {question: {row[3] for row in said if row[0] == question} for question in reg.QUESTIONS}
    by_attention, by_stop, by_reg = "0.67 (0.67 to 0.67)", "1.10 (1.10 to 1.10)", "0.55 (0.50 to 0.60)"
    assert list(ratios.values()) == [{by_attention}] * 2 + [{by_stop}] * 2 + [{by_reg}] * 2 + [
        {"0.90 (0.90 to 0.90)", "0.60 (0.60 to 0.60)", "0.66 (0.66 to 0.66)"}]
    assert {name for row in said for name in row[1:3]} == set(names)


@pytest.mark.parametrize("results", ["reg", "reg_emoji"])
def test_the_pages_show_the_answers_about_reg(results, capsys):
    reg.answers(draw.HERE / f"{results}.csv")
    page = (ROOT / "experiments/README.md").read_text()
    assert [line for line in capsys.readouterr().out.splitlines() if line not in page] == []
