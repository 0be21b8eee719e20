"""One hooked forward pass, with PyTorch's own hooks: what every fast path is compared with.

    hooked_logits(model, ids, changes)   logits with ``changes = [(site, function)]`` in force
    recorded(model, ids, site)           what stands at a site in an unmodified pass
    hooks_on(model)                      every hook of every module, to compare before and after

A function is shown the site's value with the position on axis 1 and returns another. Sites that are
the input or output of one module are reached by ``register_forward_hook``; what is made inside a
module (query, key, value, pattern, the stream between sublayers) by `forward_pass.edit`, one pass
and one row at a time, which tests of its own compare with projections by hand.
"""

from contextlib import ExitStack, contextmanager

import torch

from forward_pass import READ_ONLY, Site, edit, record
from model_architecture import Architecture

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def hooks_on(model):
    return {
        (path, kind): list(getattr(module, kind).values())
        for path, module in model.named_modules()
        for kind in KINDS
    }


def state_of(model):
    """Return what an experiment must not change: weights, gradients, config, modes, attributes."""
    return (
        hooks_on(model),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        model.config.to_dict(),
        model.config._attn_implementation,
        {path: (module.training, set(module.__dict__)) for path, module in model.named_modules()},
    )


def assert_untouched(model, before):
    after = state_of(model)
    assert after[1].keys() == before[1].keys()
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items())
    assert (after[0], *after[2:]) == (before[0], *before[2:])


def by_token(value, site):
    return value.transpose(1, 2) if site.name == "attn_pattern" else value


@contextmanager
def _hooked(architecture, changes):
    inner = []
    with ExitStack() as stack:
        for site, change in changes:
            block = architecture.blocks[site.layer]
            if site.name == "resid_post":
                stack.callback(block.register_forward_hook(_output_hook(change)).remove)
            elif site.name == "resid_pre":
                hook = block.register_forward_pre_hook(_input_hook(change), with_kwargs=True)
                stack.callback(hook.remove)
            elif site.name in ("head_out", "mlp_neurons") and (
                found := _linear(architecture, site)
            ):
                module, heads = found
                hook = module.register_forward_pre_hook(
                    _input_hook(change, heads), with_kwargs=True
                )
                stack.callback(hook.remove)
            else:
                shown = _shown(change, site)
                inner.append((site, shown))
        if inner:
            stack.enter_context(edit(architecture, inner))
        yield


def _shown(change, site):
    def hook(value):
        return by_token(change(by_token(value, site)), site)

    return hook


def _linear(architecture, site):
    """Return a module that sees ``[batch, position, d]``, and how many heads that is."""
    part = "out_proj" if site.name == "head_out" else "down_proj"
    name = architecture.part_name(site.layer, part)
    found = architecture.structure[site.layer]
    if getattr(found, part) in found.flattened:
        return None
    heads = found.n_heads if site.name == "head_out" else None
    return architecture.model.get_submodule(name), heads


def _output_hook(change):
    def hook(_module, _args, output):
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return hook


def _input_hook(change, heads=None):
    def hook(_module, args, kwargs):
        value = args[0] if args else kwargs["hidden_states"]
        shown = value if heads is None else value.unflatten(-1, (heads, -1))
        new = change(shown).reshape(value.shape)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


@torch.no_grad()
def hooked_logits(model, ids, changes, **inputs):
    architecture = Architecture(model)
    ids = torch.as_tensor(ids)
    ids = ids[None] if ids.dim() == 1 else ids
    assert architecture.structure  # understood before it is hooked
    with _hooked(architecture, changes):
        return model(ids, use_cache=False, **inputs).logits


def recorded(model, ids, site):
    """Return ``[batch, position, …]``."""
    ids = torch.as_tensor(ids)
    ids = ids[None] if ids.dim() == 1 else ids
    return by_token(record(Architecture(model), {"input_ids": ids}, [site])[site], site)


def put(value, position=None, head=None, neuron=None):
    """Return a change that puts ``value [position, …]`` of one row at these places."""

    def change(shown):
        new = shown.clone()
        places = range(shown.shape[1]) if position is None else [position]
        for i in places:
            there = value[i] if position is None else value
            if head is None and neuron is None:
                new[0, i] = there
            elif neuron is None:
                new[0, i, head] = there[head]
            else:
                new[0, i, ..., neuron] = there[..., neuron]
        return new

    return change


def sites_of(model, names=None):
    """Return the sites of the middle layer."""
    architecture = Architecture(model)
    layer = architecture.n_layers // 2
    return [
        Site(name, layer)
        for name in architecture.available_sites(layer)
        if name not in READ_ONLY and (names is None or name in names)
    ]
