"""The text part of a vision-language model, and a model with adapters, like any other."""

import copy

import pytest
import torch
import transformers

import families
import model_zoo
from architecture_check import check_architecture
from forward_pass import Site, record
from model_analyzer import ModelAnalyzer
from model_architecture import Architecture

IDS = torch.tensor([[7, 11, 30, 6, 49, 21, 13]])
TEXT = families.FAMILIES["llama"].kwargs
VISION = {**model_zoo.VISION, "num_hidden_layers": 2}


def llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=16),
        image_token_index=98,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen_vl():
    text = {**TEXT, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
    }
    vision = {"depth": 1, "hidden_size": 32, "embed_dim": 16, "num_heads": 2, "patch_size": 14}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=98)
    return transformers.Qwen2VLForConditionalGeneration(config)


def gemma3():
    return model_zoo.build("gemma3")


@pytest.fixture(params=[llava, qwen_vl, gemma3], scope="module")
def vision_model(request):
    with torch.random.fork_rng(devices=[]):
        model = request.param()
    model_zoo.randomize(model, torch.Generator().manual_seed(0))
    return model.eval()


def plain_logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def text_layers(model):
    return model.get_submodule("model.language_model.layers")


def test_the_text_part_is_found_and_proven(vision_model):
    architecture = Architecture(vision_model)
    assert [*architecture.blocks] == [*text_layers(vision_model)]
    report = check_architecture(architecture)
    assert report.passed, str(report)
    assert {proof.name for proof in report.proofs if proof.passed} >= {"resume", "parts", "heads"}


def test_a_recording_is_what_the_blocks_give(vision_model):
    seen = []
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out: seen.append(out if torch.is_tensor(out) else out[0])
        )
        for block in text_layers(vision_model)
    ]
    logits = plain_logits(vision_model)
    for handle in handles:
        handle.remove()
    sites = [Site("resid_post", layer) for layer in range(len(seen))]
    kept = record(Architecture(vision_model), {"input_ids": IDS}, sites, logits=True)
    torch.testing.assert_close(kept.logits, logits, rtol=0, atol=0)
    for site, expected in zip(sites, seen, strict=True):
        torch.testing.assert_close(kept[site], expected, rtol=0, atol=0)


def test_the_facade_takes_it(vision_model):
    tokenizer = families.tiny_tokenizer()
    analyzer = ModelAnalyzer(vision_model, tokenizer=tokenizer)
    ids = tokenizer("the cat sat on the mat").input_ids
    sweep = analyzer.patching_sweep(ids, [*ids[:2], 30, *ids[3:]], answer=40, foil=12)
    logits = plain_logits(vision_model, torch.tensor([ids]))[0, -1].double()
    assert sweep.clean == pytest.approx(float(logits[40] - logits[12]), rel=1e-5)
    text = analyzer.generate("the cat", max_new_tokens=3, temperature=0)
    expected = tokenizer("the cat", return_tensors="pt").input_ids
    for _ in range(3):
        last = plain_logits(vision_model, expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, last], dim=1)
    assert text == tokenizer.decode(expected[0])


def test_it_loads_from_its_folder(vision_model, tmp_path):
    vision_model.save_pretrained(tmp_path)
    analyzer = ModelAnalyzer(tmp_path, device="cpu", tokenizer=families.tiny_tokenizer())
    assert type(analyzer.model) is type(vision_model)
    torch.testing.assert_close(plain_logits(analyzer.model), plain_logits(vision_model))


# --- Adapters -------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT asks for it
)


@pytest.fixture
def adapted():
    """A Llama with LoRA on projections of attention and MLP, its matrices drawn at random."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(families.build("llama"), config).eval()


def merged(adapted):
    """The same function without adapters, by PEFT's own merging."""
    return copy.deepcopy(adapted).merge_and_unload().eval()


def test_a_model_with_adapters_is_analysed_with_them(adapted):
    architecture = Architecture(adapted.get_base_model())
    report = check_architecture(architecture)
    assert report.passed, str(report)
    plain = merged(adapted)
    torch.testing.assert_close(plain_logits(adapted), plain_logits(plain), rtol=1e-4, atol=1e-3)
    base = families.build("llama")
    assert not torch.allclose(plain_logits(adapted), plain_logits(base), atol=0.1)
    sites = [
        Site(name, layer)
        for layer in range(architecture.n_layers)
        for name in architecture.available_sites(layer)
    ]
    theirs = [
        Site(name, layer)
        for layer in range(architecture.n_layers)
        for name in Architecture(plain).available_sites(layer)
    ]
    assert sites == theirs
    mine = record(architecture, {"input_ids": IDS}, sites)
    expected = record(Architecture(plain), {"input_ids": IDS}, sites)
    for site in sites:
        torch.testing.assert_close(mine[site], expected[site], rtol=1e-3, atol=1e-3, msg=str(site))


def test_heads_and_neurons_are_those_of_the_adapted_projections(adapted):
    architecture = Architecture(adapted.get_base_model())
    assert architecture.structure[0].out_proj == "self_attn.o_proj"
    assert architecture.structure[0].down_proj == "mlp.down_proj"


def test_the_facade_takes_adapters(adapted):
    tokenizer = families.tiny_tokenizer()
    mine = ModelAnalyzer(adapted, tokenizer=tokenizer)
    theirs = ModelAnalyzer(merged(adapted), tokenizer=tokenizer)
    prompts = [[7, 11, 15, 6], [7, 11, 30, 6]]
    sweeps = [
        each.patching_sweep(*prompts, "head_out", answer=40, foil=12) for each in (mine, theirs)
    ]
    torch.testing.assert_close(*(torch.tensor(s.values) for s in sweeps), rtol=1e-3, atol=1e-3)
