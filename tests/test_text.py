"""The text encoder: CLIP's numbers and token ids, other encoders' masks, the caption table, refusals."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, load_golden, write_words
from text import CaptionTable, TextEncoder

transformers = pytest.importorskip("transformers")


@pytest.fixture
def golden_clip(tmp_path):
    """The reference's text half inside a whole CLIP's weights, as the hub's file has them."""
    z, state, meta = load_golden("clip_text")
    sizes = meta["config"]
    transformers.CLIPTextConfig(
        vocab_size=sizes["vocab_size"], hidden_size=sizes["hidden_size"], intermediate_size=sizes["intermediate_size"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], hidden_act="quick_gelu",
        max_position_embeddings=sizes["positions"], bos_token_id=98, eos_token_id=99, pad_token_id=99,
    ).save_pretrained(tmp_path)
    rest = {"logit_scale": torch.tensor(1.0), "text_projection.weight": torch.zeros(8, 32),
            "vision_model.post_layernorm.bias": torch.zeros(8)}
    save_file({**state, **rest}, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    write_words(tmp_path, 100, 16, pad="w99")
    return tmp_path, z, meta


def test_clips_numbers(golden_clip):
    folder, z, meta = golden_clip
    encoder = TextEncoder(str(folder))
    assert (encoder.dim, encoder.length, encoder.masked) == (32, 16, False)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.train().network.training
    torch.testing.assert_close(encoder(z["ids"]), z["last_hidden_state"], **meta["tolerance"])
    other = z["ids"][:1].clone()
    other[0, (other[0] == 99).nonzero().flatten()[1:]] = 0  # padded as OpenAI's tokenizer does
    torch.testing.assert_close(encoder(other), z["last_hidden_state_pad0"], **meta["tolerance"])


def test_clips_token_ids(tmp_path):
    """With the real vocabulary, written as the hub's files are. transformers 5 knows no ftfy, so some captions with odd
    characters differ from the published extraction's, as the reference says."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("needs the vocabulary in the package open_clip_torch")
    packed = Path(found.submodule_search_locations[0], "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")[1:48895]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    vocabulary = [*symbols, *(f"{each}</w>" for each in symbols), *(merge.replace(" ", "") for merge in merges),
                  "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({each: i for i, each in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=77, do_lower_case=True, bos_token="<|startoftext|>",
        eos_token=end, pad_token=end, unk_token=end)))
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(text_config=sizes, vision_config=dict(sizes, image_size=28, patch_size=14),
                                     projection_dim=4)
    transformers.CLIPModel(config).save_pretrained(tmp_path)

    reference = json.loads((ROOT / "tests/golden/clip_tokens.json").read_text())
    encoder = TextEncoder(str(tmp_path))
    ids = encoder.tokenize([caption["caption"] for caption in reference["captions"]])
    assert ids.dtype == torch.int64 and ids.shape == (40, 77)
    for i, (row, caption) in enumerate(zip(ids.tolist(), reference["captions"])):
        expected = caption["ids"]
        if i in reference["meta"]["differing"]["transformers5"]:
            expected = caption["transformers5"]
        assert row == expected + [49407] * (77 - len(expected)), caption["caption"]
    for name in ("vocab.json", "merges.txt"):  # transformers 5 makes a tokenizer of two tokens then
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="transformers cannot load it"):
        TextEncoder(str(tmp_path))


@pytest.mark.parametrize("kind", ["T5", "BERT"])
def test_encoders_that_look_both_ways_do_not_see_the_padding(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "T5":
        whole = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    else:
        whole = transformers.BertForMaskedLM(transformers.BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))
    whole.save_pretrained(tmp_path)
    write_words(tmp_path, 50, 512, pad="w0")
    short, long = TextEncoder(str(tmp_path), 6), TextEncoder(str(tmp_path))
    assert (short.length, long.length, long.masked) == (6, 77, True)
    found = [encoder(encoder.tokenize(["w3 w4 w5"])) for encoder in (short, long)]
    torch.testing.assert_close(found[0][:, :3], found[1][:, :3])
    theirs = (whole.encoder if kind == "T5" else whole.bert).eval()
    torch.testing.assert_close(found[0][:, :3], theirs(torch.tensor([[3, 4, 5]])).last_hidden_state)


def test_the_caption_table_is_the_encoder_and_its_last_row_the_empty_caption(golden_clip):
    encoder, captions = TextEncoder(str(golden_clip[0])), ["w3 w4", "w5", "w3 w4", ""]
    table, each_time = CaptionTable(encoder, captions), CaptionTable(encoder, captions, gib=0)
    assert table.null == 4 and len(table.table) == 3  # equal ones once
    assert table.encoder is None and each_time.table is None
    y = torch.tensor([2, 0, 4, 1, 3])
    expected = encoder(encoder.tokenize(["w3 w4", "w3 w4", "", "w5", ""]))
    assert torch.equal(table(y), each_time(y))
    torch.testing.assert_close(table(y), expected)
    assert table.cost() == (3 * 16 * 32 * 4, 0)
    assert each_time.cost()[1] == 3 * (24 * 16 * 32**2 + 4 * 16**2 * 32)


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="^text encoder 'x': .* not installed; pip install -r requirements-text.txt$"):
        TextEncoder("x")


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot load it"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"), "cannot load it"),
    (lambda folder: (folder / "config.json").write_text("{}"), "cannot load it"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load it"),
    (lambda folder: save_file({key: value for key, value in load_file(folder / "model.safetensors").items()
                               if "layers.1.mlp" not in key}, folder / "model.safetensors"),
     "no weights .*layers.1.mlp"),
    (lambda folder: transformers.ViTConfig(hidden_size=8).save_pretrained(folder), "cannot load it"),
])
def test_what_is_no_text_encoder_is_refused_in_one_line(golden_clip, damage, message):
    folder = golden_clip[0]
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        TextEncoder(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_of_an_encoder_decoder_the_encoders_states(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BartConfig(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, pad_token_id=0,
                                     encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                                     decoder_ffn_dim=16, max_position_embeddings=12)
    model = transformers.BartModel(config).eval()
    model.save_pretrained(tmp_path)
    write_words(tmp_path, 60, 12, "w0")
    encoder = TextEncoder(str(tmp_path))
    ids = encoder.tokenize(["w5 w7", "w9"])
    with torch.no_grad():
        wanted = model.get_encoder()(input_ids=ids, attention_mask=ids != 0).last_hidden_state
    torch.testing.assert_close(encoder(ids), wanted)


def test_many_captions_are_tokenised_in_pieces(tmp_path, monkeypatch):
    encoder = SimpleNamespace(length=4, dim=2, parameters=lambda: iter([torch.zeros(1)]), sizes=[])

    def tokenize(texts):
        encoder.sizes.append(len(texts))
        return torch.tensor([[int(text or 0)] * 4 for text in texts])

    encoder.tokenize = tokenize
    table = CaptionTable(encoder, [str(i) for i in range(5000)], gib=0)
    assert max(encoder.sizes) <= 1024 and table.ids[:5000, 0].tolist() == list(range(5000))
