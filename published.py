"""What others published, networks (SiT, REPA, HASTE, REG, REPA-E, JiT, MMDiT) and autoencoders: read without
running code in it, its settings read off the names and shapes of its weights."""

import json
import math
import re
import zipfile
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file

from model import MODELS

SCALE = 0.18215  # of Stable Diffusion's latents, where the config does not say
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMS = ("AutoencoderKL", "AutoencoderKLFlux2")  # what vae.py builds, by diffusers' names


# ----- networks -----------------------------------------------------------------------------------
def read_pickle(path):
    """What torch.save wrote, without running code in it; of what else pickles may hold, only training
    arguments' class is let in, for which this one stands."""
    namespace = type("Namespace", (), dict(__module__="argparse"))
    with torch.serialization.safe_globals([namespace]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def read_weights(path, average):
    """(weights by name, the settings in the file's header or None) of a checkpoint, without running code in it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("settings", "null"))
            return {key: file.get_tensor(key) for key in file.keys()}, settings
    state = read_pickle(path)
    if average is None:
        state = state.get("ema", state)
    return state.get(average or "model_ema1", state), None


def with_our_names(state):
    """Published weights by the names that ours have, without the projector's."""
    state = {re.sub(r"^(module\.|_orig_mod\.|net\.)+", "", key): value for key, value in state.items()}
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    after = lambda found: f"blocks.{depth + int(found[1])}"  # REPA's first files number these anew
    return {re.sub(r"^decoder_blocks\.(\d+)", after, key): value for key, value in state.items()
            if not key.startswith("projectors.")}


def with_time_from_data(state, channels):
    """The weights of SiT's first release, whose time runs from noise to data, turned to our time: where ours sees the
    cosines and sines of t f it saw those of (1 - t) f, so the first layer is turned by f, and the velocity's sign.
    channels: of the velocity, the first half of what it hands out."""
    state, first = dict(state), state["t_embedder.mlp.0.weight"]
    half = first.shape[1] // 2
    f = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)
    cosine, sine = first.double().chunk(2, dim=1)
    turned = [cosine * f.cos() + sine * f.sin(), cosine * f.sin() - sine * f.cos()]
    state["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1).to(first.dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
    return state


def published_settings(state):
    """Settings for a published checkpoint, read off the names and shapes of its weights, of which
    REPA-E's `bn` is taken out. Raises KeyError for others."""
    of_pixels = "x_embedder.proj1.weight" in state  # a JiT
    width, channels, patch, _ = state["x_embedder.proj1.weight" if of_pixels else "x_embedder.proj.weight"].shape
    _, N, hidden = state["pos_embed"].shape  # REG's has one more place, which rounding leaves out
    depth = len({key.split(".")[1] for key in state if key.startswith(("blocks.", "joint_blocks."))})
    known = {(m["hidden_size"], m["depth"]): m for m in MODELS.values() if ("bottleneck_dim" in m) == of_pixels}
    sit = dict(input_size=round(N**0.5) * patch, patch_size=patch, in_channels=channels, hidden_size=hidden,
               depth=depth, num_heads=known[hidden, depth]["num_heads"])
    learn_sigma = state["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels
    if "context_embedder.weight" in state:
        sit["context_dim"] = state["context_embedder.weight"].shape[1]
    else:
        sit.update(num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1, class_dropout_prob=0.1)
        if of_pixels:
            sit.update(bottleneck_dim=width, in_context_len=state["in_context_posemb"].shape[1],
                       in_context_start=known[hidden, depth].get("in_context_start", 4))
        else:
            sit.update(qk_norm="blocks.0.attn.q_norm.weight" in state, learn_sigma=learn_sigma)
            if "cls_projectors2.weight" in state:
                sit["cls_dim"] = state["cls_projectors2.weight"].shape[1]
    vae = dict(name="stabilityai/sd-vae-ft-ema", scale=SCALE)
    if "bn.running_mean" in state:  # REPA-E's normalises its latents itself; its VAE has no name
        state.pop("bn.num_batches_tracked", None)
        scale = (state.pop("bn.running_var").double() + 1e-4).rsqrt().tolist()
        vae = dict(name=None, scale=scale, shift=state.pop("bn.running_mean").tolist())
    # SiT's first release has its time run the other way, from noise to data
    return dict(sit=sit, PATH="linear", time_from_noise=learn_sigma, LABEL_DROPOUT=0.1,
                NOISE_SCALE=sit["input_size"] / 256 if of_pixels else 1.0,
                TEXT_ENCODER="openai/clip-vit-large-patch14", TEXT_LENGTH=77,
                data=dict(vae=None if of_pixels else vae))


# ----- autoencoders -------------------------------------------------------------------------------
def find_autoencoder(name):
    """(find, the weights' name) of an autoencoder: a local folder or file, or a hub name, be it with a
    folder or file of the repository. find(file, needed=False): where a file beside the weights lies;
    None where there is none. What cannot be fetched is a ValueError."""
    path = Path(name)
    if path.exists():
        folder, weights = (path, WEIGHTS) if path.is_dir() else (path.parent, path.name)

        def find(file, needed=False):
            return folder / file if needed or (folder / file).exists() else None
        return find, weights

    inside = str(name).split("/")
    weights = inside.pop() if path.suffix in (".safetensors", ".pt", ".pth", ".ckpt") else WEIGHTS

    def fetch(file, needed=False):
        try:
            return Path(hf_hub_download("/".join(inside[:2]), "/".join([*inside[2:], file])))
        except (OSError, ValueError, EntryNotFoundError) as error:  # ValueError: of a malformed name
            if isinstance(error, EntryNotFoundError) and not needed:
                return None
            raise ValueError(
                f"VAE {str(name)!r} is no local file or folder and could not be fetched from the Hugging Face "
                f"hub ({type(error).__name__} of {file}); check the name (of a file there "
                f"owner/repository/file.pt) and the connection, or set VAE to a folder with config.json and "
                f"{WEIGHTS}; train.py, which needs it for previews alone, does without with "
                f"PREVIEW_EVERY = 0") from error
    return fetch, weights


def read_config(file):
    """What a config.json says, {} without one. Raises ValueError for a network of another form."""
    try:
        config = json.loads(file.read_text()) if file else {}
        form = config.get("_class_name", FORMS[0])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}); fetch it again") from error
    if form not in FORMS:
        raise ValueError(f"{file}: of another form, {form}; set VAE to one that is an {' or '.join(FORMS)}")
    return config


def rename_autoencoder(state):
    """Gives weights, in place, the names of diffusers' files for those of its oldest or of LDM's."""
    stages = {found for key in state for found in re.findall(r"decoder\.up\.(\d+)\.", key)}
    names = [
        (r"^(module|_orig_mod|first_stage_model)\.", ""),
        (r"^(encoder|decoder)\.(quant|post_quant)_", r"\2_"),  # FLUX.2's
        (r"\bdown\.(\d+)\.", r"down_blocks.\1."),
        (r"\bup\.(\d+)\.", lambda found: f"up_blocks.{len(stages) - 1 - int(found[1])}."),  # from the image's end
        (r"\bmid\.block_(\d)", lambda found: f"mid_block.resnets.{int(found[1]) - 1}"),
        (r"\bmid\.attn_1", "mid_block.attentions.0"),
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\bnorm_out\.", "conv_norm_out."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])(uery|ey|alue)?\.", r"\1.to_\2."),  # query, key, value: the oldest
        (r"\.(proj_out|proj_attn)\.", ".to_out.0."),
    ]
    for key in list(state):
        value, name = state.pop(key), key
        for theirs, ours in names:
            name = re.sub(theirs, ours, name)
        a_convolution = ".attentions." in name and value.ndim == 4  # LDM's are of 1 x 1, [C, C, 1, 1]
        state[name] = value.flatten(1) if a_convolution else value


def read_autoencoder(file):
    """An autoencoder's weights by our names, without what else is in the file: in VA-VAE's its loss and
    foundation_model, in REPA-E's the network that was trained along."""
    state = load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    for inside in ("state_dict", "vae"):
        state = state.get(inside, state)
    state = dict(state)
    rename_autoencoder(state)
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.")
    return {key: value for key, value in state.items() if key.startswith(parts)}


def autoencoder_arguments(state):
    """vae.AutoencoderKL's arguments, but for norm_groups, read off names and shapes of weights."""
    def widths(stages):
        count = len({key.split(".")[2] for key in state if key.startswith(f"{stages}.")})
        return [len(state[f"{stages}.{i}.resnets.0.conv1.weight"]) for i in range(count)]

    if "encoder.conv_out.weight" not in state:
        raise ValueError("no encoder.conv_out.weight in it")
    latent_channels = len(state["encoder.conv_out.weight"]) // 2
    first = "encoder.down_blocks.0.resnets."
    patched = len(state.get("bn.running_mean", range(latent_channels)))
    return dict(
        block_channels=widths("encoder.down_blocks"), decoder_channels=widths("decoder.up_blocks")[::-1],
        latent_channels=latent_channels,
        layers_per_block=len({key.split(".")[4] for key in state if key.startswith(first)}),
        attention={key.split(".attentions.")[0] for key in state if ".attentions." in key},
        quant_conv="quant_conv.weight" in state, post_quant_conv="post_quant_conv.weight" in state,
        patch_size=math.isqrt(patched // latent_channels))


def read_statistics(find, weights):
    """(scale, shift), tensors, of VA-VAE's or REPA-E's file beside the weights; None without one."""
    for name in (f"{weights.stem}-latents-stats.pt", "latents_stats.pt"):
        file = find(name)
        try:
            stats = read_pickle(file) if file else {}
            if "latents_scale" in stats:
                return stats["latents_scale"], stats["latents_bias"]
            if stats:
                return 1 / stats["std"].double(), stats["mean"]
        except Exception as error:  # whatever a damaged file does to torch
            reason = str(error).splitlines()[0]
            raise ValueError(f"{file}: neither latents_scale and latents_bias nor mean and std of latents, or "
                             f"damaged ({reason}); fetch it again, or move it away") from error


def own_normalisation(state, config, find, weights, channels):
    """(scale, shift) of the latents, each a number or a list of one a channel, as their VAE says: in
    FLUX.2's `bn`, in config.json, or beside the weights. Raises ValueError where nothing does."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if "bn.running_mean" in state:
        variance = state["bn.running_var"].double() + config.get("batch_norm_eps", 1e-4)
        scale, shift = variance.rsqrt(), state["bn.running_mean"]
    elif mean or std:  # beside them scaling_factor counts for nothing: diffusers writes one into every config
        scale, shift = 1 / torch.tensor(std or [1.0] * channels, dtype=torch.float64), mean or 0.0
    elif config.get("scaling_factor"):
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
    else:
        scale, shift = read_statistics(find, weights) or (SCALE if channels == 4 else None, 0.0)
    if scale is None:
        raise ValueError(f"{weights}: neither config.json nor a latents_stats.pt beside it says by what its "
                         f"latents of {channels} channels are normalised; set prepare_latents.VAE_SCALE to "
                         f"(scale, shift)")
    both = [each if isinstance(each, (int, float)) else
            torch.as_tensor(each, dtype=torch.float64).flatten().tolist() for each in (scale, shift)]
    for each in both:
        if isinstance(each, list) and len(each) != channels:
            raise ValueError(f"{weights}: its latents of {channels} channels are to be normalised by "
                             f"{len(each)} numbers; mend config.json or latents_stats.pt, or set "
                             f"prepare_latents.VAE_SCALE")
    return both
