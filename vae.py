"""SD-VAE, Stable Diffusion's autoencoder (arXiv 2112.10752): 256 x 256 images to 4 x 32 x 32 latents and back.

    vae, scale = load_vae("stabilityai/sd-vae-ft-ema")
    mean, std = vae.encode(images)            # images [B, 3, H, W] in -1..1
    images = vae.decode(latents / scale)

Parameter names and numbers are those of diffusers' AutoencoderKL.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import nn

SCALE = 0.18215  # by which latents of Stable Diffusion's VAEs are multiplied, where their config does not say


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after group norm and SiLU, beside a shortcut."""

    def __init__(self, in_channels, out_channels, norm_groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions of [B, C, h, w]."""

    OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # the oldest files' names

    def __init__(self, channels, norm_groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.register_load_state_dict_pre_hook(self.rename_old_keys)

    @classmethod
    def rename_old_keys(cls, module, state, prefix, *_):
        for old, new in cls.OLD_NAMES.items():
            for kind in ("weight", "bias"):
                if f"{prefix}{old}.{kind}" in state:
                    state[f"{prefix}{new}.{kind}"] = state.pop(f"{prefix}{old}.{kind}")

    def forward(self, x):
        B, C, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, h * w, C]
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # [B, 1, h * w, C]
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + out.transpose(1, 2).reshape(B, C, h, w)


class MidBlock(nn.Module):
    """Resnet, attention, resnet, at the lowest resolution."""

    def __init__(self, channels, norm_groups):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, norm_groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, norm_groups) for _ in range(2))

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Resample(nn.Module):
    """Half the resolution by a strided convolution (padded right and below only), or double it (nearest, then 3x3)."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """Resnets at one resolution, then a resample (none in the last stage)."""

    def __init__(self, in_channels, out_channels, num_resnets, norm_groups, down, last):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_groups)
                                     for i in range(num_resnets))
        resamplers = nn.ModuleList([] if last else [Resample(out_channels, down)])
        self.downsamplers, self.upsamplers = (resamplers, None) if down else (None, resamplers)

    def forward(self, x):
        for layer in (*self.resnets, *(self.downsamplers or ()), *(self.upsamplers or ())):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, block_channels, latent_channels, layers_per_block, norm_groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, block_channels[0], 3, padding=1)
        widths = [block_channels[0], *block_channels]
        self.down_blocks = nn.ModuleList(
            Stage(widths[i], widths[i + 1], layers_per_block, norm_groups, down=True, last=i + 1 == len(block_channels))
            for i in range(len(block_channels)))
        self.mid_block = MidBlock(block_channels[-1], norm_groups)
        self.conv_norm_out = nn.GroupNorm(norm_groups, block_channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(block_channels[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, block_channels, latent_channels, layers_per_block, norm_groups):
        super().__init__()
        widths = [block_channels[-1], *reversed(block_channels)]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], norm_groups)
        self.up_blocks = nn.ModuleList(
            Stage(widths[i], widths[i + 1], layers_per_block + 1, norm_groups, down=False,
                  last=i + 1 == len(block_channels))
            for i in range(len(block_channels)))
        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The SD-VAE; its state dict is that of diffusers' AutoencoderKL (the oldest attention names load too)."""

    def __init__(self, block_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2, norm_groups=32):
        super().__init__()
        sizes = (block_channels, latent_channels, layers_per_block, norm_groups)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """Images [B, 3, H, W] in -1..1 to the posterior's (mean, std), each [B, latent channels, H/8, W/8]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, z):
        """Unscaled latents [B, latent channels, h, w] to images [B, 3, 8h, 8w], nominally in -1..1."""
        return self.decoder(self.post_quant_conv(z))


def sample_latents(moments, noise, vae_meta):
    """Scaled latents from stored (mean, std) [B, 2C, h, w], with noise [B, C, h, w]. Without a VAE (`vae_meta` is None)
    pixels in -1..1 from uint8 [B, C, H, W]. vae_meta: what a prepared folder's meta.json says of its VAE."""
    if vae_meta is None:
        pixels = moments.float(memory_format=torch.contiguous_format)  # decoded, they lie channels last
        return (pixels / 127.5 - 1).half().float()  # rounded as earlier versions stored them
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise) * vae_meta["scale"]


def load_vae(name):
    """(AutoencoderKL in eval mode, scale factor of its latents) from a hub name, a diffusers folder or weights file.

    Raises ValueError if the weights cannot be fetched or are not an AutoencoderKL's.
    """
    path = Path(name)
    if path.is_file():
        config_file, weights_file = path.parent / "config.json", path
    elif path.is_dir():
        config_file, weights_file = path / "config.json", path / "diffusion_pytorch_model.safetensors"
    else:
        try:
            config_file = Path(hf_hub_download(name, "config.json"))
            weights_file = Path(hf_hub_download(name, "diffusion_pytorch_model.safetensors"))
        except (OSError, ValueError) as error:  # the hub's errors are OSErrors; a malformed name is a ValueError
            raise ValueError(f"VAE {name!r} is no local file or folder and could not be fetched from the Hugging Face "
                             f"hub ({type(error).__name__}); check the name and the connection, or set VAE to a folder "
                             f"with config.json and diffusion_pytorch_model.safetensors; train.py, which needs it for "
                             f"previews alone, does without with PREVIEW_EVERY = 0") from error
    try:
        config = json.loads(config_file.read_text()) if config_file.exists() else {}
        vae = AutoencoderKL(config.get("block_out_channels", (128, 256, 512, 512)), config.get("latent_channels", 4),
                            config.get("layers_per_block", 2), config.get("norm_num_groups", 32))
        vae.load_state_dict(load_file(weights_file))
    except Exception as error:  # whatever a damaged file does to json, safetensors or torch, the user's remedy is one
        reason = str(error).splitlines()[0]
        raise ValueError(f"{weights_file}: not the weights of a diffusers AutoencoderKL, or damaged ({reason}); set "
                         f"VAE to one of Stable Diffusion's, or fetch the file again") from error
    if any(config.get(key) for key in ("shift_factor", "latents_mean", "latents_std")):
        raise ValueError(f"{config_file}: latents that are to be shifted or normalised by channel, "
                         "which is not done here; set VAE to one of Stable Diffusion's")
    return vae.eval().requires_grad_(False), config.get("scaling_factor", SCALE)
