"""Every decoder that transformers' causal-LM mapping knows, built tiny from its config.

    MODEL_TYPES            the keys of MODEL_FOR_CAUSAL_LM_MAPPING in the installed transformers
    NOT_DECODERS           those that are no decoder-only language models, and why
    build(model_type)      a float32 model in eval mode with random weights, no download
    NotBuildable           this transformers version cannot build or run it, and why

The list comes from transformers itself, so a new version brings its new families. Sizes are set by
the names that most configs share (`SIZES`); `CHANGES` holds what a family needs beside them.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, POSITIONS, VOCAB, WINDOW

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

LAYERS = 4
EXPERTS = 4

SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), INTERMEDIATE),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    # Multi-head latent attention, and its indexer.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 8),
    "index_topk": WINDOW,
    # State spaces and linear attention.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    # Decoders that were made for an encoder-decoder.
    **dict.fromkeys(("decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), INTERMEDIATE),
    "is_decoder": True,
    "is_encoder_decoder": False,
    "vocab_size": VOCAB,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), None),
}
"""What every config gets that has the attribute: the sizes of `families`, under all their names."""


LATENT = {"num_key_value_heads": HEADS}
"""Multi-head latent attention expands its latent to one key and one value per query head."""
GROUPED = {"n_group": 2, "num_expert_group": 2, "topk_group": 1}
"""Experts that are chosen by group, two groups of two."""
LATENT_GROUPED = LATENT | GROUPED
PADDED = {"pad_token_id": 1}
"""Positions are counted from the padding token's id."""
VISION = {"hidden_size": 16, "intermediate_size": 16}
VISION |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

PER_LAYER = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
"""An embedding for every layer, and keys and values that later layers use again."""
AUDIO = {"hidden_size": 16, "intermediate_size": 16}
AUDIO |= {"num_hidden_layers": 1, "num_attention_heads": 2}
BYTES = {"hidden_size": HIDDEN, "hidden_size_global": HIDDEN, "num_attention_heads": HEADS}
BYTES |= {"num_hidden_layers": 1, "intermediate_size": INTERMEDIATE}
NO_AUDIO: dict[str, Any] = {"audio_config": None}

CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk2", "deepseek_v2"),
            *("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu"),
        ),
        LATENT,
    ),
    **dict.fromkeys(("axk1", "bailing_hybrid", "deepseek_v3", "deepseek_v32"), LATENT_GROUPED),
    **dict.fromkeys(
        (
            *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
            *("xlm-roberta-xl", "prophetnet"),
        ),
        PADDED,
    ),
    **dict.fromkeys(("cwm", "modernbert-decoder"), IDS),
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        **dict.fromkeys(("encoder_config", "decoder_config", "global_config"), BYTES),
        "patcher_config": {k: v for k, v in BYTES.items() if k != "hidden_size_global"},
        "encoder_hash_byte_group_vocab": 64,
    },
    "beam": {**GROUPED},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"dim_head": 8, "dim_ff": INTERMEDIATE, "prompt_types": 32, "prompt_length": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {**LATENT, "per_layer_config": {}},
    "emu3": {"text_config": IDS},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"vision_config": VISION},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "laurel_rank": 8,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": PER_LAYER,
    "gemma4": {
        "text_config": {**PER_LAYER, "pad_token_id": 0},
        "vision_config": VISION,
        **NO_AUDIO,
    },
    "gemma4_unified": {"text_config": {"pad_token_id": 0}, **NO_AUDIO},
    "git": {"vision_config": VISION, "num_image_with_embedding": None},
    "got_ocr2": {"vision_config": VISION},
    "dots3_note": {
        "text_config": {**LATENT, "per_layer_config": {}},
        "vision_config": {
            "adapter_out_dim": HIDDEN,
            "num_hidden_layers": 1,
            "per_layer_config": {},
        },
        "audio_config": {"adapter_out_dim": HIDDEN, "num_hidden_layers": 1},
    },
    "mllama": {"text_config": {**IDS, "cross_attention_layers": [1]}, "vision_config": VISION},
    "moss_transcribe_diarize": {"audio_config": AUDIO},
    "phi4_multimodal": {
        "vision_config": VISION,
        "audio_config": {
            **{"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1},
            **{"num_attention_heads": 2, "ext_pw_out_channel": 16, "nemo_conv_channels": 16},
            "depthwise_separable_out_channel": 16,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "helium": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {**LATENT, "head_dim": 8, "expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "attn_layers": ["local", "lsh"] * 2,
        "num_hidden_layers": ...,
        "feed_forward_size": INTERMEDIATE,
        "attention_head_size": 8,
    },
    "xlm": {"emb_dim": HIDDEN, "causal": True, "is_encoder": False},
    "xmod": {"default_language": "en_XX", **PADDED},
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "layer_types": ...,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
    },
}
"""What a family needs beside `SIZES`; ``...`` leaves one of those out."""

NOT_DECODERS: dict[str, str] = {
    "xlm": "an encoder: transformers builds it as nothing else",
    "xlnet": "a permutation language model: its tokens see later ones",
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        "a decoder of several audio codebooks, not built from its own config",
    ),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft head that reads the states of another model",
    ),
}
"""Entries of the mapping that are no decoder-only language models, and why."""


def config_of(model_type: str, **more: Any) -> Any:
    """The tiny config of one entry of the mapping."""
    config_class = CONFIG_MAPPING[model_type]
    changes = dict(CHANGES.get(model_type, {}))
    parts = getattr(config_class, "sub_configs", {})
    if "text_config" in parts:
        text_class = parts["text_config"]
        if not dataclasses.is_dataclass(text_class) or text_class.__name__ == "AutoConfig":
            text_class = type(config_class().text_config)
        text = _sized(text_class, changes.pop("text_config", {}), SIZES)
        return config_class(text_config=text, **changes, **more)
    return _sized(config_class, {**changes, **more}, SIZES)


def _sized(config_class: Any, changes: dict[str, Any], sizes: dict[str, object]) -> Any:
    names = {field.name for field in dataclasses.fields(config_class)}
    kwargs = {name: value for name, value in sizes.items() if name in names}
    kwargs |= _layer_kinds(config_class, names - changes.keys())
    return config_class(**{k: v for k, v in {**kwargs, **changes}.items() if v is not ...})


def _layer_kinds(config_class: Any, names: set[str]) -> dict[str, Any]:
    """Every kind of layer that the family's own config has, within `LAYERS` layers."""
    wanted = [name for name in ("layer_types", "mlp_layer_types") if name in names]
    if not wanted:
        return {}
    whole = config_class()
    found = {name: list(dict.fromkeys(getattr(whole, name) or ())) for name in wanted}
    return {n: (kinds * LAYERS)[:LAYERS] for n, kinds in found.items() if kinds}


def build(model_type: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """Build the tiny model of one entry of the mapping, every parameter drawn at random.

    Args:
        model_type: One of `MODEL_TYPES`.
        seed: Seeds every parameter; the global random state is not changed.
        **more: Further arguments of the config.

    Returns:
        The model with its head, float32, in eval mode, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(model_type, **more), dtype=torch.float32)
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw weights so that sublayers, norms and biases all show in the numbers.

    Matrices for which a sublayer adds about as much as the stream holds, norm gains in [0.5, 1.5]
    around what they start at, biases of std 0.3, a head that gives logits of std 5 or more.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    head = None if output is None else id(output.weight)
    for path, parameter in model.named_parameters():
        owner = type(model.get_submodule(path.rpartition(".")[0])).__name__.lower()
        leaf = path.rpartition(".")[2]
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings or id(parameter) == head:
            parameter.copy_((1.0 if id(parameter) in embeddings else 2.0) * noise)
        elif "bias" in leaf:
            parameter.copy_(0.3 * noise)
        elif "norm" in owner or parameter.dim() < 2:
            parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
        else:
            parameter.copy_(0.2 * noise)


def token_ids(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> Tensor:
    """Random ids ``[batch, position]`` that any tiny model takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, length), generator=generator)


def describe(model_type: str) -> str:
    """What a family's own config says of its kind: experts, kinds of layers, sizes of caches."""
    config = config_of(model_type).get_text_config(decoder=True)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    experts = any(
        getattr(config, name, None)
        for name in ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    )
    latent = bool(getattr(config, "kv_lora_rank", None))
    words = [", ".join(kind.replace("_attention", "") for kind in kinds) if len(kinds) > 1 else ""]
    words += ["experts" if experts else "", "latent attention" if latent else ""]
    return "; ".join(word for word in words if word) or " "
