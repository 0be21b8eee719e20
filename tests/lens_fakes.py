"""Stand-ins for a lens and its results: made-up numbers with the real axes, awkward tokens."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

WORDS = (
    " the",
    " cat",
    "sat",
    "\n",
    " on",
    "$x$",
    "<b>",
    "中文",
    "😀",
    " mat",
    ".",
    " the",
    "\t",
    "",
)
WORDS += (
    " incomprehensibilities",
    "a\\b",
    " $5",
    "$",
    " café",
    "\u200b",
    "        ",
    "العربية",
    "�",
)


def words(count):
    return tuple(WORDS[i % len(WORDS)] for i in range(count))


@dataclass(frozen=True, eq=False)
class FakeResult:
    """The tables of a lens whose prediction sharpens with depth."""

    tokens: tuple
    row_labels: tuple
    top_tokens: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray
    top_logits: np.ndarray
    metrics: dict
    positions: tuple = field(default=())


def lens_result(tokens, layers=6, k=5, seed=0):
    """Return tables in which the last row is right about every second next token."""
    random = np.random.default_rng(seed)
    tokens = tuple(tokens)
    rows, count = layers + 1, len(tokens)
    depth = np.linspace(0, 1, rows)[:, None]
    logits = np.sort(random.normal(size=(rows, count, k)) * (1 + 4 * depth[..., None]))[..., ::-1]
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs = probs / probs.sum(-1, keepdims=True) * (0.2 + 0.7 * depth[..., None])
    ids = random.integers(len(WORDS), size=(rows, count, k))
    top = np.array([WORDS[i] for i in ids.ravel()], dtype=object).reshape(ids.shape)
    rank = random.integers(1, 3000, size=(rows, count)).astype(float)
    for position in range(0, count - 1, 2):
        for row in range(rows * 2 // 3, rows):
            top[row, position, 0], rank[row, position] = tokens[position + 1], 0
    rank[:, -1] = np.nan
    metrics = {
        "kl_divergence": np.abs(random.normal(size=(rows, count))) * (1 - depth) * 6,
        "top1_match": (random.random((rows, count)) < depth).astype(float),
        "top1_rank": np.floor(10 ** (4 * random.random((rows, count)) * (1 - depth))) - 1,
        "top1_logit": logits[:, :, 0],
        "entropy": (1.2 - depth) * 7 * random.random((rows, count)),
        "cross_entropy": np.abs(random.normal(size=(rows, count))) * 5,
        "next_token_prob": random.random((rows, count)),
        "next_token_rank": rank,
    }
    labels = ("embed", *map(str, range(layers)))
    places = tuple(range(count))
    return FakeResult(tokens, labels, top, ids, probs, logits, metrics, places)


class FakeLens:
    """Answers every call of the contract with made-up tables; a text is split at its spaces."""

    def __init__(self, layers=6, vocabulary=23):
        self.layers = layers
        self.architecture = SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary))
        self.calls = []

    def _tokens(self, text):
        first, *rest = text.split(" ")
        return [first, *(f" {word}" for word in rest)]

    def run(self, text, top_k=10, **options):
        self.calls.append(("run", top_k, options))
        return lens_result(self._tokens(text), self.layers, top_k)

    def get_convergence_metrics(self, text):
        result = lens_result(self._tokens(text), self.layers)
        about = {"input_tokens": list(result.tokens), "row_labels": list(result.row_labels)}
        return {**result.metrics, **about}

    def compare_to_input(self, text):
        tokens = self._tokens(text)
        shape = (self.layers + 1, len(tokens))
        random = np.random.default_rng(1)
        return {
            "input_token_rank": np.floor(10 ** (4 * random.random(shape))) - 1,
            "input_token_prob": random.random(shape),
            "kl_from_input": np.abs(random.normal(size=shape)) * np.arange(shape[0])[:, None],
            "input_tokens": tokens,
            "row_labels": ["embed", *map(str, range(self.layers))],
        }

    def get_layer_predictions(self, text, layer_indices=None, top_k=5):
        self.calls.append(("get_layer_predictions", top_k, layer_indices))
        result = lens_result(self._tokens(text), self.layers, top_k)
        layers = range(self.layers) if layer_indices is None else layer_indices
        table = {
            layer: {
                "top_k_tokens": result.top_tokens[layer + 1].tolist(),
                "top_k_probs": result.top_probs[layer + 1],
                "top_k_indices": result.top_ids[layer + 1],
            }
            for layer in layers
        }
        about = {"input_text": text, "input_tokens": list(result.tokens)}
        return {
            **about,
            "input_ids": [0] * len(result.tokens),
            "final_logits": None,
            "layers": table,
        }
