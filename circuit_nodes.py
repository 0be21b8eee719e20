"""The parts of a model that paths run between, and how they are spelled.

A *node* writes into the residual stream (a sender, or something to ablate) or reads from it (a
receiver). One notation serves path patching and ablation:

=====================  ================================  =====================================
written                also                              means
=====================  ================================  =====================================
``"9.6"``              ``(9, 6)``                        head 6 of block 9
``"9.6.q"``            ``(9, 6, "q")``                   what that head reads for its query
``"9.0.k"``            ``(9, 0, "k")``, ``"v"`` too      what key/value head 0 reads
``"mlp 9"``            ``("mlp", 9)``                    the MLP of block 9
``"attn 9"``           ``("attn", 9)``                   attention of block 9, all heads at once
``"block 9"``          ``("block", 9)``                  both
``"embed"``                                              what enters block 0 (only sends)
``"logits"``                                             final norm and head (only receives)
=====================  ================================  =====================================

The layer may have any spelling that `model_architecture.resolve_layer` knows. Keys and values count
the heads that the model stores: with grouped queries several query heads share one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from forward_pass import InputError, Site
from model_architecture import Architecture


class Node(NamedTuple):
    """A part of a model that writes into the residual stream, or reads from it."""

    kind: str
    """``head``, ``attn``, ``mlp``, ``block``, ``embed``, ``query``, ``key``, ``value``, ``logits``.
    """
    layer: int = -1
    """The block; -1 for the embedding and the logits."""
    head: int = -1
    """The head; -1 where it is not about a single one."""

    @property
    def label(self) -> str:
        """How it is written."""
        if self.layer < 0:
            return self.kind
        if self.head < 0:
            return f"{self.kind} {self.layer}"
        suffix = "" if self.kind == "head" else f".{self.kind[0]}"
        return f"{self.layer}.{self.head}{suffix}"


Group = tuple[Node, ...]
"""Nodes that are meant together."""

WRITERS = {"head": "head_out", "attn": "attn_out", "mlp": "mlp_out"}
"""The site at which a sender's output is found."""

INPUTS = {"q": "query", "k": "key", "v": "value"}

SENDER_WORDS = ("heads", "mlps", "attns", "blocks", "all")
RECEIVER_WORDS = ("queries", "keys", "values", "mlps", "attns", "blocks", "all")

_HOW = (
    "write '9.6' (head 6 of block 9), 'mlp 9', 'attn 9' or 'block 9'; "
    "the same as tuples are (9, 6), ('mlp', 9), …"
)


def group_label(group: Group) -> str:
    """Nodes that are meant together, as text."""
    return " + ".join(node.label for node in group)


# --- Spellings ------------------------------------------------------------------------------------


def sender_groups(architecture: Architecture, spec: Any, embed: bool = True) -> list[Group]:
    """What is exchanged in each run: one group of writers per entry.

    Args:
        architecture: The model.
        spec: A word out of `SENDER_WORDS` (each such node by itself; ``all`` is heads, MLPs and the
            embedding), a node, or a list whose entries are nodes, or lists of nodes that are meant
            together.
        embed: Whether the embedding may be among them.

    Returns:
        The groups, in order; the nodes of a group are heads, ``attn``, ``mlp`` and ``embed``.

    Raises:
        InputError: something is no node, or has no output; the message says what to write.
        LayerError: there is no such block.
        SiteError: the model has no such part.
    """
    if isinstance(spec, str) and spec in SENDER_WORDS:
        return [(node,) for node in _all_senders(architecture, spec, embed)]
    entries = spec if isinstance(spec, list) else [spec]
    if not entries:
        raise InputError(f"there is no node in an empty list; {_HOW}")
    groups = []
    for entry in entries:
        together = entry if isinstance(entry, list) else [entry]
        nodes = [parse_node(architecture, each) for each in together]
        for node in nodes:
            _check_sender(architecture, node, embed)
        if not nodes or len(set(nodes)) < len(nodes):
            raise InputError(f"nodes that are meant together are named once each; came {entry!r}")
        groups.append(tuple(nodes))
    return groups


def receiver_nodes(architecture: Architecture, spec: Any) -> Group:
    """Where paths end: all at once.

    Args:
        architecture: The model.
        spec: A word out of `RECEIVER_WORDS` (``all`` is everything that reads the stream), a node,
            or a list of these.

    Returns:
        Nodes of the kinds ``query``, ``key``, ``value``, ``mlp``, ``logits``, and ``attn`` in
        blocks whose attention has no such inside (state spaces); each once.

    Raises:
        InputError: something is no node, or reads nothing; the message says what to write.
        LayerError: there is no such block.
        SiteError: the model has no such part.
    """
    entries = spec if isinstance(spec, list) else [spec]
    found: dict[Node, None] = {}
    for entry in entries:
        for node in _receivers_of(architecture, entry):
            _check_site(architecture, node)
            found[node] = None
    if not found:
        raise InputError(f"there is no receiver; write 'logits', '9.6.q', or {_HOW}")
    return tuple(found)


def parse_node(architecture: Architecture, entry: Any) -> Node:
    """One node out of its spelling.

    Raises:
        InputError: it is none, or the block has no such head.
        LayerError: there is no such block.
    """
    if isinstance(entry, Node):
        return entry
    if entry in ("embed", "logits"):
        return Node(entry)
    parts = _split(entry)
    if parts is None:
        raise InputError(f"{entry!r} is no part of a model; {_HOW}")
    kind, layer, head = parts
    block = architecture.resolve(layer)
    if kind in ("mlp", "attn", "block"):
        return Node(kind, block)
    return Node(kind, block, _checked_head(architecture, kind, block, head))


def _split(entry: Any) -> tuple[str, Any, int] | None:
    """Kind, layer and head of a spelling; None where it is none."""
    if isinstance(entry, str):
        head = re.fullmatch(r"(-?\d+)\.(-?\d+)(?:\.(q|k|v))?", entry.strip())
        if head:
            return INPUTS.get(head[3] or "", "head"), int(head[1]), int(head[2])
        whole = re.fullmatch(r"(mlp|attn|block)[ ._]?(\S+)", entry.strip())
        return (whole[1], whole[2], -1) if whole else None
    if not isinstance(entry, tuple) or not 2 <= len(entry) <= 3:
        return None
    if entry[0] in ("mlp", "attn", "block"):
        return (entry[0], entry[1], -1) if len(entry) == 2 else None
    is_number = hasattr(entry[1], "__index__") and not isinstance(entry[1], bool)
    if not is_number or (len(entry) == 3 and entry[2] not in INPUTS):
        return None
    return INPUTS[entry[2]] if len(entry) == 3 else "head", entry[0], int(entry[1])


def _checked_head(architecture: Architecture, kind: str, layer: int, head: int) -> int:
    queries, stored = architecture.heads(layer)
    count = stored if kind in ("key", "value") else queries
    if not count:
        raise InputError(f"block {layer} has no attention heads; write 'attn {layer}'")
    if -count <= head < count:
        return head % count
    hint = ""
    if count < queries and -queries <= head < queries:
        shared = head % queries * stored // queries
        hint = f"; query head {head} reads key/value head {shared}: write '{layer}.{shared}.k'"
    what = f"{count} key/value heads" if count < queries else f"{count} heads"
    raise InputError(f"block {layer} has {what}, 0..{count - 1}; came {head}{hint}")


# --- Senders --------------------------------------------------------------------------------------


def _all_senders(architecture: Architecture, word: str, embed: bool) -> Iterator[Node]:
    found = [
        node for layer in range(architecture.n_layers) for node in _writers(architecture, layer)
    ]
    kinds = {"heads": {"head"}, "mlps": {"mlp"}, "attns": {"attn"}}
    if word == "blocks":
        yield from (Node("block", layer) for layer in range(architecture.n_layers))
        return
    if word == "all":
        if embed:
            yield Node("embed")
        with_heads = {node.layer for node in found if node.kind == "head"}
        yield from (n for n in found if n.kind != "attn" or n.layer not in with_heads)
        return
    chosen = [node for node in found if node.kind in kinds[word]]
    if not chosen:
        _check_site(architecture, Node(word[:-1], 0, 0))
        raise InputError(f"no block of this model has {word}")
    yield from chosen


def _writers(architecture: Architecture, layer: int) -> Iterator[Node]:
    """Everything in a block that writes."""
    if architecture.missing(Site("attn_out", layer)) is None:
        if architecture.missing(Site("head_out", layer)) is None:
            yield from (Node("head", layer, head) for head in range(architecture.heads(layer)[0]))
        yield Node("attn", layer)
    if architecture.missing(Site("mlp_out", layer)) is None:
        yield Node("mlp", layer)


def _check_sender(architecture: Architecture, node: Node, embed: bool) -> None:
    if node.kind in ("logits", *INPUTS.values()) or (node.kind == "embed" and not embed):
        raise InputError(f"{node.label!r} writes nothing into the residual stream here; {_HOW}")
    _check_site(architecture, node)


def _check_site(architecture: Architecture, node: Node) -> None:
    """Raise SiteError unless the model has what is recorded or exchanged for a node."""
    if node.layer < 0:
        return
    names = {"head": ("head_out", "attn_out"), "block": ("attn_out",)}
    own = WRITERS.get(node.kind, node.kind)
    for name in names.get(node.kind, (own,)):
        architecture.tap(Site(name, node.layer))


def parts_of(architecture: Architecture, group: Group) -> Group:
    """A group with every block replaced by its attention and its MLP, each writer once."""
    parts: dict[Node, None] = {}
    for node in group:
        if node.kind != "block":
            parts[node] = None
            continue
        parts[Node("attn", node.layer)] = None
        if architecture.missing(Site("mlp_out", node.layer)) is None:
            parts[Node("mlp", node.layer)] = None
    whole = {node.layer for node in parts if node.kind == "attn"}
    return tuple(node for node in parts if node.kind != "head" or node.layer not in whole)


# --- Receivers ------------------------------------------------------------------------------------


def _receivers_of(architecture: Architecture, entry: Any) -> list[Node]:
    layers = range(architecture.n_layers)
    if isinstance(entry, str) and entry in RECEIVER_WORDS:
        readers = [node for layer in layers for node in _block_readers(architecture, layer)]
        if entry == "all":
            return [*readers, Node("logits")]
        kinds: dict[str, tuple[str, ...]] = {
            "queries": ("query",),
            "keys": ("key",),
            "values": ("value",),
            "mlps": ("mlp",),
            "attns": ("query", "key", "value", "attn"),
        }
        return [node for node in readers if entry == "blocks" or node.kind in kinds[entry]]
    node = parse_node(architecture, entry)
    if node.kind == "embed":
        raise InputError("the embedding reads nothing: it only sends")
    expand: dict[str, Callable[[], list[Node]]] = {
        "block": lambda: list(_block_readers(architecture, node.layer)),
        "attn": lambda: list(_attention_readers(architecture, node.layer)),
        "head": lambda: _head_readers(architecture, node),
    }
    return expand.get(node.kind, lambda: [node])()


def _attention_readers(architecture: Architecture, layer: int) -> Iterator[Node]:
    queries, stored = architecture.heads(layer)
    if not queries:
        yield Node("attn", layer)
    yield from (Node("query", layer, head) for head in range(queries))
    for kind in ("key", "value"):
        yield from (Node(kind, layer, head) for head in range(stored))


def _block_readers(architecture: Architecture, layer: int) -> Iterator[Node]:
    if architecture.missing(Site("attn_out", layer)) is None:
        yield from _attention_readers(architecture, layer)
    if architecture.missing(Site("mlp_out", layer)) is None:
        yield Node("mlp", layer)


def _head_readers(architecture: Architecture, node: Node) -> list[Node]:
    queries, stored = architecture.heads(node.layer)
    if queries != stored:
        shared = node.head * stored // queries
        raise InputError(
            f"head {node.label} shares its key and value with others ({queries} query heads, "
            f"{stored} key/value heads): write '{node.label}.q', '{node.layer}.{shared}.k' or "
            f"'{node.layer}.{shared}.v', whichever is meant"
        )
    return [Node(kind, node.layer, node.head) for kind in INPUTS.values()]


# --- What lies before what ------------------------------------------------------------------------


def writes_at(node: Node) -> int:
    """When a sender's output is in the stream, counted in quarters of a block; the embedding: -1.

    Attention writes at 4·layer + 1, the MLP at 4·layer + 3.
    """
    if node.kind == "embed":
        return -1
    return 4 * node.layer + (3 if node.kind == "mlp" else 1)


def reads_at(architecture: Architecture, node: Node) -> int:
    """When a receiver reads the stream, on the clock of `writes_at`.

    Attention reads at 4·layer, the MLP at 4·layer + 2, or with attention in a parallel block.
    """
    if node.kind == "logits":
        return 4 * architecture.n_layers
    late = node.kind == "mlp" and architecture.structure[node.layer].has_resid_mid
    return 4 * node.layer + 2 * late
