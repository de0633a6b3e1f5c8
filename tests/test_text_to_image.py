"""Captions from end to end: a small COCO prepared, trained on through the switch, killed, resumed, sampled, judged."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import checkpoint
import fid
import prepare_latents
import sample
import train
from dataset import PreparedDataset
from experiments import coco as coco_run
from model import MODELS, build
from tests.conftest import ROOT, read_log, set_constants, small_constants, write_words
from tests.test_model import ShapeRecorder
from tests.test_train import assert_close_models, assert_same_state, final_state
from text import CaptionTable, TextEncoder

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory):
    """A text encoder of CLIP's kind with random weights, 12 tokens of width 16."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=1, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)
    write_words(folder, 50, 12, pad="w0")
    return folder


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """40 images of 28 pixels as COCO has them, one to three captions each, prepared: image i has i % 3 + 1 captions, of
    which each begins with the word of its number."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "train2014").mkdir()
    sheet, images, annotations = Image.open(ROOT / "data/fashion_mnist_test.png").convert("RGB"), [], []
    for i in range(40):
        name = f"COCO_train2014_{i:012d}.jpg"
        sheet.crop((28 * i, 0, 28 * i + 28, 28)).save(folder / "train2014" / name, quality=95)
        images.append(dict(id=i, file_name=name))
        annotations += [dict(id=10 * i + n, image_id=i, caption=f"w{i} w{40 + n}") for n in range(i % 3 + 1)]
    (folder / "captions.json").write_text(json.dumps(dict(images=images[::-1], annotations=annotations)))
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, prepare_latents, SOURCE=str(folder / "train2014"), CAPTIONS=str(folder / "captions.json"),
                      DATA_DIR=str(folder / "prepared"), IMAGE_SIZE=28, VAE=None, WORKERS=0, CROP="square")
        prepare_latents.main()
    return folder / "prepared"


SMALLER = dict(depth=4, hidden_size=48, num_heads=2)  # than MMDiT-T/4


@pytest.fixture
def text_run(small_run, coco, encoder_dir, monkeypatch):
    """small_run for captions."""
    monkeypatch.setitem(MODELS, "MMDiT-T/4", dict(MODELS["MMDiT-T/4"], **SMALLER))
    return lambda **constants: small_run(**{**text_constants(coco, encoder_dir), **constants})


def text_constants(coco, encoder_dir):
    return dict(DATA_DIR=str(coco), MODEL="MMDiT-T/4", TEXT_ENCODER=str(encoder_dir), TEXT_LENGTH=12, LABEL_DROPOUT=0.3)


def test_batches_show_each_image_with_one_of_its_captions(text_run, coco):
    """Drawn anew at every visit from (SEED, step), uniformly, for the global batch."""
    text_run()
    data = PreparedDataset(coco)
    seen, device = {}, torch.device("cpu")
    for step, (_, numbers, _) in enumerate(train.open_batches(data, range(400), 0, 1, device)):
        rows = train.batch_indices(step, len(data), 0, 1)
        for row, number in zip(rows, numbers.tolist()):
            assert data.caption_offsets[row] <= number < data.caption_offsets[row + 1]
            seen.setdefault(row, []).append(number - int(data.caption_offsets[row]))
    counts = np.bincount(seen[2] + seen[5] + seen[38])  # of three captions each, 80 visits each
    assert len(counts) == 3 and (abs(counts - 80) < 40).all()
    whole = [batch[1] for batch in train.open_batches(data, range(3), 0, 1, device)]
    parts = [[batch[1] for batch in train.open_batches(data, range(3), rank, 2, device)] for rank in range(2)]
    assert all(torch.equal(torch.cat(part), one) for *part, one in zip(*parts, whole))


def test_a_run_on_captions(text_run, monkeypatch):
    """Both phases, the switch, previews of fixed captions; dropped captions are the empty one; once in phase II, no
    logits, teacher or images."""
    contexts, dropped, recorder, losses = [], [], ShapeRecorder(), train.compute_losses

    def watch(student, teacher, x, noise, t, context, images, align):
        contexts.append(context.clone())
        if teacher is not None:
            return losses(student, teacher, x, noise, t, context, images, align)
        assert images is None and student.projectors is None
        with recorder:
            return losses(student, teacher, x, noise, t, context, images, align)

    monkeypatch.setattr(train, "compute_losses", watch)
    run = text_run(PREVIEW_EVERY=12, PREVIEW_GRID=(3, 2), PREVIEW_STEPS=2)
    train.main()
    rows = read_log(run)
    assert [row["phase"] for row in rows] == ["1", "1", "2", "2"]
    assert (float(rows[0]["attention_loss"]) > 0 > float(rows[0]["feature_loss"])
            and float(rows[3]["attention_loss"]) == 0)
    assert not any(len(shape) > 2 and {*shape[-2:]} <= {49, 49 + 12} for shape in recorder.shapes)

    data, encoder = PreparedDataset(train.DATA_DIR), TextEncoder(train.TEXT_ENCODER, 12)
    table = CaptionTable(encoder, data.captions)
    for step, context in enumerate(contexts):
        *_, drop = train.draw_noise(step, data.shape, 0, 1, torch.device("cpu"))
        (_, numbers, _), = train.open_batches(data, range(step, step + 1), 0, 1, torch.device("cpu"))
        assert torch.equal(context, table(torch.where(drop < 0.3, len(data.captions), numbers)))
        dropped.append((drop < 0.3).sum().item())
    assert 0 < sum(dropped) < 8 * 12

    shown = (run / "previews/captions.txt").read_text().splitlines()
    assert shown == [data.captions[i] for i in (0, round((len(data.captions) - 1) / 2), len(data.captions) - 1)]
    assert Image.open(run / "previews/step_0000012.png").size == (2 * 28, 3 * 28)
    settings = json.loads((run / "settings.json").read_text())
    assert settings["sit"]["context_dim"] == 16 and "num_classes" not in settings["sit"]


def test_captions_encoded_at_each_step_are_those_of_the_table(text_run, tmp_path):
    for gib in (1, 0):
        text_run(RUN_DIR=str(tmp_path / str(gib)), TEXT_TABLE_GIB=gib, STEPS=8, MICRO_BATCHES=2)
        train.main()
    assert_close_models(*(final_state(tmp_path / name, 8)["model"] for name in "10"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_or_on_two_processes_it_is_the_same_run(run_process, coco, encoder_dir, tmp_path, processes):
    constants = dict(text_constants(coco, encoder_dir), CONFLICT_FROM=4, CONFLICT_EVERY=4, CONFLICT_IMAGES=8,
                     extra=f"train.MODELS['MMDiT-T/4'].update({SMALLER})")
    assert run_process(tmp_path / "whole", **constants).returncode == 0
    if processes is None:
        assert run_process(tmp_path / "killed", signal.SIGKILL, 5, **constants).returncode == -signal.SIGKILL
        resumed = run_process(tmp_path / "killed", **constants)
        assert resumed.returncode == 0 and "phase I from step 4" in resumed.stdout, resumed.stderr
        assert_same_state(final_state(tmp_path / "whole"), final_state(tmp_path / "killed"))
        return
    several = run_process(tmp_path / "two", processes=processes, **constants)
    assert several.returncode == 0, several.stderr
    for part in ("model", "ema"):
        assert_close_models(final_state(tmp_path / "whole")[part], final_state(tmp_path / "two")[part])


@pytest.fixture(scope="session")
def trained(tmp_path_factory, coco, encoder_dir):
    """A checkpoint of random weights and a run's settings, for drawing."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = dict(input_size=28, in_channels=3, patch_size=4, hidden_size=48, depth=2, num_heads=2, context_dim=16)
    torch.manual_seed(0)
    model = build("MMDiT-T/4", **arguments, teacher_dim=None)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    settings = dict(sit=dict(arguments, teacher_dim=None), PATH="linear", LABEL_DROPOUT=0.1, data=dict(vae=None),
                    TEXT_ENCODER=str(encoder_dir), TEXT_LENGTH=12)
    save_file(model.state_dict(), folder / "ema.safetensors", metadata=dict(settings=json.dumps(settings)))
    return folder


@pytest.fixture
def drawing(monkeypatch, trained, tmp_path):
    """A function that sets sample's constants for a quick drawing, and any others."""
    def configure(**constants):
        set_constants(monkeypatch, sample, **{**dict(
            RUN_DIR=str(trained), OUT=str(tmp_path / "out"), NUM_SAMPLES=6, MODE="ode", STEPS=3, CFG_SCALE=2.0,
            GUIDANCE=(0.0, 1.0), BATCH_SIZE=4, GRID=(2, 3), PROMPTS=["w3 w4", "w5  w6\nw7"]), **constants})
    return configure


def test_prompts_are_drawn_one_a_row(drawing, trained, tmp_path):
    drawing(COMPARE=(1.0, 3.0), FRAMES=3)
    sample.main()
    out = tmp_path / "out"
    prompts = (out / "prompts.txt").read_text().splitlines()
    assert len(prompts) == 6 and {*prompts} == {"w3 w4", "w5 w6 w7"}
    assert (out / "rows.txt").read_text().splitlines() == ["w3 w4", "w5 w6 w7"]
    for name, columns in (("samples", 3), ("compare", 2), ("path", 3)):
        assert Image.open(out / f"{name}.png").size == (columns * 28, 2 * 28)
    with np.load(out / "samples.npz") as file:
        images = file["arr_0"]
    assert images.shape == (6, 28, 28, 3)

    # each by its own: guidance towards the prompt and away from the empty text, whatever else is in the batch
    model, settings = checkpoint.load_model(trained / "ema.safetensors")
    encoder = TextEncoder(settings["TEXT_ENCODER"], 12)
    text, nothing = (encoder(encoder.tokenize([each])) for each in (prompts[4], ""))
    x = sample.IndexedNoise(0, [4]).draw((3, 28, 28)).double()
    for t, t_next in zip((1, 2 / 3, 1 / 3), (2 / 3, 1 / 3, 0)):
        at = torch.tensor([t], dtype=torch.float32)
        v, free = (model(x.float(), at, context)[0].double() for context in (text, nothing))
        x = x + (t_next - t) * (free + 2 * (v - free))
    difference = sample.to_bytes(x)[0].permute(1, 2, 0).int() - torch.from_numpy(images[4]).int()
    assert difference.abs().max() <= 1


def test_prompts_of_a_prepared_folder_come_image_by_image(drawing, coco, tmp_path):
    drawing(PROMPTS=str(coco), NUM_SAMPLES=50, STEPS=1, CFG_SCALE=1.0, GRID=None, BATCH_SIZE=50)
    sample.main()
    prompts = (tmp_path / "out/prompts.txt").read_text().splitlines()
    assert [each.split()[0] for each in prompts] == [f"w{i % 40}" for i in range(50)]
    assert len({prompts[i].split()[1] for i in range(2, 40, 3)}) > 1  # one of three captions, at random

    # as sampled in other batches, and judged against the images
    with np.load(tmp_path / "out/samples.npz") as file:
        images = file["arr_0"]
    drawing(PROMPTS=str(coco), NUM_SAMPLES=50, STEPS=1, CFG_SCALE=1.0, GRID=None, BATCH_SIZE=7, OUT=str(tmp_path / "7"))
    sample.main()
    with np.load(tmp_path / "7/samples.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - images).max() <= 1
    with pytest.MonkeyPatch.context() as patch:
        set_constants(patch, fid, SAMPLES=str(tmp_path / "out/samples.npz"), REFERENCE=str(coco), WORKERS=0,
                      FEATURES=str(ROOT / "data/judge.safetensors"), OUT=str(tmp_path / "fid.json"))
        assert fid.main()["frechet_distance"] > 0


@pytest.mark.parametrize("constants, message", [
    (dict(PROMPTS=None), "PROMPTS None: this model draws from text; set it to a list"),
    (dict(PROMPTS=[]), "PROMPTS .*set it to a list of texts, none of them empty"),
    (dict(PROMPTS=["a", " \n"]), "PROMPTS .*none of them empty"),
    (dict(PROMPTS=["a", 3]), "PROMPTS .*list of texts"),
    (dict(PROMPTS="a red apple"), r"no such folder; .* or to a list of texts, as \['a red apple'\]"),
    (dict(PROMPTS=str(ROOT / "data")), "no meta.json"),
    (dict(CLASSES=[1]), r"CLASSES \[1\]: not what this model draws from; set it to None"),
    (dict(TEXT_ENCODER="nowhere"), "text encoder 'nowhere': transformers cannot load it"),
])
def test_prompts_and_encoders_that_cannot_be_drawn_from_are_refused(drawing, constants, message, tmp_path):
    drawing(**constants)
    with pytest.raises(ValueError, match=message) as caught:
        sample.main()
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_encoder_of_another_width_is_refused_with_the_one_that_fits(drawing, tmp_path):
    transformers.BertModel(transformers.BertConfig(vocab_size=50, hidden_size=24, intermediate_size=24,
                                                   num_hidden_layers=1,
                                                   num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    write_words(tmp_path / "bert", 50, 12, pad="w0")
    drawing(TEXT_ENCODER=str(tmp_path / "bert"))
    with pytest.raises(ValueError, match="24 numbers a token, but .* takes 16; set it to '"):
        sample.main()


def test_the_coco_run_in_short(restored, monkeypatch, tmp_path, encoder_dir, teacher_file):
    """All four parts on zips of COCO's layout, one image without captions: the paper's constants, then small ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "MMDiT-T/4", dict(MODELS["MMDiT-T/4"], **SMALLER))
    sheet = Image.open(ROOT / "data/fashion_mnist_test.png").convert("RGB")
    for split, first in (("train", 0), ("val", 100)):
        pictures, images, annotations = tmp_path / "pictures" / f"{split}2014", [], []
        pictures.mkdir(parents=True)
        for i in range(first, first + 20):
            images.append(dict(id=i, file_name=f"COCO_{split}2014_{i:012d}.jpg"))
            sheet.crop((28 * (i % 100), i // 100 * 28, 28 * (i % 100) + 28, i // 100 * 28 + 28)).resize((40, 30)).save(
                pictures / images[-1]["file_name"])
            annotations += [dict(id=i, image_id=i, caption=f" w{i % 50}\nw7 é ")] * (i > first)
        (tmp_path / "data/coco/annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"data/coco/annotations/captions_{split}2014.json").write_text(
            json.dumps(dict(images=images, annotations=annotations)))
        shutil.make_archive(str(tmp_path / f"data/coco/{split}2014"), "zip", tmp_path / "pictures", f"{split}2014")
    settings = coco_run.settings

    def small_settings():
        settings()
        if sys.argv[1] == "prepare":  # the first: nothing is small yet
            assert (train.BATCH_SIZE, sample.MODE, sample.STEPS) == (256, "sde", 250)
            assert fid.CLIP == "openai/clip-vit-large-patch14"
        assert (train.MODEL, train.ALIGN_STEPS, train.STEPS) == ("MMDiT/2", 200_000, 250_000)
        assert (sample.NUM_SAMPLES, sample.CFG_SCALE, sample.GUIDANCE) == (40_192, 2.25, (0.0, 1.0))
        assert (prepare_latents.CROP, fid.RESIZE) == ("square", "bilinear")
        small = {
            prepare_latents: dict(IMAGE_SIZE=28, VAE=None, WORKERS=0, LEAVE_OUT_UNREADABLE=True),
            train: dict(small_constants(train.DATA_DIR, teacher_file, train.RUN_DIR), MODEL="MMDiT-T/4", STEPS=4,
                        ALIGN_STEPS=2, TEXT_ENCODER=str(encoder_dir), TEXT_LENGTH=12),
            sample: dict(NUM_SAMPLES=24, STEPS=3, BATCH_SIZE=24, GRID=(2, 2)),
            fid: dict(FEATURES=str(ROOT / "data/judge.safetensors"), CLIP=None, WORKERS=0)}
        for module, constants in small.items():
            set_constants(monkeypatch, module, **constants)

    monkeypatch.setattr(coco_run, "settings", small_settings)
    for part in ("prepare", "train", "sample", "fid"):
        monkeypatch.setattr(sys, "argv", ["coco.py", part])
        coco_run.main()
    prompts = (tmp_path / "runs/haste-coco/samples/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert prompts == [f"w{(101 + i % 19) % 50} w7 é" for i in range(24)]
    assert "no caption" in (tmp_path / "data/coco/val256/unreadable.txt").read_text()
    assert json.loads((tmp_path / "runs/haste-coco/fid.json").read_text())["reference_count"] == 19
    monkeypatch.setattr(sys, "argv", ["coco.py"])
    with pytest.raises(ValueError, match="say which part to run: prepare, train, sample, fid"):
        coco_run.main()


def test_a_model_of_text_needs_captions(text_run, data_dir):
    text_run(DATA_DIR=str(data_dir))
    with pytest.raises(ValueError, match="MODEL 'MMDiT-T/4' learns from captions, of which .* has none"):
        train.main()


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import train
from runtime import run_script
train.DATA_DIR, train.MODEL, train.RUN_DIR = sys.argv[1:]
train.STEPS, train.ALIGN_STEPS, train.PREVIEW_EVERY, train.WORKERS = 1, 0, 0, 0
train.BATCH_SIZE, train.COMPILE = 4, False
run_script(train.main)
"""


@pytest.mark.slow
def test_without_transformers_classes_train_and_text_says_what_to_install(coco, data_dir, tmp_path):
    """In a process that cannot import it: nothing but text asks for it."""
    ended = [subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS, data, name, tmp_path / name[:5]], cwd=ROOT,
                            text=True, capture_output=True)
             for data, name in ((data_dir, "SiT-T/4"), (coco, "MMDiT-T/4"))]
    assert ended[0].returncode == 0, ended[0].stderr
    assert ended[1].returncode == 1 and "pip install -r requirements-text.txt" in ended[1].stderr
    assert "Traceback" not in ended[1].stderr


def test_published_checkpoints_of_text_load(tmp_path):
    """The releases' layout: a dict with model, ema, opt, args, steps; read off its weights which encoder it wants."""
    torch.manual_seed(0)
    theirs = build("MMDiT-T/4", teacher_dim=8)
    namespace = __import__("argparse").Namespace(model="MMDiT")
    torch.save(dict(model={}, ema=theirs.state_dict(), opt={}, args=namespace, steps=250000), tmp_path / "0250000.pt")
    model, settings = checkpoint.load_model(tmp_path / "0250000.pt")
    assert settings["TEXT_ENCODER"] == "openai/clip-vit-large-patch14" and settings["TEXT_LENGTH"] == 77
    assert settings["data"]["vae"]["name"] == "stabilityai/sd-vae-ft-ema" and model.num_heads == 6
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in model.state_dict().items())
