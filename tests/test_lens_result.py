"""What is made of a lens's tables: depths of planted tables, frames, texts, files; and its rows."""

import dataclasses

import numpy as np
import pytest
import torch

import families
from array_files import write_arrays
from forward_pass import InputError, LayerError, RecordFileError, Site, SiteError
from lens_result import EMBED, KIND, LensResult, previous_row, resolve_layers, row_sites, shown_rows
from model_architecture import Architecture

TOKENS = (" cat", "\n", " cat", "😀$x$")


def planted(match=None, rank=None, first=None, rows=4, count=4, k=2, **changes):
    """A result with given tables; the rest is made up."""
    shape = (rows, count)
    ids = np.arange(rows * count * k).reshape(*shape, k) % 7
    if first is not None:
        ids[:, :, 0] = first
    metrics = {
        "kl_divergence": np.linspace(3, 0, rows * count, dtype=np.float32).reshape(shape),
        "top1_match": np.ones(shape, np.float32) if match is None else np.array(match, np.float32),
        "next_token_rank": np.ones(shape, np.float32) if rank is None else np.array(rank),
    }
    words = np.array([f" w{i}" for i in ids.ravel()], dtype=object).reshape(ids.shape)
    fields = {
        "text": "the text",
        "tokens": TOKENS[:count],
        "token_ids": tuple(range(count)),
        "positions": tuple(range(count)),
        "row_labels": (EMBED, *map(str, range(rows - 1))),
        "site": "resid_post",
        "top_tokens": words,
        "top_ids": ids,
        "top_probs": np.random.default_rng(0).random((*shape, k), dtype=np.float32),
        "top_logits": np.random.default_rng(1).random((*shape, k), dtype=np.float32),
        "metrics": metrics,
    }
    return LensResult(**{**fields, **changes})


# --- Depths ---------------------------------------------------------------------------------------


def test_decision_depth_is_where_the_final_prediction_stays():
    match = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert planted(match=match).decision_depth().tolist() == [2, 3, 3, 0]


def test_no_decision_where_even_the_last_row_has_another_token():
    match = [[1, 0], [1, 0], [0, 1]]
    assert planted(match=match, rows=3, count=2).decision_depth().tolist() == [-1, 2]


def test_first_correct_layer_is_the_first_with_rank_zero():
    rank = [[5, 0, 2, np.nan], [0, 3, 2, np.nan], [4, 0, 1, np.nan], [0, 0, 1, np.nan]]
    assert planted(rank=rank).first_correct_layer().tolist() == [1, 0, -1, -1]


def test_first_correct_layer_of_a_given_token_also_where_nothing_follows():
    first = [[1, 2, 3, 4], [9, 2, 3, 9], [9, 9, 3, 4], [1, 9, 3, 9]]
    assert planted(first=first).first_correct_layer(9).tolist() == [1, 2, -1, 1]


@pytest.mark.parametrize("ask", [LensResult.decision_depth, LensResult.first_correct_layer])
def test_depths_need_their_metric(ask):
    with pytest.raises(InputError, match=r"holds no metrics; run the lens with metrics=\('"):
        ask(planted(metrics={}))


# --- Frame, text, repr ----------------------------------------------------------------------------


def test_a_frame_has_one_row_per_cell_and_rank():
    result = planted()
    frame = result.to_frame()
    assert len(frame) == 4 * 4 * 2
    for _, row in frame.iterrows():
        cell = row["row"], row["position"]
        assert row["layer"] == result.row_labels[row["row"]]
        assert row["token"] == TOKENS[row["position"]]
        assert row["predicted"] == result.top_tokens[cell][row["rank"]]
        assert row["probability"] == result.top_probs[cell][row["rank"]]
        assert row["logit"] == result.top_logits[cell][row["rank"]]
        assert row["kl_divergence_nats"] == result.metrics["kl_divergence"][cell]
        assert row["top1_match"] == result.metrics["top1_match"][cell]


def test_a_frame_counts_positions_as_the_result_does():
    frame = planted(count=2, positions=(5, 9)).to_frame()
    assert set(frame["position"]) == {5, 9}


def test_text_shows_every_step_and_always_the_last_row():
    text = planted(rows=6).to_text(layer_step=2)
    assert [line.split()[0] for line in text.splitlines()] == ["layer", "embed", "0", "2", "4"]
    assert "KL(final‖layer)" in text
    assert text.splitlines()[-1].endswith("0.000")


def test_text_shows_at_most_so_many_tokens_and_escapes_them():
    header, *lines = planted().to_text(max_tokens=2).splitlines()
    assert r"\n" in header
    assert "😀" not in header
    assert all(len(line.split()) == 4 for line in lines)


def test_text_works_without_any_metric():
    text = planted(metrics={}).to_text()
    assert "KL" not in text
    assert " w1" in text


@pytest.mark.parametrize("wrong", [{"layer_step": 0}, {"max_tokens": 0}])
def test_text_refuses_to_show_nothing(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least 1; came 0"):
        planted().to_text(**wrong)


def test_repr_is_one_line_with_sizes_and_the_start_of_the_text():
    assert repr(planted()) == "LensResult('the text', 4 rows × 4 positions, top 2, resid_post)"
    assert "…" in repr(planted(text="x" * 50))


# --- Files ----------------------------------------------------------------------------------------


def test_a_file_gives_everything_back(tmp_path):
    rank = [[5, 0, 2, np.nan]] * 4
    result = planted(rank=rank, text='a "text"\n😀')
    result.save(tmp_path / "new" / "lens.safetensors")
    loaded = LensResult.load(tmp_path / "new" / "lens.safetensors")
    for field in dataclasses.fields(LensResult):
        before, after = getattr(result, field.name), getattr(loaded, field.name)
        if field.name == "metrics":
            assert list(before) == list(after)
            for name, table in before.items():
                np.testing.assert_array_equal(after[name], table)
        elif isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            assert (before == after).all()
        else:
            assert before == after
            assert type(before) is type(after)


def test_a_file_that_is_no_lens_result_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    write_arrays(path, "safetensors", "something else", 1, {}, {})
    with pytest.raises(RecordFileError, match=f"cannot be read as {KIND}"):
        LensResult.load(path)
    write_arrays(path, "safetensors", KIND, 1, {"text": "no more"}, {"top_ids": torch.zeros(1)})
    with pytest.raises(RecordFileError, match="damaged"):
        LensResult.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"entropy": np.zeros((4, 3))}}, r"'entropy' must be \[row, position\]"),
        ({"top_ids": np.zeros((3, 4, 2), int)}, r"top_ids must be \[row, position, k\]"),
        ({"top_probs": np.zeros((4, 4))}, r"top_probs must be \[row, position, k\]"),
        ({"tokens": ("a",)}, "tokens must have one entry per position"),
    ],
)
def test_tables_with_other_axes_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        planted(**changes)


# --- Rows -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2():
    return Architecture(families.build("gpt2"))


def test_rows_of_the_stream_begin_with_the_embedding(gpt2):
    rows = row_sites(gpt2, "resid_post")
    assert rows == {
        EMBED: Site("resid_pre", 0),
        **{str(i): Site("resid_post", i) for i in range(3)},
    }
    assert list(row_sites(gpt2, "resid_post", [-1, "h.0"])) == ["2", "0"]
    assert list(row_sites(gpt2, "attn_out")) == ["0", "1", "2"]


@pytest.mark.parametrize("layers", [1, "1", "h.1", [1], ["transformer.h.1", 1, -2], np.int64(1)])
def test_layers_in_any_spelling_count_once(gpt2, layers):
    assert resolve_layers(gpt2, layers) == [1]


def test_layers_that_are_not_there(gpt2):
    with pytest.raises(LayerError, match=r"valid are 0\.\.2"):
        resolve_layers(gpt2, [0, 3])
    with pytest.raises(InputError, match="layer_indices is empty"):
        resolve_layers(gpt2, [])


@pytest.mark.parametrize("site", ["embed", "mlp_neurons", "attn_pattern", "query", "nonsense"])
def test_only_sites_of_the_stream_can_be_read(gpt2, site):
    with pytest.raises(SiteError, match=f"reads the residual stream.*not '{site}'"):
        row_sites(gpt2, site)


@pytest.mark.parametrize("head", [None, 4, -5])
def test_a_head_must_be_one_of_the_model(gpt2, head):
    with pytest.raises(InputError, match=rf"needs head=0\.\.3; came {head}"):
        row_sites(gpt2, "head_out", head=head)


def test_a_head_goes_with_its_site_alone(gpt2):
    with pytest.raises(InputError, match="head=0 goes with site='head_out'"):
        row_sites(gpt2, "attn_out", head=0)


def test_a_site_that_the_model_has_nowhere_is_refused_with_its_reason():
    with pytest.raises(SiteError, match="resid_mid"):
        row_sites(Architecture(families.build("gptj")), "resid_mid")


def test_layers_without_a_site_are_left_out_unless_named(gpt2, monkeypatch):
    def missing(site):
        return "layer 1 has none" if site.layer == 1 else None

    monkeypatch.setattr(gpt2, "missing", missing)
    assert list(row_sites(gpt2, "mlp_out")) == ["0", "2"]
    with pytest.raises(SiteError, match="layer 1 has none"):
        row_sites(gpt2, "mlp_out", [0, 1])


def test_the_row_before():
    assert [previous_row(row) for row in ("0", "1", "12")] == [EMBED, "0", "11"]


@pytest.mark.parametrize(
    ("labels", "step", "shown"),
    [
        ((EMBED, "0", "1", "2", "3"), 2, [0, 1, 3, 4]),
        ((EMBED, "0", "1", "2", "3"), 100, [0, 1, 4]),
        (("0", "1", "2"), 2, [0, 2]),
        (("0", "1", "2", "3"), 3, [0, 3]),
        (("7",), 5, [0]),
    ],
)
def test_shown_rows_always_hold_the_last(labels, step, shown):
    assert shown_rows(labels, step) == shown
