"""fid.py: the reference numbers, pytorch-fid, torch-fidelity, transformers and ADM's formulas as judges, main() end to
end, in one process and in two, and bad input, of inception.py's weights too."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import fid
import inception
import prepare_latents
from inception import InceptionV3, load_inception
from tests.conftest import ROOT, set_constants


@pytest.fixture(scope="module")
def weights_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(weights, path)
    return path


def write_images(path, count, size=16, seed=0, **more):
    """An .npz of smooth random images, written as ADM's are."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    np.savez(path, arr_0=images, **more)
    return images


@pytest.fixture
def configure(monkeypatch, tmp_path, weights_file):
    """A function that writes two small .npz files, sets fid's constants to them and changes those it is given."""
    def set_constants(**constants):
        write_images(tmp_path / "samples.npz", 6, seed=1)
        write_images(tmp_path / "reference.npz", 9, seed=2)
        defaults = dict(SAMPLES=str(tmp_path / "samples.npz"), REFERENCE=str(tmp_path / "reference.npz"), BATCH_SIZE=4,
                        OUT=str(tmp_path / "new" / "fid.json"), INCEPTION_WEIGHTS=str(weights_file), WORKERS=0)
        for name, value in {**defaults, **constants}.items():
            monkeypatch.setattr(fid, name, value)
        return Path(fid.OUT)
    return set_constants


# ---- metrics


def statistics(x):
    return x.double().mean(0).numpy(), np.cov(x.double().numpy(), rowvar=False)


@pytest.mark.parametrize("case", [0, 1, 2])
def test_frechet_distance_equals_the_reference_also_where_rank_deficient(golden, case):
    z, _, meta = golden("metrics")
    distance = fid.frechet_distance(*statistics(z[f"frechet{case}_a"]), *statistics(z[f"frechet{case}_b"]))
    assert distance == pytest.approx(z[f"frechet{case}_expected"].item(), rel=meta["rtol"])


def test_frechet_distance_of_equal_and_of_shifted_gaussians():
    x = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))  # rank 9 of 30
    mu, sigma = statistics(x)
    assert fid.frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-5)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(30 * 4, rel=1e-6)


@pytest.mark.parametrize("key, splits", [("is10", 10), ("is1", 1)])
def test_inception_score_equals_the_reference(golden, key, splits):
    z, _, meta = golden("metrics")
    for probs in (z["probs"], z["probs"].numpy()):
        assert fid.inception_score(probs, splits) == pytest.approx(z[key].tolist(), rel=meta["rtol"], abs=1e-9)


def test_inception_score_of_certain_classes_is_their_number():
    assert fid.inception_score(np.eye(5)[np.arange(50) % 5], splits=2) == pytest.approx((5, 0))


def test_precision_and_recall_equal_the_reference(golden):
    z, _, _ = golden("metrics")
    expected = (z["precision"].item(), z["recall"].item())
    assert fid.precision_recall(z["real"], z["fake"]) == pytest.approx(expected, abs=1e-6)
    assert fid.precision_recall(z["real"].numpy(), z["fake"].numpy()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("distances", [1, 3000, 100_000])
def test_precision_and_recall_do_not_depend_on_the_chunks(golden, monkeypatch, distances):
    z, _, _ = golden("metrics")
    whole = fid.precision_recall(z["real"], z["fake"])
    monkeypatch.setattr(fid, "DISTANCES", distances)
    assert fid.precision_recall(z["real"], z["fake"]) == pytest.approx(whole, abs=1e-6)


def test_precision_and_recall_far_from_the_origin():
    x, y = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    near = fid.precision_recall(x, y)
    assert 0 < near[0] < 1 and fid.precision_recall(x + 1000, y + 1000) == pytest.approx(near, abs=0.02)


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than k = 3 real images and as many samples, got 3 and 9"):
        fid.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


# ---- other evaluations as judges


# the judges' roots of 2048 x 2048 matrices take half a minute, so that usually 512 of the features must do
WIDTHS = [512, pytest.param(2048, marks=pytest.mark.slow)]


@pytest.mark.parametrize("root", ["of few images", pytest.param("their own", marks=pytest.mark.slow)])
def test_main_with_bilinear_resize_gives_pytorch_fids_number(configure, pytorch_fids_network, tmp_path, root):
    judge = pytest.importorskip("pytorch_fid.fid_score", reason="pytorch-fid is the judge")
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, (folder, count) in enumerate(zip(folders, (7, 9))):
        folder.mkdir()
        for i, image in enumerate(write_images(tmp_path / "images.npz", count, size=32, seed=seed)):
            Image.fromarray(image).save(folder / f"{i}.png")
    configure(RESIZE="bilinear", SAMPLES=str(folders[0]), REFERENCE=str(folders[1]))
    result = fid.main()
    if root == "their own":
        expected = judge.calculate_fid_given_paths([str(folder) for folder in folders], 4, "cpu", 2048, num_workers=0)
    else:
        expected = few_images_distance(*(torch.from_numpy(judge.get_activations(
            sorted(folder.iterdir()), pytorch_fids_network[0], 4, num_workers=0)) for folder in folders))
    assert result["fid"] == pytest.approx(expected, rel=1e-3)
    assert result["label"].startswith("FID as in pytorch-fid") and result["resize"] == "bilinear"
    assert "sfid" not in result and result["inception_score"] >= 1 and result["recall"] >= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_fid_and_inception_score_equal_torch_fidelitys(weights_file, tmp_path, width):
    judge = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is the judge")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    theirs = judge.FeatureExtractorInceptionV3("judge", ["2048", "logits_unbiased"], str(weights_file))
    expected, found = [], []
    for seed, count in ((1, 8), (2, 10)):
        images = write_images(tmp_path / "images.npz", count, size=32, seed=seed)
        pool, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected.append(fid_features_to_statistics(pool[:, :width]))
        data = fid.open_images(tmp_path / "images.npz", "SAMPLES")
        measured = fid.measure("", data, count, load_inception(weights_file, "tf1")[0], torch.device("cpu"), 0, 1)
        found += [measured["mu"][:width], measured["sigma"][:width, :width]]
    (distance,) = fid_statistics_to_metric(*expected, verbose=False).values()
    assert fid.frechet_distance(*found) == pytest.approx(distance, rel=1e-3)
    scores = isc_features_to_metric(logits, splits=2, shuffle=False)
    assert fid.inception_score(measured["probs"], 2) == pytest.approx(list(scores.values()), rel=1e-3)


# ---- main


@pytest.mark.filterwarnings("error::UserWarning")
def test_main_measures_two_files_and_takes_stored_statistics(configure, weights, tmp_path, capsys):
    out = configure(PRECISION_RECALL_IMAGES=5)
    write_images(tmp_path / "reference.npz", 9, seed=2, mu_s=np.full(2023, 3.0), sigma_s=np.zeros((2023, 2023)))
    result = fid.main()
    assert json.loads(out.read_text()) == result
    assert [file.name for file in out.parent.iterdir()] == ["fid.json"]  # no temporary file stays
    assert (result["sample_count"], result["reference_count"], result["precision_recall_reference_count"]) == (6, 9, 5)
    assert "FID" in result["label"] and "fid" in capsys.readouterr().out
    assert result["reference_stored"] == ["mu_s", "sigma_s"]

    network = InceptionV3("tf1")
    network.load_state_dict(weights)
    fake, real = (network(torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2))
                  for path in (fid.SAMPLES, fid.REFERENCE))
    assert result["fid"] == pytest.approx(few_images_distance(fake[0], real[0]), rel=1e-3)
    to_a_point = ((fake[1].mean(0) - 3) ** 2).sum() + fake[1].var(0).sum()
    assert result["sfid"] == pytest.approx(to_a_point.item(), rel=1e-3)
    assert result["inception_score"] == pytest.approx(fid.inception_score(fake[2], 1)[0], rel=1e-5)
    assert (result["precision"], result["recall"]) == fid.precision_recall(real[0][[0, 1, 3, 5, 7]], fake[0])


def few_images_distance(x, y):
    """The Frechet distance of N < D rows without a D x D matrix: tr (A'A B'B)^(1/2) is the nuclear norm of A B'."""
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    distance = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return (distance - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()


def test_all_four_stored_statistics_are_read_but_serve_inception_alone(configure, teacher_file, tmp_path):
    configure(FEATURES=str(teacher_file))
    before = fid.main()
    stored = dict(mu=np.ones(2048), sigma=np.eye(2048), mu_s=np.ones(2023), sigma_s=np.eye(2023))
    write_images(tmp_path / "reference.npz", 9, seed=2, **stored)
    for key, array in fid.open_images(fid.REFERENCE, "REFERENCE").stored.items():
        np.testing.assert_array_equal(array, stored.pop(key))
    assert not stored and fid.main()["frechet_distance"] == before["frechet_distance"]


def test_main_measures_in_a_networks_features_and_does_not_call_it_fid(configure, teacher_file, data_dir):
    out = configure(FEATURES=str(teacher_file), REFERENCE=str(data_dir))
    write_images(fid.SAMPLES, 6, size=28, seed=1)
    result = fid.main()
    assert json.loads(out.read_text()) == result
    assert result["label"] == f"Frechet distance in the features of {teacher_file.name}"
    assert result["frechet_distance"] > 0 and "fid" not in result and result["reference_count"] == 200


def test_a_set_against_itself_is_perfect(configure, teacher_file, data_dir):
    configure(FEATURES=str(teacher_file), REFERENCE=str(data_dir), SAMPLES=str(data_dir), BATCH_SIZE=64, WORKERS=2)
    result = fid.main()
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert (result["precision"], result["recall"]) == (1, 1)


def test_statistics_do_not_depend_on_the_batch(configure, teacher_file):
    results = []
    for batch_size in (1, 4, 100):
        configure(FEATURES=str(teacher_file), BATCH_SIZE=batch_size)  # writes the reference anew
        results.append(fid.main()["frechet_distance"])
    assert results == pytest.approx([results[0]] * 3, rel=1e-3)


def test_main_records_what_repeats_it_and_warns_of_few_images(configure, teacher_file, tmp_path, capsys):
    configure(FEATURES=str(teacher_file))
    (tmp_path / "samples.json").write_text('{"CLASS_SAMPLING": "balanced"}')
    result = fid.main()
    assert result["samples_settings"] == {"CLASS_SAMPLING": "balanced"} and result["processes"] == 1
    assert result["weights_sha256"] == subprocess.check_output(["sha256sum", teacher_file], text=True).split()[0]
    assert result["batch_size"] == 4 and result["features"] == str(teacher_file)
    assert result["versions"]["torch"] == torch.__version__.split("+")[0] and "timm" in result["versions"]
    lines = capsys.readouterr().out.splitlines()
    assert f"  {tmp_path / 'samples.npz'}: 6 images, classes balanced" in lines
    for name, count in (("samples", 6), ("reference", 9)):
        warning = f"warning: {count} images in {tmp_path / name}.npz for 32 features"
        assert any(line.startswith(warning) for line in lines)
    (tmp_path / "samples.json").write_text("not of sample.py")
    assert "samples_settings" not in fid.main()


def test_no_warning_where_images_are_enough(configure, teacher_file, data_dir, capsys):
    configure(FEATURES=str(teacher_file), REFERENCE=str(data_dir), SAMPLES=str(data_dir))
    fid.main()
    assert "warning" not in capsys.readouterr().out


def test_statistics_alone_serve_as_reference(configure, tmp_path, capsys):
    configure()
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    result = fid.main()
    assert "statistics alone, so no precision and recall" in capsys.readouterr().out
    assert result["fid"] > 0 and not {"sfid", "precision", "recall"} & result.keys()
    assert result["reference_stored"] == ["mu", "sigma"] and result["inception_score"] >= 1


# ---- folders


def save_images(images, folder):
    """Files whose paths sort in the images' order, in folders and beside them, of three formats."""
    for i, image in enumerate(images):
        file = folder / (f"{i:02d}.png" if i % 3 else f"{i:02d}/deeper/image.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    (folder / "readme.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_images_counts_as_an_npz_of_them(configure, teacher_file, tmp_path, workers):
    configure(FEATURES=str(teacher_file), WORKERS=workers)
    expected = fid.main()
    save_images(np.load(fid.SAMPLES)["arr_0"], tmp_path / "folder")
    Image.open(tmp_path / "folder/01.png").convert("RGBA").save(tmp_path / "folder/01.webp", lossless=True)
    (tmp_path / "folder/01.png").unlink()
    fid.SAMPLES = str(tmp_path / "folder")
    found = fid.main()
    for key in ("frechet_distance", "precision", "recall", "sample_count"):
        assert found[key] == expected[key]


@pytest.mark.parametrize("place", ["samples.npz", "samples/samples.npz"])
def test_the_folder_of_a_run_or_of_its_samples_names_its_samples(configure, teacher_file, tmp_path, place):
    configure(FEATURES=str(teacher_file))
    run = tmp_path / "run"
    (run / place).parent.mkdir(parents=True)
    (run / "checkpoints").mkdir()
    Image.new("RGB", (50, 50)).save((run / place).with_name("samples.png"))
    (run / place).with_suffix(".json").write_text('{"SEED": 3}')
    shutil.copy(fid.SAMPLES, run / place)
    fid.SAMPLES = str(run)
    result = fid.main()
    assert result["samples"] == str(run / place) and result["samples_settings"] == {"SEED": 3}


# ---- the network at another size


def vit_of_this_test(pretrained=True, **_):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=56, patch_size=14, embed_dim=24, depth=2, num_heads=2, num_classes=0)


def test_a_timm_name_sees_images_resized_by_pillow_at_features_size(configure, monkeypatch):
    """FD-DINOv2's convention: bytes resized by Pillow (bicubic), normalised, the class token after the last norm."""
    vit_of_this_test.__module__ = "timm.models.vision_transformer"
    timm.models.register_model(vit_of_this_test)
    configure(FEATURES="vit_of_this_test", FEATURES_SIZE=28)
    distance = fid.main()["frechet_distance"]

    network = vit_of_this_test().eval()
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    network.set_input_size(img_size=(28, 28))
    tokens = []
    for path in (fid.SAMPLES, fid.REFERENCE):
        resized = [Image.fromarray(image).resize((28, 28), Image.BICUBIC) for image in np.load(path)["arr_0"]]
        x = torch.stack([(torch.tensor(np.array(image)).permute(2, 0, 1) / 255 - mean) / std for image in resized])
        tokens.append(network.forward_features(x)[:, 0].detach())
    assert distance == pytest.approx(few_images_distance(*tokens), rel=1e-2)
    configure(FEATURES="vit_of_this_test", FEATURES_SIZE=30)
    with pytest.raises(ValueError, match="vit_of_this_test takes no images of 30 pixels .*set FEATURES_SIZE"):
        fid.main()


# ---- CLIP score


PROMPTS = ["a cat", "", "Katze \u2028 \U0001f431", "a cat on a cat " * 20, "cat", "x"]  # of the images in samples.npz


def write_clip(folder, transformers):
    """A small CLIP of random weights, written by transformers itself, and a vocabulary of bytes in the usual layout."""
    torch.manual_seed(0)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "ca", "cat</w>", "<start>", "<end>"]
    half = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    config = transformers.CLIPConfig(
        text_config=dict(half, vocab_size=516, max_position_embeddings=12, bos_token_id=514, eos_token_id=515),
        vision_config=dict(half, image_size=16, patch_size=4), projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="CLIPTokenizer", bos_token="<start>", eos_token="<end>", pad_token="<end>", unk_token="<end>")))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """None where transformers is not installed."""
    with contextlib.suppress(ImportError):
        import transformers
        folder = tmp_path_factory.mktemp("clip")
        write_clip(folder, transformers)
        return folder


@pytest.fixture
def configure_clip(configure, teacher_file, clip_folder, tmp_path):
    """configure() with a CLIP of its own, and prompts beside the samples."""
    pytest.importorskip("transformers")

    def set_constants(**constants):
        shutil.copytree(clip_folder, tmp_path / "clip")
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
        return configure(**{"FEATURES": str(teacher_file), "CLIP": str(tmp_path / "clip"), **constants})
    return set_constants


def cosines(folder, images, prompts, mean, std):
    """[image, prompt], by transformers' CLIPModel and Pillow's resize."""
    import transformers
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, max_length=12, truncation=True, return_tensors="pt")
    resized = np.stack([Image.fromarray(image).resize((16, 16), Image.BICUBIC) for image in images])
    pixels = (torch.from_numpy(resized) / 255 - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        logits = network(pixel_values=pixels.permute(0, 3, 1, 2), **tokens).logits_per_image
        return (logits / network.logit_scale.exp()).double().numpy()


@pytest.mark.parametrize("size, mean, std, tolerance", [
    (16, timm.data.OPENAI_CLIP_MEAN, timm.data.OPENAI_CLIP_STD, 1e-6),  # at the network's own size, without a file
    (32, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], 1e-4)])  # resized, and a file that says how to normalise
def test_clip_score_is_the_mean_cosine_in_clip(configure_clip, tmp_path, capsys, size, mean, std, tolerance):
    out = configure_clip()
    images = write_images(fid.SAMPLES, 6, size=size, seed=1)
    write_images(fid.REFERENCE, 9, size=size)
    if size == 32:
        (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(dict(image_mean=mean, image_std=std)))
    result = fid.main()
    expected = cosines(fid.CLIP, images, PROMPTS, mean, std)
    assert result["clip_score"] == pytest.approx(expected.diagonal().mean(), abs=tolerance)
    assert abs(result["clip_score"] - expected[:, ::-1].diagonal().mean()) > 2 * tolerance  # each prompt with its image
    assert result["label"].endswith(f"; CLIP score in {fid.CLIP}") and result["clip"] == fid.CLIP
    assert len(result["clip_weights_sha256"]) == 64 and "transformers" in result["versions"]
    assert json.loads(out.read_text()) == result and "clip_score" in capsys.readouterr().out
    fid.CLIP = None
    assert fid.main()["frechet_distance"] == result["frechet_distance"]


@pytest.mark.parametrize("content, found", [
    (None, "No such file"), (b"one\ntwo\n", "2 lines"), (b"\n" * 7, "7 lines"), (b"\xff\n" * 6, "can't decode byte")])
def test_samples_without_their_prompts_are_refused_at_once(configure, tmp_path, content, found):
    configure(CLIP="absent", INCEPTION_WEIGHTS="absent.pth")
    if content:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"prompts.txt: not the 6 prompts of .*samples.npz .*{found}.*; write"):
        fid.main()


def test_prompts_of_a_prepared_folder_are_first_captions(monkeypatch, tmp_path):
    expected = [f"drawing {i} \u2028" for i in range(5)]
    (tmp_path / "source").mkdir()
    for i, caption in enumerate(expected):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"source/{i}.png")
        captions = [caption, *(f"another {j}" for j in range(i))]
        (tmp_path / f"source/{i}.txt").write_text("\n".join(captions), encoding="utf-8")
    for name, value in dict(SOURCE=str(tmp_path / "source"), DATA_DIR=str(tmp_path / "prepared"), IMAGE_SIZE=16,
                            VAE=None, WORKERS=0, BATCH_SIZE=8).items():
        monkeypatch.setattr(prepare_latents, name, value)
    prepare_latents.main()
    found = fid.read_prompts(fid.open_images(tmp_path / "prepared", "SAMPLES"))
    assert [prompt.split() for prompt in found] == [prompt.split() for prompt in expected]


def test_a_prepared_folder_without_captions_has_no_prompts(configure, data_dir):
    configure(CLIP="absent", INCEPTION_WEIGHTS="absent.pth", SAMPLES=str(data_dir), REFERENCE=str(data_dir))
    with pytest.raises(ValueError, match="prompts.txt: not the 200 prompts of .*No such file"):
        fid.main()


def damage_weights(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
    state["text_projection.weight"].fill_(torch.nan)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("break_it, sentence", [
    (shutil.rmtree, "loads no such model"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "loads no such model"),
    (lambda folder: [(folder / name).unlink() for name in ("vocab.json", "merges.txt")], "loads no such model"),
    (damage_weights, "loads no such model .its weights are damaged"),
    (lambda folder: save_file({"logit_scale": torch.ones(())}, folder / "model.safetensors", metadata={"format": "pt"}),
     "loads no such model .without ")])
def test_what_is_no_clip_is_refused_in_one_line(configure_clip, tmp_path, monkeypatch, break_it, sentence):
    configure_clip()
    break_it(tmp_path / "clip")
    monkeypatch.setattr(fid, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(ValueError, match=f"^CLIP {fid.CLIP}: transformers {sentence}.*; set CLIP to") as error:
        fid.main()
    assert "\n" not in str(error.value)


def test_clip_score_without_transformers_says_what_to_install(configure_clip, monkeypatch):
    configure_clip()
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(fid, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(ValueError, match="pip install -r requirements-text.txt, or set CLIP = None"):
        fid.main()


# ---- the reference's statistics, kept


def rewrite_unseen(path, **arrays):
    """Other content under the same size and time."""
    before = path.stat()
    np.savez(path, **arrays)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_second_evaluation_does_not_read_the_reference_again(configure, teacher_file, tmp_path, capsys):
    configure(FEATURES=str(teacher_file))
    first = fid.main()
    (cache,) = tmp_path.glob("reference.npz.*.npz")
    assert first["reference_cache"] == str(cache) and first["weights_sha256"][:8] in cache.name
    rewrite_unseen(tmp_path / "reference.npz", arr_0=write_images(tmp_path / "other.npz", 9, seed=5))
    capsys.readouterr()
    second = fid.main()
    assert f"{cache}: statistics of {tmp_path / 'reference.npz'} from an earlier evaluation" in capsys.readouterr().out
    assert all(second[key] == first[key] for key in ("frechet_distance", "precision", "recall"))

    os.utime(tmp_path / "reference.npz")
    third = fid.main()
    assert third["frechet_distance"] != first["frechet_distance"]
    assert "earlier" not in capsys.readouterr().out and list(tmp_path.glob("reference.npz.*")) == [cache]


def test_kept_statistics_serve_no_other_settings(configure, teacher_file, tmp_path, monkeypatch, capsys):
    configure(FEATURES=str(teacher_file))
    fid.main()
    other = tmp_path / "other.safetensors"
    with safe_open(teacher_file, "pt") as file:
        save_file({key: file.get_tensor(key) * 2 for key in file.keys()}, other, metadata=file.metadata())
    for changed in (dict(PRECISION_RECALL_IMAGES=5), dict(FEATURES=str(other))):
        for name, value in changed.items():
            monkeypatch.setattr(fid, name, value)
        capsys.readouterr()
        result = fid.main()
        assert "earlier" not in capsys.readouterr().out and result["precision_recall_reference_count"] == 5


def shifted_pixels(images, by):
    """Features for measure() that need no network."""
    return images.flatten(1)[:, :3].float() + by, None, None


def test_kept_statistics_serve_no_other_resize(configure, tmp_path, monkeypatch, capsys):
    configure()
    images = fid.open_images(fid.REFERENCE, "REFERENCE")
    network, kept = dict(features="inception", features_size=299, weights_sha256="0123456789"), {}
    for resize in ("tf1", "bilinear", "tf1", "bilinear"):
        monkeypatch.setattr(fid, "RESIZE", resize)
        features = partial(shifted_pixels, by=len(resize))
        images = fid.open_images(fid.REFERENCE, "REFERENCE")
        found, cache = fid.measure_reference(images, 9, features, network, torch.device("cpu"), 0, 1)
        assert ("earlier" in capsys.readouterr().out) == (resize in kept)
        np.testing.assert_array_equal(kept.setdefault(resize, found)["mu"], found["mu"])
        if resize == "tf1":  # as before there was a choice
            assert cache.name == "reference.npz.inception-01234567-299-9.npz"
            assert "resize" not in str(np.load(cache)["made_of"])
    assert (kept["tf1"]["mu"] != kept["bilinear"]["mu"]).all()


@pytest.mark.parametrize("content", [b"", b"PK no zip", "half", "pickled"])
def test_a_damaged_file_of_statistics_is_written_anew(configure, teacher_file, tmp_path, content):
    configure(FEATURES=str(teacher_file))
    first = fid.main()
    (cache,) = tmp_path.glob("reference.npz.*.npz")
    whole = cache.read_bytes()
    if content == "pickled":
        np.savez(cache, made_of=np.array([{}], object))
    else:
        cache.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert fid.main()["frechet_distance"] == first["frechet_distance"]
    assert len(cache.read_bytes()) == len(whole)


def test_a_reference_beside_which_nothing_can_be_written(configure, teacher_file, tmp_path, capsys):
    reference = tmp_path / ("r" * 240 + ".npz")  # the longer name of its statistics is none: it also fails for root
    write_images(reference, 9, seed=2)
    configure(FEATURES=str(teacher_file), REFERENCE=str(reference))
    result = fid.main()
    assert result["reference_cache"] is None and result["frechet_distance"] > 0
    assert "so the next evaluation measures" in capsys.readouterr().out


# ---- two processes


LAUNCHED = """
import json, sys
import fid
from runtime import run_script
for name, value in json.loads(sys.argv[1]).items():
    setattr(fid, name, value)
run_script(fid.main)
"""


@pytest.fixture
def launch(tmp_path):
    """Runs fid.main(), with its constants as they are now set, in as many processes of its own."""
    (tmp_path / "launched.py").write_text(LAUNCHED)

    def run(processes):
        names = ("SAMPLES", "REFERENCE", "BATCH_SIZE", "OUT", "INCEPTION_WEIGHTS", "WORKERS", "FEATURES", "CLIP")
        constants = json.dumps({name: getattr(fid, name) for name in names})
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
             str(tmp_path / "launched.py"), constants], cwd=ROOT, text=True, capture_output=True, timeout=300,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return run


def test_two_processes_measure_what_one_measures(configure, teacher_file, clip_folder, tmp_path, launch):
    configure(FEATURES=str(teacher_file), BATCH_SIZE=2, WORKERS=1, CLIP=clip_folder and str(clip_folder))
    save_images(write_images(tmp_path / "samples.npz", 11), tmp_path / "folder")
    (tmp_path / "folder/prompts.txt").write_text("\n".join(PROMPTS + PROMPTS[:5]), encoding="utf-8")
    fid.SAMPLES = str(tmp_path / "folder")  # six batches, the last of one image; of the reference five
    one = fid.main()
    (cache,) = tmp_path.glob("reference.npz.*.npz")
    cache.rename(tmp_path / "one.npz")
    done = launch(2)
    assert done.returncode == 0, done.stderr
    two = json.loads(Path(fid.OUT).read_text())
    assert two["processes"] == 2 and done.stdout.count("precision") == 2  # rank 0 alone speaks
    for key in ("frechet_distance", "precision", "recall", *(["clip_score"] if clip_folder else [])):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    with np.load(cache) as found, np.load(tmp_path / "one.npz") as expected:
        for key in ("mu", "sigma", "features"):  # the features in the images' order
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_an_image_that_one_process_cannot_read_ends_all(configure, teacher_file, tmp_path, launch):
    configure(FEATURES=str(teacher_file), BATCH_SIZE=2, WORKERS=1)
    save_images(write_images(tmp_path / "samples.npz", 8), tmp_path / "folder")
    bad = tmp_path / "folder/02.png"  # of the second process's first batch; its header stays
    bad.write_bytes(bad.read_bytes()[:60])
    fid.SAMPLES, started = str(tmp_path / "folder"), time.time()
    done = launch(2)
    assert done.returncode != 0 and f"launched.py: {bad}: cannot be read as an image" in done.stderr
    assert time.time() - started < 100 and not Path(fid.OUT).exists()


# ---- bad input


u8 = np.zeros((8, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("arrays, sentence", [
    (dict(images=u8), "no .npz of images .*arr_0"),
    (dict(arr_0=u8.astype(np.float32)), r"arr_0 is float32 \[8, 16, 16, 3\]; write it as uint8"),
    (dict(arr_0=u8.transpose(0, 3, 1, 2).copy()), r"arr_0 is uint8 \[8, 3, 16, 16\]; write it as uint8 \[N, H, W, 3\]"),
    (dict(arr_0=np.array([{}], object)), "arr_0 is object"),
    (dict(arr_0=u8[:1]), "1 images, but precision and recall need 4; set REFERENCE to a larger set"),
    (dict(arr_0=u8, mu=np.zeros(3), sigma=np.eye(3)), "mu, sigma are not of the shapes"),
    (dict(arr_0=u8, mu=np.full(2048, np.nan)), "mu are not of the shapes .* or not finite"),
    (dict(mu=np.zeros(2048)), "no .npz of images .*arr_0"),
    (dict(arr_0=np.zeros((8, 32, 24, 3), np.uint8)), "16 x 16 pixels, those of .* have 24 x 32; compare images of one"),
])
def test_a_malformed_file_is_refused_before_the_weights_are_read(configure, tmp_path, arrays, sentence):
    configure(REFERENCE=str(tmp_path / "bad.npz"), INCEPTION_WEIGHTS="absent.pth")
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=sentence) as error:
        fid.main()
    assert str(tmp_path / "bad.npz") in str(error.value) and "\n" not in str(error.value)


def test_a_missing_and_a_truncated_file_are_refused(configure, teacher_file, tmp_path):
    configure(SAMPLES=str(tmp_path / "absent.npz"))
    with pytest.raises(ValueError, match="absent.npz: no such file or folder; set SAMPLES to"):
        fid.main()
    configure(FEATURES=str(teacher_file))
    whole = Path(fid.SAMPLES).read_bytes()
    Path(fid.SAMPLES).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="samples.npz: no .npz of images"):
        fid.main()
    Path(fid.SAMPLES).write_bytes(whole[:900] + bytes(100) + whole[1000:])
    with pytest.raises(ValueError, match="samples.npz: damaged at image 4"):
        fid.main()


@pytest.mark.parametrize("content", ["unfinished", "checkpoints"])
def test_an_unfinished_folder_and_a_run_without_samples_are_refused(configure, tmp_path, content):
    (tmp_path / "folder" / content).mkdir(parents=True)
    configure(REFERENCE=str(tmp_path / "folder"), INCEPTION_WEIGHTS="absent.pth")
    with pytest.raises(ValueError, match="folder: unfinished, or a run without samples"):
        fid.main()


def test_folders_of_few_mixed_or_unreadable_images_are_refused_at_once(configure, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    configure(SAMPLES=str(folder), INCEPTION_WEIGHTS="absent.pth")
    with pytest.raises(ValueError, match="folder: 0 images, but precision and recall need 4; set SAMPLES"):
        fid.main()
    save_images(write_images(tmp_path / "images.npz", 8), folder)
    Image.new("RGB", (20, 16)).save(folder / "02.png")
    with pytest.raises(ValueError, match="02.png: 20 x 16 pixels, but .*00/deeper/image.png has 16 x 16; give all"):
        fid.main()
    (folder / "02.png").write_text("no image")
    with pytest.raises(ValueError, match="02.png: cannot be read as an image") as error:
        fid.main()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_file_cut_short_is_named(configure, teacher_file, tmp_path, workers):
    configure(FEATURES=str(teacher_file), SAMPLES=str(tmp_path / "folder"), WORKERS=workers)
    save_images(write_images(tmp_path / "images.npz", 8), tmp_path / "folder")
    bad = tmp_path / "folder/05.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"^/.*05.png: cannot be read as an image .*; replace it") as error:
        fid.main()
    assert "\n" not in str(error.value)


def test_what_cannot_be_written_is_said_at_the_start(configure, teacher_file, tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    configure(FEATURES=str(teacher_file), OUT=str(tmp_path / "folder.json"))
    monkeypatch.setattr(fid, "measure", lambda *_: pytest.fail("it measured"))
    with pytest.raises(ValueError, match="folder.json: is a folder; set OUT to a file's path"):
        fid.main()


def test_figures_are_printed_before_they_are_written(configure, teacher_file, monkeypatch, capsys):
    def full(path, write):
        raise OSError(28, "No space left on device")

    configure(FEATURES=str(teacher_file))
    monkeypatch.setattr(fid, "write_atomically", full)
    with pytest.raises(OSError):
        fid.main()
    assert "frechet_distance" in capsys.readouterr().out


@pytest.mark.parametrize("constants, message", [
    (dict(BATCH_SIZE=0), "BATCH_SIZE = 0; allowed: whole number from 1"),
    (dict(WORKERS=-1), "WORKERS = -1; allowed: whole number from 0"),
    (dict(SAMPLES=None), "SAMPLES = None; allowed: path"),
    (dict(CLIP=""), "CLIP = ''; allowed: path or None"),
    (dict(RESIZE="bicubic"), "unknown RESIZE 'bicubic'; choose one of tf1, bilinear"),
    (dict(FEATURES_SIZE=0), "FEATURES_SIZE = 0; allowed: whole number from 1 or None")])
def test_settings_out_of_range_are_refused(configure, constants, message):
    configure(**constants)
    with pytest.raises(ValueError, match=message):
        fid.main()


def test_inception_score_of_images_sorted_by_class_is_that_of_shuffled_ones():
    classes, count = 20, 10_000
    labels = np.sort(np.arange(count) % classes)
    probs = np.full((count, classes), 0.3 / classes)
    probs[np.arange(count), labels] += 0.7
    shuffled = probs[np.random.default_rng(1).permutation(count)]
    assert fid.inception_score(probs)[0] == pytest.approx(fid.inception_score(shuffled)[0], rel=0.01)


@pytest.mark.parametrize("name", ["test_maxvit", "halonet26t"])
def test_networks_that_take_no_such_size_are_refused_in_one_line(configure, monkeypatch, name):
    create = fid.timm.create_model
    monkeypatch.setattr(fid.timm, "create_model", lambda name, pretrained, **settings: create(name, **settings))
    configure(FEATURES=name)
    with pytest.raises(ValueError, match=f"{name} takes no images of 224 pixels"):
        fid.main()


def test_features_that_are_not_finite_are_named(configure, teacher_file, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    with safe_open(teacher_file, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        state["blocks.1.attn.proj.bias"][3] = torch.inf
        save_file(state, damaged, metadata=file.metadata())
    configure(FEATURES=str(damaged))
    with pytest.raises(ValueError, match=r"reference.npz: features from image 0 on are not finite; .*damaged"):
        fid.main()


def test_too_few_images_for_precision_and_recall_are_refused_at_once(configure):
    configure(PRECISION_RECALL_IMAGES=3, INCEPTION_WEIGHTS="absent.pth")
    with pytest.raises(ValueError, match="PRECISION_RECALL_IMAGES 3: precision and recall need 4"):
        fid.main()


def test_weights_that_cannot_be_fetched(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "INCEPTION_URL", "http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")
    configure(INCEPTION_WEIGHTS=None)
    with pytest.raises(ValueError, match="nor could it be fetched") as error:
        fid.main()
    for part in (inception.INCEPTION_URL, str(tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"),
                 "INCEPTION_WEIGHTS"):
        assert part in str(error.value)


def test_fetched_weights_with_another_hash_are_not_kept(configure, tmp_path, monkeypatch, weights_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(inception, "INCEPTION_URL", weights_file.as_uri())
    configure(INCEPTION_WEIGHTS=None)
    with pytest.raises(ValueError, match="invalid hash value"):
        fid.main()
    assert not list((tmp_path / "hub/checkpoints").iterdir())


@pytest.mark.parametrize("content", [b"", b"not weights", dict(a=torch.zeros(1)), [1, 2], "absent"])
def test_weights_that_are_missing_damaged_or_others(configure, tmp_path, content):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content != "absent":
        torch.save(content, path)
    configure(INCEPTION_WEIGHTS=str(path))
    sentence = "no such file" if content == "absent" else "damaged, or of another network"
    with pytest.raises(ValueError, match=sentence) as error:
        fid.main()
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_results_lie_beside_what_they_measure(data_dir, monkeypatch, tmp_path):
    set_constants(monkeypatch, fid, REFERENCE=str(data_dir), FEATURES=str(ROOT / "data/judge.safetensors"), OUT=None,
                  WORKERS=0, BATCH_SIZE=50)
    images = np.random.default_rng(0).integers(0, 255, (60, 28, 28, 3), dtype=np.uint8)
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        monkeypatch.setattr(fid, "SAMPLES", str(tmp_path / f"{name}.npz"))
        fid.main()
    found = {path.name: json.loads(path.read_text())["samples"] for path in tmp_path.glob("*.json")}
    assert found == {f"{name}.prepared.judge.json": str(tmp_path / f"{name}.npz") for name in ("a", "b")}


def test_prompts_come_in_the_order_of_the_images_numbers(monkeypatch, tmp_path, capsys):
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "prompts.txt").write_bytes("\ufeff".encode() + b"".join(b"prompt %d\r\n" % i for i in range(12)))
    monkeypatch.setattr(fid, "CLIP", "any")
    images = fid.open_images(tmp_path, "SAMPLES")
    assert fid.read_prompts(images) == [f"prompt {i}" for i in range(12)]
    assert "images in the order of the numbers in their names, 0.png, 1.png" in capsys.readouterr().out
    assert fid.ImageFolder(tmp_path)[range(12)][0][:, 0, 0, 0].tolist() == list(range(12))
    monkeypatch.setattr(fid, "CLIP", None)
    assert [file.name for file in fid.ImageFolder(tmp_path).files][:3] == ["0.png", "1.png", "10.png"]


def test_photographs_that_exif_turns_have_their_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (30, 20), (9, 0, 0)).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGB", (20, 30), (9, 0, 0)).save(tmp_path / "upright.png")
    folder = fid.ImageFolder(tmp_path)
    assert folder.size == (30, 20) and folder[[0, 1]][0].shape == (2, 3, 30, 20)
