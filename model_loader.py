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

from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from block_finding import text_config
from checkpoints import (
    ModelLoadError,
    auto_class,
    holds_tokenizer,
    import_modeling,
    locate,
    read_config,
    read_tokenizer,
    read_weights,
    refuse_random_weights,
)
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


PLACING = ("device_map", "distributed_config", "tp_plan", "tp_size")
"""Arguments of ``from_pretrained`` that say where the parts of a model lie."""


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
        device: Where the model shall lie; None picks CUDA, then MPS, then CPU. Not with what
            says where its parts lie (`PLACING`).
        head: With False the base model without its language-model head is loaded.
        tokenizer: Used instead of the one beside the model.
        load_tokenizer: With False, and no ``tokenizer``, None is returned in its place.
        **loading: For ``from_pretrained``: ``dtype``, ``device_map``, ``revision``,
            ``quantization_config``, ``attn_implementation``, ``trust_remote_code``, …; under
            ``torchrun`` also ``tp_plan="auto"`` or ``distributed_config`` (see `model_shards`).

    Returns:
        The model and the tokenizer.

    Raises:
        ModelLoadError: nothing that can be loaded is there, or it is broken or incomplete.
        ArchitectureError: the model is not a decoder-only language model.
        InputError: arguments that contradict each other, or a dtype that does not exist.
    """
    if not isinstance(source, str | Path):
        return _live_model(source, device, tokenizer, load_tokenizer, loading)
    _check_dtype(loading.get("dtype"))
    placed = [name for name in PLACING if loading.get(name) is not None]
    if not placed:
        target = usable_device(device)
    elif device is not None:
        what = placed[0].removeprefix("device_")
        raise InputError(
            f"give device= or {placed[0]}=, not both: the {what} says where every part lies"
        )
    else:
        target = None
    place, options = locate(source, loading)
    config = read_config(place, options)
    refuse_encoder_decoder(config, f"{place} ({config.model_type})")
    if load_tokenizer and tokenizer is None:
        tokenizer = read_tokenizer(place, options)
    model, lacking = read_weights(place, config, head, target, {**loading, **options})
    _require_decoder(model.eval())  # first: an encoder lacks the head that is asked for here
    refuse_random_weights(place, model, lacking)
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
    place = model.name_or_path or ""
    if tokenizer is None and load_tokenizer and holds_tokenizer(place):
        tokenizer = read_tokenizer(place, {"local_files_only": True})
    return model, tokenizer


def _check_dtype(dtype: Any) -> None:
    named = isinstance(dtype, str) and dtype != "auto"
    if named and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(
            f"there is no dtype {dtype!r}; write float32, bfloat16, float16, float64 or auto"
        )


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
            self.config = read_config(*locate(model_path, loading))
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
            device = None if set(PLACING) & set(self._loading) else self.device
            self._model, self.tokenizer = load_model(
                self.model_path, device, load_tokenizer=load_tokenizer, **self._loading
            )
        elif load_tokenizer and self.tokenizer is None and isinstance(self.model_path, str | Path):
            self.tokenizer = read_tokenizer(*locate(self.model_path, self._loading))
        return self._model, self.tokenizer

    @property
    def _skeleton(self) -> PreTrainedModel:
        """The model itself if it is loaded, else its modules without weights."""
        return self._empty if self._model is None else self._model

    @cached_property
    def _empty(self) -> PreTrainedModel:
        """The model's modules on the meta device: shapes, no weights."""
        refuse_encoder_decoder(self.config, f"{self.model_path} ({self.config.model_type})")
        import_modeling()
        kind = auto_class(self.config, self._loading.get("head", True))
        with torch.device("meta"):
            return kind.from_config(
                self.config, trust_remote_code=bool(self._loading.get("trust_remote_code"))
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
