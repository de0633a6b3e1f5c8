"""The SD-VAE: diffusers' numbers, names and files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vae import AutoencoderKL, load_vae


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


def test_vae_equals_diffusers_on_random_weights(vae_folder):
    folder, theirs = vae_folder
    ours, scale = load_vae(folder)
    assert scale == 0.25
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        posterior, (mean, std) = theirs.encode(x).latent_dist, ours.encode(x)
        torch.testing.assert_close(mean, posterior.mean, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(std, posterior.std, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours.decode(mean), theirs.decode(mean).sample, rtol=1e-3, atol=1e-4)


def test_default_vae_has_the_keys_and_shapes_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours = AutoencoderKL().state_dict()
        theirs = diffusers.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                                         down_block_types=["DownEncoderBlock2D"] * 4,
                                         up_block_types=["UpDecoderBlock2D"] * 4).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


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
    ours, _ = load_vae(tmp_path)
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_vae_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="VAE 'stabilityai/sd-vae-ft-ema' is no local file or folder and could not be"):
        load_vae("stabilityai/sd-vae-ft-ema")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not the weights of a diffusers AutoencoderKL"):
        load_vae(tmp_path)


def test_a_vae_whose_latents_want_normalising_is_refused(vae_folder, tmp_path):
    shutil.copytree(vae_folder[0], tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(dict(config, shift_factor=0.1159)))
    with pytest.raises(ValueError, match="latents that are to be shifted or normalised by channel"):
        load_vae(tmp_path / "vae")
