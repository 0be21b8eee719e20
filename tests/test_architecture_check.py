"""The public check passes on what is right and fails on what is wrong."""

import dataclasses

import pytest
import torch

import families
from architecture_check import ArchitectureReport, Proof, check_architecture
from forward_pass import ArchitectureError
from model_architecture import _KNOWN, Architecture


def test_every_family_passes(family):
    name, model = family
    report = check_architecture(Architecture(model))
    assert report.passed, str(report)
    checked = {proof.name for proof in report.proofs if proof.passed}
    assert {"resume", "parts", "identity"} <= checked
    assert ("heads" in checked) == (name != "mamba")
    exact = {proof.name: proof.difference for proof in report.proofs}
    assert exact["resume"] == exact["identity"] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_pass_with_their_own_rounding(dtype):
    for name in ("gpt2", "gemma2", "granite"):
        report = check_architecture(Architecture(families.build(name).to(dtype)))
        assert report.passed, str(report)


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({"attn_writer": "post_attention_layernorm"}, "parts"),
        ({"mlp_writer": "self_attn"}, "parts"),
        ({"scale": 0.5}, "parts"),
        ({"n_kv_heads": 4}, None),
    ],
)
def test_a_wrong_structure_is_found_out(changes, failing):
    model = families.build("llama")
    architecture = Architecture(model)
    wrong = tuple(dataclasses.replace(found, **changes) for found in architecture.structure)
    fingerprint, found = _KNOWN[model]
    _KNOWN[model] = (fingerprint, dataclasses.replace(found, blocks=wrong))
    report = check_architecture(Architecture(model))
    failed = [proof.name for proof in report.proofs if proof.passed is False]
    assert failed == ([failing] if failing else [])
    if failing:
        with pytest.raises(ArchitectureError, match=f"{failing} +FAILED"):
            report.raise_if_failed()


def test_a_base_model_is_checked_without_its_head():
    model = families.build("gpt2").transformer
    report = check_architecture(Architecture(model))
    assert report.passed
    assert "resume" not in {proof.name for proof in report.proofs}


def test_the_report_reads_as_a_table():
    report = check_architecture(Architecture(families.build("mamba")))
    assert "resume             passed         0.0e+00" in str(report)
    assert "heads              not applicable" in str(report)
    assert "mlp_out: it has a single writer" in str(report)
    assert repr(report) == "ArchitectureReport(MambaForCausalLM, 3 layers, 8 proofs: passed)"
    failed = ArchitectureReport("X", 1, (Proof("parts", 2.0, 1.0),), ())
    assert repr(failed).endswith("1 FAILED)")
    assert not failed.passed


def test_a_model_with_nan_does_not_pass():
    for model in (families.build("llama"), families.build("llama").model):
        body = getattr(model, "model", model)
        with torch.no_grad():
            body.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
        report = check_architecture(Architecture(model))
        assert not report.passed
        assert report.proofs[0].passed is False
