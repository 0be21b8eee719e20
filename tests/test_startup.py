"""What loading imports, and that it leaves Python's cycle collector as it found it."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
import model_loader

ROOT = Path(__file__).resolve().parent.parent
MODELING = "transformers.modeling_utils"

FRESH = f"""
import gc, sys
import model_loader
inspector = model_loader.ModelInspector()
inspector.get_architecture_summary(), inspector.get_num_layers()
assert {MODELING!r} not in sys.modules, "a config needs no modeling code"
full = []
gc.collect()  # what comes before is not counted
gc.callbacks.append(lambda phase, info: full.append(info["generation"] == 2))
model_loader.load_model(device="cpu")
assert {MODELING!r} in sys.modules
assert not any(full), "the collector went through everything"
assert gc.isenabled() and gc.get_freeze_count() == 0
"""


def test_a_fresh_process_imports_what_it_needs_and_collects_nothing_in_full():
    done = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def unimported(monkeypatch):
    """As if nothing had imported the modeling code yet; the import only notes the collector."""
    seen = []
    monkeypatch.delitem(sys.modules, MODELING)
    monkeypatch.setattr(checkpoints, "import_module", lambda name: seen.append(gc.isenabled()))
    return seen


def test_the_collector_rests_during_the_import_alone(unimported):
    checkpoints.import_modeling()
    assert unimported == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_collector_runs_again_after_a_failed_import(unimported, monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(checkpoints, "import_module", fail)
    with pytest.raises(ImportError, match=MODELING):
        checkpoints.import_modeling()
    assert gc.isenabled()


def test_a_collector_that_the_user_stopped_stays_stopped(unimported):
    gc.disable()
    try:
        checkpoints.import_modeling()
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert unimported == [], "the import is left to transformers"


def test_what_the_user_froze_stays_frozen(unimported):
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        checkpoints.import_modeling()
        assert gc.get_freeze_count() == pytest.approx(frozen, rel=0.01)
        assert unimported == [False]
    finally:
        gc.unfreeze()


def test_a_second_load_leaves_the_collector_alone(monkeypatch):
    monkeypatch.setattr(gc, "disable", lambda: pytest.fail("stopped"))
    model_loader.load_model(device="cpu")
