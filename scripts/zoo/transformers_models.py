"""transformers: small models from configurations, one of each family, of every kind of network that it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from scripts.zoo.sample import Sample

_BATCH = 4
_TOKENS = 12
_WORDS = 64

_WIDTHS = {
    "vocab_size": _WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 48,
    "d_model": 48,
    "n_embd": 48,
    "embed_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
    "ffn_dim": 80,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "d_ff": 80,
    "d_kv": 12,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "use_cache": False,
}
"""What every configuration that has a field of that name gets."""

_VISION = {"image_size": 64, "patch_size": 16, "num_channels": 3}
_SPEECH = {
    "conv_dim": (32, 32),
    "conv_kernel": (10, 8),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
# by default transformers calls an operator of its own here, which no archive of ours may hold
_EXPERTS = {
    "experts_implementation": "batched_mm",
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}


def _tokens(module: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, _WORDS, (_BATCH, _TOKENS))}


def _masked_tokens(module: Any) -> dict[str, Tensor]:
    return {**_tokens(module), "attention_mask": torch.ones(_BATCH, _TOKENS, dtype=torch.int64)}


def _two_texts(module: Any) -> dict[str, Tensor]:
    return {**_tokens(module), "decoder_input_ids": torch.randint(3, _WORDS, (_BATCH, _TOKENS - 3))}


def _image(module: Any) -> dict[str, Tensor]:
    size = getattr(module.config, "image_size", 64)
    size = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(_BATCH, 3, *size)}


def _image_and_text(module: Any) -> dict[str, Tensor]:
    return {**_masked_tokens(module), "pixel_values": torch.randn(_BATCH, 3, 64, 64)}


def _wave(module: Any) -> dict[str, Tensor]:
    return {"input_values": torch.randn(_BATCH, 1600)}


def _spectrogram(module: Any) -> dict[str, Tensor]:
    config = module.config
    return {"input_values": torch.randn(_BATCH, config.max_length, config.num_mel_bins)}


def _spectrogram_and_text(module: Any) -> dict[str, Tensor]:
    size = module.config.num_mel_bins, 2 * module.config.max_source_positions
    texts = torch.randint(3, _WORDS, (_BATCH, _TOKENS))
    return {"input_features": torch.randn(_BATCH, *size), "decoder_input_ids": texts}


_Inputs = Callable[[Any], dict[str, Tensor]]

_FAMILIES: dict[str, tuple[str, _Inputs, dict[str, Any]]] = {
    # encoders
    "Bert": ("ForSequenceClassification", _masked_tokens, {}),
    "Roberta": ("ForSequenceClassification", _masked_tokens, {"max_position_embeddings": 40}),
    "DistilBert": (
        "ForSequenceClassification",
        _masked_tokens,
        {"dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 4},
    ),
    "Albert": ("ForSequenceClassification", _masked_tokens, {"embedding_size": 32}),
    "Electra": ("ForSequenceClassification", _masked_tokens, {"embedding_size": 32}),
    "DebertaV2": (
        "ForSequenceClassification",
        _masked_tokens,
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "MPNet": ("ForSequenceClassification", _masked_tokens, {}),
    "ModernBert": ("ForSequenceClassification", _masked_tokens, {}),
    "ConvBert": (
        "ForSequenceClassification",
        _masked_tokens,
        {"embedding_size": 48, "head_ratio": 2, "conv_kernel_size": 3},
    ),
    "MobileBert": (
        "ForSequenceClassification",
        _masked_tokens,
        {"embedding_size": 32, "intra_bottleneck_size": 48, "true_hidden_size": 48},
    ),
    "SqueezeBert": ("ForSequenceClassification", _masked_tokens, {"embedding_size": 48}),
    "RoFormer": ("ForSequenceClassification", _masked_tokens, {"embedding_size": 48}),
    "FNet": ("ForSequenceClassification", _tokens, {}),
    "Nystromformer": ("ForSequenceClassification", _tokens, {"segment_means_seq_len": _TOKENS, "num_landmarks": 4}),
    # decoders
    "GPT2": ("LMHeadModel", _tokens, {}),
    "GPTNeo": ("ForCausalLM", _tokens, {"attention_types": [[["global", "local"], 1]], "window_size": 4}),
    "GPTNeoX": ("ForCausalLM", _tokens, {}),
    "GPTJ": ("ForCausalLM", _tokens, {"rotary_dim": 8}),
    "OPT": ("ForCausalLM", _masked_tokens, {"word_embed_proj_dim": 48}),
    "Bloom": ("ForCausalLM", _masked_tokens, {}),
    "Llama": ("ForCausalLM", _tokens, {}),
    "Mistral": ("ForCausalLM", _tokens, {"sliding_window": 6}),
    "Qwen2": ("ForCausalLM", _tokens, {}),
    "Qwen3": ("ForCausalLM", _tokens, {}),
    "Gemma": ("ForCausalLM", _tokens, {}),
    "Gemma2": ("ForCausalLM", _tokens, {"sliding_window": 6, "query_pre_attn_scalar": 12}),
    "Phi": ("ForCausalLM", _tokens, {}),
    "Phi3": ("ForCausalLM", _tokens, {}),
    "Falcon": ("ForCausalLM", _tokens, {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "StableLm": ("ForCausalLM", _tokens, {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "Olmo2": ("ForCausalLM", _tokens, {}),
    "Granite": ("ForCausalLM", _tokens, {}),
    "Mixtral": ("ForCausalLM", _tokens, _EXPERTS),
    "Qwen3Moe": ("ForCausalLM", _tokens, _EXPERTS),
    "Mamba": ("ForCausalLM", _tokens, {"state_size": 8, "time_step_rank": 4}),
    # encoder and decoder
    "T5": ("ForConditionalGeneration", _two_texts, {}),
    "Bart": ("ForConditionalGeneration", _two_texts, {}),
    "Pegasus": ("ForConditionalGeneration", _two_texts, {}),
    # vision
    "ViT": ("ForImageClassification", _image, _VISION),
    "Beit": ("ForImageClassification", _image, {**_VISION, "use_relative_position_bias": True}),
    "Swin": (
        "ForImageClassification",
        _image,
        {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "Dinov2": ("ForImageClassification", _image, {**_VISION, "mlp_ratio": 2}),
    "ConvNextV2": ("ForImageClassification", _image, {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
    "Segformer": (
        "ForSemanticSegmentation",
        _image,
        {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 5, 8]},
    ),
    "MobileViT": (
        "ForImageClassification",
        _image,
        {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 12, 16, 24, 32, 40, 64]},
    ),
    "Levit": (
        "ForImageClassification",
        _image,
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
    ),
    "PoolFormer": ("ForImageClassification", _image, {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
    "RegNet": (
        "ForImageClassification",
        _image,
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "groups_width": 8},
    ),
    # image and text
    "CLIP": ("Model", _image_and_text, {"projection_dim": 32}),
    # speech
    "Wav2Vec2": ("ForCTC", _wave, _SPEECH),
    "Hubert": ("ForCTC", _wave, _SPEECH),
    "WavLM": ("ForCTC", _wave, _SPEECH),
    "ASTForAudioClassification": ("", _spectrogram, {"max_length": 64, "num_mel_bins": 32, "patch_size": 16}),
    "Whisper": (
        "ForConditionalGeneration",
        _spectrogram_and_text,
        {"num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 32, "decoder_start_token_id": 1},
    ),
}
"""Family -> ending of the class's name, inputs, and what its configuration gets beside `_WIDTHS`."""


def names() -> list[str]:
    """Return the class names."""
    return [family + ending for family, (ending, _, _) in _FAMILIES.items()]


def build(name: str) -> Sample:
    """Make a model with random weights, and inputs for it."""
    kind = getattr(transformers, name)
    _, inputs, special = next(entry for family, entry in _FAMILIES.items() if family + entry[0] == name)
    module = kind(_configuration(kind.config_class, special))
    return Sample(module, kwargs=inputs(module))


def _configuration(kind: type, special: dict[str, Any]) -> Any:
    known = set(inspect.signature(kind).parameters)
    taken = {key: value for key, value in _WIDTHS.items() if key in known}
    if hasattr(kind, "sub_configs"):
        for part, part_kind in kind.sub_configs.items():
            known_to_part = set(inspect.signature(part_kind).parameters)
            widths = {**_WIDTHS, **_VISION, "projection_dim": 32}
            taken[part] = {key: value for key, value in widths.items() if key in known_to_part}
    return kind(**{**taken, **special})
