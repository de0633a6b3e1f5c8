"""What a run leaves on disk, and how it, or a published checkpoint, is read back.

    RUN_DIR/checkpoints/step_N/   weights, optimiser and EMA in shards, as torch.distributed.checkpoint writes them;
                                  progress.json; ema.safetensors, the whole EMA with the run's settings in its header
    RUN_DIR/ema.safetensors       the latest of these

A checkpoint's folder bears its name once all is in it; until then it is called step_N.tmp.
"""

import hashlib
import json
import os
import pickle
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from checks import NETWORKS, differ, names_alone, same, told_apart, weights_checksum
from model import make_network
from published import published_settings, read_weights, with_our_names
from runtime import lock_folder, opened, remove_folder, write_atomically

warnings.filterwarnings("ignore", "torch.distributed is")  # said of each checkpoint that one process writes: meant so

# what runs were made with before there were these settings
EARLIER = dict(TIMES="uniform", TIME_SHIFT=1.0, NOISE_SCALE=1.0, PROJECTOR="mlp", SPATIAL_NORM=0.0, CLASS_WEIGHT=0.0)


# ----- a run's checkpoints -------------------------------------------------------------------------
def describe(constants, data, sit):
    """A run's settings: every constant of its script, the model's arguments, the data set, versions; and checksums, by
    which data and networks are known wherever they lie."""
    no_settings = ("F", "MODELS", "FROZEN", "LOGS")
    own = {name: value for name, value in constants.items() if name.isupper() and name not in no_settings}
    keys = ("source", "count", "image_size", "latent_shape", "vae", "classes", "captions")
    described = {key: data.meta[key] for key in keys if key in data.meta}
    described["class_counts"] = np.bincount(data.labels, minlength=len(data.classes)).tolist()
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    sums = {name: weights_checksum(own[name]) for name in NETWORKS}
    sums["data"] = zlib.crc32(json.dumps(data.meta["chunks"]).encode()) if "chunks" in data.meta else None
    # through JSON and back, so that it compares equal to what was read from a file
    return json.loads(json.dumps(dict(own, sit=sit, data=described, checksums=sums, versions=versions), default=str))


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def finished(run):
    """Folders of whole checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step_*[0-9]"), key=step_of)


def run_state(model, optimizer, ema, meters):
    """Every tensor of the run by name, not copied: what a checkpoint is written from and read into."""
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for (name, p), shard in zip(trained, optimizer.param_groups[0]["params"]):
        for key, value in optimizer.state[shard].items():
            if isinstance(p, DTensor) and value.ndim:  # all but the number of steps is sharded as p is
                value = DTensor.from_local(value, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            state[f"optimizer.{name}.{key}"] = value
    state.update({f"ema.{name}": value for name, value in ema.items()})
    return dict(state, meters=meters)


def whole(tensor):
    """The tensor itself, or put together from its shards; every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's shard of a DTensor, the same memory; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_ema(ema):
    """A copy of the EMA in rank 0's host memory; {} elsewhere. Every process takes part."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    averages = ((name, whole(average)) for name, average in ema.items())
    return {name: average.to("cpu", copy=True) for name, average in averages if rank == 0}


def save(run, settings, progress, state, ema, keep_last, keep_every):
    """Writes checkpoints/step_N, N = progress["step"], then removes old ones. Every process takes part.

    state: run_state(). keep_last: so many stay, one at least; keep_every: its multiples stay, 0: none.
    Returns None, or why writing failed: what stood before stands, and the run may go on.
    """
    folder = run / "checkpoints" / f"step_{progress['step']:07d}"
    unfinished = folder.with_suffix(".tmp")
    ema = whole_ema(ema)
    try:
        dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
        if ema:  # rank 0
            save_file(ema, unfinished / "ema.safetensors", metadata=dict(settings=json.dumps(names_alone(settings))))
            (unfinished / "progress.json").write_text(json.dumps(dict(progress, settings=settings)))
            os.replace(unfinished, folder)
    except (OSError, CheckpointException, SafetensorError) as error:
        free = shutil.disk_usage(run).free
        if ema:
            shutil.rmtree(unfinished, ignore_errors=True)
        if free < sum(tensor.numel() * tensor.element_size() for tensor in state.values()):
            return f"the disk is full: {free / 2**20:,.0f} MiB are free"
        return str(error).strip().splitlines()[-1]
    if ema:
        tidy(run, folder, keep_last, keep_every)


def tidy(run, newest, keep_last, keep_every):
    """Removes old checkpoints, and makes the newest's EMA the run's. What fails here is said, no more."""
    for old in finished(run)[: -max(keep_last, 1)]:
        if not keep_every or step_of(old) % keep_every:
            remove_folder(old)
    try:
        write_atomically(run / "ema.safetensors", lambda path: shutil.copyfile(newest / "ema.safetensors", path))
    except OSError as error:
        tqdm.write(f"{run / 'ema.safetensors'}: not renewed ({error.strerror}); {newest} has the latest")


def find(run, settings, frozen):
    """(folder, progress) of the newest checkpoint; (None, the progress of step 0) where the run is new.

    Raises ValueError if it is damaged, or was made with another value of a setting in `frozen` or of the data.
    """
    if not finished(run):
        return None, dict(step=0, aligning=True, cosine=None)
    newest = finished(run)[-1]
    try:
        progress = json.loads((newest / "progress.json").read_text())
        saved = {**EARLIER, **progress.pop("settings")}
    except (OSError, ValueError, KeyError) as error:
        raise damaged(newest, error) from error

    differing = [(key, saved[key], settings[key]) for key in frozen if differ(key, saved, settings)]
    if not differing:  # the names are the same, but not what they stand for
        differing = [(f"the network's {key}", value, settings["sit"][key]) for key, value in saved["sit"].items()
                     if value != settings["sit"].get(key, value)]
    before, now = saved["data"], settings["data"]
    if same(saved, settings, "data"):  # wherever their source and VAE lie
        before, now = ({**data, "source": None, "vae": data["vae"] and {**data["vae"], "name": None}}
                       for data in (before, now))
    differing += [(f"the data's {key}", before[key], now.get(key)) for key in before if before[key] != now.get(key)]
    if differing:
        told = "; ".join(f"{key} {told_apart(before, now)}" for key, before, now in differing)
        raise ValueError(f"{newest} was made with other settings ({told}); set them back, or choose another RUN_DIR")
    for name, checksum in saved.get("checksums", {}).items():  # of what is gone now its name alone says less
        settings["checksums"][name] = settings["checksums"].get(name) or checksum
    return newest, dict(progress, settings=saved)


def load(folder, state):
    """Reads a checkpoint into run_state()'s tensors, whatever number of processes wrote it. Raises
    ValueError if it is damaged."""
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except (CheckpointException, Exception) as error:  # the first is none of the others; a file may be cut anywhere
        raise damaged(folder, error) from error


def damaged(folder, error):
    """The ValueError for a checkpoint that cannot be read."""
    return ValueError(f"{folder}: damaged checkpoint ({type(error).__name__}: {str(error).strip().splitlines()[-1]}); "
                      f"delete it to resume from the one before, if there is one")


# ----- a run's folder and logs --------------------------------------------------------------------
def open_run(run, settings, saved, step, logs, rank, script):
    """Makes or claims the run's folder, with what is needed to repeat the run; every process takes part.

    saved, step: the checkpoint that it goes on from, and of what step; logs: {file: its columns, "step" the first};
    script: the file that runs.
    """
    if rank == 0:
        (run / "previews").mkdir(parents=True, exist_ok=True)
        lock_folder(run, "RUN_DIR")
        if saved != (finished(run)[-1] if finished(run) else None):
            raise ValueError(f"{run}: another process has just trained on here; give the same command again")
        for unfinished in (run / "checkpoints").glob("step_*[0-9].tmp"):  # what a killed run was writing
            shutil.rmtree(unfinished)
        write_atomically(run / "settings.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
        write_atomically(run / Path(script).name, lambda path: shutil.copyfile(script, path))
        for name, columns in logs.items():
            truncate_log(run / name, step, columns)
    if dist.is_initialized():
        dist.barrier()
    if not (run / "settings.json").exists():
        raise ValueError(f"{run}: rank {rank} does not see what rank 0 wrote there; put RUN_DIR on a disk that all "
                         f"nodes share")


def append(path, line):
    """Adds a line to a log; on a full disk the run goes on without it."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        tqdm.write(f"{path}: {error.strerror}; the run goes on")


def append_row(path, values):
    """Adds values to a CSV file, None as nothing."""
    append(path, ",".join("" if value is None else str(value) for value in values))


def truncate_log(path, step, columns):
    """Starts a log, or drops the rows after `step`, which a resumed run writes again, and one cut short by a kill."""
    rows = [line.split(",") for line in path.read_text().splitlines()[1:]] if path.exists() else []
    kept = [row for row in rows if len(row) == len(columns) and int(row[0]) <= step]
    write_atomically(path, lambda file: file.write_text("".join(",".join(row) + "\n" for row in (columns, *kept))))


def open_tracker(tracker, run, settings, step):
    """A function (step, values) that reports numbers, and pictures by their paths, to "tensorboard", "wandb" or, with
    None, nobody."""
    if tracker == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run, purge_step=step + 1)  # later ones, which a killed run wrote, are written again
        opened[run, tracker] = writer.close

        def report(step, values):
            for key, value in values.items():
                if isinstance(value, Path):
                    writer.add_image(key, np.asarray(Image.open(value).convert("RGB")), step, dataformats="HWC")
                else:
                    writer.add_scalar(key, value, step)

        return report
    if tracker == "wandb":
        import wandb
        place = hashlib.sha256(bytes(run.resolve())).hexdigest()[:16]  # by which W&B knows the run
        try:
            there = wandb.init(project=os.environ.get("WANDB_PROJECT", "nanohaste"), id=place, dir=run, config=settings,
                               name=os.environ.get("WANDB_NAME", run.name), resume="allow")
        except Exception as error:  # of its own kinds, which are not ours to import
            raise ValueError(f"TRACKER 'wandb': {error}; mend that, or set it to None") from error
        opened[run, tracker] = getattr(there, "finish", lambda: None)
        done = getattr(there, "step", 0)  # what a killed run logged is the same again, and W&B takes no step twice
        log = getattr(there, "log", wandb.log)

        def report(step, values):
            pictures = {key: wandb.Image(str(value)) for key, value in values.items() if isinstance(value, Path)}
            if step >= done:
                log(values | pictures, step=step)

        return report
    return lambda step, values: None


# ----- models to sample from: ours and published ones ---------------------------------------------
def with_places(settings, folder):
    """A header's settings, or the run's folder's around it, which say where VAE and text encoder lie."""
    for file in (folder / "settings.json", folder / "progress.json"):
        if settings and file.exists():
            known = json.loads(file.read_text())
            known = known.get("settings", known)
            settings = known if known["sit"] == settings["sit"] else settings
    return settings


def load_model(path, average=None, constant="CHECKPOINT"):
    """(network in eval mode with EMA weights and no projector, its run's settings), ours or of a published checkpoint.

    Ours is a safetensors file with settings in its header. Published ones (SiT, REPA, HASTE, REG, JiT)
    are a state dict, bare, under "ema" or under `average` (None: JiT's "model_ema1"); of what else
    pickles may hold, only an argparse.Namespace is let in. A folder's is its ema.safetensors. `constant` says the path.
    Raises ValueError where the file is missing, damaged or of another kind.
    """
    path = Path(path, "ema.safetensors") if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; train first, or set {constant} to one that is there")
    if path.name.startswith("DiT"):  # its weights have SiT's names and shapes
        raise ValueError(f"{path}: DiT predicts noise, not a velocity; set {constant} to a SiT's")
    unexpected = []
    try:
        state, settings = read_weights(path, average)
        settings, state = with_places(settings, path.parent), with_our_names(state)
        unexpected = sorted(state)
        settings = settings or published_settings(state)
        model = make_network({**settings["sit"], "teacher_dim": None})
        unexpected = sorted(state.keys() - model.state_dict().keys())
        model.load_state_dict(state)
    except (SafetensorError, pickle.UnpicklingError, OSError, EOFError, KeyError, TypeError, ValueError, RuntimeError,
            AttributeError) as error:
        if unexpected:
            raise ValueError(f"{path}: not a SiT checkpoint (unexpected keys {', '.join(map(str, unexpected[:3]))}); "
                             f"set {constant} to one of SiT, REPA, HASTE, REG, JiT or of a run") from error
        raise ValueError(f"{path}: not a SiT checkpoint, or damaged ({str(error).splitlines()[0]}); copy it again, or "
                         f"set {constant} to another") from error
    return model.eval().requires_grad_(False), settings
