"""The comparison with other toolkits, run with ours alone on a tiny model."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import families

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

peer_worker = importlib.import_module("peer_worker")
peers = importlib.import_module("peers")


def cells(table, title, toolkit):
    """One line of a printed table, as its cells."""
    wanted = f"| {title} | {toolkit} |"
    lines = [line for line in table.splitlines() if line.startswith(wanted)]
    assert len(lines) == 1, f"{wanted} occurs {len(lines)} times"
    return [cell.strip() for cell in lines[0].split("|")[3:-1]]


@pytest.mark.slow
def test_ours_on_a_tiny_model_is_plain_hugging_face():
    script = str(ROOT / "benchmarks" / "peers.py")
    arguments = ["--models", "tiny", "--toolkits", "ours", "--rounds", "2"]
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "failed" not in done.stdout
    for row, title in peers.TITLES.items():
        for toolkit in ("plain", "ours"):
            median, spread, count, first, *_, off32, _ = cells(done.stdout, title, toolkit)
            low, high = map(float, spread.split(" – "))
            assert 0 <= low <= float(median) <= high
            assert count == "2"
            assert float(first) >= 0
            if row in ("forward", "record", "sweep", "heads"):
                assert off32 == "0"
            elif row == "lens":
                assert float(off32) < 1e-5
            elif row == "steer":
                assert off32 == "same tokens"
    (ours,) = [line for line in done.stdout.splitlines() if line.startswith("| ours |")]
    assert ours.endswith("| nothing |")


def test_a_change_of_the_model_is_seen():
    model, ids = families.build("gpt2"), families.token_ids(1, 4)
    before = peer_worker.fingerprint(model, ids)
    assert peer_worker.differences(before, peer_worker.fingerprint(model, ids)) == []

    model.transformer.h[0].added = []
    after = peer_worker.fingerprint(model, ids)
    assert peer_worker.differences(before, after) == ["module attributes (new: added)"]
    del model.transformer.h[0].added

    handle = model.transformer.h[1].register_forward_hook(lambda *_: None)
    assert peer_worker.differences(before, peer_worker.fingerprint(model, ids)) == [
        "hooks (0 modules had some, 1 have)"
    ]
    handle.remove()

    model.requires_grad_(False)
    assert peer_worker.differences(before, peer_worker.fingerprint(model, ids)) == [
        "requires_grad ([True] to [False])"
    ]
    model.requires_grad_(True)

    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] += 1e-3
    after = peer_worker.fingerprint(model, ids)
    assert peer_worker.differences(before, after) == ["values of weights", "logits"]


def test_the_largest_difference_is_over_all_tensors_and_shapes_must_agree():
    two = [torch.zeros(2, 3), torch.zeros(4)]
    other = [torch.zeros(1, 2, 3), torch.tensor([0.0, 0, -0.5, 0.25])]
    assert peer_worker.largest_difference(two, other) == 0.5
    with pytest.raises(ValueError, match="shape"):
        peer_worker.largest_difference([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="1 tensors where the reference has 2"):
        peer_worker.largest_difference([torch.zeros(2)], two)


def test_a_peer_ahead_is_listed_and_a_failure_is_shown():
    ours = peers.Measured(0.3, [0.2, 0.4, 0.3], [5.0] * 3, 0.0, 1e-7, 2.0)
    ahead = peers.Measured(0.5, [0.29, 0.1, 0.9], [6.0] * 3, 1e-7, 2e-7, 2.0)
    failed = peers.Measured(error="KeyError: 'a|b'")
    run = peers.ModelRun("tiny", {"lens": {"ours": ours, "nnsight": ahead, "pyvene": failed}})
    assert peers.ahead([run]) == (
        "- tiny, lens, top 10 of every layer and token: nnsight takes 290.00 ms, ours 300.00"
    )
    assert "failed: KeyError: 'a\\|b'" in peers.model_table(run)


def test_the_section_is_written_between_its_markers(tmp_path):
    page = tmp_path / "RESULTS.md"
    page.write_text(f"before\n{peers.BEGIN}\nold\n{peers.END}\nafter\n")
    peers.write("new", page)
    assert page.read_text() == f"before\n{peers.BEGIN}\n\nnew\n\n{peers.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        peers.write("new", page)
