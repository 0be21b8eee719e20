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


ENGINE = {
    "test_activation_extraction", "test_architecture_check", "test_attention_internals",
    "test_families", "test_forward_pass", "test_logit_lens", "test_model_architecture",
    "test_model_zoo", "test_tensor_parallel",
}  # fmt: skip
"""Modules whose tests try every family also when they have to be quick."""

KINDS = {
    "gpt2", "gpt_neox", "bloom", "llama", "mixtral", "qwen3", "olmo2", "gemma2", "phi", "cohere",
    "granite", "gpt_oss", "mamba",
}  # fmt: skip
"""One family of each kind: a technique is tried on these, and on the others by `make test-all`."""


def pytest_collection_modifyitems(items):
    """Mark as slow what tries a technique on a family whose kind is tried already."""
    others = set(families.FAMILIES) - KINDS
    for item in items:
        asked = getattr(item, "callspec", None)
        params = () if asked is None else asked.params.values()
        named = {each for each in params if isinstance(each, str)}
        if item.path.stem not in ENGINE and named & others:
            item.add_marker(pytest.mark.slow)


@functools.cache
def _built(name):
    return families.build(name)


@pytest.fixture(params=families.FAMILIES)
def family(request):
    """Return `(name, model)` of each family in turn; the model is shared, so leave it as it was."""
    return request.param, _built(request.param)
