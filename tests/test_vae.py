"""Autoencoders: diffusers' numbers, names and files, LDM's files, how latents are normalised, and what is refused."""

import argparse
import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
import published
import sample
import train
from checkpoint import load_model
from model import build
from published import autoencoder_arguments
from tests.conftest import load_golden, set_constants
from vae import AutoencoderKL, load_vae, normalisation, sample_latents

FORMS = {"vae_flux": "AutoencoderKL", "vae_f16": "AutoencoderKL", "vae_flux2": "AutoencoderKLFlux2"}


def as_folder(name, folder, **config):
    """A reference file's network as a folder of diffusers'; (folder, arrays, meta)."""
    z, state, meta = load_golden(name)
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    said = dict(meta.get("config_json", meta["config"]), _class_name=FORMS[name])
    (folder / "config.json").write_text(json.dumps(dict(said, **config)))
    return folder, z, meta


def as_ldm(folder, config=None):
    """The f16 reference as VA-VAE's file: LDM's names, convolutions for attention, nested, with much beside it."""
    _, state, meta = load_golden("vae_f16")
    theirs = {old: state[ours][..., None, None] if ".attn" in old and ".norm." not in old and "weight" in old
              else state[ours] for old, ours in meta["ldm_names"].items()}
    theirs |= {"loss.logvar": torch.zeros(()), "foundation_model.encoder.conv_in.weight": torch.zeros(3)}
    folder.mkdir()
    torch.save(dict(state_dict=theirs, epoch=3), folder / "vavae.pt")
    (folder / "config.json").write_text(json.dumps(config or dict(norm_num_groups=8)))
    return folder / "vavae.pt"


# ---- numbers


def test_vae_equals_the_reference(golden):
    z, state, meta = golden("sd_vae")
    vae = AutoencoderKL(**meta["config"])
    vae.load_state_dict(state)
    tolerance = dict(rtol=meta["rtol"], atol=meta["atol"])
    with torch.no_grad():
        mean, std = vae.encode(z["x"])
        torch.testing.assert_close(mean, z["mean"], **tolerance)
        torch.testing.assert_close(std, z["std"], **tolerance)
        torch.testing.assert_close(vae.decode(z["z"]), z["decoded"], **tolerance)


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_equal_the_reference(name, tmp_path):
    folder, z, meta = as_folder(name, tmp_path / "vae")
    vae, scale, shift = load_vae(folder)
    assert (vae.factor, vae.channels) == (meta["reduction"], z["mean"].shape[1])
    vae_meta, tolerance = dict(scale=scale, shift=shift), dict(rtol=meta["rtol"], atol=meta["atol"])
    scale, shift = normalisation(json.loads(json.dumps(vae_meta)), torch.device("cpu"))
    with torch.no_grad():
        mean, std = vae.encode(z["images"])
        found = dict(mean=mean, std=std, decoded=vae.decode(z["z"] / scale + shift),
                     latents=sample_latents(torch.cat([mean, std], dim=1), z["noise"], vae_meta))
    for key, value in found.items():
        torch.testing.assert_close(value, z[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")
    assert (scale is normalisation(vae_meta, torch.device("cpu"))[0]) or isinstance(scale, float)  # no second copy


def test_vae_equals_diffusers_on_random_weights(vae_folder):
    folder, theirs = vae_folder
    ours, scale, shift = load_vae(folder)
    assert (scale, shift) == (0.25, 0.0)
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        posterior, (mean, std) = theirs.encode(x).latent_dist, ours.encode(x)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(std, posterior.std, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=1e-3, atol=1e-4)


F16 = dict(block_out_channels=(128, 128, 256, 256, 512), latent_channels=32,
           down_block_types=["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
           up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4)
SD = dict(block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
          up_block_types=["UpDecoderBlock2D"] * 4)


@pytest.mark.parametrize("form, config, latents", [
    ("AutoencoderKL", SD, (4, 8)), ("AutoencoderKL", F16, (32, 16)),
    ("AutoencoderKL", dict(SD, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False), (16, 8)),
    ("AutoencoderKL", dict(SD, mid_block_add_attention=False), (4, 8)),
    ("AutoencoderKLFlux2", {}, (128, 16)),
    ("AutoencoderKLFlux2", dict(decoder_block_out_channels=(96, 192, 384, 384)), (128, 16))])
def test_full_sizes_have_the_keys_and_shapes_of_diffusers(form, config, latents):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = getattr(diffusers, form)(**{"layers_per_block": 2, **config}).state_dict()
        ours = AutoencoderKL(**autoencoder_arguments(theirs))
        default = AutoencoderKL().state_dict()
    shapes = {key: value.shape for key, value in theirs.items() if not key.startswith("bn.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert (ours.channels, ours.factor) == latents
    assert config is not SD or {key: value.shape for key, value in default.items()} == shapes


# ---- files


def test_oldest_attention_names_load(vae_folder, tmp_path):
    folder, _ = vae_folder
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    old = {}
    for key, value in state.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert old.keys() != state.keys()
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours, *_ = load_vae(tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("file, stats", [
    ("latents_stats.pt", lambda mean, std: dict(mean=mean, std=std)),
    ("vavae-latents-stats.pt", lambda mean, std: dict(latents_bias=mean, latents_scale=1 / std))])
def test_ldms_file_is_the_same_network(file, stats, tmp_path):
    path = as_ldm(tmp_path / "ldm")
    z, state, meta = load_golden("vae_f16")
    config = meta["config_json"]
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.save(stats(mean, std), path.parent / file)
    ours, scale, shift = load_vae(path)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    torch.testing.assert_close(torch.tensor(scale), z["scale"])
    torch.testing.assert_close(torch.tensor(shift), z["shift"])
    torch.save(dict(mean=mean[:, :3], std=std[:, :3]), path.parent / file)
    with pytest.raises(ValueError, match="latents of 8 channels are to be normalised by 3 numbers; mend config.json"):
        load_vae(path)
    torch.save(dict(average=mean), path.parent / file)
    with pytest.raises(ValueError, match=f"{file}: neither latents_scale and latents_bias nor mean and std of latents"):
        load_vae(path)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module."])
def test_a_bare_file_of_four_channels_is_stable_diffusions(prefix, tmp_path):
    vae = AutoencoderKL((32, 32), 4, 1)
    state = {f"{prefix}{key}": value for key, value in vae.state_dict().items()}
    torch.save({**state, "model.diffusion_model.x": torch.zeros(2)}, tmp_path / "kl-f8.ckpt")
    ours, scale, shift = load_vae(tmp_path / "kl-f8.ckpt")
    assert (scale, shift) == (0.18215, 0.0)
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("name, config, expected", [
    ("vae_flux", {}, (0.3611, 0.1159)), ("vae_flux", dict(shift_factor=None), (0.3611, 0.0)),
    ("vae_flux", dict(scaling_factor=0.18215, latents_mean=[1.0] * 16, latents_std=[2.0] * 16),
     ([0.5] * 16, [1.0] * 16)),
    ("vae_flux", dict(latents_std=[2.0] * 16), ([0.5] * 16, 0.0)),
    ("vae_flux", dict(latents_mean=None, latents_std=None), (0.3611, 0.1159)),
    ("vae_flux", dict(scaling_factor=None, latents_mean=None), None),
    ("vae_f16", dict(latents_mean=None, latents_std=None), (0.18215, 0.0)),
    ("vae_flux2", dict(batch_norm_eps=3.0), "bn")])
def test_what_a_config_says_of_latents(name, config, expected, tmp_path):
    folder, *_ = as_folder(name, tmp_path / "vae", **config)
    if expected is None:
        with pytest.raises(ValueError, match="latents of 16 channels are normalised; set prepare_latents.VAE_SCALE"):
            load_vae(folder)
        assert load_vae(folder, 0.3099)[1:] == (0.3099, 0.0) and load_vae(folder, 2, [1.0])[1:] == (2, [1.0])
    elif expected == "bn":
        _, state, _ = load_golden(name)
        torch.testing.assert_close(torch.tensor(load_vae(folder)[1]), 1 / (state["bn.running_var"] + 3).sqrt())
    else:
        assert load_vae(folder)[1:] == expected


def test_vae_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="VAE 'stabilityai/sd-vae-ft-ema' is no local file or folder and could not be"):
        load_vae("stabilityai/sd-vae-ft-ema")
    with pytest.raises(ValueError, match="VAE '/nowhere/vae.safetensors' is no local file or folder"):
        load_vae("/nowhere/vae.safetensors")
    with pytest.raises(ValueError, match="not the weights of a diffusers AutoencoderKL.*No such file"):
        load_vae(tmp_path)
    for name in ("diffusion_pytorch_model.safetensors", "vae.pt"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ValueError, match=f"{name}: not the weights of a diffusers AutoencoderKL"):
            load_vae(tmp_path / name)
    torch.save(dict(weight=torch.zeros(3)), tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="vae.pt: not the weights of a diffusers AutoencoderKL"):
        load_vae(tmp_path / "vae.pt")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="config.json: damaged .*; fetch it again"):
        load_vae(tmp_path)


@pytest.mark.parametrize("config", [
    dict(_class_name="AutoencoderDC", latent_channels=32, scaling_factor=0.41407), dict(_class_name="AutoencoderRAE"),
    dict(_class_name="AutoencoderKLQwenImage", z_dim=16, latents_mean=[0.0] * 16)])
def test_another_form_is_named_before_weights_are_read(config, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
    fetched = []

    def fetch(repository, file):
        fetched.append(file)
        return tmp_path / file

    monkeypatch.setattr(published, "hf_hub_download", fetch)
    for name in (tmp_path, "owner/repository"):
        with pytest.raises(ValueError, match=f"config.json: of another form, {next(iter(config.values()))}; set"):
            load_vae(name)
    assert fetched == ["config.json"]


@pytest.mark.parametrize("name, repository, inside", [
    ("black-forest-labs/FLUX.1-dev/vae", "black-forest-labs/FLUX.1-dev", "vae/"),
    ("REPA-E/e2e-sd3.5-vae", "REPA-E/e2e-sd3.5-vae", ""),
    ("hustvl/vavae/vavae.pt", "hustvl/vavae", ""), ("owner/many/one/vavae.pt", "owner/many", "one/")])
def test_hub_names(name, repository, inside, tmp_path, monkeypatch):
    """A repository, a folder in one, and a file in one, whose statistics lie beside it."""
    folder = tmp_path / "vae"
    if name.endswith(".pt"):
        as_ldm(folder)
        torch.save(dict(mean=torch.zeros(1, 8, 1, 1), std=torch.full((1, 8, 1, 1), 2.0)), folder / "latents_stats.pt")
    else:
        as_folder("vae_flux", folder)

    def fetch(asked, file):
        assert asked == repository and file.startswith(inside)
        if not (folder / file.removeprefix(inside)).exists():
            raise EntryNotFoundError("404")
        return str(folder / file.removeprefix(inside))

    monkeypatch.setattr(published, "hf_hub_download", fetch)
    vae, scale, shift = load_vae(name)
    assert (vae.channels, scale, shift) == ((8, [0.5] * 8, [0.0] * 8) if name.endswith(".pt") else (16, 0.3611, 0.1159))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"VAE '{name}' is no local file or folder and could not be fetched .*"
                                         rf"\(EntryNotFoundError of .*\); check the name"):
        load_vae(name)


# ---- from images to samples


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draws from a checkpoint, in place of what a sampler made given latents; uint8 [N, H, W, 3]."""
    def run(latents, out, **constants):
        set_constants(monkeypatch, sample, **{**dict(
            RUN_DIR=str(tmp_path / "run"), OUT=str(tmp_path / out), NUM_SAMPLES=len(latents), BATCH_SIZE=8, GRID=None,
            CFG_SCALE=1.0, MODE="ode", COMPILE=False), **constants})
        monkeypatch.setattr(sample, "sample_ode", lambda *_, **__: latents)
        sample.main()
        with np.load(tmp_path / out / "samples.npz") as file:
            return torch.from_numpy(file["arr_0"])
    return run


def decoded(vae, latents, scale, shift):
    """The same by hand."""
    scale, shift = (torch.tensor(each).view(-1, 1, 1) for each in (scale, shift))
    with torch.no_grad():
        images = vae.decode(latents / scale + shift)
    return (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("name, model_name, side", [("vae_flux", "SiT-T/4", 32), ("vae_f16", "student", 32),
                                                    ("vae_flux2", "student", 64)])
def test_pipeline(name, model_name, side, tree, prepare, small_run, draw, tmp_path, monkeypatch, capsys):
    """Shift and scale are those of the VAE from meta.json by training to the samples; patches of 1 fit f16."""
    monkeypatch.setitem(model.MODELS, "student", dict(model.MODELS["SiT-T/4"], patch_size=1, depth=3))
    folder, *_ = as_folder(name, tmp_path / "vae")
    vae, scale, shift = load_vae(folder)
    data = prepare(SOURCE=str(tree), VAE=str(folder), IMAGE_SIZE=side)
    assert data.vae == dict(name=str(folder), scale=scale, shift=shift)
    assert data.shape == (vae.channels, side // vae.factor, side // vae.factor)
    assert "  latents as the network sees them: mean " in capsys.readouterr().out
    prepare(VAE=str(folder), IMAGE_SIZE=side, CHECK=True)

    seen, losses = [], train.compute_losses
    monkeypatch.setattr(train, "compute_losses", lambda *batch: seen.append(batch[2:4]) or losses(*batch))
    run = small_run(DATA_DIR=str(data.path), MODEL=model_name, ALIGN_STEPS=0, STEPS=2, PREVIEW_EVERY=2,
                    PREVIEW_GRID=(2, 2), PREVIEW_STEPS=1)
    train.main()
    mean, std = data[train.batch_indices(0, len(data), 0, 1)][0].float().chunk(2, dim=1)
    posterior_noise = train.draw_noise(0, data.shape, 0, 1, torch.device("cpu"))[0]
    by_hand = mean + std * posterior_noise - torch.tensor(shift).view(-1, 1, 1)
    torch.testing.assert_close(seen[0][0], by_hand * torch.tensor(scale).view(-1, 1, 1))
    with safe_open(run / "ema.safetensors", "pt") as file:
        vae_meta = json.loads(file.metadata()["settings"])["data"]["vae"]
    assert vae_meta == dict(name="vae", scale=scale, shift=shift)  # for others, without this machine's path

    latents = torch.randn(3, *data.shape)
    assert torch.equal(draw(latents, "samples"), decoded(vae, latents, scale, shift))
    other, *_ = as_folder("vae_flux" if name == "vae_f16" else "vae_f16", tmp_path / "other")
    with pytest.raises(ValueError, match=f"VAE '{other}' has latents of .* channels, but .* draws {vae.channels}; set"):
        draw(latents, "others", VAE=str(other))

    small_run(DATA_DIR=str(data.path), MODEL=model_name, ALIGN_STEPS=0, STEPS=3)  # goes on, but not with other latents
    train.main()
    meta = json.loads((data.path / "meta.json").read_text())
    (data.path / "meta.json").write_text(json.dumps(dict(meta, vae=dict(meta["vae"], shift=0.5))))
    small_run(DATA_DIR=str(data.path), MODEL=model_name, ALIGN_STEPS=0, STEPS=4)
    with pytest.raises(ValueError, match="made with other settings .*the data's vae"):
        train.main()


def test_stable_diffusions_folders_and_runs_stay_as_they_are(tree, prepare, small_run, vae_folder, tmp_path):
    data = prepare(SOURCE=str(tree), VAE=str(vae_folder[0]))
    assert data.vae == dict(name=str(vae_folder[0]), scale=0.25)
    assert list(data.meta) == ["format", "count", "source", "captions_source", "image_size", "crop", "vae_name",
                               "vae_checksum", "mirror", "vae_precision", "vae", "latent_shape", "image_mode",
                               "classes", "captions", "captions_checksum", "bytes", "versions", "chunks"]
    moments, noise = data[np.arange(5)][0], torch.randn(5, 4, 8, 8)
    mean, std = moments.float().chunk(2, dim=1)
    assert torch.equal(sample_latents(moments, noise, data.vae), (mean + std * noise) * 0.25)
    vae = load_vae(vae_folder[0])[0]
    before = (255 * (vae.decode(noise / 0.25) + 1) / 2).clamp(0, 255).to(torch.uint8)
    assert torch.equal(sample.to_bytes(noise.double(), vae, *normalisation(data.vae, noise.device)), before)
    for steps in (1, 2):
        run = small_run(DATA_DIR=str(data.path), ALIGN_STEPS=0, STEPS=steps)
        train.main()
    assert json.loads((run / "settings.json").read_text())["data"]["vae"] == data.vae


def test_a_recipes_own_scale(tree, prepare, tmp_path, capsys):
    """As SR-DiT's, which multiplies by a number of its own and does not shift."""
    folder, *_ = as_folder("vae_flux", tmp_path / "vae", scaling_factor=None)
    with pytest.raises(ValueError, match="normalised; set prepare_latents.VAE_SCALE"):
        prepare(SOURCE=str(tree), VAE=str(folder))
    data = prepare(SOURCE=str(tree), VAE=str(folder), VAE_SCALE=0.3099)
    assert data.vae == dict(name=str(folder), scale=0.3099) and data.meta["vae_scale"] == [0.3099, 0.0]
    prepare(SOURCE=str(tree), VAE=str(folder), VAE_SCALE=(0.3099, 0))
    assert "already finished" in capsys.readouterr().out
    for other, now in ((None, "None"), ((0.3099, 1.0), r"\[0.3099, 1.0\]")):
        with pytest.raises(ValueError, match=rf"finished with other settings \(vae_scale \[0.3099, 0.0\], now {now}\)"):
            prepare(SOURCE=str(tree), VAE=str(folder), VAE_SCALE=other)
    for wrong in (0, -1.0, "1", True, (1.0,), (0.0, 1.0), (1.0, "0"), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="VAE_SCALE = .*; allowed: scale, .scale, shift. or None"):
            prepare(SOURCE=str(tree), VAE=str(folder), VAE_SCALE=wrong)
    data = prepare(SOURCE=str(tree), VAE=str(folder), VAE_SCALE=[2, -0.5], DATA_DIR=str(tmp_path / "shifted"))
    assert data.vae == dict(name=str(folder), scale=2, shift=-0.5)


def test_the_line_after_preparation_says_what_the_network_sees(tree, prepare, tmp_path, capsys):
    folder, *_ = as_folder("vae_flux", tmp_path / "vae")
    data = prepare(SOURCE=str(tree), VAE=str(folder))
    x = sample_latents(data[np.arange(5)][0], torch.randn(5, *data.shape), dict(scale=1.0))
    std, mean = (each.item() for each in torch.std_mean(x))
    for out, scale, expected in (("right", (1 / std, mean), (0, 1)), ("small", (0.2 / std, mean), (0, 0.2)),
                                 ("far", (1 / std, mean - std), (1, 1))):
        capsys.readouterr()
        prepare(SOURCE=str(tree), VAE=str(folder), VAE_SCALE=scale, DATA_DIR=str(tmp_path / out))
        found = re.search(r"  latents as the network sees them: mean (\S+), standard deviation ([^\s;]+)(.*)\n",
                          capsys.readouterr().out)
        assert [float(found[1]), float(found[2])] == pytest.approx(expected, abs=0.05)
        warning = "; WARNING: about 0 and 1 are meant, so look at VAE and VAE_SCALE"
        assert found[3] == ("" if out == "right" else warning)


def test_repa_es_checkpoint_normalises_by_its_own_and_holds_its_vae(draw, tmp_path):
    torch.manual_seed(0)
    theirs = build("SiT-S/1", in_channels=8, input_size=8)
    z, state, meta = load_golden("vae_f16")
    bn = torch.nn.BatchNorm2d(8, eps=1e-4, affine=False)
    bn.running_mean, bn.running_var = z["shift"].clone(), 1 / z["scale"] ** 2 - 1e-4
    of_network = {**theirs.state_dict(), **{f"bn.{key}": value for key, value in bn.state_dict().items()}}
    file = tmp_path / "0400000.pt"
    ldm = torch.load(as_ldm(tmp_path / "ldm"), weights_only=True)
    whole = dict(ema=of_network, vae=ldm["state_dict"], args=argparse.Namespace(a=1))
    torch.save(whole, file)
    ours, settings = load_model(file)
    x, t, y = torch.randn(1, 8, 8, 8), torch.rand(1), torch.tensor([3])
    assert torch.equal(ours(x, t, y)[0], theirs(x, t, y)[0])
    vae_meta = settings["data"]["vae"]
    torch.testing.assert_close(torch.tensor(vae_meta["scale"]), z["scale"])
    torch.testing.assert_close(torch.tensor(vae_meta["shift"]), z["shift"])

    latents = torch.randn(2, 8, 8, 8)
    with pytest.raises(ValueError, match="0400000.pt: does not say which VAE its latents are of; set VAE to"):
        draw(latents, "without", CHECKPOINT=str(file))
    (tmp_path / "config.json").write_text(json.dumps(dict(norm_num_groups=8)))
    drawn = draw(latents, "with", CHECKPOINT=str(file), VAE=str(file))
    vae = AutoencoderKL(**autoencoder_arguments(state), norm_groups=8)
    vae.load_state_dict(state)
    assert torch.equal(drawn, decoded(vae, latents, vae_meta["scale"], vae_meta["shift"]))
