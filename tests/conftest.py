"""What every test gets: no network, one thread, no window, and the tiny models built once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools

import hypothesis
import pytest
import torch

import families

torch.set_num_threads(1)

# The same examples on every run, and no time limit on a machine that others use too.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("steady")


@functools.cache
def _built(name):
    return families.build(name)


@pytest.fixture(params=families.FAMILIES)
def family(request):
    """Return `(name, model)` of each family in turn; the model is shared, so leave it as it was."""
    return request.param, _built(request.param)
