"""Each toolkit's own way to do the rows of `peers.py`, named in the docstring of its class.

A toolkit is imported in its constructor, so that a process needs the one that it measures alone.
``load`` reads a folder, ``wrap`` takes a live model and must come before the rows:

    forward   logits ``[1, position, vocab]``, nothing attached
    record    the four `SITES` of every block, block by block, and the logits
    lens      log-probabilities of the ten best tokens, ``[1 + layer, position, 10]``
    sweep     ``resid_pre`` from clean to corrupted, one position at a time, ``[layer, position]``
    heads     the same for each head's z at all positions, ``[layer, head]``
    steer     greedy tokens under a vector added to the stream, ``[position]``
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peer_models import SITES, TOP, Parts, Task, load_plain, parts_of
from torch import Tensor


class Toolkit:
    """What the worker calls."""

    package = ""
    """The distribution whose version is reported."""
    model: Any
    tokenizer: Any
    task: Task

    def load(self, folder: Path, device: str) -> Any:
        """A folder to something ready, by the toolkit's own loader."""
        raise NotImplementedError

    def wrap(self, model: Any, tokenizer: Any) -> None:
        """Take a live model."""
        self.model, self.tokenizer = model, tokenizer


class Plain(Toolkit):
    """Hugging Face with PyTorch's hooks: one pass for everything but sweeps, one per cell there.

    The reference of every difference.
    """

    package = "transformers"

    def load(self, folder: Path, device: str) -> Any:
        """`AutoModelForCausalLM.from_pretrained`."""
        return load_plain(folder, device)

    def forward(self) -> Tensor:
        """The model's call."""
        return self.model(self.task.text).logits

    @contextmanager
    def _hooked(self, module: Any, hook: Any, before: bool = False) -> Iterator[None]:
        attach = module.register_forward_pre_hook if before else module.register_forward_hook
        handle = attach(hook)
        try:
            yield
        finally:
            handle.remove()

    def record(self) -> list[Tensor]:
        """A hook per site, each keeping a copy."""
        parts, kept, handles = parts_of(self.model), [], []

        def keep_input(_module: Any, args: Any) -> None:
            kept.append(args[0].clone())

        def keep(_module: Any, _args: Any, output: Any) -> None:
            kept.append((output[0] if isinstance(output, tuple) else output).clone())

        for block in parts.of(self.model):
            handles.append(block.register_forward_pre_hook(keep_input))
            modules = (getattr(block, parts.attention), getattr(block, parts.mlp), block)
            handles.extend(module.register_forward_hook(keep) for module in modules)
        logits = self.model(self.task.text).logits
        for handle in handles:
            handle.remove()
        return [*kept, logits]

    def lens(self) -> Tensor:
        """Final norm and head on what enters block 0 and leaves every block."""
        *kept, _ = self.record()
        norm = Parts.inside(self.model, parts_of(self.model).norm)
        rows = [kept[0], *kept[3 :: len(SITES)]]
        return torch.cat([
            self.model.lm_head(norm(row)).log_softmax(-1).topk(TOP).values for row in rows
        ])  # fmt: skip

    def _inputs_of(self, modules: list[Any]) -> list[Tensor]:
        kept: list[Tensor] = []
        handles = [
            module.register_forward_pre_hook(lambda _m, args: kept.append(args[0].clone()))
            for module in modules
        ]
        self.model(self.task.clean)
        for handle in handles:
            handle.remove()
        return kept

    def _patch(self, modules: list[Any], where: list[Any]) -> Tensor:
        """One hooked pass per module and index."""
        kept = self._inputs_of(modules)
        found = []
        for (module, source), index in itertools.product(zip(modules, kept, strict=True), where):

            def patch(_module: Any, args: Any, source: Any = source, index: Any = index) -> Any:
                value = args[0].clone()
                value[index] = source[index]
                return (value, *args[1:])

            with self._hooked(module, patch, before=True):
                found.append(self.task.metric(self.model(self.task.corrupted).logits))
        return torch.stack(found).view(len(modules), len(where))

    def sweep(self) -> Tensor:
        """A pre-hook on the block writes one position."""
        positions = range(self.task.clean.shape[1])
        blocks = parts_of(self.model).of(self.model)
        return self._patch(blocks, [(slice(None), p) for p in positions])

    def heads(self) -> Tensor:
        """A pre-hook on the output projection writes one head's part."""
        parts = parts_of(self.model)
        modules = [Parts.inside(block, parts.projection) for block in parts.of(self.model)]
        return self._patch(modules, [(..., part) for part in head_slices(self.model)])

    def steer(self) -> Tensor:
        """`model.generate` while a hook on the block adds the vector."""
        block = parts_of(self.model).of(self.model)[self.task.layer]
        with self._hooked(block, lambda _m, _args, output: output + self.task.vector):
            return self.model.generate(self.task.clean, **generation(self.task))[0]


def generation(task: Task) -> dict[str, Any]:
    """Arguments of `model.generate`."""
    mask = torch.ones_like(task.clean)
    return {"attention_mask": mask, "max_new_tokens": task.new, "do_sample": False}


def head_slices(model: Any) -> list[slice]:
    """Each head's part of the output projection's input."""
    heads = model.config.num_attention_heads
    size = model.config.hidden_size // heads
    return [slice(head * size, (head + 1) * size) for head in range(heads)]


class Ours(Toolkit):
    """`ModelAnalyzer`, `extract_activations`, `LogitLens.run`, `patching_sweep`, `steer`."""

    package = "ours"

    def __init__(self) -> None:
        import model_analyzer

        self.analyzer_class = model_analyzer.ModelAnalyzer

    def load(self, folder: Path, device: str) -> Any:
        """`ModelAnalyzer(folder)`."""
        return self.analyzer_class(folder, device=device)

    def wrap(self, model: Any, tokenizer: Any) -> None:
        """`ModelAnalyzer(model)`."""
        from logit_lens import LogitLens

        super().wrap(model, tokenizer)
        self.analyzer = self.analyzer_class(model, tokenizer=tokenizer)
        self.lens_reader = LogitLens(model, tokenizer=tokenizer)

    def forward(self) -> Tensor:
        """There is no call of our own: the model stays the user's."""
        return self.analyzer.model(self.task.text).logits

    def record(self) -> list[Tensor]:
        """One call for all sites and logits."""
        found: Any = self.analyzer.extract_activations(
            self.task.text[0].tolist(), sites=SITES, return_logits=True
        )
        layers = range(self.analyzer.get_num_layers())
        return [*(found.at(site, layer) for layer in layers for site in SITES), found.logits]

    def lens(self) -> Tensor:
        """Top tokens without further metrics, which also decodes every one of them."""
        ids = self.task.text[0].tolist()
        found = self.lens_reader.run(ids, top_k=TOP, metrics=())
        return torch.from_numpy(found.top_probs).log()

    def _sweep(self, site: str) -> Tensor:
        from patching_sweep import patching_sweep

        task = self.task
        found = patching_sweep(
            self.model, self.tokenizer, task.clean[0].tolist(), task.corrupted[0].tolist(), site,
            answer=task.answer, foil=task.foil, show_progress=False,
        )  # fmt: skip
        return torch.from_numpy(found.values)

    def sweep(self) -> Tensor:
        """`patching_sweep` of `resid_pre`."""
        return self._sweep("resid_pre")

    def heads(self) -> Tensor:
        """`patching_sweep` of `head_out`."""
        return self._sweep("head_out")

    def steer(self) -> Tensor:
        """`model.generate` inside `steer`."""
        from steering import steer

        with steer(self.model, self.task.vector, self.task.layer):
            return self.model.generate(self.task.clean, **generation(self.task))[0]


class TransformerLens(Toolkit):
    """`build_bridge_from_module`, `run_with_cache`, `accumulated_resid`, `get_act_patch_…`.

    For the lens the recipe of its documentation, faster in `bench_lens.py` than its `logit_lens`.
    """

    package = "transformer-lens"

    def __init__(self) -> None:
        import transformer_lens

        self.library = transformer_lens

    def load(self, folder: Path, device: str) -> Any:
        """`TransformerBridge.boot_transformers`."""
        from transformer_lens.model_bridge import TransformerBridge

        return TransformerBridge.boot_transformers(str(folder), device=device)

    def wrap(self, model: Any, tokenizer: Any) -> None:
        """A bridge around the live model, in place."""
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        super().wrap(model, tokenizer)
        self.bridge: Any = build_bridge_from_module(
            model, type(model).__name__, hf_config=model.config, tokenizer=tokenizer
        )

    def forward(self) -> Tensor:
        """The bridge's call."""
        return self.bridge(self.task.text)

    def record(self) -> list[Tensor]:
        """`run_with_cache` of these hook points alone."""
        blocks = range(self.bridge.cfg.n_layers)
        names = [f"blocks.{block}.hook_{site}" for block in blocks for site in SITES]
        logits, cache = self.bridge.run_with_cache(self.task.text, names_filter=names)
        return [*(cache[name] for name in names), logits]

    def lens(self) -> Tensor:
        """Cached stream, `accumulated_resid` with the final norm, `unembed`."""
        last = self.bridge.cfg.n_layers - 1
        names = [f"blocks.{layer}.hook_resid_pre" for layer in range(last + 1)]
        names.append(f"blocks.{last}.hook_resid_post")
        _, cache = self.bridge.run_with_cache(self.task.text, names_filter=names)
        rows = cache.accumulated_resid(apply_ln=True)
        return torch.cat([
            self.bridge.unembed(row).log_softmax(-1).topk(TOP).values for row in rows
        ])  # fmt: skip

    def _patching(self, name: str) -> Tensor:
        from transformer_lens import patching

        _, cache = self.bridge.run_with_cache(self.task.clean)
        return getattr(patching, name)(self.bridge, self.task.corrupted, cache, self.task.metric)

    def sweep(self) -> Tensor:
        """The clean run's cache and `get_act_patch_resid_pre`."""
        return self._patching("get_act_patch_resid_pre")

    def heads(self) -> Tensor:
        """The clean run's cache and `get_act_patch_attn_head_out_all_pos`."""
        return self._patching("get_act_patch_attn_head_out_all_pos")

    def steer(self) -> Tensor:
        """`generate` inside `hooks`."""
        name = f"blocks.{self.task.layer}.hook_resid_post"
        hook = (name, lambda value, hook: value + self.task.vector)  # noqa: ARG005
        with self.bridge.hooks(fwd_hooks=[hook]):
            return self.bridge.generate(
                self.task.clean, max_new_tokens=self.task.new, do_sample=False,
                stop_at_eos=False, return_type="tokens", verbose=False,
            )[0]  # fmt: skip


class NNsight(Toolkit):
    """`TransformersModel`, `trace`, `save`; sweeps as one `invoke` per cell in one trace.

    One trace for all cells is one batched pass, its documentation's way to run several prompts.
    """

    package = "nnsight"

    def __init__(self) -> None:
        import nnsight

        self.library = nnsight

    def load(self, folder: Path, device: str) -> Any:
        """`TransformersModel(folder)`; the task is given since there is no hub to ask for it."""
        return self.library.TransformersModel(
            str(folder), task="text-generation", dispatch=True, device_map=device
        )

    def wrap(self, model: Any, tokenizer: Any) -> None:
        """`TransformersModel(model)`."""
        super().wrap(model, tokenizer)
        self.traced = self.library.TransformersModel(model, tokenizer=tokenizer)
        self.parts = parts_of(model)
        self.blocks = self.parts.of(self.traced)

    def forward(self) -> Tensor:
        """A trace that saves the logits."""
        traced = self.traced
        with traced.trace(self.task.text):
            logits = traced.output.logits.save()
        return logits

    def record(self) -> list[Tensor]:
        """A trace that saves the sites and the logits."""
        save, traced, blocks, parts = self.library.save, self.traced, self.blocks, self.parts
        with traced.trace(self.task.text):
            kept = save([])
            for block in blocks:
                kept.append(block.input)
                kept.append(getattr(block, parts.attention).output[0])
                kept.append(getattr(block, parts.mlp).output)
                kept.append(block.output)
            kept.append(traced.output.logits)
        return list(kept)

    def lens(self) -> Tensor:
        """Final norm and head applied to each block's output inside the trace."""
        save, traced, blocks = self.library.save, self.traced, self.blocks
        norm, head = Parts.inside(traced, self.parts.norm), traced.lm_head
        with traced.trace(self.task.text):
            rows = save([])
            rows.append(head(norm(blocks[0].input)).log_softmax(-1).topk(TOP).values)
            for block in blocks:
                rows.append(head(norm(block.output)).log_softmax(-1).topk(TOP).values)
        return torch.cat(list(rows))

    def _patch(self, modules: list[Any], where: list[Any]) -> Tensor:
        save, traced, task = self.library.save, self.traced, self.task
        with traced.trace(task.clean):
            kept = save([])
            for module in modules:
                kept.append(module.input)
        with traced.trace() as tracer:
            found = save([])
            for module, source in zip(modules, kept, strict=True):
                for index in where:
                    with tracer.invoke(task.corrupted):
                        module.input[index] = source[index]
                        found.append(task.metric(traced.output.logits))
        return torch.stack(list(found)).view(len(modules), len(where))

    def sweep(self) -> Tensor:
        """Writes one position of a block's input per invoke."""
        positions = range(self.task.clean.shape[1])
        return self._patch(self.blocks, [(slice(None), p) for p in positions])

    def heads(self) -> Tensor:
        """Writes one head's part of the output projection's input per invoke."""
        modules = [Parts.inside(block, self.parts.projection) for block in self.blocks]
        return self._patch(modules, [(..., part) for part in head_slices(self.model)])

    def steer(self) -> Tensor:
        """`generate`, with the vector added at every step."""
        traced, task, block = self.traced, self.task, self.blocks[self.task.layer]
        with traced.generate(task.clean, **generation(task)) as tracer:
            for _step in tracer.iter[: task.new]:
                block.output[:] += task.vector
            result = tracer.result.save()
        return result[0]


class Pyvene(Toolkit):
    """`IntervenableModel` with collect, vanilla and addition interventions.

    Sweeps make one intervenable model per layer and call it once per cell, as its tutorials do; the
    clean activations are collected once and given as `source_representations`. The lens applies the
    model's own norm and head to collected streams: there is none in the library.
    """

    package = "pyvene"

    def __init__(self) -> None:
        import pyvene

        self.library = pyvene

    def load(self, folder: Path, device: str) -> Any:
        """It has no loader of its own: Hugging Face's, and an `IntervenableModel` around it."""
        return self.library.IntervenableModel([], load_plain(folder, device))

    def wrap(self, model: Any, tokenizer: Any) -> None:
        """An `IntervenableModel` without interventions."""
        super().wrap(model, tokenizer)
        self.bare = self.library.IntervenableModel([], model)

    def _intervenable(self, *places: tuple[int, str, Any], **options: Any) -> Any:
        return self.library.IntervenableModel(
            [
                {"layer": layer, "component": component, "intervention": intervention, **options}
                for layer, component, intervention in places
            ],
            self.model,
        )

    def forward(self) -> Tensor:
        """The call of one without interventions."""
        original, _ = self.bare({"input_ids": self.task.text})
        return original.logits

    def _collect(self, ids: Tensor, components: tuple[str, ...]) -> tuple[list[Tensor], Tensor]:
        layers = range(self.model.config.num_hidden_layers)
        collector = self._intervenable(*(
            (layer, component, self.library.CollectIntervention(keep_last_dim=True))
            for layer in layers for component in components
        ))  # fmt: skip
        found = collector({"input_ids": ids}, return_dict=True)
        return found.collected_activations, found.intervened_outputs.logits

    def record(self) -> list[Tensor]:
        """A collect intervention per site."""
        names = ("block_input", "attention_output", "mlp_output", "block_output")
        kept, logits = self._collect(self.task.text, names)
        return [*kept, logits]

    def lens(self) -> Tensor:
        """Collected streams through the model's norm and head."""
        kept, _ = self._collect(self.task.text, ("block_input", "block_output"))
        norm = Parts.inside(self.model, parts_of(self.model).norm)
        rows = [kept[0], *kept[1::2]]
        return torch.cat([
            self.model.lm_head(norm(row)).log_softmax(-1).topk(TOP).values for row in rows
        ])  # fmt: skip

    def _patch(self, component: str, unit: str, count: int, pick: Any) -> Tensor:
        task = self.task
        kept, _ = self._collect(task.clean, (component,))
        found = []
        for layer, source in enumerate(kept):
            place = (layer, component, self.library.VanillaIntervention())
            patched = self._intervenable(place, unit=unit)
            for cell in range(count):
                _, output = patched(
                    {"input_ids": task.corrupted},
                    unit_locations={"sources->base": cell},
                    source_representations={patched.sorted_keys[0]: pick(source, cell)},
                )
                found.append(task.metric(output.logits))
        return torch.stack(found).view(len(kept), count)

    def sweep(self) -> Tensor:
        """A vanilla intervention on `block_input` at one position."""
        count = self.task.clean.shape[1]
        return self._patch("block_input", "pos", count, lambda kept, cell: kept[:, cell : cell + 1])

    def heads(self) -> Tensor:
        """A vanilla intervention on `head_attention_value_output`, one head at all positions."""
        heads = self.model.config.num_attention_heads
        component = "head_attention_value_output"

        def pick(kept: Tensor, cell: int) -> Tensor:
            return kept.unflatten(-1, (heads, -1)).transpose(1, 2)[:, cell : cell + 1]

        return self._patch(component, "h", heads, pick)

    def steer(self) -> Tensor:
        """`generate` with an addition intervention at every token."""
        addition = self.library.AdditionIntervention(source_representation=self.task.vector)
        steered = self._intervenable((self.task.layer, "block_output", addition))
        _, output = steered.generate(
            {"input_ids": self.task.clean}, intervene_on_prompt=True, **generation(self.task)
        )
        return output[0]


TOOLKITS: dict[str, type[Toolkit]] = {
    "plain": Plain,
    "ours": Ours,
    "transformer_lens": TransformerLens,
    "nnsight": NNsight,
    "pyvene": Pyvene,
}
ROWS = ("load", "wrap", "forward", "record", "lens", "sweep", "heads", "steer")
"""What is measured, in order; each is a method of `Toolkit`."""
