"""What the counts say, against figures worked out by hand."""

import numpy as np
import pytest

from train.analyze import summary
from train.analyze.activity import Activity


def activity(nnz, hits, ids=None, length=2):
    nnz, hits = np.asarray(nnz, np.int32), np.asarray(hits, np.int64)
    ids = np.arange(nnz.shape[1]) if ids is None else np.asarray(ids)
    return Activity(ids, length, hits.shape[1], nnz, hits, (2,), {"text": np.ones((len(nnz), 1))})


def test_a_layers_figures():
    [layer] = summary.layers(activity([[1, 3, 0, 4]], [[5, 0, 2, 1, 0, 0, 0, 0, 0, 0]]))
    assert (layer.mean_nnz, layer.max_nnz, layer.silent_share) == (2.0, 4, 0.7)
    assert layer.p99_nnz == pytest.approx(3.97)
    # 10 % of ten neurons are one, which has 5 of 8 hits; 1 and 5 % are parts of it.
    assert layer.held_by_top == pytest.approx((0.0625, 0.3125, 0.625))


def test_a_silent_layer_has_figures_too():
    silent = activity([[0, 0]], [[0] * 20])
    assert summary.layers(silent)[0].held_by_top == (0.0, 0.0, 0.0)
    assert (summary.popularity(silent).held == 0).all()


def test_popularity_rises_to_all():
    found = summary.popularity(activity([[4, 4]], [[1, 1, 1, 1, 4, 0, 0, 0]]))
    assert found.shares[-1] == 1.0
    assert found.held[0, -1] == pytest.approx(1.0)
    assert found.held[0, 0] == pytest.approx(0.5), "one neuron of eight has half of the hits"
    assert (np.diff(found.held[0]) >= -1e-12).all()


def test_tokens_are_judged_by_their_mean_over_layers():
    ids = [7] * 12 + [8] * 12 + [9]
    nnz = [[1] * 12 + [5] * 12 + [100], [3] * 12 + [5] * 12 + [100]]
    found = summary.tokens(activity(nnz, [[1], [1]], ids, 5), str, count=1)
    assert found.least_count == 10
    assert [(token.id, token.text, token.count, token.mean_nnz) for token in found.least] == [(7, "7", 12, 2)]
    assert [token.id for token in found.most] == [8], "9 came once and is not judged"


def test_in_a_short_text_every_token_counts():
    found = summary.tokens(activity([[1, 2, 9, 9]], [[1]], [4, 5, 6, 6]), str, count=2)
    assert found.least_count == 1
    assert [token.id for token in found.least] == [4, 5]
    assert [token.id for token in found.most] == [6, 5]


def test_positions_are_means_over_sequences():
    found = summary.by_position(activity([[1, 2, 3, 10]], [[1]], length=2))
    np.testing.assert_array_equal(found, [[2, 6]])


@pytest.mark.parametrize(
    ("length", "bounds"),
    [(1, [(0, 1)]), (4, [(0, 1), (1, 3), (3, 4)]), (7, [(0, 1), (1, 3), (3, 7)])],
)
def test_octaves_cover_every_position_once(length, bounds):
    assert [(part.start, part.stop) for part in summary.octaves(length)] == bounds


def test_correlation():
    assert summary.correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert summary.correlation([1, 2], [1, 2]) is None
    assert summary.correlation([1, 1, 1], [1, 2, 3]) is None
