"""Tiny random decoders, one for each mechanism that a family brings."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 128
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name → (class of its configuration, values): what is special about it.
MECHANISMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen3 (norms of queries and keys)": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma3 (sliding and full layers)": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3 (fused projections)": ("Phi3Config", GROUPED),
    "opt (biases, learned positions)": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        },
    ),
    "gpt2 (Conv1D)": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt-neox (parallel block)": ("GPTNeoXConfig", {**SIZES, "max_position_embeddings": 64}),
    "bloom (alibi)": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mixtral (experts)": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", GROUPED),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "olmo2": ("Olmo2Config", GROUPED),
    "falcon": (
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "multi_query": True, "alibi": False},
    ),
    "stablelm": ("StableLmConfig", GROUPED),
    "granite": ("GraniteConfig", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    "gpt-neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48,
            "max_position_embeddings": 64, "attention_types": [[["global", "local", "global"], 1]], "window_size": 6,
        },
    ),
    "glm4-moe (a bias that is a buffer)": (
        "Glm4MoeConfig",
        {**GROUPED, "head_dim": 8, "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**GROUPED, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
ALL = {**MECHANISMS, **MORE}
SSM = {"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
STATES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "expand": 2, "num_heads": 4, "head_dim": 16,
            "n_groups": 1, "chunk_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "falcon-h1": ("FalconH1Config", {**GROUPED, **SSM, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 2}),
    "bamba": ("BambaConfig", {**GROUPED, **SSM, "attn_layer_indices": [1], "mamba_n_heads": 4}),
    "lfm2": ("Lfm2Config", {**GROUPED, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **GROUPED, "head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {**SIZES, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "rwkv": (
        "RwkvConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "context_length": 64, "attention_hidden_size": 32,
            "intermediate_size": 48,
        },
    ),
}  # fmt: skip
"Families with a state that is not only keys and values."


def build(name: str) -> PreTrainedModel:
    """The family's model with weights that are not tiny, so that every mechanism shows in the numbers."""
    kind, values = {**ALL, **STATES}[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def tokens(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
