"""`ModelAnalyzer`: one loaded model, and everything the toolkit can do with it.

Load once, then generate, extract, read the lens, patch, steer, inspect. Every method is one call of
a function in a sibling module, named in its docstring; delete this file and only convenience is
lost.

    from model_analyzer import ModelAnalyzer

    analyzer = ModelAnalyzer()                                   # the bundled demo model
    text = analyzer.generate("The capital of France is", max_new_tokens=5)
    record = analyzer.extract_activations("The Eiffel Tower is in")
    record.layer_activations[5]                                  # block 5: [1, position, d_model]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ablation import ablate
from activation_extraction import (
    DEFAULT_BATCH,
    ActivationExtractor,
    ActivationRecord,
    load_activations,
    save_activations,
)
from architecture_check import ArchitectureReport, check_architecture
from causal_tracing import trace_subject
from direction_finding import find_direction
from feature_attribution import compute_feature_attribution
from generation import decode_text, generate
from intervention import (
    Patches,
    activation_patch_experiment,
    generate_with_patching,
    patch_and_run,
    path_patching,
)
from lens_reports import (
    analyze_generation_token,
    predict_last,
    print_predictions,
    read_record,
)
from logit_lens import LogitLens
from model_architecture import Layer
from model_loader import DEMO_MODEL, ModelInspector, ModelSource, load_model
from node_effects import AblationEffects, PathEffects
from patching_sweep import patching_sweep
from path_patching import patch_paths
from record_files import DEFAULT_FORMAT
from steering import generate_with_steering
from steering_direction import Direction
from steering_sweep import COEFFICIENTS, SteeringSweep, steering_sweep
from sweep_result import SweepResult
from tokenization import Positions, Prompt, encode, token_strings
from trace_result import CausalTrace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelAnalyzer:
    """A causal language model, loaded once, with every analysis at hand; it is never changed.

    Args:
        model_path: A local folder, a hub id, or a live ``PreTrainedModel``; the bundled demo model
            by default.
        device: ``"cpu"``, ``"cuda"``, …; None picks CUDA, then MPS, then the CPU.
        load_for_generation: With False the base model without head is loaded; what needs the head
            raises.
        tokenizer: Used instead of the one beside the model.
        **loading: For ``from_pretrained``: ``dtype``, ``device_map``, ``revision``,
            ``quantization_config``, ``attn_implementation``, ``trust_remote_code``, …; and
            ``load_tokenizer=False`` to do without one.

    Raises:
        ModelLoadError: no model that can be loaded is there.
        ArchitectureError: it is not a decoder-only language model.
    """

    def __init__(
        self,
        model_path: ModelSource = DEMO_MODEL,
        device: str | torch.device | None = None,
        load_for_generation: bool = True,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **loading: Any,
    ) -> None:
        self.model, self.tokenizer = load_model(
            model_path, device, head=load_for_generation, tokenizer=tokenizer, **loading
        )
        self.config = self.model.config
        self._extractor = ActivationExtractor(self.model, self.tokenizer)
        self._inspector = ModelInspector(self.model)
        self.architecture = self._extractor.architecture

    def __repr__(self) -> str:
        name = self.model.name_or_path or type(self.model).__name__
        size = f"{self.architecture.n_layers} layers"
        return f"ModelAnalyzer({name!r}, {size}, {self.device}, {self.model.dtype})"

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self.architecture.input_device

    # --- Generation ------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 50,
        return_activations: bool = False,
        seed: int | None = None,
        **generation_kwargs: Any,
    ) -> str | tuple[str, ActivationRecord]:
        """Continue a prompt: greedily, or by sampling where a temperature above 0 is given.

        With ``return_activations=True`` the pair of text and record is returned; the record covers
        prompt and continuation, ``[1, position, d_model]`` per block, kept while generating.
        See `generation.generate_text`.
        """
        return generate(
            self.architecture,
            self.tokenizer,
            prompt,
            return_activations=return_activations,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            **generation_kwargs,
        )

    # --- Activations -----------------------------------------------------------------------------

    def extract_activations(
        self,
        prompt: Prompt,
        layer_names: Sequence[Layer] | None = None,
        layer_indices: Sequence[Layer] | None = None,
        include_attention: bool = False,
        return_logits: bool = False,
        metadata: Mapping[str, Any] | None = None,
        positions: Positions = None,
        sites: Sequence[str] = ("resid_post",),
    ) -> ActivationRecord:
        """Every block's output (or any other site) for one prompt, ``[1, position, d_model]`` each.

        See `activation_extraction.ActivationExtractor.extract_activations`.
        """
        return self._extractor.extract_activations(
            prompt,
            layer_names,
            layer_indices,
            include_attention,
            return_logits,
            metadata,
            positions,
            sites,
        )

    def extract_batch_activations(
        self,
        prompts: Sequence[Prompt],
        layer_names: Sequence[Layer] | None = None,
        layer_indices: Sequence[Layer] | None = None,
        include_attention: bool = False,
        show_progress: bool = True,
        batch_size: int = DEFAULT_BATCH,
        return_logits: bool = False,
        positions: Positions = None,
        sites: Sequence[str] = ("resid_post",),
    ) -> list[ActivationRecord]:
        """One record per prompt, in the order given, equal to extracting one by one.

        See `activation_extraction.ActivationExtractor.extract_batch_activations`.
        """
        return self._extractor.extract_batch_activations(
            prompts,
            layer_names,
            layer_indices,
            include_attention,
            show_progress,
            batch_size,
            return_logits,
            positions,
            sites,
        )

    def save_activations(
        self,
        record_or_records: ActivationRecord | Sequence[ActivationRecord],
        output_path: str | Path,
        format: str = DEFAULT_FORMAT,
    ) -> Path:
        """Save one record or a list: safetensors, npz, pt, pickle or json; returns the path.

        Where ``format`` is not given the suffix decides. See `record_files.save_activations`.
        """
        return save_activations(record_or_records, output_path, format)

    def load_activations(self, path: str | Path) -> ActivationRecord | list[ActivationRecord]:
        """Load what `save_activations` wrote; never executes code.

        See `record_files.load_activations`.
        """
        return load_activations(path)

    # --- Logit lens ------------------------------------------------------------------------------

    @cached_property
    def lens(self) -> LogitLens:
        """The logit lens on this model; see `logit_lens.LogitLens`."""
        return LogitLens(self.model, tokenizer=self.tokenizer)

    def logit_lens(
        self,
        text: Prompt,
        layer_indices: Sequence[Layer] | None = None,
        top_k: int = 10,
        apply_ln: bool = True,
    ) -> dict[int, list[tuple[str, float]]]:
        """``{layer: [(token, probability), …]}`` for the last position, best first.

        See `lens_reports.predict_last`.
        """
        return predict_last(self.lens, text, layer_indices, top_k, apply_ln)

    def print_logit_lens(self, text: Prompt, layer_step: int = 1, top_k: int = 5) -> None:
        """Print what each layer would say next; always shows the last layer.

        See `lens_reports.print_predictions`.
        """
        print_predictions(self.lens, text, layer_step, top_k)

    def logit_lens_on_activation(
        self,
        record: ActivationRecord,
        layer_indices: Sequence[Layer] | None = None,
        top_k: int = 10,
        apply_ln: bool = True,
        token_position: int | None = -1,
    ) -> dict[str, Any]:
        """The lens on a record made earlier. See `lens_reports.read_record`."""
        return read_record(self.lens, record, layer_indices, top_k, apply_ln, token_position)

    def analyze_generation_token(
        self,
        prompt: Prompt,
        target_token: str | int | None = None,
        token_position: int | None = None,
        max_new_tokens: int = 50,
        layer_step: int = 1,
        top_k: int = 5,
        **generation_kwargs: Any,
    ) -> dict[str, Any]:
        """Generate, then ask every layer about one generated token.

        See `lens_reports.analyze_generation_token`.
        """
        return analyze_generation_token(
            self.lens,
            prompt,
            target_token,
            token_position,
            max_new_tokens,
            layer_step,
            top_k,
            **generation_kwargs,
        )

    # --- Patching --------------------------------------------------------------------------------

    def generate_with_patching(
        self,
        prompt: Prompt,
        patches: Patches,
        max_new_tokens: int = 50,
        **generation_kwargs: Any,
    ) -> str:
        """Continue a prompt while patches hold; the same text with and without a cache.

        See `intervention.generate_with_patching`.
        """
        return generate_with_patching(
            self.model, self.tokenizer, prompt, patches, max_new_tokens, **generation_kwargs
        )

    def patch_and_run(self, prompt: Prompt, patches: Patches) -> Tensor:
        """Logits ``[1, position, vocab]`` of a prompt with activations exchanged.

        See `intervention.patch_and_run`.
        """
        return patch_and_run(self.model, self.tokenizer, prompt, patches)

    def activation_patch_experiment(
        self,
        clean_prompt: Prompt,
        corrupted_prompt: Prompt,
        layer_name: Layer,
        position: int = -1,
        **options: Any,
    ) -> dict[str, Any]:
        """One activation of the corrupted run, put into the clean run: logits and effect.

        See `intervention.activation_patch_experiment`.
        """
        return activation_patch_experiment(
            self.model,
            self.tokenizer,
            clean_prompt,
            corrupted_prompt,
            layer_name,
            position,
            **options,
        )

    def path_patching(
        self,
        clean_prompt: Any,
        corrupted_prompt: Any,
        layers_to_test: Sequence[Layer] | None = None,
        metric: Any = "distance",
        **options: Any,
    ) -> dict[int, float]:
        """``{layer: effect}`` of the corrupted run's last position in the clean run.

        0 is no effect, 1 all of it. See `intervention.path_patching`.
        """
        return path_patching(
            self.model,
            self.tokenizer,
            clean_prompt,
            corrupted_prompt,
            layers_to_test,
            metric,
            **options,
        )

    def patching_sweep(
        self,
        clean_prompt: Any,
        corrupted_prompt: Any,
        site: str = "resid_pre",
        **options: Any,
    ) -> SweepResult:
        """Every layer × position, head or neuron exchanged between two prompts, one at a time.

        See `patching_sweep.patching_sweep`.
        """
        return patching_sweep(
            self.model, self.tokenizer, clean_prompt, corrupted_prompt, site, **options
        )

    def patch_paths(
        self,
        clean_prompt: Any,
        corrupted_prompt: Any,
        senders: Any = "heads",
        receivers: Any = "logits",
        **options: Any,
    ) -> PathEffects:
        """What each sender tells the receivers alone, all else being as in the clean run.

        Senders and receivers are written ``"9.6"``, ``"9.6.q"``, ``"mlp 3"``, ``"logits"``.
        See `path_patching.patch_paths`.
        """
        return patch_paths(
            self.model,
            self.tokenizer,
            clean_prompt,
            corrupted_prompt,
            senders,
            receivers,
            **options,
        )

    def trace_subject(
        self, prompt: Prompt, subject: str | Positions, **options: Any
    ) -> CausalTrace:
        """Noise a prompt's subject and restore one site at one position (Meng et al. 2022).

        See `causal_tracing.trace_subject`.
        """
        return trace_subject(self.model, self.tokenizer, prompt, subject, **options)

    def ablate(
        self, prompts: Any, components: Any = "all", method: str = "mean", **options: Any
    ) -> AblationEffects:
        """How far the metric drops without each head and MLP, or several at once.

        ``method`` is ``"zero"``, ``"mean"`` or ``"resample"``. See `ablation.ablate`.
        """
        return ablate(self.model, self.tokenizer, prompts, components, method, **options)

    def compute_feature_attribution(
        self,
        prompt: Prompt,
        layer_name: Layer,
        position: int = -1,
        n_features: int = 10,
        **options: Any,
    ) -> list[tuple[int, float]]:
        """``(feature, importance)`` of one token's activation, by exact ablation.

        See `feature_attribution.compute_feature_attribution`.
        """
        return compute_feature_attribution(
            self.model, self.tokenizer, prompt, layer_name, position, n_features, **options
        )

    # --- Steering --------------------------------------------------------------------------------

    def generate_with_steering(
        self,
        prompt: Prompt,
        positive_examples: Sequence[Prompt],
        negative_examples: Sequence[Prompt],
        layer_name: Layer | Sequence[Layer] | None = None,
        coefficient: float = 2.0,
        max_new_tokens: int = 50,
        **generation_kwargs: Any,
    ) -> str:
        """Continue a prompt, steered from the negative examples towards the positive ones.

        ``layer_name=None`` is the middle layer; a negative coefficient steers the other way.
        ``positions``, ``operation``, ``keep_norm``, ``method``, ``read`` and what
        ``model.generate`` takes may follow. See `steering.generate_with_steering`.
        """
        return generate_with_steering(
            self.model,
            self.tokenizer,
            prompt,
            positive_examples,
            negative_examples,
            layer_name,
            coefficient,
            max_new_tokens,
            **generation_kwargs,
        )

    def find_direction(
        self,
        positive_examples: Sequence[Prompt],
        negative_examples: Sequence[Prompt],
        layer: Layer,
        **options: Any,
    ) -> Direction:
        """What tells positive from negative examples at one layer: ``vector [d_model]``.

        ``method``, ``read``, ``site``, ``normalize`` and ``label`` may follow.
        See `direction_finding.find_directions`.
        """
        return find_direction(
            self.model, self.tokenizer, positive_examples, negative_examples, layer, **options
        )

    def steering_sweep(
        self,
        prompts: Sequence[Prompt],
        positive_examples: Sequence[Prompt],
        negative_examples: Sequence[Prompt],
        layers: Layer | Sequence[Layer] | None = None,
        coefficients: Sequence[float] = COEFFICIENTS,
        **options: Any,
    ) -> SteeringSweep:
        """Effect and perplexity of every layer and coefficient, over sampled continuations.

        ``score=`` a function of a text, or ``positive_words=`` and ``negative_words=``, must
        follow. See `steering_sweep.steering_sweep`.
        """
        return steering_sweep(
            self.model,
            self.tokenizer,
            prompts,
            positive_examples,
            negative_examples,
            layers,
            coefficients,
            **options,
        )

    # --- Inspection ------------------------------------------------------------------------------

    def check(self) -> ArchitectureReport:
        """Prove by numbers that this model was understood.

        See `architecture_check.check_architecture`.
        """
        return check_architecture(self.architecture)

    def get_architecture_summary(self) -> dict[str, Any]:
        """Sizes and kinds, from the config. See `model_loader.architecture_summary`."""
        return self._inspector.get_architecture_summary()

    def print_architecture_summary(self) -> None:
        """Print the summary. See `model_loader.ModelInspector.print_architecture_summary`."""
        self._inspector.print_architecture_summary()

    def get_model_config(self) -> dict[str, Any]:
        """The whole config as a dict."""
        return self._inspector.get_model_config()

    def get_parameter_count(self) -> dict[str, int]:
        """``total, trainable, non_trainable``. See `model_loader.parameter_count`."""
        return self._inspector.get_parameter_count()

    def get_num_layers(self) -> int:
        """Number of blocks."""
        return self._inspector.get_num_layers()

    def get_layer_names(self) -> list[str]:
        """Full names of the blocks, in order (``transformer.h.0``, …)."""
        return self._inspector.get_layer_names()

    def get_attention_layer_names(self) -> list[str]:
        """Full names of the attention modules, in order."""
        return self._inspector.get_attention_layer_names()

    def get_mlp_layer_names(self) -> list[str]:
        """Full names of the MLP modules, in order."""
        return self._inspector.get_mlp_layer_names()

    def get_layer_by_name(self, name: Layer) -> nn.Module:
        """A module by dotted name, a block by any spelling. See `model_loader.find_module`."""
        return self._inspector.get_layer_by_name(name)

    def get_weights_by_layer(self, name: Layer) -> dict[str, Tensor]:
        """A module's parameters by name, detached. See `model_loader.weights_of`."""
        return self._inspector.get_weights_by_layer(name)

    # --- Tokens ----------------------------------------------------------------------------------

    def tokenize(self, text: Prompt) -> list[int]:
        """Token ids of a text or chat, as the tokenizer makes them by default.

        See `tokenization.encode`.
        """
        return encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Token ids as text, special tokens left out. See `generation.decode_text`."""
        return decode_text(self.tokenizer, ids)

    def get_tokens(self, text: Prompt) -> list[str]:
        """Each token as readable text, leading space kept. See `tokenization.token_strings`."""
        return token_strings(self.tokenizer, encode(self.tokenizer, text))
