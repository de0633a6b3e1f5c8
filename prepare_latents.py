"""Turns images into a prepared data set: VAE latents to train on, the images for the teacher, the labels.

    python prepare_latents.py                      # ImageNet: SOURCE into DATA_DIR, with the constants below
    prepare_latents.SOURCE = ...; prepare_latents.main()      # anything else, from a Python file of yours

SOURCE is a folder with one folder of images per class, or a sprite sheet: one image of square tiles, sorted by class.
A prepared folder is a few large files that memory-map (see PreparedDataset); meta.json is written last, so a folder
without it is unfinished.
"""

import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

# source
SOURCE = "data/imagenet/train"  # class-per-folder tree, or a sprite sheet's image file
SHEET_TILE = 28  # sprite sheet: edge of a tile in pixels
SHEET_CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat",  # sprite sheet: its classes in order, each
                 "sandal", "shirt", "sneaker", "bag", "ankle boot"]  # with the same number of whole rows
# result
DATA_DIR = "data/imagenet256"
IMAGE_SIZE = 256  # pixels; ADM's centre crop
VAE = "stabilityai/sd-vae-ft-mse"  # hub name, or diffusers' folder or weights file; None: pixels, no VAE
# speed
BATCH_SIZE = 64  # images per call of the VAE
WORKERS = 8  # processes that decode and crop; 0: none but this one

FORMAT = 1  # of the prepared folder
FILES = ("latents.npy", "images.bin", "image_offsets.npy", "labels.npy")


# ---------------------------------------------------------------------------------------------------------------------
# SD-VAE (Stable Diffusion's autoencoder, arXiv 2112.10752), keys and numbers as in diffusers


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
                             f"with config.json and diffusion_pytorch_model.safetensors") from error
    try:
        config = json.loads(config_file.read_text()) if config_file.exists() else {}
        vae = AutoencoderKL(config.get("block_out_channels", (128, 256, 512, 512)), config.get("latent_channels", 4),
                            config.get("layers_per_block", 2), config.get("norm_num_groups", 32))
        vae.load_state_dict(load_file(weights_file))
    except Exception as error:  # whatever a damaged file does to json, safetensors or torch, the user's remedy is one
        reason = str(error).splitlines()[0]
        raise ValueError(f"{weights_file}: not the weights of a diffusers AutoencoderKL ({reason}); "
                         f"fetch the file again") from error
    return vae.eval().requires_grad_(False), config.get("scaling_factor", 0.18215)


# ---------------------------------------------------------------------------------------------------------------------
# sources


def center_crop(image, size):
    """ADM's crop (guided-diffusion): halve with a box filter while the short edge is >= 2 * size, scale the short edge
    to size (bicubic), cut the centre. PIL image in, PIL image of size x size out."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageTree:
    """Folder of class folders; class ids follow the sorted folder names. Item i is an RGB PIL image."""

    mode = "RGB"

    def __init__(self, root):
        self.classes = sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir())
        readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        self.files, self.labels, self.ignored = [], [], 0
        for label, name in enumerate(self.classes):
            for path in sorted(p for p in Path(root, name).rglob("*") if p.is_file()):
                if path.suffix.lower() in readable:
                    self.files.append(str(path))
                    self.labels.append(label)
                else:
                    self.ignored += 1
        if not self.files:
            raise ValueError(f"{root}: no images found; SOURCE must hold one folder of images per class")

    def __getitem__(self, i):
        try:
            with Image.open(self.files[i]) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            raise ValueError(f"{self.files[i]}: unreadable image ({error}); repair or remove it, "
                             f"then run prepare_latents.py again") from error


class SpriteSheet:
    """One image of SHEET_TILE-sized tiles; each class has the same number of whole rows. Item i is a PIL image."""

    ignored = 0

    def __init__(self, path):
        try:
            sheet = Image.open(path)
            sheet.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: unreadable image ({error}); SOURCE must be a sprite sheet "
                             f"or a folder with one folder of images per class") from error
        self.sheet = sheet if sheet.mode == "L" else sheet.convert("RGB")
        self.mode, self.classes = self.sheet.mode, list(SHEET_CLASSES)
        self.columns, rows = sheet.width // SHEET_TILE, sheet.height // SHEET_TILE
        if sheet.width % SHEET_TILE or sheet.height % SHEET_TILE or rows % len(self.classes):
            raise ValueError(f"{path}: {sheet.width} x {sheet.height} pixels are not whole rows of {SHEET_TILE}-pixel "
                             f"tiles, equally many for {len(self.classes)} classes; set SHEET_TILE and SHEET_CLASSES")
        self.labels = np.repeat(np.arange(len(self.classes)), rows // len(self.classes) * self.columns)

    def __getitem__(self, i):
        left, top = i % self.columns * SHEET_TILE, i // self.columns * SHEET_TILE
        return self.sheet.crop((left, top, left + SHEET_TILE, top + SHEET_TILE))


class Crops:
    """What the workers do: item i is (uint8 pixels [H, W] or [H, W, 3], the same as PNG bytes), or the ValueError."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source.labels)

    def __getitem__(self, i):
        try:
            image = center_crop(self.source[i], self.size)
        except ValueError as error:
            return error
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)  # decoding speed does not depend on the level, writing speed does
        return np.asarray(image), file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# the prepared folder


class PreparedDataset:
    """Reads a folder written by main(). `dataset[indices]` is a batch: (moments, labels, images or None).

    latents.npy        float16 [N, 2C, h, w]: posterior mean and std; without a VAE [N, C, H, W]: the pixels in -1..1
    images.bin         PNG files end to end; image_offsets.npy int64 [N + 1]: where each begins and ends
    labels.npy         int64 [N]
    meta.json          count, sizes, class names, VAE and its scale, source, versions, bytes of each file

    Large files are memory-mapped, never copied to memory. With `with_images=False` the images' files are not opened.
    Raises ValueError where the folder is missing, unfinished or damaged.
    """

    def __init__(self, path, with_images=True):
        self.path, self.with_images = Path(path), with_images
        meta_file = self.path / "meta.json"
        if not self.path.is_dir():
            raise ValueError(f"{path}: no such folder; set DATA_DIR to a prepared data set, or make one with "
                             f"prepare_latents.py")
        if not meta_file.exists():
            raise ValueError(f"{path}: no meta.json, so this is not a finished data set; run prepare_latents.py again")
        try:
            self.meta = json.loads(meta_file.read_text())
            expected_bytes, self.vae, self.classes = self.meta["bytes"], self.meta["vae"], self.meta["classes"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{meta_file}: damaged ({error!r}); delete the folder and run prepare_latents.py again") \
                from error
        if self.meta["format"] != FORMAT:
            raise ValueError(f"{meta_file}: format {self.meta['format']}, this version reads {FORMAT}; "
                             f"delete the folder and run prepare_latents.py again")
        for name in FILES if with_images else ("latents.npy", "labels.npy"):
            found = (self.path / name).stat().st_size if (self.path / name).exists() else 0
            if found != expected_bytes[name]:
                raise ValueError(f"{self.path / name}: {found} bytes, meta.json says {expected_bytes[name]}; "
                                 f"delete the folder and run prepare_latents.py again")
        self.latents = np.load(self.path / "latents.npy", mmap_mode="r")
        self.labels = np.load(self.path / "labels.npy")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"{self.path / 'labels.npy'}: labels {self.labels.min()}..{self.labels.max()}, but "
                             f"meta.json names {len(self.classes)} classes; delete the folder and run "
                             f"prepare_latents.py again")
        moments_per_channel = 1 if self.vae is None else 2
        self.shape = (self.latents.shape[1] // moments_per_channel, *self.latents.shape[2:])  # of one latent, (C, h, w)
        if with_images:
            self.packed = np.memmap(self.path / "images.bin", dtype=np.uint8, mode="r")
            self.offsets = np.load(self.path / "image_offsets.npy", mmap_mode="r")

    def __len__(self):
        return len(self.labels)

    def __reduce__(self):  # a worker process opens the files itself; pickling a memory map would copy the data set
        return PreparedDataset, (self.path, self.with_images)

    def images(self, indices):
        """uint8 [B, 3, H, W]; grayscale images are repeated over the channels."""
        return torch.from_numpy(np.stack([self.decode(i) for i in indices])).permute(0, 3, 1, 2).contiguous()

    def decode(self, i):
        """One image as uint8 [H, W, 3]."""
        png = self.packed[self.offsets[i] : self.offsets[i + 1]].tobytes()
        try:
            return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.path / 'images.bin'}: image {i} is damaged ({error}); "
                             f"delete the folder and run prepare_latents.py again") from error

    def __getitem__(self, indices):
        moments = torch.from_numpy(self.latents[indices])
        labels = torch.from_numpy(self.labels[indices])
        return moments, labels, self.images(indices) if self.with_images else None


def write_atomically(path, write):
    """Calls write(temporary path beside `path`), flushes it to disk and renames: the file is whole or absent."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def main():
    started = time.time()
    source_path, folder = Path(SOURCE), Path(DATA_DIR)
    if not source_path.exists():
        raise ValueError(f"{SOURCE}: no such file or folder; set SOURCE to a folder with one folder of images per "
                         f"class, or to a sprite sheet")
    settings = dict(source=str(SOURCE), image_size=IMAGE_SIZE, vae_name=VAE)
    if (folder / "meta.json").exists():
        finished = PreparedDataset(folder).meta
        differing = [f"{key} {finished[key]!r}, now {settings[key]!r}" for key in settings
                     if finished[key] != settings[key]]
        if differing:
            raise ValueError(f"{folder}: finished with other settings ({'; '.join(differing)}); "
                             f"choose another DATA_DIR or delete the folder")
        print(f"{folder}: already finished, {finished['count']:,} images; nothing to do")
        return

    source = ImageTree(source_path) if source_path.is_dir() else SpriteSheet(source_path)
    count, device = len(source.labels), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if VAE is None:
        vae, vae_meta, shape = None, None, (len(source.mode), IMAGE_SIZE, IMAGE_SIZE)
    else:
        vae, scale = load_vae(VAE)
        vae, vae_meta = vae.to(device), dict(name=VAE, scale=scale)
        factor = 2 ** (len(vae.encoder.down_blocks) - 1)
        if IMAGE_SIZE % factor:
            raise ValueError(f"IMAGE_SIZE {IMAGE_SIZE} is no multiple of {factor}, the VAE's reduction")
        shape = (vae.quant_conv.out_channels, IMAGE_SIZE // factor, IMAGE_SIZE // factor)

    folder.mkdir(parents=True, exist_ok=True)
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (count, *shape))
    lengths = []
    loader = DataLoader(Crops(source, IMAGE_SIZE), BATCH_SIZE, num_workers=min(WORKERS, os.cpu_count()),
                        collate_fn=list)
    with open(folder / "images.bin", "wb") as packed, tqdm(total=count, unit="img", desc=folder.name) as bar:
        for batch in loader:
            for item in batch:
                if isinstance(item, ValueError):
                    raise item
            pixels = torch.from_numpy(np.stack([pixels for pixels, _ in batch])).to(device)
            pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
            pixels = pixels.float() / 127.5 - 1  # [B, C, H, W] in -1..1
            if vae is None:
                moments = pixels
            else:
                with torch.no_grad():
                    moments = torch.cat(vae.encode(pixels.expand(-1, 3, -1, -1)), dim=1)
            done = len(lengths)
            latents[done : done + len(batch)] = moments.half().cpu().numpy()
            for _, png in batch:
                packed.write(png)
                lengths.append(len(png))
            bar.update(len(batch))
        packed.flush()
        os.fsync(packed.fileno())
    latents.flush()
    np.save(folder / "image_offsets.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))
    np.save(folder / "labels.npy", np.asarray(source.labels, dtype=np.int64))

    meta = dict(format=FORMAT, count=count, **settings, vae=vae_meta, latent_shape=shape, image_mode=source.mode,
                classes=source.classes, bytes={name: (folder / name).stat().st_size for name in FILES},
                versions=dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__,
                              pillow=PIL.__version__))
    write_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))
    seconds = time.time() - started
    print(f"{folder}: {count:,} images of {len(source.classes)} classes in {seconds:.0f} s "
          f"({count / seconds:.0f} images/s)\n  latents {list(shape)} {meta['bytes']['latents.npy'] / 2**20:,.0f} MiB, "
          f"images {meta['bytes']['images.bin'] / 2**20:,.0f} MiB; ignored {source.ignored} files that are no images")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # bad input: its one line says what, where and the remedy
        sys.exit(f"prepare_latents.py: {error}")
