"""Metrics of logits, against the formulas written out with NumPy in double precision."""

import numpy as np
import pytest
import torch

import families
from forward_pass import InputError
from logit_metrics import (
    NAMED,
    NEED_ANSWER,
    Metric,
    kl_divergence,
    make_metric,
    reads_of,
    refuse_unused,
)

VOCAB = 11


def draw(seed, std=3.0, positions=2):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(1, positions, VOCAB, generator=generator)


CLEAN, CORRUPTED = draw(0), draw(1)
RUNS = torch.cat([draw(2), draw(3), CLEAN, CORRUPTED])


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def by_hand(name, logits, answer, foil, base, other):
    z = logits[-1].double().numpy()
    p, q = softmax(CLEAN[0, -1].double().numpy()), softmax(z)
    to_base, apart = z - base[0, -1].double().numpy(), (base - other)[0, -1].double().numpy()
    return {
        "logit_diff": z[answer] - z[foil],
        "logit": z[answer],
        "log_prob": np.log(q[answer]),
        "prob": q[answer],
        "rank": sum(z[i] > z[answer] for i in range(VOCAB)),
        "kl": sum(p[i] * np.log(p[i] / q[i]) for i in range(VOCAB)),
        "distance": np.sqrt((to_base**2).sum()) / np.sqrt((apart**2).sum()),
    }[name]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("corrupted_is_base", [False, True])
@pytest.mark.parametrize("answer", [None, 4])
def test_every_metric_of_several_runs(name, corrupted_is_base, answer):
    base, other = (CORRUPTED, CLEAN) if corrupted_is_base else (CLEAN, CORRUPTED)
    given = answer if name in NEED_ANSWER else None
    metric = make_metric(name, CLEAN, CORRUPTED, base=base, answer=given, config=Config)
    chosen = int(CLEAN[0, -1].argmax()) if answer is None else answer
    foil = int(CORRUPTED[0, -1].argmax())
    assert len({chosen, foil}) == 2
    found = metric(RUNS)
    assert found.shape == (4,)
    assert found.dtype == torch.float32
    for run, value in zip(RUNS, found, strict=True):
        expected = by_hand(name, run, chosen, foil, base, other)
        assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    wide = metric(RUNS.double())
    assert wide.dtype == torch.float64
    half = metric(RUNS.bfloat16())
    assert half.dtype == torch.float32
    assert metric.read == (-1,)


class Config:
    """As much of a config as a token id is checked against."""

    vocab_size = VOCAB
    max_position_embeddings = None


def test_a_base_that_equals_one_of_the_runs_but_is_a_copy():
    for base, other in ((CLEAN, CORRUPTED), (CORRUPTED, CLEAN)):
        metric = make_metric("distance", CLEAN, CORRUPTED, base=base.clone())
        assert metric(base).tolist() == [0.0]
        assert metric(other).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_distance_to_the_other_run_is_exactly_one(dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        clean, corrupted = torch.randn(2, 1, 1, 5003, generator=generator).to(dtype)
        metric = make_metric("distance", clean, corrupted)
        assert metric(torch.cat([clean, corrupted, clean])).tolist() == [0.0, 1.0, 0.0]
    assert make_metric("distance", clean, clean)(corrupted).tolist() == [0.0]


def test_kl_of_impossible_tokens_and_of_broken_logits():
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]).log()
    expected = [
        0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75),
        0.5 * np.log(0.5 / 0.25),
        np.inf,
    ]
    np.testing.assert_allclose(kl_divergence(p, q).numpy(), expected, rtol=1e-6)
    broken = torch.full((1, 3), torch.nan)
    assert kl_divergence(p, broken).isnan().all()  # and not 0, which would say "no effect"
    assert kl_divergence(p, p) == 0


def test_functions_are_given_one_run_at_a_time():
    shapes = []

    def mine(logits):
        shapes.append(tuple(logits.shape))
        return logits[0, 0, 3]

    metric = make_metric(mine, CLEAN, CORRUPTED)
    assert (metric.name, metric.read, metric.unit) == ("mine", None, "")
    assert metric(RUNS).tolist() == RUNS[:, 0, 3].tolist()
    assert shapes == [(1, 2, VOCAB)] * 4
    assert metric.positions(3) == (0, 1, 2)
    for value, expected in (
        (3, 3.0),
        (np.float32(2.5), 2.5),
        (torch.tensor([1.5]), 1.5),
        (True, 1.0),
    ):
        assert make_metric(lambda _z, v=value: v, CLEAN, CORRUPTED)(CLEAN).tolist() == [expected]
    for value in (torch.zeros(2), None, "a", [1, 2]):
        with pytest.raises(InputError, match="must return one number; it returned"):
            make_metric(lambda _z, v=value: v, CLEAN, CORRUPTED)(CLEAN)


def test_functions_stay_in_the_graph():
    logits = RUNS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        make_metric(lambda z: z[0, -1, 2] ** 2, CLEAN, CLEAN)(logits).sum(), logits
    )
    expected = torch.zeros_like(RUNS)
    expected[:, -1, 2] = 2 * RUNS[:, -1, 2]
    assert torch.equal(slope, expected)


def test_a_metric_is_taken_as_it_is():
    metric = Metric("mine", "", lambda z: z[:, 0, 0], read=(0, -1))
    made = make_metric(metric, CLEAN, CORRUPTED)
    assert (made.name, made.unit, made.read) == ("mine", "", (0, -1))
    assert made(RUNS).tolist() == RUNS[:, 0, 0].tolist()
    assert reads_of(metric) == (0, -1)
    assert metric.positions(5) == (0, 4)


@pytest.mark.parametrize("read", [5, -6])
def test_a_position_that_is_not_there_is_not_another(read):
    metric = Metric("mine", "", lambda z: z[:, 0, 0], read=(0, read))
    assert metric.positions(6) == (0, read % 6)
    with pytest.raises(InputError, match=f"position {read} is out of range: the prompt has 5"):
        metric.positions(5)


def test_what_a_metric_writes_stays_with_it():
    def write(logits):
        logits[0, -1] = 0
        return logits[0, 0, 3]

    def write_all(logits):
        logits[:] = 0
        return logits[:, 0, 3]

    logits = RUNS.clone()
    made = make_metric(write, logits, logits)
    assert made(logits).tolist() == RUNS[:, 0, 3].tolist()
    assert make_metric(Metric("m", "", write_all), logits, logits)(logits).tolist() == [0.0] * 4
    assert torch.equal(logits, RUNS)


@pytest.mark.parametrize("metric", [*NAMED, lambda z: z[0, 0, 0], Metric("m", "", lambda z: z)])
def test_tokens_that_a_metric_does_not_look_at(metric):
    one = {name: {"answer"} for name in ("logit", "log_prob", "prob", "rank")}
    uses = {"logit_diff": {"answer", "foil"}} | one
    refuse_unused(metric)
    for given in ({"answer": 0}, {"foil": 0}, {"answer": " a"}, {"foil": [" a", " b"]}):
        (name,) = given
        if isinstance(metric, str) and name in uses.get(metric, ()):
            refuse_unused(metric, **given)
        else:
            with pytest.raises(InputError, match=f"{name}=.* was given, and the metric"):
                refuse_unused(metric, **given)
            with pytest.raises(InputError, match=f"{name}=.* was given, and the metric"):
                make_metric(metric, CLEAN, CORRUPTED, **given)


def test_tokens_as_text():
    tokenizer = families.tiny_tokenizer()
    cat, mat = (tokenizer(text)["input_ids"][0] for text in (" cat", " on"))
    logits = torch.randn(1, 1, families.VOCAB, generator=torch.Generator().manual_seed(0))
    metric = make_metric(
        "logit_diff", logits, logits, answer=" cat", foil=" on", tokenizer=tokenizer
    )
    assert (metric.answer, metric.foil) == (cat, mat)
    assert float(metric(logits)) == float(logits[0, 0, cat] - logits[0, 0, mat])
    for answer, message in (("the cat", "is 3 tokens"), ("cat", "is one token")):
        with pytest.raises(InputError, match=message):
            make_metric("logit", logits, logits, answer=answer, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("metric", "options", "message"),
    [
        ("perplexity", {}, "no metric 'perplexity'; metrics are logit_diff, logit, log_prob"),
        (None, {}, "a metric is a name .* came NoneType"),
        ("logit", {"answer": 11}, "token id 11 is outside"),
        ("logit", {"answer": -1}, "token id -1 is outside"),
        ("logit", {"answer": 1.5}, "must be integers"),
        ("logit", {"answer": " cat"}, "needs a tokenizer"),
        ("logit_diff", {"answer": 4, "foil": 4}, "answer and foil are both '<4>'.*Say which"),
    ],
)
def test_refused(metric, options, message):
    with pytest.raises(InputError, match=message):
        make_metric(metric, CLEAN, CORRUPTED, config=Config, **options)


@pytest.mark.parametrize("name", NAMED)
def test_broken_logits_give_no_number(name):
    """A run that became NaN must not look like the best rank, or like no effect."""
    answer = 4 if name in NEED_ANSWER else None
    metric = make_metric(name, CLEAN, CORRUPTED, answer=answer, config=Config)
    broken = torch.full_like(CLEAN, torch.nan)
    found = metric(torch.cat([CLEAN, broken]))
    assert found.isnan().tolist() == [False, True]
