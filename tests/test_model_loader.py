"""Loading and inspecting: against the model that was saved, and checkpoints broken on purpose."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import families
import model_loader
from forward_pass import ArchitectureError, InputError, LayerError
from model_loader import (
    ModelInspector,
    ModelLoadError,
    compare_architectures,
    find_module,
    load_model,
    load_model_from_path,
    usable_device,
    weights_of,
)

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = {
    "model_type": "llama",
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 128,
    "activation_function": "silu",
}


def save(model, folder, tokenizer=True):
    model.save_pretrained(folder)
    if tokenizer:
        families.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2():
    return families.build("gpt2")


@pytest.fixture(scope="module")
def llama():
    return families.build("llama")


@pytest.fixture(scope="module")
def gpt2_folder(gpt2, tmp_path_factory):
    return save(gpt2, tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="module")
def llama_folder(llama, tmp_path_factory):
    return save(llama, tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def broken(gpt2_folder, tmp_path):
    """A copy of a good checkpoint, for the test to break."""
    return Path(shutil.copytree(gpt2_folder, tmp_path / "broken"))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same_weights(a, b):
    mine, yours = a.state_dict(), b.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[k], yours[k]) for k in mine)


@pytest.fixture
def received(monkeypatch):
    """The keyword arguments of every `from_pretrained`, by the class that got them."""
    calls = []
    for kind in (AutoModelForCausalLM, AutoModel, AutoTokenizer, transformers.AutoConfig):
        real = kind.from_pretrained

        def spy(*args, _kind=kind, _real=real, **kwargs):
            calls.append((_kind.__name__, kwargs))
            return _real(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", spy)
    return calls


# --- From a folder --------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_saved(gpt2, gpt2_folder):
    model, tokenizer = load_model(gpt2_folder, "cpu")
    assert same_weights(model, gpt2)
    assert not model.training
    assert tokenizer("the cat")["input_ids"] == families.tiny_tokenizer()("the cat")["input_ids"]
    with torch.no_grad():
        ids = families.token_ids(1, 7)
        assert torch.equal(model(ids).logits, gpt2(ids).logits)


def test_a_folder_is_read_without_network_and_once(gpt2_folder, received, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection to {args[1:]}")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_model(gpt2_folder, "cpu")
    names = [name for name, _ in received]
    assert set(names) == {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"}
    assert names.count("AutoModelForCausalLM") == names.count("AutoTokenizer") == 1
    assert all(kwargs["local_files_only"] is True for _, kwargs in received)


def test_code_of_a_model_is_not_run_unless_asked_for(gpt2_folder, received):
    load_model(gpt2_folder, "cpu")
    ModelInspector(gpt2_folder)
    assert {kwargs["trust_remote_code"] for _, kwargs in received} == {False}
    received.clear()
    load_model(gpt2_folder, "cpu", trust_remote_code=True)
    ModelInspector(gpt2_folder, trust_remote_code=True)
    assert {kwargs["trust_remote_code"] for _, kwargs in received} == {True}


def test_a_model_with_code_of_its_own_names_the_switch(broken):
    own = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (broken / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (broken / "code.py").write_text("raise SystemExit('run!')")
    with pytest.raises(ModelLoadError, match="pass trust_remote_code=True"):
        load_model(broken)


def test_options_reach_every_part(gpt2_folder, received):
    load_model(gpt2_folder, "cpu", revision="v1", attn_implementation="eager")
    assert {kwargs["revision"] for _, kwargs in received} == {"v1"}
    assert dict(received)["AutoModelForCausalLM"]["attn_implementation"] == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype(gpt2_folder, dtype):
    model, _ = load_model(gpt2_folder, "cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_keeps_its_own_dtype(tmp_path):
    folder = save(families.build("gpt2").to(torch.bfloat16), tmp_path)
    assert load_model(folder, "cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_map(gpt2, gpt2_folder, device_map):
    model, _ = load_model(gpt2_folder, device_map=device_map)
    assert same_weights(model, gpt2)
    inspected, _ = ModelInspector(gpt2_folder, device_map=device_map).load_model()
    assert same_weights(inspected, gpt2)


def test_device_and_device_map_contradict_each_other(gpt2_folder):
    with pytest.raises(InputError, match="device= or device_map=, not both"):
        load_model(gpt2_folder, "cpu", device_map="cpu")


def test_a_quantized_model_is_put_in_place_and_not_moved(gpt2, gpt2_folder, monkeypatch):
    """It cannot be moved afterwards: bitsandbytes refuses `.to`."""
    calls = []

    def stand_in(*args, **kwargs):
        calls.append(kwargs)
        return gpt2, {"missing_keys": set(), "mismatched_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stand_in)
    monkeypatch.setattr(type(gpt2), "to", lambda *_: pytest.fail("moved"))
    quantization = object()
    load_model(gpt2_folder, "cpu", quantization_config=quantization)
    assert calls[0]["quantization_config"] is quantization
    assert calls[0]["device_map"] == {"": torch.device("cpu")}


def test_the_device_is_checked_before_anything_is_read(gpt2_folder, received):
    with pytest.raises(InputError, match=r"no device 'gpu'; here are: .*cpu"):
        load_model(gpt2_folder, "gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"finds no device 'cuda'; here are: .*cpu"):
            load_model(gpt2_folder, "cuda")
    assert received == []


def test_the_default_device_is_the_fastest_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert usable_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert usable_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usable_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"finds no device 'cuda:2'; here are: cuda, mps, cpu"):
        usable_device("cuda:2")


def test_without_a_head(llama, llama_folder, tmp_path):
    model, _ = load_model(llama_folder, "cpu", head=False)
    assert same_weights(model, llama.model)
    folder = save(llama.model, tmp_path)
    model, _ = load_model(folder, "cpu", head=False)
    assert same_weights(model, llama.model)
    with pytest.raises(ModelLoadError, match=r"lm_head.weight.*use|lm_head.weight.*load_for_gen"):
        load_model(folder, "cpu")


def test_load_model_from_path(gpt2, gpt2_folder):
    model, tokenizer = load_model_from_path(str(gpt2_folder))
    assert same_weights(model, gpt2)
    assert len(tokenizer) == families.VOCAB
    assert model.device == torch.device("cpu")


CHECK_MEMORY = """
import sys, torch
from pathlib import Path
from transformers.models.gpt2 import modeling_gpt2
from model_loader import load_model

def peak():  # getrusage would count the parent's memory too
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
before = peak()
model, _ = load_model(sys.argv[1], "cpu", load_tokenizer=False)
total = sum(float(p.sum()) for p in model.parameters())  # read it all, should it be mapped
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / size, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_checkpoint_is_not_held_twice(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=1000, n_embd=1024, n_layer=8, n_head=8, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CHECK_MEMORY, tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    growth, size = map(float, done.stdout.split())
    assert size > 400e6
    assert 0.9 < growth < 1.3


# --- What cannot be loaded ------------------------------------------------------------------------


def test_a_missing_folder_names_the_nearest(gpt2_folder):
    with pytest.raises(ModelLoadError, match=r"no folder .*/gpt3; did you mean .*/gpt2\?"):
        load_model(gpt2_folder.with_name("gpt3"))
    with pytest.raises(ModelLoadError, match=r"no folder .*nowhere/gpt2 \(nor .*nowhere\)"):
        load_model(gpt2_folder.parent / "nowhere" / "gpt2")


def test_a_hub_id_that_cannot_be_reached_says_that_it_was_taken_for_one():
    with pytest.raises(
        ModelLoadError, match=r"models/gpt3 \(no folder here, so taken as a hub id\)"
    ):
        load_model("models/gpt3")


@pytest.mark.parametrize("source", [None, 5, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_by_its_type(source):
    with pytest.raises(InputError, match=f"not {type(source).__name__}"):
        load_model(source)


def test_a_folder_or_file_without_a_model(gpt2_folder, tmp_path):
    with pytest.raises(ModelLoadError, match=r"folder without config.json"):
        load_model(tmp_path)
    with pytest.raises(ModelLoadError, match="is a file; give the folder"):
        load_model(gpt2_folder / "config.json")


BROKEN_CONFIGS = ["{", "{}", "[]", "null", "5", '{"model_type": "nonsense"}', '{"model_type": []}',
                  '{"model_type": "gpt2", "n_layer": "three"}']  # fmt: skip


@pytest.mark.parametrize("content", BROKEN_CONFIGS)
def test_a_broken_config(broken, content):
    (broken / "config.json").write_text(content)
    for load in (load_model, ModelInspector):
        with pytest.raises(ModelLoadError, match=r"cannot read the config of .*broken"):
            load(broken)


def test_a_folder_without_weights(broken):
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"cannot load the weights of .*model.safetensors"):
        load_model(broken)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_weights(broken, keep):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"weights of .*broken or truncated"):
        load_model(broken)


def test_weights_that_are_no_weights(broken):
    (broken / "model.safetensors").write_bytes(b"garbage " * 50)
    with pytest.raises(ModelLoadError, match=r"weights of .*broken or truncated"):
        load_model(broken)
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"garbage " * 50)
    with pytest.raises(ModelLoadError, match="broken: no PyTorch file of plain tensors"):
        load_model(broken)


@pytest.mark.parametrize("content", [b"", [1, 2], None])
def test_an_empty_or_strange_pytorch_file(broken, content):
    (broken / "model.safetensors").unlink()
    file = broken / "pytorch_model.bin"
    file.write_bytes(content) if content == b"" else torch.save(content, file)
    with pytest.raises(ModelLoadError, match=r"cannot load the weights of .*broken: .*\w"):
        load_model(broken)


def test_a_config_that_no_model_can_be_made_from(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"activation_function": "zzz"}))
    with pytest.raises(ModelLoadError, match=r"cannot load the weights of .*: KeyError 'zzz'"):
        load_model(broken)


def test_a_missing_shard(broken, gpt2):
    (broken / "model.safetensors").unlink()
    gpt2.save_pretrained(broken, max_shard_size="20KB")
    shards = sorted(broken.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert same_weights(load_model(broken, "cpu")[0], gpt2)
    shards[1].unlink()
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        load_model(broken)


def test_missing_weights_are_an_error_and_not_random_numbers(broken):
    edit_weights(broken, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights .*h\.1\.mlp\.c_fc\.weight.*random"):
        load_model(broken)


def test_weights_of_another_shape_are_an_error_even_where_ignored(broken):
    wrong = {"transformer.h.1.mlp.c_fc.weight": torch.zeros(3, 3)}
    edit_weights(broken, lambda tensors: tensors.update(wrong))
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        load_model(broken)
    with pytest.raises(ModelLoadError, match=r"h\.1\.mlp\.c_fc\.weight.*random"):
        load_model(broken, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "qwen2"])
def test_a_missing_tokenizer_is_an_error_and_not_an_empty_one(tmp_path, name):
    """Some classes make a tokenizer without vocabulary from nothing: no text would have a token."""
    folder = save(families.build(name), tmp_path, tokenizer=False)
    with pytest.raises(ModelLoadError, match=r"tokenizer.*pass tokenizer=.*load_tokenizer=False"):
        load_model(folder, "cpu")
    assert load_model(folder, "cpu", load_tokenizer=False)[1] is None
    own = families.tiny_tokenizer()
    assert load_model(folder, "cpu", tokenizer=own)[1] is own


@pytest.mark.parametrize("content", ["", "{", "{}", '{"added_tokens": [], "model": {}}'])
def test_a_broken_tokenizer_is_said_before_the_weights_are_read(broken, received, content):
    (broken / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"cannot load a tokenizer from .*broken"):
        load_model(broken)
    assert "AutoModelForCausalLM" not in dict(received)


def test_an_encoder_decoder_is_refused(tmp_path, received):
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
    )
    save(transformers.T5ForConditionalGeneration(config), tmp_path)
    with pytest.raises(ArchitectureError, match=r"t5.* is an encoder-decoder"):
        load_model(tmp_path)
    assert dict(received).keys() == {"AutoConfig"}
    with pytest.raises(ArchitectureError, match=r"t5.* is an encoder-decoder"):
        ModelInspector(tmp_path).get_layer_names()


# --- A live model ---------------------------------------------------------------------------------


def test_a_live_model_is_used_as_it_is(gpt2, received):
    own = families.tiny_tokenizer()
    model, tokenizer = load_model(gpt2, tokenizer=own)
    assert model is gpt2
    assert tokenizer is own
    assert load_model(gpt2) == (gpt2, None)
    assert received == []


def test_a_live_model_from_a_folder_finds_its_tokenizer(gpt2_folder):
    live = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    _, tokenizer = load_model(live, "cpu")
    assert len(tokenizer) == families.VOCAB


def test_a_live_model_is_not_moved_or_converted(gpt2):
    with pytest.raises(
        InputError, match="dtype cannot be used with a model that is already loaded"
    ):
        load_model(gpt2, dtype=torch.bfloat16)
    with pytest.raises(
        InputError, match=r"lies on cpu, not on meta; move it with model.to\('meta'\)"
    ):
        load_model(gpt2, "meta")


# --- Inspection -----------------------------------------------------------------------------------


def test_questions_about_the_config_and_shapes_need_no_weights(llama, llama_folder, tmp_path):
    folder = Path(shutil.copytree(llama_folder, tmp_path / "m"))
    (folder / "model.safetensors").unlink()
    inspector = ModelInspector(folder)
    assert inspector.get_architecture_summary() == SUMMARY
    assert inspector.get_model_config()["intermediate_size"] == 48
    assert inspector.get_num_layers() == 3
    assert inspector.get_layer_names() == [f"model.layers.{i}" for i in range(3)]
    assert inspector.get_parameter_count() == ModelInspector(llama).get_parameter_count()
    assert compare_architectures([folder])[str(folder)] == SUMMARY | {
        "total_parameters": sum(p.numel() for p in llama.parameters())
    }
    with pytest.raises(ModelLoadError, match="cannot load the weights"):
        inspector.get_attention_layer_names()


def test_shapes_without_a_head(llama, llama_folder):
    inspector = ModelInspector(llama_folder, head=False)
    without = inspector.get_parameter_count()["total"]
    assert without == sum(p.numel() for p in llama.model.parameters())
    assert inspector.get_layer_names() == [f"model.layers.{i}" for i in range(3)]
    inspector.load_model()
    assert inspector.get_parameter_count()["total"] == without


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "gemma2", "llama", "mixtral"])
def test_parameters_are_counted_once(name, tmp_path):
    model = families.build(name)
    unique = {t.data_ptr(): t for t in model.state_dict(keep_vars=True).values()}
    arrays = [t.detach().numpy() for t in unique.values() if isinstance(t, torch.nn.Parameter)]
    expected = int(np.sum([array.size for array in arrays]))
    assert ModelInspector(model).get_parameter_count()["total"] == expected
    assert ModelInspector(save(model, tmp_path)).get_parameter_count()["total"] == expected


def test_frozen_parameters_are_counted_apart_also_after_loading(gpt2_folder):
    inspector = ModelInspector(gpt2_folder)
    counted = inspector.get_parameter_count()
    assert counted["trainable"] == counted["total"]
    model, _ = inspector.load_model()
    model.transformer.wpe.requires_grad_(False)
    positions = families.POSITIONS * families.HIDDEN
    assert inspector.get_parameter_count() == {
        "total": counted["total"],
        "trainable": counted["total"] - positions,
        "non_trainable": positions,
    }


def test_the_summary_says_what_the_modules_are(family):
    """Sizes against the modules' own; None only where the config does not say."""
    name, model = family
    summary = ModelInspector(model).get_architecture_summary()
    assert list(summary) == list(SUMMARY)
    assert summary["num_layers"] == families.FAMILIES[name].layers
    embedding = model.get_input_embeddings().weight
    assert (summary["vocab_size"], summary["hidden_size"]) == tuple(embedding.shape)
    widths = {n for p in model.parameters() for n in p.shape}
    silent = {"bloom": {"intermediate_size", "activation_function", "max_position_embeddings"},
              "mpt": {"intermediate_size", "activation_function"},
              "mamba": {"num_attention_heads", "head_dim", "max_position_embeddings"}}  # fmt: skip
    assert {key for key, value in summary.items() if value is None} == silent.get(name, set())
    if name not in silent:
        assert summary["intermediate_size"] in widths
        if name not in ("gpt2", "gptj", "gpt_neo", "opt"):  # their head size is no one's argument
            assert summary["head_dim"] * families.HEADS in widths


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo"])
def test_an_intermediate_size_of_none_means_four_times_the_width(name):
    key = "n_inner" if name == "gpt2" else "intermediate_size"
    model = families.build(name, **{key: None})
    summary = ModelInspector(model).get_architecture_summary()
    down = model.get_submodule("transformer.h.0.mlp.c_proj").weight
    assert summary["intermediate_size"] == max(down.shape) == 128


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("gpt2", "transformer.h.{}.attn", "transformer.h.{}.mlp"),
        ("llama", "model.layers.{}.self_attn", "model.layers.{}.mlp"),
        ("gpt_neox", "gpt_neox.layers.{}.attention", "gpt_neox.layers.{}.mlp"),
    ],
)
def test_names_of_attention_and_mlp(name, attention, mlp):
    inspector = ModelInspector(families.build(name))
    assert inspector.get_attention_layer_names() == [attention.format(i) for i in range(3)]
    assert inspector.get_mlp_layer_names() == [mlp.format(i) for i in range(3)]


def test_a_model_without_attention_has_no_attention_names():
    assert ModelInspector(families.build("mamba")).get_attention_layer_names() == []


@pytest.mark.parametrize(
    "name", [1, "1", -2, np.int64(1), "h.1", "transformer.h.1", " h.1 ".strip()]
)
def test_a_block_is_found_by_every_spelling(gpt2, name):
    for model in (gpt2, gpt2.transformer):
        inspector = ModelInspector(model)
        assert inspector.get_layer_by_name(name) is gpt2.transformer.h[1]
        weights = inspector.get_weights_by_layer(name)
        assert torch.equal(weights["mlp.c_fc.weight"], gpt2.transformer.h[1].mlp.c_fc.weight)


def test_any_module_is_found_by_its_name(gpt2, family):
    for name in ("h.2.attn.c_proj", "transformer.h.2.attn.c_proj", "2.attn.c_proj"):
        for model in (gpt2, gpt2.transformer):
            assert find_module(model, name) is gpt2.transformer.h[2].attn.c_proj
    _, model = family
    for path, module in model.named_modules():
        if path:
            assert find_module(model, path) is module


def test_a_module_that_is_not_there_names_the_nearest(gpt2):
    with pytest.raises(LayerError, match=r"nearest is 'transformer\.h\.2\.attn\.c_proj'"):
        find_module(gpt2, "h.2.attn.c_prj")
    with pytest.raises(LayerError, match=r"layer 3 is out of range.* valid are 0\.\.2 or -3\.\.-1"):
        find_module(gpt2, 3)
    with pytest.raises(LayerError, match=r"fits 3 modules, from 'transformer\.h\.0\.attn' to"):
        find_module(gpt2, "attn")
    for nothing in ("", ".", "xyz", "h"[:0]):
        with pytest.raises(LayerError):
            find_module(gpt2, nothing)


def test_weights_are_the_models_own_and_ask_for_no_gradient(gpt2):
    norm = gpt2.transformer.ln_f
    weights = weights_of(norm)
    assert list(weights) == ["weight", "bias"]
    assert weights["weight"].data_ptr() == norm.weight.data_ptr()
    assert not weights["weight"].requires_grad


def test_the_inspector_loads_once_and_the_tokenizer_when_asked(gpt2_folder, received):
    inspector = ModelInspector(gpt2_folder)
    model, tokenizer = inspector.load_model(load_tokenizer=False)
    assert tokenizer is None
    again, tokenizer = inspector.load_model()
    assert again is model is inspector.model
    assert len(tokenizer) == families.VOCAB
    assert [name for name, _ in received].count("AutoModelForCausalLM") == 1
    assert repr(inspector) == f"ModelInspector({str(gpt2_folder)!r}, loaded)"


def test_the_summary_is_printed_with_the_number_of_parameters(gpt2, gpt2_folder, capsys):
    ModelInspector(gpt2_folder).print_architecture_summary()
    printed = capsys.readouterr().out
    assert f"{sum(p.numel() for p in gpt2.parameters()):,}" in printed
    assert "num_layers" in printed
    ModelInspector(gpt2).print_architecture_summary()
    assert capsys.readouterr().out.startswith("Architecture of GPT2LMHeadModel\n")


def test_models_of_one_name_are_all_compared(gpt2, gpt2_folder, llama_folder):
    other = families.build("gpt2", n_inner=64)
    table = compare_architectures([gpt2, other, gpt2_folder, llama_folder])
    first, second, *paths = table
    assert first == "GPT2LMHeadModel"
    assert second == "GPT2LMHeadModel (2)"
    assert paths == [str(gpt2_folder), str(llama_folder)]
    assert [row["intermediate_size"] for row in table.values()] == [48, 64, 48, 48]
    with pytest.raises(ModelLoadError):
        compare_architectures([gpt2_folder, gpt2_folder.with_name("gpt3")])


def test_looking_leaves_config_and_random_state_alone(llama_folder):
    inspector = ModelInspector(llama_folder)
    config, state = inspector.config.to_dict(), torch.random.get_rng_state()
    inspector.get_parameter_count()
    inspector.get_layer_names()
    assert inspector.config.to_dict() == config
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_demo_model_lies_beside_the_code():
    assert model_loader.DEMO_MODEL == ROOT / "demo_model"
