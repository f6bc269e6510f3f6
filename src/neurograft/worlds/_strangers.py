"""Pico models of architectures that have no family file: what the structural fallback must find its way in.

Picked from transformers' auto mappings. A config takes those of `SMALL` that it has, and what is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SMALL: Mapping[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_ff": 48, "d_kv": 8, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 4, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48,
    "n_layers": 2, "n_heads": 4, "image_size": 16, "patch_size": 4, "num_channels": 3, "num_labels": 3, "ffn_dim": 48,
    "embedding_size": 16, "rotary_dim": 4, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "decoder_start_token_id": 1, "max_seq_len": 64,
}  # fmt: skip
_SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip
_STAGES = {
    "hidden_sizes": [16, 32], "num_encoder_blocks": 2, "depths": [1, 1], "num_attention_heads": [2, 4],
    "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
_SPARSE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0}

# name: (class, fields beside SMALL)
STRANGERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", {}),
    "beit": ("BeitForImageClassification", {}),
    "biogpt": ("BioGptForCausalLM", {}),
    "codegen": ("CodeGenForCausalLM", {}),
    "cohere": ("CohereForCausalLM", {}),
    "deit": ("DeiTForImageClassification", {}),
    "fnet": ("FNetForSequenceClassification", {}),
    "gemma": ("GemmaForCausalLM", {}),
    "glm": ("GlmForCausalLM", {}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {}),
    "gpt_neo": ("GPTNeoForCausalLM", {"attention_types": [[["global"], 2]]}),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "gptj": ("GPTJForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "mamba": ("MambaForCausalLM", {"state_size": 4}),
    "mbart": ("MBartForConditionalGeneration", {}),
    "mpnet": ("MPNetForSequenceClassification", {}),
    "mpt": ("MptForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),
    "olmo": ("OlmoForCausalLM", {}),
    "persimmon": ("PersimmonForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 1}),
    "segformer": ("SegformerForImageClassification", _STAGES),
    "stablelm": ("StableLmForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", _SPARSE),
    "unispeech": ("UniSpeechForCTC", _SPEECH),
    "wavlm": ("WavLMForCTC", _SPEECH),
}
