"""SiT: reference numbers, published shapes, and that logits exist only where asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import MODELS, SiT, attention_logits, build
from teacher import Teacher


class ShapeRecorder(TorchDispatchMode):
    """Notes the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        self.shapes.update(tuple(o.shape) for o in outputs if torch.is_tensor(o))
        return out


def reference(golden):
    z, state, meta = golden("sit_forward")
    model = SiT(**meta["config"])
    model.load_state_dict(state)
    return model.eval(), z, meta


def check(outputs, z, rtol, atol):
    velocity, logits, features = outputs
    torch.testing.assert_close(velocity, z["velocity"], rtol=rtol, atol=atol)
    torch.testing.assert_close(torch.stack(logits), z["attn_logits"], rtol=rtol, atol=atol)
    torch.testing.assert_close(features, z["features"], rtol=rtol, atol=atol)


def test_forward_equals_the_reference(golden):
    model, z, meta = reference(golden)
    check(model(z["x"], z["t"], z["y"], attn_layers=(0, 1, 2), return_features=True), z, meta["rtol"], meta["atol"])


def test_forward_equals_the_reference_when_compiled(golden):
    model, z, meta = reference(golden)
    compiled = torch.compile(model)
    check(compiled(z["x"], z["t"], z["y"], attn_layers=(0, 1, 2), return_features=True), z, meta["rtol"], meta["atol"])


def test_bf16_autocast_is_the_reference_within_bf16(golden):
    model, z, _ = reference(golden)
    with torch.autocast("cpu", torch.bfloat16):
        velocity, logits, features = model(z["x"], z["t"], z["y"], attn_layers=(0, 1, 2), return_features=True)
    for ours, theirs in ((velocity, z["velocity"]), (torch.stack(logits), z["attn_logits"]), (features, z["features"])):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()  # bf16 keeps 8 bits: 0.4 % per rounding


def test_position_table_is_the_published_one(golden):
    model, _, meta = reference(golden)
    torch.testing.assert_close(SiT(**meta["config"]).pos_embed, model.pos_embed)


def test_fused_and_explicit_attention_agree(golden):
    model, z, _ = reference(golden)
    plain = model(z["x"], z["t"], z["y"])
    explicit = model(z["x"], z["t"], z["y"], attn_layers=(0, 1, 2, 3))
    torch.testing.assert_close(plain[0], explicit[0], rtol=1e-4, atol=1e-5)
    assert plain[1] == [] and plain[2] is None


def test_logits_come_in_the_order_asked_for(golden):
    model, z, meta = reference(golden)
    logits = model(z["x"], z["t"], z["y"], attn_layers=(2, 0, 2))[1]
    torch.testing.assert_close(torch.stack(logits), z["attn_logits"][[2, 0, 2]], rtol=meta["rtol"], atol=meta["atol"])


def test_no_logits_unless_asked_for():
    model = build("SiT-T/4", input_size=28, in_channels=1, teacher_dim=None)  # 49 tokens: no other size is 49 x 49
    x, t, y = torch.randn(2, 1, 28, 28), torch.rand(2), torch.tensor([0, 1])
    with ShapeRecorder() as recorder:
        model(x, t, y)[0].sum().backward()
    assert recorder.shapes and not any(shape[-2:] == (49, 49) for shape in recorder.shapes)
    with ShapeRecorder() as recorder:
        model(x, t, y, attn_layers=(1,))
    assert (2, 4, 49, 49) in recorder.shapes


@pytest.mark.parametrize("network", [build("SiT-T/4", qk_norm=True), Teacher("vit_tiny_patch16_224", (), 64, pretrained=False)])
def test_tokens_and_their_gradients_are_stored_as_they_are_read(network):
    """A convolution leaves channels before tokens in memory; each sum and LayerNorm after it would be slower."""
    strides, teacher = [], isinstance(network, Teacher)

    def watch(block, inputs, output):
        out = output if teacher else output[0]
        strides.extend([inputs[0].stride(), out.stride()])
        if not teacher:
            out.register_hook(lambda gradient: strides.append(gradient.stride()))

    blocks = network.network.blocks if teacher else network.blocks
    for block in blocks:
        block.register_forward_hook(watch)
    if teacher:
        network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    else:
        torch.nn.init.normal_(network.final_layer.linear.weight)
        network(torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([0, 1]))[0].square().sum().backward()
    assert len(strides) == len(blocks) * (2 if teacher else 3)
    tokens, width = (17, network.dim) if teacher else network.pos_embed.shape[1:]
    assert set(strides) == {(tokens * width, width, 1)}


def test_times_and_logits_are_float32_under_autocast():
    model = build("SiT-T/4")
    torch.nn.init.normal_(model.final_layer.linear.weight)
    t, q, k = torch.tensor([0.5, 0.5 + 1 / 250]), *torch.randn(2, 1, 2, 9, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        embedded, logits = model.t_embedder(t), attention_logits(q, k)
    assert torch.equal(embedded, model.t_embedder(t))
    assert torch.equal(logits, (q.float() * 32**-0.5) @ k.float().mT)


def test_tokens_between_blocks_are_bf16_on_request():
    model, seen = build("SiT-T/4"), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0].dtype, output[0].dtype]))
    x, t, y = torch.randn(2, 4, 32, 32), torch.rand(2), torch.tensor([0, 1])
    for model.bf16_tokens, expected in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            velocity, _, _ = model(x, t, y)
        assert set(seen) == {expected} and velocity.isfinite().all()
        seen.clear()


def test_parameter_counts_of_sit_xl_2():
    with torch.device("meta"):
        plain, aligned = build("SiT-XL/2", teacher_dim=None), build("SiT-XL/2")
    assert sum(p.numel() for p in plain.parameters()) == 675_111_184
    assert sum(p.numel() for p in aligned.parameters()) == 683_242_512


def published_shapes(depth, d, patch, channels, classes, teacher_dim=768, projector=2048):
    """Keys and shapes of the REPA and HASTE releases, written out from their modules."""
    shapes = {"pos_embed": (1, (32 // patch) ** 2, d), "y_embedder.embedding_table.weight": (classes + 1, d),
              "x_embedder.proj.weight": (d, 4, patch, patch), "x_embedder.proj.bias": (d,)}
    linear = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d), "final_layer.adaLN_modulation.1": (2 * d, d),
              "final_layer.linear": (patch * patch * channels, d), "projectors.0.0": (projector, d),
              "projectors.0.2": (projector, projector), "projectors.0.4": (teacher_dim, projector)}
    for i in range(depth):
        linear |= {f"blocks.{i}.attn.qkv": (3 * d, d), f"blocks.{i}.attn.proj": (d, d), f"blocks.{i}.mlp.fc1": (4 * d, d),
                   f"blocks.{i}.mlp.fc2": (d, 4 * d), f"blocks.{i}.adaLN_modulation.1": (6 * d, d)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("name, depth, width", [("SiT-S/4", 12, 384), ("SiT-B/2", 12, 768), ("SiT-L/8", 24, 1024),
                                                ("SiT-XL/2", 28, 1152)])
def test_keys_and_shapes_are_the_published_ones(name, depth, width):
    patch = int(name[-1])
    with torch.device("meta"):
        aligned, original = build(name), build(name, learn_sigma=True, teacher_dim=None)
    shapes = published_shapes(depth, width, patch, 4, 1000)
    assert {key: tuple(value.shape) for key, value in aligned.state_dict().items()} == shapes
    shapes = {key: value for key, value in published_shapes(depth, width, patch, 8, 1000).items() if "projectors" not in key}
    assert {key: tuple(value.shape) for key, value in original.state_dict().items()} == shapes


def test_learn_sigma_returns_the_first_channels():
    torch.manual_seed(0)
    model = build("SiT-T/4", input_size=8, num_classes=3, learn_sigma=True, teacher_dim=None)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    velocity = model(x, t, y)[0]
    assert velocity.shape == x.shape
    # the first channels are the same network's output with the other half of the last layer cut off
    half = build("SiT-T/4", input_size=8, num_classes=3, teacher_dim=None)
    state = model.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = state[key].unflatten(0, (4, 4, 8))[:, :, :4].flatten(0, 2)
    half.load_state_dict(state)
    torch.testing.assert_close(velocity, half(x, t, y)[0])


def test_a_seed_makes_the_same_student_with_and_without_a_projector():
    students = []
    for teacher_dim in (None, 32):
        torch.manual_seed(0)
        students.append(build("SiT-T/4", input_size=28, teacher_dim=teacher_dim).state_dict())
    assert all(torch.equal(students[1][key], value) for key, value in students[0].items())
    assert any(key.startswith("projectors.") for key in students[1])


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = build("SiT-T/4", input_size=8, num_classes=3, teacher_dim=16)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    gradients = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        velocity, logits, features = model(x, t, y, attn_layers=(1,), return_features=False)
        (velocity.sum() + logits[0].square().sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'SiT-XXL/2'; choose one of .*SiT-XL/2"):
        build("SiT-XXL/2")
    assert len(MODELS) == 13


@pytest.mark.parametrize("arguments, message", [
    (dict(input_size=30, patch_size=4), "input_size 30 is no multiple of patch_size 4"),
    (dict(hidden_size=48, num_heads=5), "hidden_size 48 must be a multiple of num_heads 5"),
    (dict(depth=2, align_depth=3), r"align_depth 3 is not one of the model's blocks 1\.\.2"),
])
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**dict(hidden_size=48, num_heads=4, depth=2, align_depth=1), **arguments})


def test_wrong_inputs_are_refused():
    model = build("SiT-T/4", input_size=8, teacher_dim=None)
    t, y = torch.rand(1), torch.tensor([0])
    with pytest.raises(ValueError, match=r"takes \[B, 4, 8, 8\]"):
        model(torch.randn(1, 4, 16, 16), t, y)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.5"):
        model(torch.randn(1, 4, 8, 8), t, y, attn_layers=(6,))
    with pytest.raises(ValueError, match="needs a projector"):
        model(torch.randn(1, 4, 8, 8), t, y, return_features=True)
