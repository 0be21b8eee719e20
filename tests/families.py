"""Tiny random causal language models of many families, and a tokenizer to go with them.

    FAMILIES                     name -> Family: the config and the few numbers that differ
    build(name, seed=0, ...)     a float32 model in eval mode, built from its config, no download
    tiny_tokenizer()             a space-aware BPE tokenizer of 99 tokens, written out in code
    token_ids(batch, length)     random token ids that are no special tokens

A model fresh from its config hides mistakes: norm weights are 1, biases are 0, sublayers add next
to nothing and logits are too small for a soft-cap to matter. So `build` draws every parameter
again, from a generator of its own: norm gains in [0.5, 1.5], biases of std 0.3, matrices for which
a sublayer adds about as much as the residual stream holds, and a head that gives logits of std 8 or
more (before a soft-cap).

The sizes are the same everywhere (`HIDDEN`, `HEADS`, `VOCAB`; 3 layers, 4 where kinds of layers
alternate), but the head size is not always hidden / heads: code that divides to find it is wrong.
"""

import dataclasses

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN = 32
HEADS = 4
KV_HEADS = 2
VOCAB = 99
INTERMEDIATE = 48
POSITIONS = 128
WINDOW = 4
"""Sliding windows see this many positions, the current one included: less than any test prompt."""

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table: what a config is made from, and how its weights are scaled."""

    config_class: str
    """Name of a class in `transformers`."""
    kwargs: dict[str, object]
    """Everything that the config gets; a key that the config class does not know is refused."""
    embedding_std: float = 1.0
    """Chosen so that the stream that enters block 0 has a root mean square of about 1 to 2."""
    head_std: float = 2.0
    """Of the head where it is not tied. 2 gives logits of std 11, before any scale or soft-cap."""
    matrix_std: float = 0.2
    """Of every other matrix: with 32 to 64 inputs, outputs are about as large as inputs."""
    final_norm_shift: float = 0.0
    """Added to the gain of the last norm, where a tied head is small because the embedding is."""
    layers: int = 3


def _llama_like(config_class: str, *, layers: int = 3, **changes: object) -> Family:
    """Return a row in the names that most configs share."""
    fields = {f.name for f in dataclasses.fields(Family)} - {"config_class", "kwargs", "layers"}
    scales = {key: changes.pop(key) for key in fields & changes.keys()}
    kwargs = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
    }
    kwargs = {key: value for key, value in (kwargs | changes).items() if value is not ...}
    return Family(config_class, kwargs, layers=layers, **scales)


def _gpt2_like(config_class: str, **changes: object) -> Family:
    """Return a row in the names of the first GPT configs."""
    sizes = {"n_embd": HIDDEN, "n_layer": 3, "n_head": HEADS, "n_positions": POSITIONS}
    return Family(config_class, {"vocab_size": VOCAB, **sizes, "n_inner": INTERMEDIATE, **changes})


PARTIAL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FULL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
ALTERNATING = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, Family] = {
    # Learned positions, GPT-2 blocks and their relatives.
    "gpt2": dataclasses.replace(_gpt2_like("GPT2Config"), embedding_std=2.0),
    "gptj": _gpt2_like("GPTJConfig", rotary_dim=4, tie_word_embeddings=False),
    "gpt_neo": _llama_like(
        "GPTNeoConfig",
        layers=4,
        num_attention_heads=...,
        num_heads=HEADS,
        num_hidden_layers=...,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
    ),
    "gpt_neox": _llama_like("GPTNeoXConfig"),
    "opt": _llama_like(
        "OPTConfig", intermediate_size=..., ffn_dim=INTERMEDIATE, word_embed_proj_dim=HIDDEN
    ),
    "bloom": Family(
        "BloomConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "n_layer": 3,
            "n_head": HEADS,
            "tie_word_embeddings": False,
        },
    ),
    "mpt": Family(
        "MptConfig",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "n_layers": 3,
            "n_heads": HEADS,
            "expansion_ratio": 2,
            "max_seq_len": POSITIONS,
            "tie_word_embeddings": False,
        },
    ),
    # Rotary positions, RMS norms, gated MLPs.
    "llama": _llama_like("LlamaConfig", num_key_value_heads=KV_HEADS),
    "llama_tied": _llama_like(
        "LlamaConfig",
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        embedding_std=2.0,
    ),
    "mistral": _llama_like(
        "MistralConfig", num_key_value_heads=KV_HEADS, head_dim=16, sliding_window=WINDOW
    ),
    "mixtral": _llama_like(
        "MixtralConfig",
        num_key_value_heads=KV_HEADS,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen2": _llama_like("Qwen2Config", num_key_value_heads=KV_HEADS),
    "qwen2_moe": _llama_like(
        "Qwen2MoeConfig",
        num_key_value_heads=KV_HEADS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "qwen3": _llama_like("Qwen3Config", num_key_value_heads=KV_HEADS, head_dim=16),
    "stablelm": _llama_like(
        "StableLmConfig",
        num_key_value_heads=KV_HEADS,
        use_qkv_bias=True,
        rope_parameters=PARTIAL_ROTARY,
    ),
    "phi3": _llama_like("Phi3Config", num_key_value_heads=KV_HEADS),
    # A norm after the sublayer.
    "olmo2": _llama_like("Olmo2Config", num_key_value_heads=KV_HEADS),
    "gemma2": _llama_like(
        "Gemma2Config",
        layers=4,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=10.0,
        tie_word_embeddings=True,
        embedding_std=0.25,
        final_norm_shift=8.0,
    ),
    "gemma3": _llama_like(
        "Gemma3TextConfig",
        layers=4,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=[ALTERNATING[0], *ALTERNATING[:3]],
        tie_word_embeddings=True,
        embedding_std=0.25,
        final_norm_shift=8.0,
    ),
    # Attention and MLP in parallel.
    "phi": _llama_like("PhiConfig", num_key_value_heads=KV_HEADS, rope_parameters=PARTIAL_ROTARY),
    "falcon": _llama_like(
        "FalconConfig",
        intermediate_size=...,
        ffn_hidden_size=INTERMEDIATE,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bias=False,
    ),
    "falcon_new": _llama_like(
        "FalconConfig",
        intermediate_size=...,
        ffn_hidden_size=INTERMEDIATE,
        num_kv_heads=KV_HEADS,
        new_decoder_architecture=True,
        bias=False,
    ),
    "cohere": _llama_like(
        "CohereConfig", num_key_value_heads=KV_HEADS, logit_scale=0.5, head_std=4.0
    ),
    # Multipliers, sinks, no attention at all.
    "granite": _llama_like(
        "GraniteConfig",
        num_key_value_heads=KV_HEADS,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.5,
        logits_scaling=2.0,
        embedding_std=0.4,
        head_std=4.0,
    ),
    "gpt_oss": _llama_like(
        "GptOssConfig",
        layers=4,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=ALTERNATING,
        rope_parameters=FULL_ROTARY,
    ),
    "mamba": _llama_like(
        "MambaConfig",
        num_attention_heads=...,
        max_position_embeddings=...,
        intermediate_size=...,
        state_size=8,
        expand=2,
        time_step_rank=4,
        matrix_std=0.25,
    ),
}


def build(name: str, seed: int = 0, **config_overrides: object) -> PreTrainedModel:
    """Build the tiny model of one family.

    Args:
        name: A key of `FAMILIES`.
        seed: Seeds every parameter; the global random state is neither read nor changed.
        **config_overrides: Replace or extend the family's config arguments, and
            `attn_implementation`.

    Returns:
        The model with its head, float32, in eval mode, on the CPU.

    Raises:
        ValueError: A config argument that the config class does not know, so a typo.
    """
    family = FAMILIES[name]
    config_class = getattr(transformers, family.config_class)
    special_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kwargs = special_ids | family.kwargs | config_overrides
    known = config_class()
    unknown = sorted(k for k in kwargs if k != "attn_implementation" and not hasattr(known, k))
    if unknown:
        raise ValueError(f"{family.config_class} knows no {unknown}: a typo, it would be ignored")
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config_class(**kwargs), dtype=torch.float32)
    _randomize(model, family, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel, family: Family, generator: torch.Generator) -> None:
    """Draw every parameter again, in the order of `named_parameters`."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = id(model.get_output_embeddings().weight)
    final_norm = None
    for path, parameter in model.named_parameters():
        owner = type(model.get_submodule(path.rpartition(".")[0])).__name__.lower()
        leaf = path.rpartition(".")[2]
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(family.embedding_std * noise)
        elif id(parameter) == head:
            parameter.copy_(family.head_std * noise)
        elif "bias" in leaf:
            parameter.copy_(0.3 * noise)
        elif "norm" in owner or leaf in ("D", "A_log"):
            # Around what it starts at: 1, or 0 where the norm multiplies by 1 + weight.
            parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
            final_norm = parameter if "norm" in owner else final_norm
        elif leaf == "sinks":
            parameter.copy_(noise)
        else:
            parameter.copy_(family.matrix_std * noise)
    if final_norm is not None:
        final_norm.add_(family.final_norm_shift)


_CHARACTERS = "ĠĊ.,!?'\"-:" + "".join(map(chr, range(ord("a"), ord("z") + 1)))
_CHARACTERS += _CHARACTERS[-26:].upper() + "0123456789"
_MERGES = "Ġ t|h e|Ġt he|Ġ a|i n|r e|o n|e r|Ġ s|a n|Ġ on|n d|i s|Ġ c|a t|Ġ b|Ġa nd|Ġc at|Ġs at|"
_MERGES += "in g|o r|e n|Ġ m|Ġm at"


def tiny_tokenizer(
    vocab_size: int = VOCAB, *, bos: bool = False, eos: bool = False, pad: bool = False
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer in the manner of GPT-2's: a space belongs to the next word.

    It covers English letters, digits and a little punctuation; the rest becomes `<unk>`.

    Args:
        vocab_size: The number of tokens at most; merges beyond it are left out.
        bos: Give it a BOS token, put before every text.
        eos: Give it an EOS token (not appended to a text).
        pad: Give it a padding token.

    Returns:
        The tokenizer. Its special tokens are the ids 0 to 3, there or not.

    Raises:
        ValueError: Too small a vocabulary for the special tokens and single characters.
    """
    base = [*SPECIAL_TOKENS, *_CHARACTERS]
    if vocab_size < len(base):
        raise ValueError(f"vocab_size={vocab_size}: at least {len(base)} are needed")
    merges = [tuple(pair.split()) for pair in _MERGES.split("|")][: vocab_size - len(base)]
    vocabulary = {token: i for i, token in enumerate([*base, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    given = {"bos_token": bos and "<s>", "eos_token": eos and "</s>", "pad_token": pad and "<pad>"}
    special = {key: value for key, value in given.items() if value}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def token_ids(batch: int, length: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Return random ids `[batch, position]`, none of them a special token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), vocab, (batch, length), generator=generator)
