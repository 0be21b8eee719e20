"""Ablation against one plainly hooked forward pass per entry."""

import functools
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import families
from ablation import ablate
from circuit_nodes import parse_node
from forward_pass import ArchitectureError, InputError, LayerError, RecordFileError, SiteError
from model_architecture import Architecture
from node_effects import AblationEffects, PathEffects

PROMPTS = [row.tolist() for row in families.token_ids(3, 6, seed=1)]
OTHERS = [row.tolist() for row in families.token_ids(4, 6, seed=2)]
FLOAT32_ONLY = {"mixtral", "qwen2_moe", "gpt_oss"}
"""Their experts' products do not take float64."""


@functools.cache
def built(name):
    model = families.build(name)
    return model if name in FLOAT32_ONLY else model.double()


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Plain:
    """Plain hooks on the modules of one model."""

    def __init__(self, model):
        self.model, self.arch = model, Architecture(model)

    def place(self, node):
        """Module, whether its input is meant, and the columns."""
        found, block = self.arch.structure[node.layer], self.arch.blocks[node.layer]
        if node.kind != "head":
            path = found.attn_writer if node.kind == "attn" else found.mlp_writer
            return block.get_submodule(path), False, slice(None), found.scale
        out = block.get_submodule(found.out_proj)
        size = self.widths[id(out)] // found.n_heads
        return out, True, slice(node.head * size, (node.head + 1) * size), 1.0

    @functools.cached_property
    def widths(self):
        """Width of what each output projection takes."""
        modules = [
            block.get_submodule(found.out_proj)
            for block, found in zip(self.arch.blocks, self.arch.structure, strict=True)
            if found.out_proj
        ]
        kept = {}
        with torch.no_grad(), ExitStack() as stack:
            for m in modules:
                keep = lambda m, args: kept.__setitem__(id(m), args[0].shape[-1])  # noqa: E731
                stack.callback(m.register_forward_pre_hook(keep).remove)
            self.model(torch.tensor([PROMPTS[0]]))
        return kept

    def run(self, ids, changes=()):
        """Logits of the last position; ``changes``: module, at its input, function."""
        with torch.no_grad(), ExitStack() as stack:
            for module, at_input, change in changes:
                if at_input:
                    hook = lambda _m, args, c=change: (c(args[0]),)  # noqa: E731
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                else:
                    hook = functools.partial(self.after, change)
                    stack.callback(module.register_forward_hook(hook).remove)
            return self.model(torch.tensor([ids]), use_cache=False).logits[0, -1]

    @staticmethod
    def after(change, _module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = change(hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def seen(self, ids, node):
        """A part's output, ``[position, width]``."""
        kept = []
        module, at_input, columns, _ = self.place(node)
        self.run(ids, [(module, at_input, lambda value: kept.append(value.clone()) or value)])
        return kept[0].view(len(ids), -1)[:, columns]

    def ablated(self, ids, nodes, values, positions=slice(None)):
        """The last logits, with parts replaced by ``[position or 1, width]`` each."""

        def put(columns, value):
            def change(hidden):
                new = hidden.clone().view(len(ids), -1)
                rows = new[:, columns].clone()
                rows[positions] = value.expand_as(rows)[positions].to(rows)
                new[:, columns] = rows
                return new.view_as(hidden)

            return change

        changes = []
        for node, value in zip(nodes, values, strict=True):
            module, at_input, columns, _ = self.place(node)
            changes.append((module, at_input, put(columns, value)))
        return self.run(ids, changes)

    def log_prob(self, logits, answer):
        return float(logits.log_softmax(-1)[answer])


def study(model, prompts, components="all", method="mean", **options):
    return ablate(model, None, prompts, components, method, show_progress=False, **options)


def tolerance(name):
    return 1e-4 if name in FLOAT32_ONLY else 2e-6


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "mamba"])
def test_every_head_and_mlp_is_that_of_one_hooked_pass(name, method):
    model = built(name)
    plain, ids = Plain(model), PROMPTS[0]
    reference = None if method == "zero" else OTHERS[:1] if method == "resample" else OTHERS[:2]
    options = {"metric": "logit", "answer": 7, "reference": reference, "samples": 2}
    result = study(model, ids, method=method, **options)
    assert len(result.labels) == plain.arch.n_layers * (families.HEADS + 1)
    clean = plain.run(ids)
    for (node,), drop in zip(result.groups, result.values, strict=True):
        if method == "zero":
            value = torch.zeros(1, 1)
        elif method == "mean":
            value = torch.cat([plain.seen(other, node) for other in OTHERS[:2]]).mean(0, True)
        else:
            value = plain.seen(OTHERS[0], node)
        patched = plain.ablated(ids, [node], [value])
        truth = float(clean[7] - patched[7])
        assert drop == pytest.approx(truth, abs=tolerance(name), rel=tolerance(name)), node
    assert np.abs(result.values).max() > 0.1
    assert count_hooks(model) == 0


def test_several_parts_at_once_and_single_positions():
    model = built("llama")
    plain, ids = Plain(model), PROMPTS[0]
    groups = [["0.1", "0.2", "mlp 1"], ["block 1"], ["attn 0", "2.3"]]
    parts = [["0.1", "0.2", "mlp 1"], ["attn 1", "mlp 1"], ["attn 0", "2.3"]]
    clean, answer = plain.run(ids), 5
    for positions in (None, [5, 1]):
        result = study(model, ids, groups, "zero", answer=5, positions=positions)
        for names, drop in zip(parts, result.values, strict=True):
            nodes = [parse_node(plain.arch, name) for name in names]
            zeros = [torch.zeros(1, 1)] * len(nodes)
            where = slice(None) if positions is None else positions
            patched = plain.ablated(ids, nodes, zeros, where)
            truth = plain.log_prob(clean, answer) - plain.log_prob(patched, answer)
            assert drop == pytest.approx(truth, abs=1e-9)
    assert result.labels == ("0.1 + 0.2 + mlp 1", "block 1", "attn 0 + 2.3")
    assert result.answer == "<5>"


def test_a_mean_per_position():
    model = built("gpt2")
    plain, ids = Plain(model), PROMPTS[0]
    result = study(
        model, ids, ["1.2", "mlp 0"], reference=OTHERS, per_position=True, positions=[2, 5]
    )
    clean = plain.run(ids)
    for (node,), drop in zip(result.groups, result.values, strict=True):
        value = torch.stack([plain.seen(other, node) for other in OTHERS]).mean(0)
        patched = plain.ablated(ids, [node], [value], [2, 5])
        answer = int(clean.argmax())
        truth = plain.log_prob(clean, answer) - plain.log_prob(patched, answer)
        assert drop == pytest.approx(truth, abs=1e-9)
    assert result.references == 4


def test_resampling_averages_over_its_draws():
    model = built("gpt2")
    plain, ids = Plain(model), PROMPTS[0]
    result = study(model, ids, ["1.2"], "resample", reference=OTHERS, samples=5, seed=3)
    drawn = np.random.default_rng(3).integers(len(OTHERS), size=5)
    assert len(set(drawn.tolist())) > 1
    clean = plain.run(ids)
    answer, node = int(clean.argmax()), result.groups[0][0]
    logits = [plain.ablated(ids, [node], [plain.seen(OTHERS[i], node)]) for i in drawn]
    truth = plain.log_prob(clean, answer) - np.mean([plain.log_prob(z, answer) for z in logits])
    assert result.values[0] == pytest.approx(truth, abs=1e-9)
    assert result.samples == 5


def test_several_prompts_are_averaged_and_stand_in_for_each_other():
    model = built("gpt2")
    prompts = [*PROMPTS, OTHERS[0][:4]]
    answers = [4, 5, 6, 7]
    singles = [
        study(model, row, "heads", reference=prompts, answer=answer).values
        for row, answer in zip(prompts, answers, strict=True)
    ]
    result = study(model, prompts, "heads", answer=answers)
    assert np.allclose(result.values, np.mean(singles, 0))
    assert np.allclose(result.stderr, np.std(singles, 0, ddof=1) / 2)
    assert (result.count, result.references) == (4, 4)
    two = study(model, PROMPTS[:2], "heads", "resample", samples=1)
    swapped = [
        study(model, PROMPTS[i], "heads", "resample", reference=[PROMPTS[1 - i]], answer=None)
        for i in (0, 1)
    ]
    assert np.allclose(two.values, np.mean([each.values for each in swapped], 0))


def test_ablating_what_is_not_there_changes_nothing():
    """An MLP whose last matrix is 0 adds nothing, so that its absence is not felt."""
    model = families.build("llama").double()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    result = study(model, PROMPTS[0], "mlps", "zero")
    assert result["mlp 1"] == pytest.approx(0, abs=1e-12)
    assert abs(result["mlp 0"]) > 1e-3


def test_other_metrics():
    model = built("gpt2")
    plain, ids = Plain(model), PROMPTS[0]
    node = parse_node(plain.arch, "mlp 1")
    clean, patched = plain.run(ids), plain.ablated(ids, [node], [torch.zeros(1, 1)])
    drops = {
        "logit_diff": (clean[5] - clean[6]) - (patched[5] - patched[6]),
        "prob": clean.softmax(-1)[5] - patched.softmax(-1)[5],
        "kl": -(clean.softmax(-1) * (clean.log_softmax(-1) - patched.log_softmax(-1))).sum(),
    }
    for metric, truth in drops.items():
        tokens = {"logit_diff": {"answer": 5, "foil": 6}, "prob": {"answer": 5}}.get(metric, {})
        result = study(model, ids, "mlp 1", "zero", metric=metric, **tokens)
        assert result.values[0] == pytest.approx(float(truth), abs=1e-9)
    own = study(model, ids, "mlp 1", "zero", metric=lambda z: z[0, -1, 7])
    assert own.values[0] == pytest.approx(float(clean[7] - patched[7]), abs=1e-9)


def test_a_state_space_model_is_ablated_by_its_mixers():
    model = built("mamba")
    result = study(model, PROMPTS[0], method="zero")
    assert result.labels == ("attn 0", "attn 1", "attn 2")
    plain, ids = Plain(model), PROMPTS[0]
    clean = plain.run(ids)
    answer = int(clean.argmax())
    patched = plain.ablated(ids, [result.groups[1][0]], [torch.zeros(1, 1)])
    truth = plain.log_prob(clean, answer) - plain.log_prob(patched, answer)
    assert result["attn 1"] == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "median"}, InputError, "method is one of zero, mean, resample"),
        ({"method": "mean"}, InputError, "needs reference=: a list of prompts"),
        ({"method": "resample"}, InputError, "needs reference="),
        ({"metric": "distance"}, InputError, "compares two prompts"),
        ({"metric": "logit_diff"}, InputError, "needs a foil"),
        (
            {"method": "resample", "reference": [[5, 6]]},
            InputError,
            r"6 and 2 tokens.*\['<5>', '<6>'\]",
        ),
        ({"method": "resample", "reference": [PROMPTS[0]]}, InputError, "is the prompt itself"),
        (
            {"reference": [[5]], "method": "mean", "per_position": True},
            InputError,
            "6 and 1 tokens",
        ),
        ({"components": "0.9"}, InputError, "block 0 has 4 heads"),
        ({"components": "embed"}, InputError, "writes nothing"),
        ({"components": "mlp 9"}, LayerError, "out of range"),
        ({"samples": 0}, InputError, "samples must be at least 1"),
        ({"positions": 9}, InputError, "out of range"),
        ({"answer": [5, 6]}, InputError, "2 tokens for 1 prompts"),
    ],
)
def test_requests_that_make_no_sense(options, error, match):
    model = built("gpt2")
    with pytest.raises(error, match=match):
        study(model, PROMPTS[0], **{"method": "zero"} | options)
    assert count_hooks(model) == 0


def test_models_that_lack_a_part():
    with pytest.raises(SiteError, match="no site 'mlp_out'"):
        study(built("mamba"), PROMPTS[0], "mlps", "zero")
    with pytest.raises(ArchitectureError, match="ablation needs the language-model head"):
        study(built("gpt2").transformer, PROMPTS[0], "heads", "zero")


def test_text_and_a_picture(tmp_path):
    tokenizer = families.tiny_tokenizer()
    result = ablate(
        families.build("gpt2"), tokenizer, ["the cat sat", "a mat on the"], show_progress=False
    )
    assert repr(result) == "AblationEffects(mean ablation of 15, log_prob, 2 prompts)"
    assert result.value_label == "drop in log_prob (nats)"
    frame = result.to_frame()
    assert list(frame)[-4:] == ["value", "stderr", "low", "high"]
    assert result.top(1).value[0] == result.values[np.abs(result.values).argmax()]
    assert result.grid()[2] == ("0", "1", "2", "3", "mlp")
    assert result.plot().axes
    result.save(tmp_path / "drops")
    again = AblationEffects.load(tmp_path / "drops")
    assert repr(again) == repr(result)
    for name in ("values", "stderr", "low", "high"):
        assert np.array_equal(getattr(again, name), getattr(result, name))
    assert (again.method, again.groups, again.references) == ("mean", result.groups, 2)
    with pytest.raises(RecordFileError, match="expected 'path effects'"):
        PathEffects.load(tmp_path / "drops")
