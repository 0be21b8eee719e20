"""The models and the inputs that every toolkit gets in `peers.py`, and what is asked of them.

- `MODELS`: how each model is made, and how long its prompts are.
- `make_folder` writes one as Hugging Face does, with the bundled tokenizer; `load_plain` reads it.
- `Task`: prompts, tokens and vector, the same in every process, made from a seed.
- `parts_of`: where a GPT-2 or a Llama keeps its blocks, for those who hook modules by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

DEMO = Path(__file__).parent.parent / "demo_model"
SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")
"""What "record everything" keeps of each block: the sites that every toolkit has."""
TOP = 10


@dataclass(frozen=True)
class Recipe:
    """How a model is made, and how long its prompts are."""

    title: str
    config: Callable[[], Any] | None
    """None is the bundled model."""
    text: int
    """Tokens of the text that is run, recorded and read by the lens."""
    pair: int
    """Tokens of the two prompts of a sweep."""
    new: int
    """Tokens generated."""


def _gpt2(**sizes: Any) -> GPT2Config:
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return GPT2Config(**sizes, **special, initializer_range=0.1)


def _llama(**sizes: int) -> LlamaConfig:
    small = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
             "num_key_value_heads": 2, "intermediate_size": 688}  # fmt: skip
    return LlamaConfig(
        **{**small, **sizes}, vocab_size=4096, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def _llama_large() -> LlamaConfig:
    return _llama(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=4,
        intermediate_size=2816,
    )  # fmt: skip


MODELS = {
    "demo": Recipe("the bundled model, 12 × 96, 6 heads", None, 64, 12, 24),
    "gqa": Recipe("Llama-like, 8 × 256, 8 heads on 2 key/value heads, random", _llama, 64, 12, 24),
    "gpt2-small": Recipe("GPT-2 small's shape, 12 × 768, 12 heads, random", _gpt2, 64, 5, 24),
    "llama-300m": Recipe(
        "Llama-like, 24 × 1024, 16 heads on 4 key/value heads, random", _llama_large, 512, 12, 48
    ),
    "tiny": Recipe(
        "GPT-2, 2 × 32, 2 heads, random",
        lambda: _gpt2(n_layer=2, n_embd=32, n_head=2, vocab_size=2048, n_positions=64), 8, 4, 4,
    ),
}  # fmt: skip
"""``tiny`` is for trying the script out, ``llama-300m`` for a GPU."""


def make_folder(name: str, folder: Path) -> None:
    """Write a model with a tokenizer, both without an end of text, so that nobody stops early."""
    recipe = MODELS[name]
    torch.manual_seed(0)
    if recipe.config is None:
        model = AutoModelForCausalLM.from_pretrained(DEMO)
    else:
        model = AutoModelForCausalLM.from_config(recipe.config())
    for config in (model.config, model.generation_config):
        config.bos_token_id = config.eos_token_id = None
        config.pad_token_id = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)


def load_plain(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model by Hugging Face, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)


@dataclass(frozen=True)
class Task:
    """What every toolkit is asked to do with one model; tensors lie on its device."""

    text: Tensor
    """``[1, position]``, for a pass, a record and the lens."""
    clean: Tensor
    """``[1, position]``; the sweeps patch its activations into the run of ``corrupted``."""
    corrupted: Tensor
    vector: Tensor
    """``[d_model]``, added to ``resid_post`` of ``layer`` at every token."""
    layer: int
    new: int
    answer: int = 15
    foil: int = 17

    def metric(self, logits: Tensor) -> Tensor:
        """Logit difference at the last position of the first row."""
        return logits[0, -1, self.answer] - logits[0, -1, self.foil]


def make_task(name: str, model: Any, device: str) -> Task:
    """The inputs for a model, from a fixed seed; ids 0 to 9 stay out (padding is guessed by id)."""
    recipe = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    vocabulary, width = model.config.vocab_size, model.config.hidden_size
    text = torch.randint(10, vocabulary, (1, recipe.text), generator=generator).to(device)
    pair = torch.randint(10, vocabulary, (2, recipe.pair), generator=generator).to(device)
    vector = torch.randn(width, generator=generator).to(device)
    layer = model.config.num_hidden_layers // 2
    return Task(text, pair[:1], pair[1:], vector, layer, recipe.new)


@dataclass(frozen=True)
class Parts:
    """Names of modules, for toolkits that leave finding them to the user."""

    blocks: str
    attention: str
    mlp: str
    projection: str
    norm: str

    def of(self, root: Any) -> list[Any]:
        """The blocks of a model, or of a wrapper that mirrors its modules."""
        for name in self.blocks.split("."):
            root = getattr(root, name)
        return list(root)

    @staticmethod
    def inside(root: Any, path: str) -> Any:
        """A module by its dotted path."""
        for name in path.split("."):
            root = getattr(root, name)
        return root


def parts_of(model: nn.Module) -> Parts:
    """Names in a GPT-2 or a Llama."""
    if hasattr(model, "transformer"):
        return Parts("transformer.h", "attn", "mlp", "attn.c_proj", "transformer.ln_f")
    return Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj", "model.norm")
