"""Loading a model once, and looking at it without running it.

`load_model` takes a local folder, a hub id or a live ``PreTrainedModel``, and returns the model and
its tokenizer. A folder is read without any network access; code shipped with a model is never run
unless asked for (``trust_remote_code=True``); weights that a checkpoint lacks are an error, never
random numbers, and so is a tokenizer without a vocabulary.

`ModelInspector` answers questions about a model (`model_inspection`). What needs only the config
(`get_architecture_summary`, `get_num_layers`) or only the shapes (`get_layer_names`,
`get_parameter_count`) does not load the weights; the config alone does not even import
transformers' modeling code.

    python -m model_loader check PATH_OR_ID      what was found in a model, proved by numbers
"""

from __future__ import annotations

import difflib
import gc
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from block_finding import text_config
from decoder_check import refuse_encoder, refuse_encoder_decoder
from forward_pass import InputError
from model_architecture import Architecture, Layer
from model_inspection import (
    SUMMARY_FIELDS,
    architecture_summary,
    find_module,
    format_summary,
    parameter_count,
    part_names,
    weights_of,
)
from model_lock import unwrap
from module_devices import compute_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEMO_MODEL",
    "SUMMARY_FIELDS",
    "ModelInspector",
    "ModelLoadError",
    "ModelSource",
    "architecture_summary",
    "compare_architectures",
    "find_module",
    "format_summary",
    "load_model",
    "load_model_from_path",
    "parameter_count",
    "part_names",
    "usable_device",
    "weights_of",
]

DEMO_MODEL = Path(__file__).resolve().parent / "demo_model"
"""The small trained model that comes with the toolkit."""

ModelSource: TypeAlias = "str | Path | PreTrainedModel"
"""A folder, a hub id, or a model that is already loaded."""


class ModelLoadError(OSError):
    """A model that cannot be loaded; the message says what was expected and what to do."""


# --- Loading --------------------------------------------------------------------------------------


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """A device that is there; None picks CUDA, then MPS, then the CPU.

    Raises:
        InputError: there is no such device here.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    usable = [kind for kind, is_there in there.items() if is_there] + ["cpu"]
    if device is None:
        return torch.device(usable[0])
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(f"there is no device {device!r}; here are: {', '.join(usable)}") from None
    beyond = wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count()
    if beyond or not there.get(wanted.type, True):
        raise InputError(f"PyTorch finds no device {str(wanted)!r}; here are: {', '.join(usable)}")
    return wanted


def load_model(
    source: ModelSource = DEMO_MODEL,
    device: str | torch.device | None = None,
    *,
    head: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load_tokenizer: bool = True,
    **loading: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and its tokenizer, ready for analysis (evaluation mode).

    Args:
        source: A local folder, a hub id, or a live model, which is used as it is (of what
            ``torch.compile`` returned, the model inside).
        device: Where the model shall lie; None picks CUDA, then MPS, then CPU. Not with
            ``device_map``.
        head: With False the base model without its language-model head is loaded.
        tokenizer: Used instead of the one beside the model.
        load_tokenizer: With False, and no ``tokenizer``, None is returned in its place.
        **loading: For ``from_pretrained``: ``dtype``, ``device_map``, ``revision``,
            ``quantization_config``, ``attn_implementation``, ``trust_remote_code``, …

    Returns:
        The model and the tokenizer.

    Raises:
        ModelLoadError: nothing that can be loaded is there, or it is broken or incomplete.
        ArchitectureError: the model is not a decoder-only language model.
        InputError: arguments that contradict each other.
    """
    if not isinstance(source, str | Path):
        return _live_model(source, device, tokenizer, load_tokenizer, loading)
    if loading.get("device_map") is None:
        target = usable_device(device)
    elif device is not None:
        raise InputError(
            "give device= or device_map=, not both: the map says where every part lies"
        )
    else:
        target = None
    place, options = _locate(source, loading)
    config = _load_config(place, options)
    refuse_encoder_decoder(config, f"{place} ({config.model_type})")
    if load_tokenizer and tokenizer is None:
        tokenizer = _load_tokenizer(place, options)
    model = _load_weights(place, config, head, target, {**loading, **options}).eval()
    _require_decoder(model)
    return model, tokenizer


def load_model_from_path(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load model and tokenizer from a folder. See `load_model`."""
    return load_model(path, device)


def _live_model(
    model: PreTrainedModel,
    device: str | torch.device | None,
    tokenizer: PreTrainedTokenizerBase | None,
    load_tokenizer: bool,
    loading: dict[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    model = unwrap(model)
    _require_live(model)
    if loading:
        raise InputError(f"{', '.join(loading)} cannot be used with a model that is already loaded")
    _require_decoder(model)
    here = compute_device(model)
    wanted = here if device is None else usable_device(device)
    if wanted.type != here.type or wanted.index not in (None, here.index):
        raise InputError(
            f"the model lies on {here}, not on {wanted}; "
            f"move it with model.to({str(wanted)!r}) first"
        )
    if (
        tokenizer is None
        and load_tokenizer
        and model.name_or_path
        and Path(model.name_or_path).is_dir()
    ):
        tokenizer = _load_tokenizer(model.name_or_path, {"local_files_only": True})
    return model, tokenizer


def _require_decoder(model: PreTrainedModel) -> None:
    """Refuse encoders; runs two tokens, and only where the model's class leaves a doubt."""
    refuse_encoder_decoder(model.config, type(model).__name__)
    ids = torch.tensor([[1, 2, 3]], device=compute_device(model))
    refuse_encoder(model, model.base_model, {"input_ids": ids})


def _require_live(model: PreTrainedModel) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise InputError(
            f"a model is a folder, a hub id or a live PreTrainedModel, not {type(model).__name__}"
        )


def _locate(source: str | Path, loading: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The folder or hub id, and the options that config, tokenizer and weights share."""
    options: dict[str, Any] = {
        name: loading[name]
        for name in ("revision", "token", "cache_dir", "subfolder")
        if name in loading
    }
    options["trust_remote_code"] = loading.get("trust_remote_code", False)
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


def _load_config(place: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as err:
        where = place if Path(place).is_dir() else f"{place} (no folder here, so taken as a hub id)"
        raise ModelLoadError(
            f"cannot read the config of {where}: {_first_line(err)}{_remedy(err)}"
        ) from err


def _remedy(err: BaseException) -> str:
    """What to do about a model that brings code of its own."""
    asks = "trust_remote_code" in str(err)
    return "; if you trust that code, pass trust_remote_code=True" if asks else ""


def _load_tokenizer(place: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        # without files some classes make an empty tokenizer, which finds no token in any text
        if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
            raise ValueError("it holds no vocabulary (no tokenizer.json or the like)")
    except Exception as err:  # the tokenizers library raises bare Exceptions
        raise ModelLoadError(
            f"cannot load a tokenizer from {place}: {_first_line(err)}; pass tokenizer=, or save "
            "one there with tokenizer.save_pretrained(folder), or pass load_tokenizer=False and "
            f"give token ids instead of text{_remedy(err)}"
        ) from err
    return tokenizer


def _import_modeling() -> None:
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


def _auto_class(config: Any, head: bool) -> Any:
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


def _load_weights(
    place: str, config: Any, head: bool, device: torch.device | None, loading: dict[str, Any]
) -> PreTrainedModel:
    """The model on ``device`` (None: where ``device_map`` says), no weight of it made up."""
    _import_modeling()
    kind = _auto_class(config, head)
    own = getattr(config, "quantization_config", None)
    quantized = own is not None or loading.get("quantization_config") is not None
    if quantized and device is not None:  # a quantized model cannot be moved afterwards
        loading, device = {**loading, "device_map": {"": device}}, None
    try:
        loaded: Any = kind.from_pretrained(
            place, config=config, output_loading_info=True, **loading
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as err:
        raise ModelLoadError(f"cannot load the weights of {place}: {_first_line(err)}") from err
    except SafetensorError as err:
        raise ModelLoadError(
            f"the weights of {place} are broken or truncated: {_first_line(err)}"
        ) from err
    except UnpicklingError as err:
        raise ModelLoadError(
            f"the weights of {place} are broken: no PyTorch file of plain tensors"
        ) from err
    model, info = loaded
    _refuse_random_weights(place, model, info)
    return model if device is None else model.to(device)


def _refuse_random_weights(place: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
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
    return str(err).strip().split("\n")[0]


# --- Inspection -----------------------------------------------------------------------------------


class ModelInspector:
    """Looks at a model in a folder or on the hub, loading no more of it than a question needs.

    Args:
        model_path: A local folder, a hub id or a live model.
        device: Where `load_model` puts the model, unless there is a ``device_map``.
        **loading: For ``from_pretrained``, as in `load_model`.

    Raises:
        ModelLoadError: there is no such model.
    """

    def __init__(
        self,
        model_path: ModelSource = DEMO_MODEL,
        device: str | torch.device | None = "cpu",
        **loading: Any,
    ) -> None:
        self.model_path, self.device, self._loading = model_path, device, loading
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._model: PreTrainedModel | None = None
        if isinstance(model_path, str | Path):
            self.config = _load_config(*_locate(model_path, loading))
        else:
            self._model = unwrap(model_path)
            _require_live(self._model)
            self.config = self._model.config

    def __repr__(self) -> str:
        state = "not loaded" if self._model is None else "loaded"
        return f"ModelInspector({_name_of(self.model_path)!r}, {state})"

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded when first needed."""
        if self._model is None:
            self.load_model(load_tokenizer=False)
        assert self._model is not None
        return self._model

    def load_model(
        self, load_tokenizer: bool = True
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """Load model and tokenizer, each once.

        Returns:
            The model, and the tokenizer (None with ``load_tokenizer=False``).

        Raises:
            ModelLoadError: it cannot be loaded.
        """
        if self._model is None:
            device = None if "device_map" in self._loading else self.device
            self._model, self.tokenizer = load_model(
                self.model_path, device, load_tokenizer=load_tokenizer, **self._loading
            )
        elif load_tokenizer and self.tokenizer is None and isinstance(self.model_path, str | Path):
            self.tokenizer = _load_tokenizer(*_locate(self.model_path, self._loading))
        return self._model, self.tokenizer

    @property
    def _skeleton(self) -> PreTrainedModel:
        """The model itself if it is loaded, else its modules without weights."""
        return self._empty if self._model is None else self._model

    @cached_property
    def _empty(self) -> PreTrainedModel:
        """The model's modules on the meta device: shapes, no weights."""
        refuse_encoder_decoder(self.config, f"{self.model_path} ({self.config.model_type})")
        _import_modeling()
        kind = _auto_class(self.config, self._loading.get("head", True))
        with torch.device("meta"):
            return kind.from_config(
                self.config, trust_remote_code=self._loading.get("trust_remote_code", False)
            )

    def get_architecture_summary(self) -> dict[str, Any]:
        """What the config says; does not load the weights. See `architecture_summary`."""
        return architecture_summary(self.config)

    def print_architecture_summary(self) -> None:
        """Print the summary and the number of parameters; does not load the weights."""
        summary = {
            **self.get_architecture_summary(),
            "parameters": f"{self.get_parameter_count()['total']:,}",
        }
        title = f"Architecture of {_name_of(self.model_path)}"
        print(format_summary(summary, title))  # noqa: T201

    def get_model_config(self) -> dict[str, Any]:
        """The whole config as a dict."""
        return self.config.to_dict()

    def get_parameter_count(self) -> dict[str, int]:
        """``total, trainable, non_trainable``, tied ones once; does not load the weights."""
        return parameter_count(self._skeleton)

    def get_num_layers(self) -> int:
        """Number of blocks; reads only the config."""
        return int(text_config(self.config).num_hidden_layers)

    def get_layer_names(self) -> list[str]:
        """Full names of the blocks, in order; does not load the weights."""
        return Architecture(self._skeleton).layer_names

    def get_attention_layer_names(self) -> list[str]:
        """Full names of the attention modules, in order, where there is one. Loads the model."""
        return part_names(Architecture(self.model), "attention")

    def get_mlp_layer_names(self) -> list[str]:
        """Full names of the MLP modules, in order, where there is one. Loads the model."""
        return part_names(Architecture(self.model), "mlp")

    def get_layer_by_name(self, name: Layer) -> nn.Module:
        """A module by dotted name, a block by any spelling (`find_module`). Loads the model."""
        return find_module(self.model, name)

    def get_weights_by_layer(self, name: Layer) -> dict[str, Tensor]:
        """Parameters of a module (`find_module`), detached, not copied. Loads the model."""
        return weights_of(find_module(self.model, name))


def compare_architectures(paths: Sequence[ModelSource]) -> dict[str, dict[str, Any]]:
    """The summaries of several models side by side; reads configs and shapes, no weights.

    Args:
        paths: Folders, hub ids or live models.

    Returns:
        ``{path: summary}``, each with a ``total_parameters`` beside the keys of `SUMMARY_FIELDS`.

    Raises:
        ModelLoadError: one of them is not there.
    """
    table: dict[str, dict[str, Any]] = {}
    for path in paths:
        inspector = ModelInspector(path)
        name = _name_of(path)
        if name in table:
            name = f"{name} ({sum(known.startswith(name) for known in table) + 1})"
        total = inspector.get_parameter_count()["total"]
        table[name] = {**inspector.get_architecture_summary(), "total_parameters": total}
    return table


def _name_of(source: ModelSource) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return source.name_or_path or type(source).__name__


if __name__ == "__main__":
    raise SystemExit(import_module("model_check").main())
