"""The frozen text encoder: any of the `transformers` package's, and the table that turns captions into its output.

    encoder = TextEncoder("openai/clip-vit-large-patch14")
    context = encoder(encoder.tokenize(["a red apple"]))  # [1, 77, 768]

transformers is needed for text alone: pip install -r requirements-text.txt
"""

import torch
from torch import nn


class TextEncoder(nn.Module):
    """A frozen text encoder: captions to token ids, token ids to the last hidden state of every position.

    name: hub name or folder of a CLIP, of which the text half is taken, a T5 or a BERT-like encoder. length: tokens of
    a caption, L: longer ones are cut, shorter ones padded; fewer where the encoder takes no more. CLIP is causal, and
    as in REPA's and HASTE's training gets no mask; the others' tokens attend to the caption's, not to padding.
    Raises ValueError where transformers is missing, or has no text encoder of this name.
    """

    def __init__(self, name, length=77):
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ValueError(f"text encoder {name!r}: the package transformers is not installed; "
                             f"pip install -r requirements-text.txt") from error
        transformers.logging.set_verbosity_error()  # what a text encoder leaves unused of a file is no warning
        transformers.logging.disable_progress_bar()
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            config = getattr(config, "text_config", config)
            has_decoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING  # or another part to leave out
            kind = transformers.AutoModelForTextEncoding if has_decoder else transformers.AutoModel
            network, found = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
            if missing := [key for key in found["missing_keys"] if "pooler" not in key]:  # which would stay random
                raise ValueError(f"no weights {', '.join(sorted(missing)[:3])}")
            self.tokenizer = tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            if len(tokenizer) <= len(tokenizer.all_special_ids):  # as it would be made without files
                raise ValueError("no vocabulary")
            self.length = min(length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", length))
            self.dim, self.layers, self.pad = config.hidden_size, config.num_hidden_layers, tokenizer.pad_token_id
            self.masked = config.model_type != "clip_text_model" and "attention_mask" in tokenizer.model_input_names
            if getattr(config, "is_encoder_decoder", False):
                network = network.get_encoder()
            self.network = network.eval().requires_grad_(False)
            found = self(self.tokenize([""])).shape
        except Exception as error:  # the hub, the network stack, tokenizers and each model raise their own
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
            raise ValueError(f"text encoder {name!r}: transformers cannot load it ({reason}); give the hub name or the "
                             f"folder of a CLIP, T5 or BERT-like encoder; without a connection, copy the Hugging Face "
                             f"cache (HF_HOME) from where there is one") from error
        if found != (1, self.length, self.dim):
            raise ValueError(f"text encoder {name!r} gives {list(found)} for a caption, not [1, "
                             f"{self.length}, {self.dim}]; choose a CLIP, T5 or BERT-like encoder")

    def train(self, mode=True):
        return super().train(False)  # frozen

    def tokenize(self, texts):
        """ids int64 [B, L] of a list of texts."""
        return self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.length,
                              return_tensors="pt").input_ids

    @torch.no_grad()
    def forward(self, ids):
        """ids [B, L] to token embeddings [B, L, C]."""
        return self.network(input_ids=ids, attention_mask=ids != self.pad if self.masked else None).last_hidden_state


class CaptionTable:
    """The context of captions by their numbers: table(y), y int64 [B], is [B, L, C].

    captions: a list of texts; number len(captions), `null`, is the empty one's: "no text". Equal
    captions are encoded once, at the start where their embeddings take `gib` GiB at most (one of
    CLIP's takes 231 KiB in float32), otherwise at each call.
    """

    def __init__(self, encoder, captions, gib=float("inf")):
        numbers = {caption: i for i, caption in enumerate(dict.fromkeys([*captions, ""]))}
        self.null, self.encoder = len(captions), encoder
        parameter = next(encoder.parameters())
        self.rows = torch.tensor([numbers[caption] for caption in (*captions, "")], device=parameter.device)
        distinct = list(numbers)
        self.ids = torch.empty(len(distinct), encoder.length, dtype=torch.int32, device=parameter.device)
        for i in range(0, len(distinct), 1024):  # at once they would take ten times their ids' memory
            self.ids[i : i + 1024] = encoder.tokenize(distinct[i : i + 1024])
        self.table = None
        if self.ids.numel() * encoder.dim * parameter.itemsize <= gib * 2**30:
            self.table, self.encoder = torch.cat([encoder(some.long()) for some in self.ids.split(256)]), None

    def cost(self):
        """(bytes on the device, FLOPs of a call per caption)."""
        if self.encoder is None:
            return self.table.nbytes, 0
        L, D = self.ids.shape[1], self.encoder.dim
        return (self.ids.nbytes + sum(p.nbytes for p in self.encoder.parameters()),
                self.encoder.layers * (24 * L * D**2 + 4 * L**2 * D))

    def __call__(self, y):
        rows = self.rows[y]
        return self.encoder(self.ids[rows].long()) if self.table is None else self.table[rows]
