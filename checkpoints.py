"""A checkpoint in a folder or on the hub: where it is, its config, tokenizer and weights.

A folder is read without any network access; code shipped with a model is never run unless asked
for; weights that a checkpoint lacks are an error, never random numbers, and so is a tokenizer
without a vocabulary.
"""

from __future__ import annotations

import difflib
import gc
import sys
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelLoadError(OSError):
    """A model that cannot be loaded; the message says what was expected and what to do."""


def locate(source: str | Path, loading: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The folder or hub id, and the options that config, tokenizer and weights share.

    Args:
        source: A folder, or else a hub id.
        loading: Options of `model_loader.load_model`.

    Raises:
        ModelLoadError: it is a file, or can only be a folder and is none with a model.
    """
    options: dict[str, Any] = {
        name: loading[name]
        for name in ("revision", "token", "cache_dir", "subfolder")
        if name in loading
    }
    options["trust_remote_code"] = bool(loading.get("trust_remote_code"))  # None would ask
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / loading.get("subfolder", "") / "config.json").is_file():
            raise ModelLoadError(
                f"{folder} is a folder without config.json, so it holds no Hugging Face model; "
                "save one there with model.save_pretrained(folder) "
                "and tokenizer.save_pretrained(folder)"
            )
        return str(folder), {**options, "local_files_only": True}
    if folder.is_file():
        raise ModelLoadError(
            f"{folder} is a file; give the folder that holds config.json and the weights"
        )
    text = str(source)
    if isinstance(source, Path) or text.startswith((".", "/", "~", "\\")) or text.count("/") > 1:
        raise ModelLoadError(f"there is no folder {folder}{_nearest_folder(folder)}")
    return text, {
        **options,
        **({"local_files_only": True} if loading.get("local_files_only") else {}),
    }


def _nearest_folder(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f" (nor {folder.parent})"
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(folder.name, siblings, n=1, cutoff=0.4)
    return f"; did you mean {folder.parent / near[0]}?" if near else ""


def read_config(place: str, options: dict[str, Any]) -> Any:
    """The config at a place that `locate` found; ModelLoadError where there is none."""
    try:
        return transformers.AutoConfig.from_pretrained(place, **options)
    except Exception as err:  # a config may be damaged in any way
        where = place if Path(place).is_dir() else f"{place} (no folder here, so taken as a hub id)"
        raise ModelLoadError(
            f"cannot read the config of {where}: {_first_line(err)}{_remedy(err)}"
        ) from err


def _remedy(err: BaseException) -> str:
    """What to do about a model that brings code of its own."""
    asks = "trust_remote_code" in str(err)
    return "; if you trust that code, pass trust_remote_code=True" if asks else ""


TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")
"""What the names of a tokenizer's files start with."""


def holds_tokenizer(place: str) -> bool:
    """Whether a place is a folder with files of a tokenizer."""
    folder = Path(place)
    if not place or not folder.is_dir():
        return False
    return any(entry.name.startswith(TOKENIZER_FILES) for entry in folder.iterdir())


def read_tokenizer(place: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer at a place that `locate` found; ModelLoadError without a vocabulary."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        _require_vocabulary(tokenizer)
    except Exception as err:  # the tokenizers library raises bare Exceptions
        raise ModelLoadError(
            f"cannot load a tokenizer from {place}: {_first_line(err)}; pass tokenizer=, or save "
            "one there with tokenizer.save_pretrained(folder), or pass load_tokenizer=False and "
            f"give token ids instead of text{_remedy(err)}"
        ) from err
    return tokenizer


def _require_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    """Without files some classes make an empty tokenizer, which finds no token in any text."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        raise ValueError("it holds no vocabulary (no tokenizer.json or the like)")


def import_modeling() -> None:
    """Import the part of transformers under every model class, the cycle collector held back.

    The objects of these 1,500 modules live as long as the process. The collector would go through
    all of them three times meanwhile: a sixth of the time in which a small model is ready.
    """
    if "transformers.modeling_utils" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        import_module("transformers.modeling_utils")
    finally:
        if gc.get_freeze_count() == 0:
            gc.freeze()  # the two together make everything old,
            gc.unfreeze()  # without a look at it; nothing stays frozen
        gc.enable()


def auto_class(config: Any, head: bool) -> Any:
    """The automatic class that knows a config: with a head also those that read images beside text.

    Args:
        config: The model's config.
        head: Whether the language-model head is wanted.
    """
    if not head:
        return transformers.AutoModel
    readers = transformers.AutoModelForImageTextToText
    text_only = type(config) in transformers.AutoModelForCausalLM._model_mapping
    with_images = not text_only and type(config) in readers._model_mapping
    return readers if with_images else transformers.AutoModelForCausalLM


def read_weights(
    place: str, config: Any, head: bool, device: torch.device | None, loading: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on ``device`` (None: where ``device_map`` says), and what was lacking in the files.

    Args:
        place: A folder or hub id, as `locate` gives it.
        config: As `read_config` gives it.
        head: Whether the language-model head is wanted.
        device: Where all of it shall lie.
        loading: For ``from_pretrained``.

    Returns:
        The model, and what `refuse_random_weights` looks at.

    Raises:
        ModelLoadError: the weights are not there, or broken.
        MemoryError: there is too little memory for them.
    """
    import_modeling()
    kind = auto_class(config, head)
    own = getattr(config, "quantization_config", None)
    quantized = own is not None or loading.get("quantization_config") is not None
    if quantized and device is not None:  # a quantized model cannot be moved afterwards
        loading, device = {**loading, "device_map": {"": device}}, None
    try:
        loaded: Any = kind.from_pretrained(
            place, config=config, output_loading_info=True, **loading
        )
    except SafetensorError as err:
        raise ModelLoadError(
            f"the weights of {place} are broken or truncated: {_first_line(err)}"
        ) from err
    except UnpicklingError as err:
        raise ModelLoadError(
            f"the weights of {place} are broken: no PyTorch file of plain tensors"
        ) from err
    except MemoryError:
        raise
    except Exception as err:  # so may a file of weights; one that is empty is an EOFError
        raise ModelLoadError(f"cannot load the weights of {place}: {_first_line(err)}") from err
    model, info = loaded
    return model if device is None else model.to(device), info


def refuse_random_weights(place: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise ModelLoadError where a checkpoint lacks weights, so that some were made up."""
    mismatched = (key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    lacking = sorted({*info["missing_keys"], *mismatched})
    if not lacking:
        return
    headless = "; if it holds a model without a head, load that: load_for_generation=False"
    raise ModelLoadError(
        f"the checkpoint {place} lacks {len(lacking)} weights of {type(model).__name__} "
        f"({', '.join(lacking[:3])}{', …' if len(lacking) > 3 else ''}), or has them in another "
        f"shape; they would be random numbers{'' if model.base_model is model else headless}"
    )


def _first_line(err: BaseException) -> str:
    """What an error says, with its name where that is but a key or nothing."""
    text = str(err).strip().split("\n")[0]
    bare = isinstance(err, KeyError | EOFError) or not text
    return f"{type(err).__name__} {text}".rstrip() if bare else text
