"""Models of random weights in the very files that the real ones come in: BLIP-2, CLIP twice, and a BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = (
    *("a", "an", "the", "photo", "of", "contains", "something", "in", "front", "building", "flowers", "cat", "dog"),
    *("tree", "house", "and", "zero", "one", "two", "three"),
)


def tokenizer(specials: dict[str, str], ends: tuple[str, str] | None = None) -> PreTrainedTokenizerFast:
    """Whole words as tokens; ``ends`` stand before and behind each text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: place for place, word in enumerate([*specials.values(), *WORDS])}
    made = Tokenizer(models.WordLevel(known, unk_token=specials["unk_token"]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        first, last = ends
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", special_tokens=[(one, known[one]) for one in ends]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, **specials)


def blip(directory: Path, seed: int = 0) -> Path:
    """BLIP-2 with OPT and the classes of its real processor."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessor

    text = tokenizer({"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    processor = Blip2Processor(images, text, num_query_tokens=4)
    narrow = {"hidden_size": 16, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**narrow, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        qformer_config={
            **narrow, "intermediate_size": 32, "num_hidden_layers": 2, "encoder_hidden_size": 16, "vocab_size": 40
        },
        text_config={
            **narrow, "model_type": "opt", "vocab_size": len(processor.tokenizer), "ffn_dim": 32,
            "num_hidden_layers": 1, "word_embed_proj_dim": 16, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    # Larger than a network begins with, or every image would be told the same.
    for name, weight in model.named_parameters():
        if weight.ndim > 1 or "query" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def bert(directory: Path, seed: int = 0) -> Path:
    """A BERT of 16 channels."""
    from transformers import BertConfig, BertModel

    specials = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    text = tokenizer(specials, ("[CLS]", "[SEP]"))
    config = BertConfig(
        vocab_size=len(text), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(seed)
    BertModel(config).save_pretrained(directory)
    text.save_pretrained(directory)
    return directory


def clip(directory: Path, seed: int = 0) -> Path:
    """A CLIP of transformers, images and text, as hubs have it."""
    from transformers import CLIPConfig, CLIPModel

    # CLIP's configuration takes an end of 2 for a sign of its first release, which read the pooled vector elsewhere.
    specials = {"pad_token": "<|pad|>", "unk_token": "<|unk|>", "bos_token": "<|start|>", "eos_token": "<|end|>"}
    text = tokenizer(specials, ("<|start|>", "<|end|>"))
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = CLIPConfig(
        text_config={**narrow, **ids, "vocab_size": len(text), "max_position_embeddings": 20},
        vision_config={**narrow, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(directory)
    text.save_pretrained(directory)
    return directory


def open_clip(directory: Path, seed: int = 0) -> Path:
    """open_clip's CLIP with its own tokenizer: 12 channels together, 16 in the text tower."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from safetensors.torch import save_file

    parts = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    torch.manual_seed(seed)
    model = CLIP(12, CLIPVisionCfg(**parts["vision_cfg"]), CLIPTextCfg(**parts["text_cfg"]))
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, directory / "open_clip_model.safetensors")
    (directory / "open_clip_config.json").write_text(json.dumps({"model_cfg": parts, "preprocess_cfg": {}}))
    return directory
