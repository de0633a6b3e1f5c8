"""Autoencoders (arXiv 2112.10752): SD's, SDXL's, SD3's, FLUX's, FLUX.2's, VA-VAE and REPA-E's.

    vae, scale, shift = load_vae("stabilityai/sd-vae-ft-ema")
    mean, std = vae.encode(images)                    # images [B, 3, H, W] in -1..1
    latents = (mean + std * noise - shift) * scale    # SD-VAE: 4 x 32 x 32 of 256 x 256 pixels
    images = vae.decode(latents / scale + shift)

Scale and shift are numbers, or lists of one a channel. Parameter names and numbers are those of
diffusers' AutoencoderKL.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from published import (
    autoencoder_arguments,
    find_autoencoder,
    own_normalisation,
    read_autoencoder,
    read_config,
    rename_autoencoder,
)


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

    def __init__(self, channels, norm_groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        B, C, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, h * w, C]
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # [B, 1, h * w, C]
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + out.transpose(1, 2).reshape(B, C, h, w)


class MidBlock(nn.Module):
    """Resnet, attention (or none), resnet, at the lowest resolution."""

    def __init__(self, channels, norm_groups, attention):
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, norm_groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, norm_groups) for _ in range(2))

    def forward(self, x):
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class Resample(nn.Module):
    """Half the resolution by a strided convolution (padded right and below only), or double it (nearest, then 3x3)."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if down else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """Resnets at one resolution, each with attention after it (or none), then a resample (none in the last stage)."""

    def __init__(self, in_channels, out_channels, num_resnets, norm_groups, attention, down, last):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_groups)
                                     for i in range(num_resnets))
        self.attentions = nn.ModuleList(SpatialAttention(out_channels, norm_groups)
                                        for _ in range(num_resnets if attention else 0))
        resamplers = nn.ModuleList([] if last else [Resample(out_channels, down)])
        self.downsamplers, self.upsamplers = (resamplers, None) if down else (None, resamplers)

    def forward(self, x):
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions:
                x = self.attentions[i](x)
        for resample in (*(self.downsamplers or ()), *(self.upsamplers or ())):
            x = resample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, channels, latent_channels, layers_per_block, norm_groups, attention):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.down_blocks = nn.ModuleList(
            Stage(widths[i], widths[i + 1], layers_per_block, norm_groups, f"encoder.down_blocks.{i}" in attention,
                  down=True, last=i + 1 == len(channels))
            for i in range(len(channels)))
        self.mid_block = MidBlock(widths[-1], norm_groups, "encoder.mid_block" in attention)
        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, channels, latent_channels, layers_per_block, norm_groups, attention):
        super().__init__()
        widths = [channels[-1], *reversed(channels)]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], norm_groups, "decoder.mid_block" in attention)
        self.up_blocks = nn.ModuleList(
            Stage(widths[i], widths[i + 1], layers_per_block + 1, norm_groups, f"decoder.up_blocks.{i}" in attention,
                  down=False, last=i + 1 == len(channels))
            for i in range(len(channels)))
        self.conv_norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The SD-VAE, or another by its arguments; its state dict is that of diffusers' AutoencoderKL (old
    names and LDM's load too).

    attention: the blocks that have it, by name. patch_size: FLUX.2's latents are patches of 2 x 2.
    Latents have `channels` channels, and of the images' height and width 1 / `factor`.
    """

    def __init__(self, block_channels=(128, 256, 512, 512), latent_channels=4, layers_per_block=2,
                 norm_groups=32, decoder_channels=None, quant_conv=True, post_quant_conv=True, patch_size=1,
                 attention=("encoder.mid_block", "decoder.mid_block")):
        super().__init__()
        sizes, C = (latent_channels, layers_per_block, norm_groups, attention), latent_channels
        self.encoder = Encoder(block_channels, *sizes)
        self.decoder = Decoder(decoder_channels or block_channels, *sizes)
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if post_quant_conv else nn.Identity()
        self.patch_size, self.channels = patch_size, C * patch_size**2
        self.factor = patch_size * 2 ** (len(block_channels) - 1)
        self.register_load_state_dict_pre_hook(lambda _, state, *__: rename_autoencoder(state))

    def encode(self, x):
        """Images [B, 3, H, W] in -1..1 to the posterior's (mean, std), [B, channels, H/factor, W/factor]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30, 20))
        return F.pixel_unshuffle(mean, self.patch_size), F.pixel_unshuffle(std, self.patch_size)

    def decode(self, z):
        """Latents as encode makes them to images [B, 3, H, W], nominally in -1..1."""
        return self.decoder(self.post_quant_conv(F.pixel_shuffle(z, self.patch_size)))


# ----- latents as the network sees them -----------------------------------------------------------
@lru_cache
def per_channel(numbers, device):
    """Numbers as [C, 1, 1]; made once, as copying them to a GPU in each step would wait for it."""
    return torch.tensor(numbers, device=device)[:, None, None]


def normalisation(vae_meta, device):
    """(scale, shift), numbers or [C, 1, 1], by what meta.json says of its VAE; (1, 0) without a VAE."""
    both = (vae_meta["scale"], vae_meta.get("shift", 0.0)) if vae_meta else (1.0, 0.0)
    return [each if isinstance(each, (int, float)) else per_channel(tuple(each), device) for each in both]


def sample_latents(moments, noise, vae_meta):
    """Normalised latents from stored (mean, std) [B, 2C, h, w], with noise [B, C, h, w]. Without a VAE
    pixels in -1..1 from uint8 [B, C, H, W]. vae_meta: what meta.json says of the VAE, None without."""
    if vae_meta is None:
        pixels = moments.float(memory_format=torch.contiguous_format)  # decoded, they lie channels last
        return (pixels / 127.5 - 1).half().float()  # rounded as earlier versions stored them
    mean, std = moments.float().chunk(2, dim=1)
    scale, shift = normalisation(vae_meta, moments.device)
    return (mean + std * noise - shift) * scale


def describe_latents(data):
    """The line that says what the network will see of a PreparedDataset: there a wrong scale shows."""
    moments = data[torch.linspace(0, len(data) - 1, min(256, len(data))).long().numpy()][0]
    noise = torch.randn(len(moments), *data.shape, generator=torch.Generator().manual_seed(0))
    std, mean = (each.item() for each in torch.std_mean(sample_latents(moments, noise, data.vae)))
    usual = abs(mean) < 0.5 and 0.5 < std < 2
    return (f"latents as the network sees them: mean {mean:.3g}, standard deviation {std:.3g}"
            + ("" if usual else "; WARNING: about 0 and 1 are meant, so look at VAE and VAE_SCALE"))


# ----- from files ---------------------------------------------------------------------------------
def load_vae(name, scale=None, shift=0.0):
    """(AutoencoderKL in eval mode, scale, shift) of a hub name, a diffusers folder or a weights file.

    scale, shift: of a run that has its own, in place of the VAE's. Raises ValueError if config or
    weights cannot be fetched, or are no AutoencoderKL's, or nothing says how to normalise its latents.
    """
    find, weights = find_autoencoder(name)
    config = read_config(find("config.json"))  # before the weights, which may be gigabytes
    file = find(weights, needed=True)
    try:
        state = read_autoencoder(file)
        groups = config.get("norm_num_groups", 32)
        vae = AutoencoderKL(**autoencoder_arguments(state), norm_groups=groups)
        vae.load_state_dict({key: value for key, value in state.items() if not key.startswith("bn.")})
    except Exception as error:  # whatever a damaged file does to safetensors or torch, the remedy is one
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file}: not the weights of a diffusers AutoencoderKL, or of LDM's, or damaged "
                         f"({reason}); set VAE to one of Stable Diffusion's, or fetch it again") from error
    if scale is None:
        scale, shift = own_normalisation(state, config, find, file, vae.channels)
    return vae.eval().requires_grad_(False), scale, shift


def load_decoder(name, vae_meta, channels, checkpoint):
    """The VAE called `name`, for latents of so many channels that a checkpoint draws. Raises ValueError
    where it does not fit, or the name is None, as of REPA-E's checkpoints."""
    if name is None:
        raise ValueError(f"{checkpoint}: does not say which VAE its latents are of; set VAE to that, or to "
                         f"the checkpoint itself if it holds its VAE, as those of REPA-E do")
    vae = load_vae(name, vae_meta["scale"])[0]
    if vae.channels != channels:
        raise ValueError(f"VAE {name!r} has latents of {vae.channels} channels, but {checkpoint} draws "
                         f"{channels}; set VAE to the one that it was trained with")
    return vae
