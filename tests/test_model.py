"""SiT, MMDiT and JiT: reference numbers, published shapes, and that logits exist only where asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import MODELS, ConvProjector, JiT, MMDiT, SiT, attention_logits, build
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


@pytest.mark.slow
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


MMDIT = ("input_size patch_size in_channels hidden_size num_heads depth context_dim align_depth teacher_dim "
         "projector_dim").split()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_mmdits_forward_equals_the_reference(golden, compiled):
    z, state, meta = golden("mmdit_forward")
    model, seen = MMDiT(**{key: meta["config"][key] for key in MMDIT}), []
    table = model.pos_embed.clone()
    model.load_state_dict(state)
    torch.testing.assert_close(table, model.pos_embed)
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output[:2]))
    forward = torch.compile(model) if compiled else model
    velocity, logits, features = forward(z["x"], z["t"], z["context"], attn_layers=(2, 0, 1), return_features=True)
    pairs = [(velocity, z["velocity"]), (features, z["features"])]
    pairs += [(logits[i], z[f"image_logits/{layer}"]) for i, layer in enumerate((2, 0, 1))]
    for i, (x, text) in enumerate(seen if not compiled else ()):
        pairs += [(x, z[f"image_tokens/{i}"]), *([(text, z[f"text_tokens/{i}"])] if i < 2 else [])]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **meta["tolerance"])


def test_mmdits_attention_is_fused_and_every_weight_is_used():
    """13 x 13 tokens, 9 words: no tensor holds logits of image, text or both; each weight gets a gradient."""
    model = build("MMDiT-T/4", input_size=52, in_channels=1, teacher_dim=None, context_dim=20)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    x, t, context = torch.randn(2, 1, 52, 52), torch.rand(2), torch.randn(2, 9, 20)

    def logits_of(recorder):
        return {shape[-2:] for shape in recorder.shapes if len(shape) > 2 and {*shape[-2:]} <= {169, 178}}

    with ShapeRecorder() as recorder:
        model(x, t, context)[0].square().sum().backward()
    assert not logits_of(recorder)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with ShapeRecorder() as recorder:
        _, logits, _ = model(x, t, context, attn_layers=(5,))
    assert logits_of(recorder) == {(169, 169)}
    assert logits[0].shape == (2, 6, 169, 169)


def test_text_reaches_the_picture_and_the_order_of_words_alone_does_not():
    """The context has no positions: what words say beside their own order is the encoder's part."""
    model = build("MMDiT-T/4", input_size=8, in_channels=1, teacher_dim=None, context_dim=20)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, context = torch.randn(1, 1, 8, 8), torch.rand(1), torch.randn(1, 5, 20)
    velocity, reordered, other = (model(x, t, c)[0] for c in (context, context.flip(1), torch.randn(1, 5, 20)))
    torch.testing.assert_close(velocity, reordered, rtol=1e-4, atol=1e-5)
    assert (velocity - other).abs().max() > 1e-3


def test_mmdit_2_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = build("MMDiT/2")
    d, block = 768, {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 4, "mlp.fc2": (1, 4), "adaLN_modulation.1": 6}
    linear = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d), "context_embedder": (d, 768),
              "final_layer.adaLN_modulation.1": (2 * d, d), "final_layer.linear": (16, d), "projectors.0.0": (2048, d),
              "projectors.0.2": (2048, 2048), "projectors.0.4": (768, 2048)}
    for i in range(24):
        for half in ("x_block", "context_block"):
            last = {"attn.qkv": 3, "adaLN_modulation.1": 2} if (i, half) == (23, "context_block") else block
            linear |= {f"joint_blocks.{i}.{half}.{name}": (d, 4 * d) if name == "mlp.fc2" else (times * d, d)
                       for name, times in last.items()}
    shapes = {"pos_embed": (1, 256, d), "x_embedder.proj.weight": (d, 4, 2, 2), "x_embedder.proj.bias": (d,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    counts = {key: p.numel() for key, p in model.named_parameters() if key != "pos_embed"}
    assert sum(counts.values()) == 512_415_504
    assert sum(count for key, count in counts.items() if "projectors" not in key) == 505_070_608


def reference_jit(golden, in_context=True, **settings):
    z, state, meta = golden("jit_forward")
    if not in_context:
        settings["in_context_len"] = 0
        state = {key: value for key, value in state.items() if key != "in_context_posemb"}
    model = JiT(**meta["config"] | dict(teacher_dim=None) | settings).eval()
    table = model.pos_embed.clone()
    model.load_state_dict(state)
    torch.testing.assert_close(table, model.pos_embed)
    return model, z, meta["tolerance"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prefix", ["", "off/"])
def test_jits_forward_equals_the_reference(golden, prefix, compiled):
    model, z, tolerance = reference_jit(golden, in_context=not prefix)
    seen, pairs = [], []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output[0][:, -16:]))
    forward = torch.compile(model) if compiled else model
    velocity, logits, _ = forward(z["x"], z["t"], z["y"], attn_layers=(2, 0, 1))
    pairs.append((velocity, z[f"{prefix}velocity"], tolerance["velocity"]))
    pairs += [(logits[i], z[f"{prefix}logits/{layer}"], tolerance["logits"]) for i, layer in enumerate((2, 0, 1))]
    pairs += [(tokens, z[f"{prefix}tokens/{i}"], tolerance["tokens"])
              for i, tokens in enumerate(() if compiled else seen)]
    target = (z["x"] - z["image"]) / z["t"].clamp(min=0.05).view(-1, 1, 1, 1)  # noise - image, but below 0.05
    loss = torch.nn.functional.mse_loss(velocity, target)
    pairs.append((loss, z[f"{prefix}loss"], tolerance["loss"]))
    for ours, theirs, allowed in pairs:
        torch.testing.assert_close(ours, theirs, rtol=allowed, atol=allowed)


def test_jits_features_and_queries_are_of_the_images_tokens_alone(golden):
    """Block 0 is before the class tokens, blocks 1 and 2 are behind: all hand out 16 tokens, and class tokens count."""
    for depth in (1, 2, 3):
        model, z, _ = reference_jit(golden)
        model.align_depth, model.projectors = depth, torch.nn.ModuleList([torch.nn.Identity()])
        _, qk, features = model(z["x"], z["t"], z["y"], (0, 1, 2), return_features=True, return_qk=True)
        torch.testing.assert_close(features, z[f"tokens/{depth - 1}"], rtol=1e-4, atol=1e-4)
        assert [tuple(each.shape) for pair in qk for each in pair] == [(4, 2, 16, 16)] * 6
    with torch.no_grad():
        model.in_context_posemb += 1
        _, moved, _ = model(z["x"], z["t"], z["y"], (0, 1, 2), return_qk=True)
    assert [torch.equal(a[0], b[0]) for a, b in zip(qk, moved)] == [True, True, False]


def test_jits_velocity_is_held_back_near_the_data_and_its_dropout_is_of_the_middle_blocks():
    torch.manual_seed(0)
    model = build("JiT-T/4", input_size=8, depth=8, dropout=0.5)
    x, t, y = torch.randn(4, 3, 8, 8), torch.tensor([0.0, 0.02, 0.05, 0.5]), torch.arange(4)
    for own, held, noised in zip(model(x, t, y)[0], (0.05, 0.05, 0.05, 0.5), x):  # a new network predicts a gray image
        torch.testing.assert_close(own, noised / held)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    assert not torch.equal(model(x, t, y)[0], model(x, t, y)[0])
    assert torch.equal(model.eval()(x, t, y)[0], model(x, t, y)[0])
    assert [(block.attn.dropout, block.mlp.dropout) for block in model.blocks] == \
        [(0, 0)] * 2 + [(0.5, 0.5)] * 4 + [(0, 0)] * 2


@pytest.mark.parametrize("name, size, every, trained, of_a_block", [
    ("JiT-B/16", 256, 131_320_320, 131_123_712, 10_631_040), ("JiT-L/16", 256, 459_139_808, 458_877_664, 18_891_220),
    ("JiT-H/16", 256, 952_842_048, 952_514_368, 29_513_546), ("JiT-B/32", 512, 133_387_008, 133_190_400, 10_631_040),
    ("JiT-L/32", 512, 461_796_320, 461_534_176, 18_891_220), ("JiT-H/32", 512, 956_383_296, 956_055_616, 29_513_546)])
def test_jits_have_as_many_parameters_as_the_published_ones(name, size, every, trained, of_a_block):
    with torch.device("meta"):
        model = build(name, input_size=size, teacher_dim=None)
    assert sum(p.numel() for p in model.parameters()) == every
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in model.blocks[-1].parameters()) == of_a_block
    assert [block.attn.cos.shape[0] for block in model.blocks].index(288) == {"B": 4, "L": 8, "H": 10}[name[4]]


def test_the_convolutional_projector_equals_the_reference(golden):
    z, _, meta = golden("irepa")
    projector, tolerance = ConvProjector(12, 10), meta["tolerance"]["projected"]
    projector.load_state_dict({f"projection_layer.{name}": z[f"sd3/{name}"] for name in ("weight", "bias")})
    torch.testing.assert_close(projector(z["tokens"]), z["projected/3"], rtol=tolerance, atol=tolerance)
    model = build("SiT-T/4", projector="conv", teacher_dim=10)
    assert {key for key in model.state_dict() if "proj" in key and "blocks" not in key and "embed" not in key} == \
        {"projectors.0.projection_layer.weight", "projectors.0.projection_layer.bias"}


@pytest.mark.parametrize("network", [build("SiT-T/4", qk_norm=True), build("MMDiT-T/4"),
                                     Teacher("vit_tiny_patch16_224", (), 64, pretrained=False)])
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
        condition = torch.tensor([0, 1]) if isinstance(network, SiT) else torch.randn(2, 9, 384)
        network(torch.randn(2, 4, 32, 32), torch.rand(2), condition)[0].square().sum().backward()
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


@pytest.mark.parametrize("name, y", [("SiT-T/4", torch.tensor([0, 1])), ("MMDiT-T/4", torch.ones(2, 9, 384)),
                                     ("JiT-T/4", torch.tensor([0, 1]))])
def test_tokens_between_blocks_are_bf16_on_request(name, y):
    model, seen = build(name, input_size=32, in_channels=4), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.extend(
            each.dtype for each in (*inputs[:-2], *output[:-1])))  # image, and text where there is one
    x, t = torch.randn(2, 4, 32, 32), torch.rand(2)
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
        linear |= {f"blocks.{i}.attn.qkv": (3 * d, d), f"blocks.{i}.attn.proj": (d, d),
                   f"blocks.{i}.mlp.fc1": (4 * d, d), f"blocks.{i}.mlp.fc2": (d, 4 * d),
                   f"blocks.{i}.adaLN_modulation.1": (6 * d, d)}
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
    shapes = {key: value for key, value in published_shapes(depth, width, patch, 8, 1000).items()
              if "projectors" not in key}
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


@pytest.mark.parametrize("name, y, arguments", [
    ("SiT-T/4", torch.tensor([0, 3]), dict(num_classes=3)), ("MMDiT-T/4", torch.ones(2, 9, 20), dict(context_dim=20))])
def test_activation_checkpointing_changes_nothing(name, y, arguments):
    torch.manual_seed(0)
    model = build(name, input_size=8, teacher_dim=16, **arguments)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
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
    assert len(MODELS) == 26


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
