"""fid.py: the reference numbers, pytorch-fid and ADM's formulas as judges, main() end to end, and bad input."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import fid


def recipe_weights(state):
    """The random weights that tests/golden/inception.npz was made with (its meta tells the recipe)."""
    weights = {}
    for key, p in state.items():
        if key.endswith("num_batches_tracked"):
            weights[key] = p
            continue
        r = torch.randn(p.shape, generator=torch.Generator().manual_seed((zlib.crc32(key.encode()) + 7) % 2**31))
        if key.endswith("running_var"):
            weights[key] = r.abs() * 0.2 + 0.8
        elif key.endswith(("running_mean", "bias")):
            weights[key] = 0.05 * r
        elif key.endswith("bn.weight"):
            weights[key] = 1 + 0.1 * r
        else:
            weights[key] = r * (1.6 / p[0].numel()) ** 0.5
    return weights


@pytest.fixture(scope="module")
def weights():
    return recipe_weights(fid.InceptionV3().state_dict())


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


# ---- the network


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= 0.02 * (expected[0] - expected[1]).abs().max()


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("resize, names", [("tf1", ("pool_tf1_", "spatial_tf1_", "probs_tf1_")),
                                           ("bilinear", ("pool", "spatial", "probs"))])
def test_inception_equals_the_reference(golden, weights, size, resize, names):
    z, _, _ = golden("inception")
    network = fid.InceptionV3(resize)
    network.load_state_dict(weights)
    for ours, name in zip(network(z[f"images{size}"]), names):
        assert_close(ours, z[f"{name}{size}"])


def test_inception_has_pytorch_fids_keys_and_gives_its_features(monkeypatch):
    judge = pytest.importorskip("pytorch_fid.inception", reason="pytorch-fid is the judge")

    def random_weights(*_, **__):  # in place of its download; num_batches_tracked and all other keys are its own
        net = judge._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        return recipe_weights(net.state_dict())
    monkeypatch.setattr(judge, "load_state_dict_from_url", random_weights)
    whole = judge.fid_inception_v3()
    monkeypatch.setattr(judge, "fid_inception_v3", lambda: whole)
    theirs, ours = judge.InceptionV3().eval(), fid.InceptionV3("bilinear")

    ours.load_state_dict(whole.state_dict())  # strict: exactly its keys and shapes
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images.float() / 255)[0].flatten(1)
    torch.testing.assert_close(ours(images)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (400, 350)])
def test_resize_is_tensorflow_1s(height, width):
    judge = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow", reason="torch-fidelity is the judge")
    x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255
    expected = judge.interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(fid.resize_tf1(x, 299), expected)


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

    network = fid.InceptionV3("tf1")
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
    for key, array in fid.open_images(fid.REFERENCE, "REFERENCE")[2].items():
        np.testing.assert_array_equal(array, stored.pop(key))
    assert not stored and fid.main()["frechet_distance"] == before["frechet_distance"]


def test_main_measures_in_a_networks_features_and_does_not_call_it_fid(configure, teacher_file, data_dir):
    out = configure(FEATURES=str(teacher_file), REFERENCE=str(data_dir))
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
        configure(FEATURES=str(teacher_file), BATCH_SIZE=batch_size)
        results.append(fid.main()["frechet_distance"])
    assert results == pytest.approx([results[0]] * 3, rel=1e-3)


# ---- bad input


u8 = np.zeros((8, 16, 16, 3), np.uint8)


@pytest.mark.parametrize("arrays, sentence", [
    (dict(images=u8), "no .npz of images .*arr_0"),
    (dict(arr_0=u8.astype(np.float32)), r"arr_0 is float32 \[8, 16, 16, 3\]; write it as uint8"),
    (dict(arr_0=u8.transpose(0, 3, 1, 2).copy()), r"arr_0 is uint8 \[8, 3, 16, 16\]; write it as uint8 \[N, H, W, 3\]"),
    (dict(arr_0=np.array([{}], object)), "arr_0 is object"),
    (dict(arr_0=u8[:1]), "1 images, but precision and recall need 4; set REFERENCE to a larger set"),
    (dict(arr_0=u8, mu=np.zeros(3), sigma=np.eye(3)), "mu, sigma are not of the shapes"),
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


def test_an_unfinished_folder_is_refused(configure, tmp_path):
    (tmp_path / "unfinished").mkdir()
    configure(REFERENCE=str(tmp_path / "unfinished"))
    with pytest.raises(ValueError, match="unfinished: no meta.json"):
        fid.main()


def test_weights_that_cannot_be_fetched(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    configure(INCEPTION_WEIGHTS=None, INCEPTION_URL="http://127.0.0.1:9/pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(ValueError, match="nor could it be fetched") as error:
        fid.main()
    for part in (fid.INCEPTION_URL, str(tmp_path / "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"),
                 "INCEPTION_WEIGHTS"):
        assert part in str(error.value)


def test_fetched_weights_with_another_hash_are_not_kept(configure, tmp_path, monkeypatch, weights_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    configure(INCEPTION_WEIGHTS=None, INCEPTION_URL=weights_file.as_uri())
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
