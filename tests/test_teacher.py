"""Teacher: reference numbers of DINOv2, other vision transformers, bad input, the shipped networks."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

import prepare_latents
import teacher
from dataset import PreparedDataset
from teacher import Teacher, load_network, preprocess
from tests.conftest import ROOT


def to_timm(state):
    """DINOv2's hub keys as timm's (see the golden files' meta)."""
    state = {key: value for key, value in state.items() if key != "mask_token"}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return state


@pytest.mark.parametrize("name, input_size", [("dinov2_teacher", 56), ("dinov2_teacher256", 224),
                                              ("dinov2_teacher_reg", 70)])
def test_tokens_and_logits_equal_the_reference(golden, name, input_size):
    z, state, meta = golden(name)
    network = VisionTransformer(**meta["timm_kwargs"])
    network.load_state_dict(to_timm(state))
    tokens, logits = Teacher(network, range(len(network.blocks)), input_size)(z["images"])
    tolerance = dict(rtol=meta["rtol"], atol=meta["atol"])
    torch.testing.assert_close(tokens, z["tokens"], **tolerance)
    if "logits" in z:
        torch.testing.assert_close(torch.stack(logits), z["logits"], **tolerance)
    else:
        torch.testing.assert_close(torch.stack(logits)[:, :, :, ::8], z["logits_rows"], **tolerance)


def test_preprocessing_equals_the_reference(golden):
    z, _, meta = golden("dinov2_teacher256")
    x = preprocess(z["images"], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
    torch.testing.assert_close(x[:, :, ::16, ::16], z["pre"], rtol=meta["rtol"], atol=meta["atol"])


def test_position_table_is_resampled_to_the_grid():
    network = VisionTransformer(img_size=70, patch_size=14, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    table = network.pos_embed.detach().clone()
    small = Teacher(network, (0,), 42)
    assert small.grid == 3
    expected = timm.layers.resample_abs_pos_embed(table, [3, 3], [5, 5])
    torch.testing.assert_close(small.network.pos_embed, expected)
    tokens, logits = small(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert tokens.shape == (2, 9, 32) and logits[0].shape == (2, 2, 9, 9)


@pytest.mark.parametrize("name, settings", [
    ("vit_tiny_patch16_224", {}),  # supervised
    ("vit_base_patch16_224.mae", {}),
    ("vit_small_patch14_reg4_dinov2.lvd142m", {}),
    ("vit_base_patch16_clip_224.openai", {}),  # norm before the blocks
    ("vit_base_patch16_siglip_224.webli", {}),  # no class token, attention pooling
])
def test_any_timm_vit_with_plain_attention(name, settings):
    kwargs = dict(depth=2, embed_dim=48, num_heads=3, **settings)
    network = timm.create_model(name, pretrained=False, num_classes=0, **kwargs).eval()
    patch = network.patch_embed.patch_size[0]
    frozen = Teacher(network, (1, 0), 4 * patch)
    images = torch.randint(0, 256, (2, 3, 4 * patch, 4 * patch), dtype=torch.uint8)
    tokens, logits = frozen(images)
    assert tokens.shape == (2, 16, 48) and [tuple(each.shape) for each in logits] == [(2, 3, 16, 16)] * 2
    config = timm.data.resolve_model_data_config(network)
    expected = network.forward_features(preprocess(images, config["mean"], config["std"], 4 * patch))
    torch.testing.assert_close(tokens, expected[:, network.num_prefix_tokens :], rtol=1e-4, atol=1e-5)


def test_logits_of_no_other_layer(monkeypatch):
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    frozen = Teacher(network, (2,), 32)
    explicit = []
    original = teacher.attention_with_qk
    monkeypatch.setattr(teacher, "attention_with_qk", lambda attn, x: (explicit.append(attn), original(attn, x))[1])
    frozen(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert explicit == [network.blocks[2].attn]


def test_stays_frozen_and_in_eval_mode():
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    frozen = Teacher(network, (0,), 32).train()
    assert not frozen.training and not frozen.network.training
    assert not any(p.requires_grad for p in frozen.parameters())
    tokens, logits = frozen(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert not tokens.requires_grad and not logits[0].requires_grad


def small_vit(**settings):
    return VisionTransformer(**{**dict(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2), **settings})


@pytest.mark.parametrize("make, layers, size, message", [
    (small_vit, (2,), 28, r"teacher layers \[2\] must lie in 0\.\.1; change LAYER_PAIRS"),
    (small_vit, (0,), 30, "input_size 30 is no multiple of its patch size 14"),
    (lambda: timm.create_model("resnet18"), (0,), 28, "ResNet has no attention of the usual kind"),
    (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), (0,), 28, "Eva has no attention of the usual kind"),
    (lambda: small_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock), (1,), 28,
     "no attention of the usual kind in layer 1"),
])
def test_impossible_teachers_are_refused(make, layers, size, message):
    with pytest.raises(ValueError, match=message):
        Teacher(make(), layers, size)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown network 'vit_gigantic': neither a timm model"):
        Teacher("vit_gigantic", (0,), 28)


@pytest.mark.parametrize("name, message", [
    ("vit_base_patch14_dinov2.lvd142",
     "called 'vit_base_patch14_dinov2.lvd142'; choose one of vit_base_patch14_dinov2.lvd142m"),
    ("vit_large_patch14_224", "of 'vit_large_patch14_224'; choose another network")])
def test_weights_that_there_are_not_do_not_blame_the_connection(name, message):
    with pytest.raises(ValueError, match=f"timm has no weights {message}"):
        load_network(name)


@pytest.mark.parametrize("name", ["hiera_tiny_224", "tiny_vit_5m_224", "xcit_nano_12_p16_224", "volo_d1_224"])
def test_networks_of_other_kinds_are_refused_as_teachers(name, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **settings: create(name, **settings))
    with pytest.raises(ValueError, match="has no attention of the usual kind; choose a timm VisionTransformer"):
        teacher.teacher_for_grid(name, (1,), 7)


def test_weights_that_cannot_be_fetched():
    with pytest.raises(ValueError, match=r"weights of 'vit_base_patch14_dinov2.lvd142m' could not be fetched"):
        Teacher("vit_base_patch14_dinov2.lvd142m", (8,), 224)


def test_default_teacher_without_weights_has_dinov2_shape():
    frozen = Teacher("vit_small_patch14_dinov2.lvd142m", (10, 11), 56, pretrained=False)
    tokens, logits = frozen(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert tokens.shape == (1, 16, 384) and [tuple(each.shape) for each in logits] == [(1, 6, 16, 16)] * 2
    assert torch.equal(frozen.mean, torch.tensor((0.485, 0.456, 0.406)))


def test_damaged_or_missing_file(tmp_path, teacher_file):
    with pytest.raises(ValueError, match="no such file; make one with experiments/train_network.py"):
        load_network(tmp_path / "absent.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(teacher_file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged.safetensors: not a network of experiments/train_network.py"):
        load_network(damaged)


@pytest.mark.parametrize("name, most_bytes, accuracy", [("teacher", 3_000_000, 0.90), ("judge", 1_000_000, 0.90)])
def test_shipped_networks_recognise_held_out_images(name, most_bytes, accuracy, tmp_path, monkeypatch):
    """On the 1,000 embedded test images; the header's figure is of all 10,000."""
    path = ROOT / f"data/{name}.safetensors"
    assert path.stat().st_size <= most_bytes
    for constant, value in dict(SOURCE=str(ROOT / "data/fashion_mnist_test.png"), DATA_DIR=str(tmp_path), IMAGE_SIZE=28,
                                VAE=None, WORKERS=0).items():
        monkeypatch.setattr(prepare_latents, constant, value)
    prepare_latents.main()
    data = PreparedDataset(tmp_path)
    network = load_network(path)
    config = timm.data.resolve_model_data_config(network)
    x = preprocess(data.images(range(len(data))), config["mean"], config["std"], config["input_size"][-1])
    with torch.no_grad():
        right = (network(x).argmax(1).numpy() == data.labels).mean()
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["network"])
    assert header["images"] == 60_000 and header["accuracy"] >= accuracy
    assert right >= accuracy - 0.03  # three standard errors of 1,000 images
