"""The configs of the pico models: tiny, but of every shape their families come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY, IMAGE, PATCH = 64, 16, 4

_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
_DECODER = {**_TEXT, "num_key_value_heads": 2, **_ENDS}
_LABELLED = {**_TEXT, "num_labels": 3}
_IMAGE = {**_ENCODER, "image_size": IMAGE, "patch_size": PATCH}
_PICTURED = {**_IMAGE, "num_channels": 3, "num_labels": 3}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_STARTS = {"decoder_start_token_id": 1, "forced_eos_token_id": None}
_PAIR = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **_ENDS, **_STARTS,
}  # fmt: skip
_SPEECH = {
    **_ENCODER, "vocab_size": VOCABULARY, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2}

# family: (class, config)
PICO: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ast": (
        "ASTForAudioClassification",
        {
            **_ENCODER, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8,
            "num_labels": 3,
        },
    ),
    "bart": ("BartForConditionalGeneration", {**_PAIR, "max_position_embeddings": 64}),
    "bert": ("BertForSequenceClassification", _LABELLED),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_ENDS}),
    "clip": ("CLIPModel", {"text_config": {**_TEXT, **_ENDS}, "vision_config": _IMAGE, "projection_dim": 16}),
    "convnext": (
        "ConvNextForImageClassification",
        {"patch_size": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "num_labels": 3,
         "image_size": IMAGE, "layer_scale_init_value": 0.5},
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        {**_LABELLED, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "decision_transformer": (
        "DecisionTransformerModel",
        {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "max_ep_len": 32, "n_layer": 2, "n_head": 4,
         "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "dinov2": ("Dinov2ForImageClassification", {**_PICTURED, "mlp_ratio": 2}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
         "max_position_embeddings": 64, "num_labels": 3},
    ),
    "electra": ("ElectraForSequenceClassification", {**_LABELLED, "embedding_size": 16}),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "new_decoder_architecture": True, "num_kv_heads": 2, **_ENDS},
    ),
    "gemma2": ("Gemma2ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**_TEXT, **_ENDS}),
    "hubert": ("HubertForCTC", _SPEECH),
    "llama": ("LlamaForCausalLM", _DECODER),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_DECODER, "model_type": "llama", "max_position_embeddings": 128},
            "vision_config": {**_IMAGE, "model_type": "clip_vision_model"},
            "image_token_index": VOCABULARY - 1, "image_token_id": VOCABULARY - 1,
            "vision_feature_layer": -1,
        },
    ),
    "marian": ("MarianMTModel", {**_PAIR, "max_position_embeddings": 64}),
    "mistral": ("MistralForCausalLM", _DECODER),
    "mixtral": ("MixtralForCausalLM", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "modernbert": ("ModernBertForSequenceClassification", {**_LABELLED, **_ENDS, "cls_token_id": 1, "sep_token_id": 2}),
    "olmo2": ("Olmo2ForCausalLM", _DECODER),
    "olmoe": ("OlmoeForCausalLM", {**_DECODER, **_MOE}),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_ENDS},
    ),
    "phi3": ("Phi3ForCausalLM", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_DECODER, **_MOE, "head_dim": 8, "moe_intermediate_size": 24}),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "bottleneck",
         "num_labels": 3},
    ),
    "roberta": ("RobertaForSequenceClassification", {**_LABELLED, "pad_token_id": 0}),
    "siglip": ("SiglipModel", {"text_config": {**_TEXT, **_ENDS}, "vision_config": _IMAGE}),
    "smollm3": ("SmolLM3ForCausalLM", _DECODER),
    "swin": (
        "SwinForImageClassification",
        {"image_size": IMAGE, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
         "window_size": 4, "mlp_ratio": 2, "num_labels": 3},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
    "vit": ("ViTForImageClassification", _PICTURED),
    "wav2vec2": ("Wav2Vec2ForCTC", _SPEECH),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**_PAIR, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
         "begin_suppress_tokens": None, "suppress_tokens": None},
    ),
}  # fmt: skip

# family: (class of the diffusers library, arguments)
DIFFUSERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_num_groups": 8},
    ),
    "unet": (
        "UNet2DConditionModel",
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16, "attention_head_dim": 4,
         "norm_num_groups": 8},
    ),
}  # fmt: skip
