"""Teacher: reference numbers of DINOv2, DINOv3 and PE, other vision transformers, bad input, the shipped networks."""

import json
import re
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


@pytest.mark.parametrize("name", ["teacher_eva", "teacher_eva_pe"])
def test_eva_equals_the_reference(golden, name):
    z, state, meta = golden(name)
    network = Eva(**meta["timm_kwargs"], norm_layer=partial(nn.LayerNorm, eps=1e-5))
    network.load_state_dict(state)
    frozen = Teacher(network, meta["layers"], meta["run_size"])
    tokens, logits = frozen(z["images"])
    queries, keys = zip(*frozen(z["images"], return_qk=True)[1])
    expected = {name: z[name] for name in ("tokens", "logits", "queries", "keys")}
    found = dict(tokens=tokens, logits=torch.stack(logits), queries=torch.stack(queries), keys=torch.stack(keys))
    torch.testing.assert_close(found, expected, rtol=meta["rtol"], atol=meta["atol"])


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


EVAS = {  # timm's names, whose settings differ, and settings that make them differ more
    "vit_base_patch16_dinov3": {},
    "vit_base_patch16_dinov3_qkvb": {},
    "vit_small_plus_patch16_dinov3": {},
    "eva02_tiny_patch14_224": {},  # position table too
    "eva02_base_patch14_224": {},  # separate projections, norm inside the MLP
    "eva02_base_patch16_clip_224": {},  # norm inside attention
    "eva_giant_patch14_clip_224": {},  # no rotary embedding
    "vit_pe_core_tiny_patch16_384": {},  # norm before the blocks
    "vit_pe_spatial_tiny_patch16_512": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_base_patch16_sapiens2": dict(attn_only_layer_scale=True, num_kv_heads=3),  # norms of queries and keys
}


def small_eva(name="vit_base_patch16_dinov3", **settings):
    """The network of a timm name in small, all its weights random, its LayerScale's near 1."""
    settings = dict(depth=2, embed_dim=48, num_heads=3, num_classes=0, init_values=1.0) | settings
    network = timm.create_model(name, pretrained=False, **settings).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network


def some_images(size):
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name, settings", EVAS.items())
def test_eva_equals_timm(name, settings, monkeypatch):
    """Tokens those of forward_features, queries and keys those of which timm's attention makes its logits."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    network = small_eva(name, **settings)
    patch, prefix = network.patch_embed.patch_size[0], network.num_prefix_tokens
    frozen = Teacher(network, (1, 0), 5 * patch)
    images = some_images(5 * patch)
    tokens, qk = frozen(images, return_qk=True)
    attended = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **options: (attended.append((q, k)), attend(q, k, v, **options))[1])
    with torch.no_grad():
        expected = network.forward_features(preprocess(images, frozen.mean, frozen.std, 5 * patch))[:, prefix:]
    if isinstance(network.norm, nn.Identity):  # of the mean alone, if any
        expected = network.fc_norm(expected)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(qk, [(q[:, :, prefix:], k[:, :, prefix:]) for q, k in attended[::-1]])
    assert torch.equal(frozen(images)[0], tokens)  # nothing of a call is left for the next


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "vit_small_patch16_rope_mixed_ape_224"])
def test_compiled_eva_equals_itself(name, backend):
    """One graph, as train.py compiles it ("inductor")."""
    frozen = Teacher(small_eva(name), (1,), 48)
    tokens, logits = frozen(some_images(48))
    frozen.forward = torch.compile(frozen.forward, fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(frozen(some_images(48)), (tokens, logits), rtol=1e-4, atol=1e-4)


class AllOn(TorchDispatchMode):
    """Fails where an operation makes a tensor on another device."""

    def __init__(self, device):
        super().__init__()
        self.device = torch.device(device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert all(each.device == self.device for each in tree_leaves(made) if torch.is_tensor(each)), function
        return made


@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "eva02_tiny_patch14_224",
                                  "vit_small_patch16_rope_mixed_ape_224", "vit_small_patch14_reg4_dinov2"])
def test_a_call_makes_nothing_on_the_host(name, monkeypatch):
    """A copy from there, as of timm's rotary embedding, waits for the GPU; "meta" stands for one here."""
    network = timm.create_model(name, pretrained=False, depth=2, embed_dim=48, num_heads=3)
    size = 4 * network.patch_embed.patch_size[0]
    frozen = Teacher(network, (0, 1), size).to("meta")
    monkeypatch.setattr(network, "_pos_embed", None)  # where timm makes it
    with AllOn("meta"):
        tokens, qk = frozen(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device="meta"), return_qk=True)
    assert tokens.shape == (2, 16, 48) and qk[0][0].shape == qk[1][1].shape == (2, 3, 16, 16)


def test_a_network_serves_two_teachers():
    network, images = small_eva(), some_images(64)
    first, _ = Teacher(network, (0,), 64)(images)
    Teacher(network, (0,), 96)
    assert torch.equal(Teacher(network, (0,), 64)(images)[0], first)


def test_tokens_are_normed_by_what_norms_their_mean():
    network = small_vit(global_pool="avg")
    assert isinstance(network.norm, nn.Identity) and isinstance(network.fc_norm, nn.LayerNorm)
    nn.init.normal_(network.fc_norm.weight)
    images = some_images(28)
    frozen = Teacher(network, (), 28)
    with torch.no_grad():
        features = network.forward_features(preprocess(images, frozen.mean, frozen.std, 28))
        expected = network.fc_norm(features)[:, network.num_prefix_tokens :]
    torch.testing.assert_close(frozen(images)[0], expected, rtol=1e-5, atol=1e-5)


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


def changed(network, **attributes):
    """The network with other attributes of its second attention."""
    for name, value in attributes.items():
        setattr(network.blocks[1].attn, name, value)
    return network


@pytest.mark.parametrize("make, layers, size, message", [
    (small_vit, (2,), 28, r"teacher layers \[2\] must lie in 0\.\.1; change LAYER_PAIRS"),
    (small_vit, (0,), 30, "input_size 30 is no multiple of its patch size 14"),
    (lambda: timm.create_model("resnet18"), (0,), 28, "ResNet has no attention of the usual kind"),
    (lambda: small_eva(use_post_norm=True), (1,), 32, r"Eva has no .* in layer 1 \(EvaBlockPostNorm, EvaAttention\)"),
    (lambda: changed(small_eva(attn_type="rope"), num_kv_groups=3), (0, 1), 32, r"layer 1 \(heads share keys\)"),
    (lambda: changed(small_eva(), gate=nn.Identity()), (0, 1), 32, r"layer 1 \(its output is gated\)"),
    (lambda: changed(small_vit(), gate=nn.Identity()), (0, 1), 28, r"layer 1 \(its output is gated\)"),
    (lambda: small_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock), (1,), 28,
     "no attention of the usual kind in layer 1"),
])
def test_impossible_teachers_are_refused(make, layers, size, message):
    with pytest.raises(ValueError, match=message):
        Teacher(make(), layers, size)


def families():
    """(a timm name, whether and how it works) of the table in experiments/README.md."""
    page = (ROOT / "experiments/README.md").read_text()
    table = page.split("| family | timm's names, for example | works |\n|---|---|---|\n")[1].split("\n\n")[0]
    for line in table.splitlines():
        _, names, works = line.strip("| ").split(" | ")
        yield from ((name, works) for name in re.findall("`(.+?)`", names))


@pytest.mark.parametrize("name, works", list(families()))
def test_families_work_as_the_page_says(name, works, monkeypatch):
    """Each network at its full size, without memory."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False, num_classes=0)
    monkeypatch.setattr(teacher, "load_network", lambda name: network)
    middle = (len(getattr(network, "blocks", ())) // 2,)
    if works.startswith("no: "):
        with pytest.raises(ValueError, match=re.search('"(.+)"', works)[1]):
            teacher.teacher_for_grid(name, middle, 16)
        return
    frozen = teacher.teacher_for_grid(name, middle, 16).to("meta")
    tokens, [(q, k)] = frozen(torch.zeros(2, 3, 256, 256, dtype=torch.uint8, device="meta"), return_qk=True)
    assert tokens.shape == (2, 256, network.embed_dim)
    assert q.shape[:3] == k.shape[:3] == (2, network.blocks[1].attn.num_heads, 256)
    unnormed = isinstance(network.norm, nn.Identity) and isinstance(network.fc_norm, nn.Identity)
    assert works == ("yes, not normed" if unnormed else "yes")


def test_dinov3_takes_the_place_of_dinov2():
    """Same layers and heads, so the same LAYER_PAIRS; 256 pixels make 16 x 16 tokens."""
    assert timm.is_model_pretrained("vit_base_patch16_dinov3.lvd1689m")
    with torch.device("meta"):
        ours, theirs = (timm.create_model(f"vit_base_{name}") for name in ("patch14_dinov2", "patch16_dinov3"))
    assert len(ours.blocks) == len(theirs.blocks) == 12
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads == 12
    assert theirs.patch_embed.patch_size == (16, 16)


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
