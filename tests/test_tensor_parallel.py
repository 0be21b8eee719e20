"""A model that two processes run together (``tp_plan="auto"``): the numbers of a single process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import families
from long_calls import CALLS, WEIGHTS
from memory_limits import NotEnoughMemoryError, in_batches, share_passes
from model_architecture import Architecture
from model_shards import count_parts, find_mesh, require_whole, smallest, whole_weight

WORKER = Path(__file__).with_name("tensor_parallel_worker.py")
SECONDS = 240
SOME_CALLS = ("extraction", "sweep", "paths", "lens", "features", "generation", "head writes")
SHARDED = ("head_out", "query", "key", "value", "attn_pattern", "mlp_neurons")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def launched(folder, *calls):
    """What each of two processes reports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), *calls],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


def check(folder, name, calls):
    families.build(name).save_pretrained(folder)
    families.tiny_tokenizer().save_pretrained(folder)
    for report in launched(folder, *calls):
        assert report.pop("processes") == 2
        said = report.pop("said")
        message = report.pop("out of memory")
        assert "3 prompts at a time" in message
        assert "smaller batch_size" in message
        assert {f"call: {call}" for call in calls} < set(report)
        for what, found in report.items():
            if what.removeprefix("call: ") in WEIGHTS:
                assert found["error"] == "ArchitectureError", what
                assert "split over 2 processes: load the model without tp_plan" in found["message"]
                continue
            assert "error" not in found, (what, found)
            assert found["difference"] <= 1e-5 * max(found["largest"], 1), (what, found)
            assert found["largest"] > 0 or what == "compared weights", what
    return report, said


def test_two_processes_give_the_numbers_of_one(tmp_path):
    report, said = check(tmp_path, "llama", SOME_CALLS)
    assert said == [
        "heads, key/value heads, neurons are split over 2 processes, and gathered for every site"
    ]
    for name in SHARDED:
        assert {f"record {name}", f"edit {name}", f"gradient {name}"} < set(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mixtral", "qwen2_moe", "qwen3", "gemma2", "cohere", "granite", "gpt_neox", "phi3", "olmo2"],
)
def test_every_way_to_split_a_model(tmp_path, name):
    """Experts, query norms, norms after, parallel blocks, fused projections, gathered ones."""
    report, _ = check(tmp_path, name, ("sweep", "lens"))
    assert {"record head_out", "edit head_out", "record key", "edit value"} < set(report)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_every_call_in_two_processes(tmp_path, part):
    check(tmp_path, "llama", sorted(CALLS)[part::3])


@pytest.mark.slow
def test_a_family_without_a_plan_is_refused(tmp_path):
    families.build("gpt2").save_pretrained(tmp_path)
    families.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match=r"ModelLoadError: cannot load .* has no `tp_plan`"):
        launched(tmp_path)


def test_a_model_in_one_process_is_whole():
    model = families.build("llama")
    assert find_mesh(model) is None
    require_whole(model, "anything")
    assert whole_weight(model.lm_head.weight) is model.lm_head.weight
    assert smallest(model, 7) == 7
    assert count_parts(model, torch.ones(2)) == 1
    found = Architecture(model).structure[0]
    assert (found.head_parts, found.kv_head_parts, found.neuron_parts) == (1, 1, 1)


def test_no_batch_is_halved_while_other_processes_wait_for_it():
    """In them it would stay whole, and both would wait for the other for ever."""
    model, sizes, needs = torch.nn.Linear(1, 1), [], []

    def run(batch):
        sizes.append(len(batch))
        raise MemoryError

    share_passes(model)
    with pytest.raises(NotEnoughMemoryError, match=r"4 things at a time .* split over processes"):
        list(in_batches([[1, 2, 3, 4]], run, unit="things", needs=needs.append))
    assert sizes == [4]
    assert needs == [], "what it needs is found out by a pass, which the others do not join"
    del model
    with pytest.warns(UserWarning), pytest.raises(NotEnoughMemoryError, match="one of the things"):
        list(in_batches([[1, 2]], run, unit="things"))
