"""Every decoder of transformers' mapping: understood, or refused with a sentence.

The quick test proves each by `check_architecture`; the slow one tries every column of
docs/MODELS.md, and compares with that page.
"""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import model_zoo
from architecture_check import check_architecture
from expert_routing import ROUTING
from forward_pass import ArchitectureError, Site, SiteError, edit, record
from model_architecture import Architecture
from model_trials import COLUMNS, try_all

PAGE = Path(__file__).resolve().parent.parent / "docs" / "MODELS.md"

REFUSED = {
    "blt": "does not say how many blocks",
    "cpmant": "for one row of 5 tokens",
    "hrm_text": "no ModuleList of 32 blocks",
    "mllama": r"does not run its blocks \[1\] on a text",
    "prophetnet": "for one row of 5 tokens",
    "reformer": "reversible",
}
"""Families without a chain of blocks that hands on one residual stream, and what is said."""

UNBUILT = {"gemma3n": "timm", "qwen4_exp": "unsupported operand"}
"""What this transformers version cannot build alone, and why."""

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers says of its own rarer models
]


@pytest.fixture
def model(model_type):
    if model_type in model_zoo.NOT_DECODERS:
        pytest.skip(model_zoo.NOT_DECODERS[model_type])
    if model_type in UNBUILT:
        with pytest.raises(Exception, match=UNBUILT[model_type]):
            model_zoo.build(model_type)
        pytest.skip(f"transformers cannot build it here: {UNBUILT[model_type]}")
    return model_zoo.build(model_type)


@pytest.mark.parametrize("model_type", model_zoo.MODEL_TYPES)
def test_a_family_is_proven_or_refused(model_type, model):
    if model_type in REFUSED:
        with pytest.raises(ArchitectureError, match=REFUSED[model_type]):
            check_architecture(Architecture(model))
        return
    report = check_architecture(Architecture(model))
    assert report.passed, str(report)
    assert next(p for p in report.proofs if p.name == "resume").passed


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_zoo.MODEL_TYPES)
def test_every_column_is_as_published(model_type, model, tmp_path):
    if model_type in REFUSED:
        pytest.skip("refused as a whole")
    outcomes = try_all(model, tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')}" not in " ".join(text.split()):
        assert [name for name, each in outcomes.items() if each.value == "no"] == []
        return
    row = next(line for line in text.splitlines() if line.startswith(f"| {model_type} |"))
    published = [cell.strip() for cell in row.strip("|").split("|")][2:]
    marks = {"yes": "yes", "no": "**no**", "n.a.": "–"}
    assert [marks[each.value] for each in outcomes.values()] == published, outcomes


def test_the_page_counts_at_least_75_complete_families():
    text = PAGE.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.endswith(" |") and "| yes |" in line]
    complete = sum("**no**" not in row for row in rows)
    claimed = int(re.search(r"\*\*(\d+) of \d+ decoders are complete", text).group(1))
    assert claimed == complete >= 75
    assert all(row.count("|") == len(COLUMNS) + 3 for row in rows)


# --- What is peculiar to some -----------------------------------------------------------------


IDS = torch.tensor([[7, 11, 30, 6, 49, 21, 13]])


def of_layer(architecture, name):
    return [
        layer
        for layer in range(architecture.n_layers)
        if architecture.missing(Site(name, layer)) is None
    ]


@pytest.mark.parametrize(
    ("model_type", "attending"),
    [
        ("jamba", [1, 3]),
        ("bamba", [1, 3]),
        ("qwen3_next", [1, 3]),
        ("lfm2", [1, 3]),
        ("recurrent_gemma", [2]),
        ("zamba2", [1, 3]),
        ("falcon_h1", [0, 1, 2, 3]),
        ("mamba", []),
        ("mamba2", []),
        ("falcon_mamba", []),
        ("rwkv", []),
    ],
)
def test_hybrids_have_heads_in_their_attention_layers_alone(model_type, attending):
    architecture = Architecture(model_zoo.build(model_type))
    assert of_layer(architecture, "head_out") == attending
    assert of_layer(architecture, "attn_pattern") == attending
    assert of_layer(architecture, "resid_post") == [0, 1, 2, 3]
    for layer in set(range(4)) - set(attending):
        with pytest.raises(SiteError, match="it computes no attention"):
            architecture.tap(Site("attn_pattern", layer))


def by_hand(architecture, layer, ids):
    """Router logits of one block from its input, by the router's own weight."""
    path, _ = architecture.structure[layer].router
    router = architecture.blocks[layer].get_submodule(path)
    seen = []
    handle = router.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        architecture.model(ids, use_cache=False)
    handle.remove()
    return seen[0].reshape(*ids.shape, -1) @ router.weight.T


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_sites_against_the_routers_own_weight(model_type):
    architecture = Architecture(model_zoo.build(model_type))
    layer = of_layer(architecture, "expert_weights")[-1]
    sites = [Site(name, layer) for name in ROUTING]
    kept = record(architecture, {"input_ids": IDS}, sites)
    logits, probs, weights = (kept[site] for site in sites)
    torch.testing.assert_close(logits, by_hand(architecture, layer, IDS))
    torch.testing.assert_close(probs, logits.softmax(-1))
    top = probs.topk(2, dim=-1)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, top.indices, value=True)
    assert torch.equal(weights != 0, chosen)
    scale = weights.sum(-1) / top.values.sum(-1)
    torch.testing.assert_close(weights, torch.where(chosen, probs * scale[..., None], 0.0))


def test_sigmoid_routers_are_told_from_softmax_ones():
    architecture = Architecture(model_zoo.build("deepseek_v3"))
    layer = of_layer(architecture, "router_probs")[0]
    sites = [Site("router_logits", layer), Site("router_probs", layer)]
    logits, probs = record(architecture, {"input_ids": IDS}, sites).values()
    torch.testing.assert_close(probs, logits.float().sigmoid())


def test_an_expert_that_gets_no_weight_writes_nothing():
    """Against a copy of the model in which that expert's matrices are zero."""
    model = model_zoo.build("mixtral")
    architecture = Architecture(model)
    layer, site = 1, Site("expert_weights", 1)
    weights = record(architecture, {"input_ids": IDS}, [site])[site]
    busiest = int((weights > 0).sum((0, 1)).argmax())

    def silence(value):
        new = value.clone()
        new[..., busiest] = 0
        return new

    with edit(architecture, {site: silence}), torch.no_grad():
        found = model(IDS, use_cache=False).logits
    other = model_zoo.build("mixtral")
    with torch.no_grad():
        other.model.layers[layer].mlp.experts.down_proj[busiest] = 0
        expected = other(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, model(IDS, use_cache=False).logits, atol=0.1)


def test_router_logits_can_only_be_recorded():
    architecture = Architecture(model_zoo.build("mixtral"))
    with (
        edit(architecture, {Site("router_logits", 1): lambda value: value + 1}),
        pytest.raises(SiteError, match="can only be recorded; edit 'expert_weights'"),
    ):
        architecture.model(IDS, use_cache=False)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "deepseek_v4", "hy_v4"])
def test_several_streams_are_recorded_side_by_side(model_type):
    model = model_zoo.build(model_type)
    architecture = Architecture(model)
    assert architecture.d_model == 4 * architecture.config.hidden_size
    seen = []
    handle = architecture.blocks[1].register_forward_hook(
        lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    site = Site("resid_post", 1)
    kept = record(architecture, {"input_ids": IDS.expand(2, -1)}, [site])[site]
    handle.remove()
    assert kept.shape == (2, 7, architecture.d_model)
    streams = kept.unflatten(-1, (4, -1))
    whole = seen[0] if seen[0].shape[0] == 2 else seen[0].permute(1, 2, 0, 3)
    torch.testing.assert_close(streams, whole, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["zamba2", "inkling_text"])
def test_blocks_that_mix_tokens_again_after_attention_are_swept_whole(model_type):
    """A head's output at an early token reaches the last one within the last block."""
    from edited_runs import abilities

    assert not abilities(Architecture(model_zoo.build(model_type))).local_end
    assert abilities(Architecture(model_zoo.build("llama"))).local_end
