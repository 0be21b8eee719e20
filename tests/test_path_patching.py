"""Path patching against plain hooks, GPT-2 written out again, and circuits built by hand."""

import functools
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import families
import path_patching
from circuit_nodes import Node, parse_node, receiver_nodes, sender_groups
from edited_runs import Abilities
from forward_pass import InputError, LayerError, Site, SiteError, edit, record
from model_architecture import Architecture
from node_effects import PathEffects
from path_patching import patch_paths

CLEAN = families.token_ids(1, 8, seed=1)[0]
CORRUPTED = CLEAN.clone()
CORRUPTED[2], CORRUPTED[4] = 50, 60
FLOAT32_ONLY = {"mixtral", "qwen2_moe", "gpt_oss"}
"""Their experts' products do not take float64."""
FLOAT32_INSIDE = {"gptj", "gpt_neo"}
"""Their attention computes in float32 whatever the model's dtype."""


@functools.cache
def built(name):
    model = families.build(name)
    return model if name in FLOAT32_ONLY else model.double()


def patch(model, senders, receivers, clean=CLEAN, corrupted=CORRUPTED, **options):
    options = {"metric": "distance", "show_progress": False} | options
    return patch_paths(model, None, clean, corrupted, senders, receivers, **options)


def logit_of(token):
    """A metric that a test can compute by itself."""
    return lambda logits: logits[0, -1, token]


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- All paths are the whole sender ---------------------------------------------------------------

SITES = {"head": "head_out", "attn": "attn_out", "mlp": "mlp_out", "embed": "embed"}


def exchanged(arch, node, other):
    """The logits with one sender's output exchanged for everybody."""
    site = Site(SITES[node.kind], max(node.layer, 0))

    def swap(value):
        new = value.clone() if node.kind == "head" else other[site].clone()
        if node.kind == "head":
            new[:, :, node.head] = other[site][:, :, node.head]
        return new

    with torch.no_grad(), edit(arch, {site: swap}):
        return arch.model(CLEAN[None], use_cache=False).logits[0, -1]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_all_paths_from_a_sender_are_the_sender(name):
    model = built(name)
    arch = Architecture(model)
    word = "attns" if name == "mamba" else "all"
    result = patch(model, word, "all")
    nodes = [node for (node,) in result.groups]
    sites = {Site(SITES[node.kind], max(node.layer, 0)) for node in nodes}
    other = record(arch, arch.inputs(CORRUPTED[None]), sorted(sites))
    ends = [record(arch, arch.inputs(ids[None]), [], logits=True).logits[0, -1]
            for ids in (CLEAN, CORRUPTED)]  # fmt: skip
    truth = [float((exchanged(arch, node, other) - ends[0]).norm()) for node in nodes]
    truth = np.array(truth) / float((ends[0] - ends[1]).norm())
    assert min(truth) > 0.03
    assert np.allclose(result.values, truth, rtol=0, atol=1e-6)
    assert result.passes <= (4 if name == "bloom" else 1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_several_senders_together_are_their_exchange(name):
    model = built(name)
    arch = Architecture(model)
    groups = [["0.1", "mlp 0", "1.2", "1.3", "mlp 2"], ["embed", "block 0", "attn 1"]]
    result = patch(model, groups, "all", metric=logit_of(7))
    for group, value in zip(groups, result.values, strict=True):
        nodes = [n for s in group for n in _parts(parse_node(arch, s))]
        sites = sorted({Site(SITES[n.kind], max(n.layer, 0)) for n in nodes})
        other = record(arch, arch.inputs(CORRUPTED[None]), sites)
        hooks = [
            (site, _swap([n for n in nodes if _site(n) == site], other[site])) for site in sites
        ]
        with torch.no_grad():
            base = model(CLEAN[None]).logits[0, -1, 7]
            with edit(arch, hooks):
                changed = model(CLEAN[None], use_cache=False).logits[0, -1, 7]
        assert value == pytest.approx(float(changed - base), abs=1e-9)


def _site(node):
    return Site(SITES[node.kind], max(node.layer, 0))


def _parts(node):
    return [Node("attn", node.layer), Node("mlp", node.layer)] if node.kind == "block" else [node]


def _swap(nodes, theirs):
    def swap(value):
        new = value.clone()
        for node in nodes:
            if node.kind == "head":
                new[:, :, node.head] = theirs[:, :, node.head]
            else:
                new = theirs.clone()
        return new

    return swap


# --- GPT-2, written out again ---------------------------------------------------------------------


class ByHand:
    """GPT-2 without hooks: a reader takes the real stream, or that plus what senders changed."""

    def __init__(self, model):
        self.model, self.body = model, model.transformer
        self.heads = model.config.n_head

    @torch.no_grad()
    def __call__(
        self, ids, senders=(), receivers=(), other=None, *, through=False, sent=None, read=None
    ):
        """Logits `[position, vocab]` and every node's output, `[position, d_model]`."""
        length = len(ids)
        sent = torch.ones(length, 1) if sent is None else sent
        read = torch.ones(length, 1) if read is None else read
        x = self.body.wte(ids) + self.body.wpe(torch.arange(length))
        out = {"embed": x}
        delta = (other["embed"] - x) * sent if "embed" in senders else torch.zeros_like(x)
        started = "embed" in senders
        for layer, block in enumerate(self.body.h):
            seen = lambda name: x + delta * read if name in receivers else x  # noqa: B023, E731
            attn = block.attn.c_proj.bias.clone()
            for head in range(self.heads):
                z = self.head(block, layer, head, seen)
                wide = z @ block.attn.c_proj.weight.unflatten(0, (self.heads, -1))[head]
                out[f"{layer}.{head}"] = wide
                attn = attn + wide
            out[f"attn {layer}"] = attn
            for name in (*(f"{layer}.{head}" for head in range(self.heads)), f"attn {layer}"):
                if name in senders:
                    delta, started = delta + (other[name] - out[name]) * sent, True
            x = x + attn
            name = f"mlp {layer}"
            mlp = block.mlp(block.ln_2(seen(name)))
            if name in senders:
                delta, started = delta + (other[name] - mlp) * sent, True
            elif through and started:
                delta = delta + block.mlp(block.ln_2(x + delta)) - mlp
            out[name] = mlp
            x = x + mlp
        end = x + delta * read if "logits" in receivers else x
        return self.model.lm_head(self.body.ln_f(end)), out

    def head(self, block, layer, head, seen):
        weight = block.attn.c_attn.weight.unflatten(1, (3, self.heads, -1))
        bias = block.attn.c_attn.bias.unflatten(0, (3, self.heads, -1))
        q, k, v = (
            block.ln_1(seen(f"{layer}.{head}.{side}")) @ weight[:, i, head] + bias[i, head]
            for i, side in enumerate("qkv")
        )
        scores = q @ k.T / k.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ v


CASES = [
    ("0.1", ["1.2.q"], {}),
    ("0.1", ["1.2.k"], {}),
    ("0.3", ["2.0.v"], {}),
    ("0.3", ["mlp 0"], {}),
    ("mlp 0", ["mlp 2"], {}),
    ("mlp 0", ["2.1.q", "1.0.k", "logits"], {}),
    ("attn 1", ["mlp 1", "2.3.v"], {}),
    ("embed", ["0.0.k", "mlp 1", "2.2.q"], {}),
    ("2.3", ["logits"], {}),
    ("2.3", ["mlp 2"], {}),
    (["0.1", "1.2"], ["1.2.k", "2.0.v"], {}),
    (["0.0", "1.1", "1.3", "mlp 1", "2.2"], ["0.2.q", "mlp 0", "1.1.v", "mlp 2", "logits"], {}),
    (["embed", "attn 0", "mlp 1"], ["mlp 0", "1.3.q", "2.1.k", "mlp 2"], {}),
    ("0.1", ["2.2.v"], {"through": True}),
    ("0.1", ["logits"], {"through": True}),
    ("embed", ["2.2.k", "logits"], {"through": True}),
    (["0.1", "1.2"], ["2.2.v", "logits"], {"through": True}),
    ("0.1", ["1.2.v", "mlp 1"], {"sent": [4, 6]}),
    ("0.1", ["1.2.v", "mlp 1"], {"read": [3, 7]}),
    (["0.1", "mlp 1"], ["1.2.v", "2.0.k", "logits"], {"sent": [2, 5, 7], "read": [5, 7]}),
]  # fmt: skip


@pytest.mark.parametrize(("senders", "receivers", "options"), CASES)
def test_single_edges_are_those_of_gpt2_written_out(senders, receivers, options):
    model = built("gpt2")
    by_hand = ByHand(model)
    masks = {key: torch.isin(torch.arange(8), torch.tensor(value))[:, None]
             for key, value in options.items() if key != "through"}  # fmt: skip
    base, _ = by_hand(CLEAN)
    assert torch.allclose(base, model(CLEAN[None]).logits[0], atol=1e-9)
    _, other = by_hand(CORRUPTED)
    together = senders if isinstance(senders, list) else [senders]
    through = options.get("through", False)
    changed, _ = by_hand(CLEAN, together, receivers, other, through=through, **masks)
    result = patch(
        model, [together], receivers, metric=logit_of(7), through_mlps=through,
        sender_positions=options.get("sent"), receiver_positions=options.get("read"),
    )  # fmt: skip
    truth = float(changed[-1, 7] - base[-1, 7])
    assert abs(truth) > 1e-6
    assert float(result.values[0]) == pytest.approx(truth, abs=1e-9)


# --- Two passes with plain hooks, on other architectures ------------------------------------------

NAMES = {
    "llama": ("self_attn", "o_proj", "self_attn", "mlp"),
    "qwen3": ("self_attn", "o_proj", "self_attn", "mlp"),
    "mixtral": ("self_attn", "o_proj", "self_attn", "mlp"),
    "gemma2": ("self_attn", "o_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("self_attn", "o_proj", "post_attention_layernorm", "post_feedforward_layernorm"),
    "phi": ("self_attn", "dense", "self_attn", "mlp"),
    "opt": ("self_attn", "out_proj", "self_attn", "fc2"),
    "gptj": ("attn", "out_proj", "attn", "mlp"),
    "gpt_neo": ("attn.attention", "out_proj", "attn", "mlp"),
}
"""Attention, its output projection, and the modules whose outputs are added to the stream."""


class TwoPasses:
    """Wang et al.'s algorithm on a model whose modules are named above, one path at a time."""

    def __init__(self, name, model):
        self.name, self.model, self.layers = name, model, Architecture(model).blocks
        self.path, self.out, *self.writers = NAMES[name]
        self.d_head = self.attention(self.layers[0]).head_dim

    def attention(self, layer):
        return layer.get_submodule(self.path)

    def run(self, ids, hooks):
        """The logits, with functions applied to module outputs (or inputs)."""
        with torch.no_grad(), ExitStack() as stack:
            for module, at_input, change in hooks:
                if at_input:
                    hook = lambda _m, args, c=change: (c(args[0]),)  # noqa: E731
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                else:
                    hook = functools.partial(self.after, change)
                    stack.callback(module.register_forward_hook(hook).remove)
            return self.model(ids[None], use_cache=False).logits[0, -1]

    @staticmethod
    def after(change, _module, _args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        new = change(hidden)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def keep(self, store, key):
        def change(value):
            store[key] = value.clone()
            return value

        return change

    def record(self, ids):
        kept, hooks = {}, []
        for i, layer in enumerate(self.layers):
            for writer in self.writers:
                hooks.append((getattr(layer, writer), False, self.keep(kept, (i, writer))))
            out = getattr(self.attention(layer), self.out)
            hooks.append((out, True, self.keep(kept, (i, "z"))))
        self.run(ids, hooks)
        return kept

    def part(self, head):
        return slice(head * self.d_head, (head + 1) * self.d_head)

    def effect(self, sender, receiver):
        base, other = self.record(CLEAN), self.record(CORRUPTED)
        s_layer, s_head = sender
        r_layer, kind, r_head = receiver
        module = getattr(self.layers[r_layer], self.writers[1])
        if kind != "mlp":
            attention = self.attention(self.layers[r_layer])
            normed = self.name == "olmo2" and kind != "v"  # a norm over all heads comes in between
            module = getattr(attention, f"{kind}_norm" if normed else f"{kind}_proj")
        kept = {}
        hooks = [(module, False, self.keep(kept, "received"))]

        def exchange(z):
            new = z.clone()
            new[..., self.part(s_head)] = other[s_layer, "z"][..., self.part(s_head)]
            return new

        for i, layer in enumerate(self.layers):
            for number, writer in enumerate(self.writers):
                if (i, number) != (s_layer, 0):
                    freeze = lambda value, k=(i, writer): base[k].view_as(value)  # noqa: E731
                    hooks.append((getattr(layer, writer), False, freeze))
        sending = getattr(self.attention(self.layers[s_layer]), self.out)
        self.run(CLEAN, [*hooks, (sending, True, exchange)])

        def receive(value):
            where = slice(None) if kind == "mlp" else self.part(r_head)
            new = value.clone()
            new[..., where] = kept["received"].view_as(value)[..., where]
            return new

        return float(self.run(CLEAN, [(module, False, receive)])[7] - self.run(CLEAN, [])[7])


PATHS = [
    ((0, 1), (1, "q", 3)),
    ((0, 3), (2, "k", 1)),
    ((1, 0), (2, "v", 0)),
    ((0, 2), (1, "mlp", 0)),
    ((1, 1), (1, "mlp", 0)),
]


@pytest.mark.parametrize("name", NAMES)
def test_single_edges_are_those_of_two_plainly_hooked_passes(name):
    model = built(name)
    plain = TwoPasses(name, model)
    for (layer, head), receiver in PATHS:
        kv_head = receiver[2]
        if receiver[1] in "kv" and Architecture(model).heads(0)[1] == 4:
            kv_head += 1  # without groups there are more to choose from
        receiver = receiver[0], receiver[1], kv_head
        ends = receiver[0], receiver[2], receiver[1]
        node = f"mlp {receiver[0]}" if receiver[1] == "mlp" else ends
        result = patch(model, [(layer, head)], node, metric=logit_of(7))
        parallel = name in ("phi", "gptj") and receiver == (1, "mlp", 0) and layer == 1
        truth = plain.effect((layer, head), receiver)
        assert (abs(truth) < 1e-9) == parallel
        tolerance = 1e-4 if name in FLOAT32_ONLY else 1e-5 if name in FLOAT32_INSIDE else 1e-9
        assert float(result.values[0]) == pytest.approx(truth, abs=tolerance)


# --- No path, no effect ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "phi", "falcon"])
def test_without_a_path_there_is_no_effect(name):
    for sender, receiver in [
        ("1.1", "1.2.q"),
        ("mlp 1", "mlp 1"),
        ("2.0", "1.0.k"),
        ("mlp 2", "2.1.q"),
    ]:
        result = patch(built(name), sender, receiver)
        assert result.values.tolist() == [0.0]
        assert result.passes == 0
    within = patch(built(name), "1.1", "mlp 1").values[0]
    assert (within == 0.0) == (name in ("phi", "falcon"))  # parallel: the MLP does not see it


def test_the_same_prompt_twice_has_no_effect():
    result = patch(built("gpt2"), "all", "all", CLEAN, CLEAN)
    assert not result.values.any()
    assert result.passes == 0


def test_what_lies_behind_the_metric_is_not_heard():
    """A key of the last block is read at every position, a query only where the metric looks."""
    model = built("llama")
    at = {"receiver_positions": [0, 1, 2, 3, 4, 5, 6]}
    assert patch(model, "0.1", "2.1.q", **at).values[0] < 1e-12
    assert patch(model, "0.1", "2.1.k", **at).values[0] > 1e-5


# --- Circuits built by hand -----------------------------------------------------------------------

TOKENS = 8
SHARP = 60.0


def parts(number):
    """A part of the stream: `TOKENS` dimensions."""
    return slice(number * TOKENS, (number + 1) * TOKENS)


def induction_gpt2():
    """Head 0.0 notes the previous token, head 1.2 looks for the present token in that note."""
    config = GPT2Config(
        vocab_size=TOKENS, n_positions=TOKENS, n_embd=4 * TOKENS, n_layer=2, n_head=4, n_inner=8,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    eye = torch.eye(TOKENS, dtype=torch.float64)
    token, place, previous, found = map(parts, range(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("ln" in name and "weight" in name))
        model.transformer.wte.weight[:, token] = eye
        model.transformer.wpe.weight[:, place] = eye

        def head(layer, number, query, key, out, shift):
            attention = model.transformer.h[layer].attn
            columns = [parts(4 * i + number) for i in range(3)]
            # a position's query is the one before it
            attention.c_attn.weight[query, columns[0]] = SHARP * (eye.roll(-1, 1) if shift else eye)
            attention.c_attn.weight[key, columns[1]] = eye
            attention.c_attn.weight[token, columns[2]] = eye
            attention.c_proj.weight[parts(number), out] = eye

        head(0, 0, place, place, previous, True)
        head(1, 2, token, previous, found, False)
        model.lm_head.weight[:, found] = 10 * eye
    return model


def induction_llama():
    """With rotary positions and grouped queries: head 0.1 goes by angle, head 1.2 by content."""
    width, d_head = 3 * TOKENS, 32
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=d_head, intermediate_size=8, attention_bias=True,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    eye = torch.eye(TOKENS, dtype=torch.float64)
    token, previous, found = map(parts, range(3))
    slow = slice(TOKENS, 2 * TOKENS)  # dimensions that rotate by less than 1e-5 a token
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name))
        model.model.embed_tokens.weight[:, token] = eye

        def rows(number):
            return slice(number * d_head, (number + 1) * d_head)

        def head(layer, number, out):
            attention, shared = model.model.layers[layer].self_attn, number // 2
            attention.v_proj.weight[rows(shared)][slow, token] = eye
            attention.o_proj.weight[out, rows(number)][:, slow] = eye
            return attention, rows(number), rows(shared)

        attention, mine, shared = head(0, 1, previous)
        angle = torch.tensor(1.0)  # of the fastest pair, per token
        attention.q_proj.bias[mine][0] = 10 * SHARP * torch.cos(angle)
        attention.q_proj.bias[mine][d_head // 2] = -10 * SHARP * torch.sin(angle)
        attention.k_proj.bias[shared][0] = 1.0
        attention, mine, shared = head(1, 2, found)
        attention.q_proj.weight[mine][slow, token] = SHARP * eye
        attention.k_proj.weight[shared][slow, previous] = eye
        model.lm_head.weight[:, found] = 10 * eye
    return model


SEEN = torch.tensor([0, 1, 5, 2, 3, 1])
UNSEEN = torch.tensor([0, 4, 5, 2, 3, 1])


@pytest.mark.parametrize(
    ("make", "writer", "key_head", "reader"),
    [(induction_gpt2, "0.0", 2, "1.2"), (induction_llama, "0.1", 1, "1.2")],
)
def test_the_induction_circuit_is_the_one_that_was_built(make, writer, key_head, reader):
    model = make()
    with torch.no_grad():
        best = model(SEEN[None]).logits[0, -1]
    assert int(best.argmax()) == 5  # 1 was followed by 5
    options = {"metric": "logit_diff", "answer": 5, "foil": 3}
    whole = patch(model, writer, "all", SEEN, UNSEEN, **options)
    assert whole.values[0] == pytest.approx(whole.other - whole.base, rel=0.02)
    assert whole.values[0] < -5
    key = f"1.{key_head}.k"
    for receiver in receiver_nodes(Architecture(model), "all"):
        value = patch(model, writer, receiver.label, SEEN, UNSEEN, **options).values[0]
        expected = whole.values[0] if receiver.label == key else 0.0
        assert value == pytest.approx(expected, abs=1e-3), receiver.label
    swept = patch(model, "all", key, SEEN, UNSEEN, **options)
    assert swept.top(1).node[0] == writer
    assert [label for label in swept.labels if abs(swept[label]) > 1e-3] == [writer]
    direct = patch(model, "heads", "logits", SEEN, UNSEEN, **options)
    assert direct[reader] == pytest.approx(whole.values[0], rel=0.02)
    assert [label for label in direct.labels if abs(direct[label]) > 1e-3] == [reader]
    note = patch(model, writer, key, SEEN, UNSEEN, sender_positions=2, **options).values[0]
    assert note == pytest.approx(whole.values[0], abs=1e-3)  # the note at token 5 is the one


# --- Shortcuts, directions, several pairs ---------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_shortcuts_do_not_change_the_numbers(name, monkeypatch):
    model = built(name)
    ends = ["1.1.k", "2.0.v", "mlp 1", "logits"]
    quick = patch(model, "all", ends)
    single = patch(model, "all", ends, max_tokens=1)
    plain = Abilities(grows=False, suffix=False, causal=False)
    monkeypatch.setattr(path_patching, "abilities", lambda _: plain)
    slow = patch(model, "all", ends)
    assert quick.passes < slow.passes < single.passes
    assert np.allclose(quick.values, slow.values, atol=1e-9)
    assert np.allclose(quick.values, single.values, atol=1e-9)


def test_denoising_is_noising_with_the_prompts_exchanged():
    model, metric = built("llama"), logit_of(9)
    one = patch(model, "heads", "2.1.v", direction="denoising", metric=metric)
    two = patch(model, "heads", "2.1.v", CORRUPTED, CLEAN, metric=metric)
    assert np.array_equal(one.values, two.values)
    assert (one.base, one.other) == (two.base, two.other)
    assert one.tokens == two.tokens


def test_several_pairs_are_averaged():
    model = built("gpt2")
    pairs = [(CLEAN, CORRUPTED), (CORRUPTED, CLEAN.flip(0)), (CLEAN[:5], CLEAN[1:6])]
    singles = [patch(model, "heads", "mlp 2", *pair).values for pair in pairs]
    clean, corrupted = ([pair[i].tolist() for pair in pairs] for i in (0, 1))
    result = patch(model, "heads", "mlp 2", clean, corrupted)
    assert np.allclose(result.values, np.mean(singles, 0))
    assert np.allclose(result.stderr, np.std(singles, 0, ddof=1) / 3**0.5)
    assert (result.low <= result.values).all() and (result.values <= result.high).all()
    assert result.count == 3
    assert result.tokens == ()


def test_a_metric_that_reads_before_the_first_difference():
    model = built("gpt2")
    result = patch(model, ["0.1"], "all", metric=lambda logits: logits[0, 0, 7])
    assert result.values[0] == 0.0


def test_text_and_tokens():
    tokenizer = families.tiny_tokenizer()
    model = families.build("gpt2")
    result = patch_paths(
        model, tokenizer, "the cat sat", "the sat sat", "heads", "logits",
        answer=" sat", foil=" cat", show_progress=False,
    )  # fmt: skip
    assert result.tokens == ("t", "he", " cat", " sat")
    assert (result.answer, result.foil) == (" sat", " cat")
    assert result.unit == "logits"


# --- What can be wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "senders", "receivers", "error", "match"),
    [
        ("gpt2", "head 3", "logits", InputError, r"is no part of a model; write '9\.6'"),
        ("gpt2", [], "logits", InputError, "no node in an empty list"),
        ("gpt2", "logits", "logits", InputError, "writes nothing"),
        ("gpt2", "0.1.q", "logits", InputError, "writes nothing"),
        ("gpt2", "0.4", "logits", InputError, "block 0 has 4 heads"),
        ("gpt2", "3.1", "logits", LayerError, r"0\.\.2"),
        ("gpt2", [["0.1", "0.1"]], "logits", InputError, "named once"),
        ("gpt2", "0.1", "embed", InputError, "the embedding reads nothing"),
        ("gpt2", "0.1", [], InputError, "there is no receiver"),
        ("gpt2", "0.1", ("h.7", 1, "q"), LayerError, r"the nearest is"),
        ("llama", "0.1", "1.3.k", InputError, r"key/value head 1: write '1\.1\.k'"),
        ("llama", "0.1", "1.3", InputError, r"write '1\.3\.q', '1\.1\.k'"),
        ("mamba", "heads", "logits", SiteError, "no site 'head_out'"),
        ("mamba", "0.1", "logits", InputError, "write 'attn 0'"),
        ("mamba", "attn 0", "mlp 1", SiteError, "no site 'mlp_out'"),
    ],
)
def test_bad_nodes_say_what_to_write(name, senders, receivers, error, match):
    model = built(name)
    with pytest.raises(error, match=match):
        patch(model, senders, receivers)
    assert count_hooks(model) == 0


def test_prompts_of_different_length_are_refused_with_their_tokens():
    with pytest.raises(InputError, match=r"8 and 3 tokens.*\['<\d+>'.*\] and \['<\d+>'"):
        patch(built("gpt2"), "heads", "logits", CLEAN, CLEAN[:3])


def test_other_requests_that_make_no_sense():
    model = built("gpt2")
    with pytest.raises(InputError, match="direction is 'noising' or 'denoising'"):
        patch(model, "heads", "logits", direction="both")
    with pytest.raises(InputError, match="no metric 'fun'"):
        patch(model, "heads", "logits", metric="fun")
    with pytest.raises(InputError, match="position 8 is out of range"):
        patch(model, "heads", "logits", sender_positions=8)


def test_a_failure_leaves_the_model_untouched():
    model = built("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def breaks(logits):
        calls.append(logits)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return logits[0, -1, 0]

    with pytest.raises(KeyboardInterrupt):
        patch(model, "all", "all", metric=breaks)
    assert count_hooks(model) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "forward" not in model.transformer.h[0].__dict__


def test_bfloat16_agrees_with_float64_within_its_rounding():
    truth = patch(built("llama"), "all", "all").values
    assert np.allclose(
        patch(families.build("llama").bfloat16(), "all", "all").values, truth, atol=0.1
    )


def test_a_model_in_training_mode_is_patched_without_dropout():
    model = families.build("gpt2")
    expected = patch(model, "heads", "1.1.q").values
    model.train()
    assert np.array_equal(patch(model, "heads", "1.1.q").values, expected)
    assert model.training and all(module.training for module in model.modules())


# --- Spellings and results ------------------------------------------------------------------------


def test_spellings_of_a_node():
    arch = Architecture(built("llama"))
    head = Node("head", 2, 3)
    for spelled in ("2.3", "-1.3", "2.-1", (2, 3), ("layers.2", 3), ("model.layers.2", -1), head):
        assert parse_node(arch, spelled) == head
    for spelled in ("1.1.k", (1, 1, "k"), ("layers.1", -1, "k")):
        assert parse_node(arch, spelled) == Node("key", 1, 1)
    for spelled in (
        "mlp 1",
        "mlp.1",
        "mlp1",
        ("mlp", 1),
        ("mlp", "layers.1"),
        "mlp model.layers.1",
    ):
        assert parse_node(arch, spelled) == Node("mlp", 1)
    everything = [*sender_groups(arch, "all"), *sender_groups(arch, "blocks"),
                  *((node,) for node in receiver_nodes(arch, "all"))]  # fmt: skip
    for (node,) in everything:
        assert parse_node(arch, node.label) == node
    assert len(receiver_nodes(arch, "all")) == 3 * (4 + 2 + 2 + 1) + 1
    assert set(receiver_nodes(arch, "blocks")) == set(receiver_nodes(arch, ["attns", "mlps"]))
    assert receiver_nodes(arch, "block 1") == receiver_nodes(arch, ["attn 1", "mlp 1"])
    assert receiver_nodes(Architecture(built("mamba")), "block 1") == (Node("attn", 1),)
    sides = [Node(kind, 1, 2) for kind in ("query", "key", "value")]
    assert receiver_nodes(Architecture(built("gpt2")), "1.2") == tuple(sides)


def test_a_result_is_drawn_tabulated_and_kept(tmp_path):
    result = patch(built("gpt2"), "all", ["2.1.q", "mlp 2"])
    assert repr(result) == "PathEffects(16 senders → 2.1.q, mlp 2, noising, distance)"
    table, rows, columns = result.grid()
    assert rows == ("embed", "0", "1", "2")
    assert columns == ("0", "1", "2", "3", "mlp", "embed")
    assert table[2, 3] == result["1.3"]
    assert table[1, 4] == result["mlp 0"]
    assert table[0, 5] == result["embed"]
    assert np.isnan(table[0, 0]) and np.isnan(table[1, 5])
    frame = result.to_frame()
    assert len(frame) == 16
    assert frame.set_index("node").loc["1.3", ["kind", "layer", "head"]].tolist() == ["head", 1, 3]
    top = result.top(3)
    assert top.value.abs().is_monotonic_decreasing
    assert top.value[0] == result.values[np.abs(result.values).argmax()]
    result.save(tmp_path / "paths")
    again = PathEffects.load(tmp_path / "paths")
    assert repr(again) == repr(result)
    for name in ("groups", "receivers", "tokens", "source_tokens", "base", "other", "passes"):
        assert getattr(again, name) == getattr(result, name)
    assert np.array_equal(again.values, result.values)
    assert result.plot().axes[0].get_title() == "16 senders → 2.1.q, mlp 2, noising"
    with pytest.raises(InputError, match=r"no entry '9\.9'"):
        result["9.9"]


def test_senders_that_go_together_are_one_entry():
    result = patch(built("gpt2"), [["0.1", "0.2"], "mlp 1"], "logits")
    assert result.labels == ("0.1 + 0.2", "mlp 1")
    assert result.grid()[1] == result.labels
    assert result.to_frame().layer.isna().tolist() == [True, False]
    assert result.plot().axes
