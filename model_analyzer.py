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
from attention_analysis import (
    attention_patterns,
    batch_attention_patterns,
    find_heads,
    head_summary,
)
from attention_result import AttentionPatterns, HeadRanking, HeadSummary
from attribution_patching import attribution_patching, attribution_sweeps
from attribution_sweep import AttributionSweep
from causal_tracing import trace_subject
from comparison_result import ModelComparison
from concept_eraser import ConceptEraser, ErasureResult, check_erasure, erase_concept
from direct_attribution import logit_attribution
from direction_finding import find_direction
from embedding_geometry import (
    GeometryResult,
    NearestTokens,
    measure_geometry,
    nearest_tokens,
    token_neighbors,
)
from feature_attribution import compute_feature_attribution
from generation import decode_text, generate
from gradient_attribution import attribute_tokens
from head_circuit_result import (
    KINDS,
    CircuitTokens,
    CompositionScores,
    HeadDirections,
    HeadScores,
)
from head_circuits import circuit_tokens, composition_scores, copying_scores, head_directions
from head_weights import HeadWeights, head_weights
from head_writing import head_writes, value_weighted_patterns
from head_writing_result import HeadWrites, WeightedPatterns
from intervention import (
    Patches,
    activation_patch_experiment,
    generate_with_patching,
    patch_and_run,
    path_patching,
)
from layer_attribution import layer_attribution
from layer_attribution_result import LayerAttribution
from lens_reports import (
    analyze_generation_token,
    predict_last,
    print_predictions,
    read_record,
)
from linear_probes import train_probes
from logit_attribution import LogitAttribution
from logit_lens import LogitLens
from memory_estimate import MemoryEstimate, estimate_memory
from model_architecture import Layer
from model_comparison import compare_models
from model_loader import DEMO_MODEL, ModelInspector, ModelSource, load_model
from node_effects import AblationEffects, PathEffects
from patching_sweep import patching_sweep
from path_patching import patch_paths
from probe_result import ProbeResult
from record_files import DEFAULT_FORMAT
from similarity import SimilarityResult, layer_similarity, prompt_similarity
from steering import generate_with_steering
from steering_direction import Direction
from steering_sweep import COEFFICIENTS, SteeringSweep, steering_sweep
from sweep_result import SweepResult
from token_attribution import TokenAttribution
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

    def estimate_memory(self, prompts: Sequence[Prompt], **options: Any) -> MemoryEstimate:
        """What `extract_batch_activations` will need of memory, before it is run.

        ``options`` are that method's. See `memory_estimate.estimate_memory`.
        """
        return estimate_memory(self.architecture, self.tokenizer, prompts, **options)

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

    # --- Attention -------------------------------------------------------------------------------

    def attention_patterns(
        self, prompt: Prompt, layers: Layer | Sequence[Layer] | None = None
    ) -> AttentionPatterns:
        """Every head's pattern of one text, ``[head, query, key]`` per layer.

        See `attention_analysis.attention_patterns`.
        """
        return attention_patterns(self.model, self.tokenizer, prompt, layers)

    def batch_attention_patterns(
        self,
        prompts: Sequence[Prompt],
        layers: Layer | Sequence[Layer] | None = None,
        **options: Any,
    ) -> list[AttentionPatterns]:
        """The patterns of many texts, padding gone, in the order given.

        ``batch_size`` and ``show_progress`` may follow.
        See `attention_analysis.batch_attention_patterns`.
        """
        return batch_attention_patterns(self.model, self.tokenizer, prompts, layers, **options)

    def head_summary(self, prompts: Sequence[Prompt] | None = None, **options: Any) -> HeadSummary:
        """Previous-token, duplicate, induction, sink, … scores of every head, in one pass.

        ``prompts=None`` takes repeated random tokens. See `attention_analysis.head_summary`.
        """
        return head_summary(self.model, self.tokenizer, prompts, **options)

    def find_heads(
        self, kind: str = "induction", prompts: Sequence[Prompt] | None = None, **options: Any
    ) -> HeadRanking:
        """The heads in order of one score: ``find_heads("induction")[0]`` is the first.

        See `attention_analysis.find_heads`.
        """
        return find_heads(self.model, self.tokenizer, kind, prompts, **options)

    # --- Weights of heads ------------------------------------------------------------------------

    def head_weights(self, layer: Layer, *, fold_norm: bool = False) -> HeadWeights:
        """W_Q, W_K, W_V, W_O of one block's heads, and their QK and OV circuits.

        See `head_weights.head_weights`.
        """
        return head_weights(self.architecture, layer, fold_norm=fold_norm)

    def copying_scores(
        self, layers: Sequence[Layer] | Layer | None = None, **options: Any
    ) -> HeadScores:
        """Whether each head says the token that it looks at, by its weights: −1 to 1.

        ``circuit="qk"`` asks whether it looks for its own token. See
        `head_circuits.copying_scores`.
        """
        return copying_scores(self.architecture, layers, **options)

    def composition_scores(
        self,
        kinds: str | Sequence[str] = KINDS,
        layers: Sequence[Layer] | Layer | None = None,
        **options: Any,
    ) -> CompositionScores:
        """How strongly each head's query, key and value read what each earlier head writes.

        See `head_circuits.composition_scores`.
        """
        return composition_scores(self.architecture, kinds, layers, **options)

    def circuit_tokens(
        self, head: Any, tokens: Sequence[str | int] | str | int | None = None, **options: Any
    ) -> CircuitTokens:
        """Which token makes a head (``"4.2"``) say which, or look for which (``circuit="qk"``).

        See `head_circuits.circuit_tokens`.
        """
        return circuit_tokens(self.architecture, self.tokenizer, head, tokens, **options)

    def head_directions(self, head: Any, **options: Any) -> HeadDirections:
        """What a head reads and writes along its singular directions, as tokens.

        See `head_circuits.head_directions`.
        """
        return head_directions(self.architecture, self.tokenizer, head, **options)

    def value_weighted_patterns(
        self, prompt: Prompt, layers: Sequence[Layer] | Layer | None = None
    ) -> WeightedPatterns:
        """Attention times the length of what each token's value writes (Kobayashi et al. 2020).

        See `head_writing.value_weighted_patterns`.
        """
        return value_weighted_patterns(self.architecture, self.tokenizer, prompt, layers)

    def head_writes(
        self,
        prompt: Prompt,
        targets: Sequence[str | int] | str | int | None = None,
        **options: Any,
    ) -> HeadWrites:
        """Each head's direct effect on logits at one position, and the tokens that it says.

        See `head_writing.head_writes`.
        """
        return head_writes(self.architecture, self.tokenizer, prompt, targets, **options)

    def logit_attribution(
        self,
        prompt: Prompt,
        tokens: Sequence[str | int] | str | int | None = None,
        against: Sequence[str | int] | str | int | None = None,
        positions: Positions = -1,
        **options: Any,
    ) -> LogitAttribution:
        """A logit, or a difference of two, as an exact sum over heads, MLPs (neurons) and biases.

        See `direct_attribution.logit_attribution`.
        """
        return logit_attribution(
            self.architecture, self.tokenizer, prompt, tokens, against, positions, **options
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

    def attribution_patching(
        self,
        clean_prompt: Any,
        corrupted_prompt: Any,
        site: str = "resid_pre",
        **options: Any,
    ) -> AttributionSweep:
        """Every cell of a patching sweep, to first order, from two forwards and one backward.

        ``exact=True`` puts the sweep's own numbers and their correlation beside the estimates.
        See `attribution_patching.attribution_sweeps` for the options.
        """
        return attribution_patching(
            self.model, self.tokenizer, clean_prompt, corrupted_prompt, site, **options
        )

    def attribution_sweeps(
        self,
        clean_prompt: Any,
        corrupted_prompt: Any,
        sites: Sequence[str] = ("head_out", "mlp_out"),
        **options: Any,
    ) -> dict[str, AttributionSweep]:
        """The same for several sites, from the same passes.

        See `attribution_patching.attribution_sweeps`.
        """
        return attribution_sweeps(
            self.model, self.tokenizer, clean_prompt, corrupted_prompt, sites, **options
        )

    def layer_attribution(
        self,
        prompt: Prompt,
        site: str = "resid_post",
        method: str = "conductance",
        **options: Any,
    ) -> LayerAttribution:
        """How much each unit of a site speaks for a prediction, in every block and token.

        ``method`` is ``conductance``, ``integrated_gradients`` or ``internal_influence``.
        See `layer_attribution.layer_attribution`.
        """
        return layer_attribution(self.model, self.tokenizer, prompt, site, method, **options)

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

    def attribute_tokens(
        self,
        prompt: Prompt,
        method: str = "integrated_gradients",
        targets: Any = None,
        target_positions: Positions = -1,
        **options: Any,
    ) -> TokenAttribution:
        """How much each token of a prompt speaks for what is predicted after it, signed.

        ``method`` is ``"saliency"``, ``"gradient_x_input"``, ``"integrated_gradients"``,
        ``"smoothgrad"``, ``"occlusion"``, ``"attention_rollout"`` or ``"gradient_attention"``;
        ``metric``, ``against``, ``baseline``, ``n_steps`` and more may follow.
        See `gradient_attribution.attribute_tokens`.
        """
        return attribute_tokens(
            self.model, self.tokenizer, prompt, method, targets, target_positions, **options
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

    # --- Probes, similarity, geometry ------------------------------------------------------------

    def train_probes(
        self,
        texts: Sequence[Prompt],
        labels: Any,
        layers: Layer | Sequence[Layer] | None = None,
        **options: Any,
    ) -> ProbeResult:
        """What can be read from each layer by a linear map, with controls; directions included.

        ``groups``, ``permutations``, ``read``, ``at``, ``site`` and more may follow.
        See `linear_probes.train_probes`.
        """
        return train_probes(self.model, self.tokenizer, texts, labels, layers, **options)

    def erase_concept(
        self, texts: Sequence[Prompt], labels: Any, layer: Layer, **options: Any
    ) -> ConceptEraser:
        """A function that takes out of one layer what a linear probe could read of the labels.

        See `concept_eraser.erase_concept`.
        """
        return erase_concept(self.model, self.tokenizer, texts, labels, layer, **options)

    def check_erasure(
        self, texts: Sequence[Prompt], labels: Any, layer: Layer, **options: Any
    ) -> ErasureResult:
        """Erase a concept in the running model, and probe for it again, there and in later layers.

        See `concept_eraser.check_erasure`.
        """
        return check_erasure(self.model, self.tokenizer, texts, labels, layer, **options)

    def layer_similarity(
        self, texts: Sequence[Prompt], other: Any = None, **options: Any
    ) -> SimilarityResult:
        """CKA or cosine of every layer with every layer, of this model or another.

        See `similarity.layer_similarity`.
        """
        return layer_similarity(self.model, self.tokenizer, texts, other, **options)

    def prompt_similarity(
        self, texts: Sequence[Prompt], layer: Layer, **options: Any
    ) -> SimilarityResult:
        """Cosine or CKA of every prompt with every prompt at one layer.

        See `similarity.prompt_similarity`.
        """
        return prompt_similarity(self.model, self.tokenizer, texts, layer, **options)

    def nearest_tokens(self, vectors: Any, k: int = 10, **options: Any) -> NearestTokens:
        """The vocabulary's tokens nearest to a vector, several, or a direction.

        See `embedding_geometry.nearest_tokens`.
        """
        return nearest_tokens(self.model, self.tokenizer, vectors, k, **options)

    def token_neighbors(
        self, tokens: str | int | Sequence[str | int], k: int = 10, **options: Any
    ) -> NearestTokens:
        """The tokens with the most similar embeddings. See `embedding_geometry.token_neighbors`."""
        return token_neighbors(self.model, self.tokenizer, tokens, k, **options)

    def measure_geometry(self, texts: Sequence[Prompt], **options: Any) -> GeometryResult:
        """Anisotropy and participation ratio of activations, layer by layer.

        See `embedding_geometry.measure_geometry`.
        """
        return measure_geometry(self.model, self.tokenizer, texts, **options)

    def compare_models(
        self, other: Any, texts: Sequence[Prompt], **options: Any
    ) -> ModelComparison:
        """This model and its fine-tune: activations, lens, logits and weights by layer.

        See `model_comparison.compare_models`.
        """
        return compare_models(self.model, self.tokenizer, other, texts, **options)

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
