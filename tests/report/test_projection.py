from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from dlrm.embeddings import CommonValues
from dlrm.errors import EnvironmentFaultError, UserError
from dlrm.report import projection
from dlrm.report.projection import (
    linear_cka,
    map_vectors,
    nearest,
    neighbourhood,
    refuse_not_finite,
    smoothed_click_rates,
)


def two_groups(values: int = 80, dim: int = 8) -> tuple[Any, Any]:
    """Vectors of two groups that are 20 deviations apart, and which group each is of."""
    generator = np.random.default_rng(3)
    group = generator.permutation(np.arange(values) % 2)
    vectors = generator.normal(size=(values, dim))
    vectors[:, 2] += 20 * group
    return vectors.astype(np.float32), group


def common(counts: Any, clicks: Any, vectors: Any) -> CommonValues:
    counts, clicks = np.array(counts), np.array(clicks)
    names = [f"v{place}" for place in range(len(counts))]
    return CommonValues("f", names, counts, clicks, vectors, len(counts), int(counts.sum()))


def test_two_groups_stay_two_groups() -> None:
    vectors, group = two_groups()
    places = map_vectors(vectors, 0)
    assert places.shape == (80, 2)
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-4)
    # The nearest on the map are of the own group, and a gap lies between the groups.
    assert (group[nearest(places, 5)] == group[:, None]).all()
    distances = np.linalg.norm(places[:, None] - places, axis=2)
    across = distances[group[:, None] != group].min()
    within = max(np.sort(distances[group == each][:, group == each])[:, 1].max() for each in (0, 1))
    assert across > 2 * within


def test_maps_depend_on_the_seed_alone() -> None:
    vectors, _ = two_groups(120)
    maps = []
    for threads in (1, 4):
        with threadpool_limits(threads):
            maps.append(map_vectors(vectors, 7))
    np.testing.assert_array_equal(maps[0], maps[1])
    assert np.isfinite(map_vectors(vectors, -1)).all()  # seeds of runs can be negative


def test_vectors_that_do_not_differ_or_have_one_number_have_a_map() -> None:
    assert not map_vectors(np.ones((12, 3), np.float32), 0).any()
    line = np.array([[1.0], [5.0], [3.0]], np.float32)
    assert map_vectors(line, 0).tolist() == [[-2, 0], [2, 0], [0, 0]]


def test_nearest_are_by_distance_and_never_the_vector_itself() -> None:
    line = np.array([[0.0], [1.0], [3.0], [3.5]])
    assert nearest(line, 2).tolist() == [[1, 2], [0, 2], [3, 1], [2, 1]]
    assert nearest(line).shape == (4, 3)  # there are no more
    vectors = np.random.default_rng(0).normal(size=(1500, 5)).astype(np.float32)
    distances = np.linalg.norm(vectors[:, None].astype(np.float64) - vectors, axis=2)
    np.fill_diagonal(distances, np.inf)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(nearest(vectors, 4), expected)


def test_rates_of_rare_values_lie_near_the_average() -> None:
    rates = smoothed_click_rates(np.array([1, 20, 980]), np.array([1, 20, 980]), 0.25)
    np.testing.assert_allclose(rates, [6 / 21, 25 / 40, 985 / 1000])


def test_neighbours_tell_the_click_rate_where_vectors_follow_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "FEWEST_COMPARED", 4)
    monkeypatch.setattr(nearest, "__defaults__", (1,))
    line = np.array([[0.0], [1.0], [10.0], [10.5]], np.float32)
    values = common([10, 20, 10, 40], [1, 4, 8, 36], line)
    found = neighbourhood(values, np.array([0.1, 0.2, 0.8, 0.9]))
    assert found.neighbours.tolist() == [[1], [0], [3], [2]]
    np.testing.assert_allclose(found.click_rates, [0.2, 0.1, 0.9, 0.8])
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert found.correlation == pytest.approx(0.6)
    assert np.isnan(neighbourhood(values, np.full(4, 0.5)).correlation)
    assert neighbourhood(common([3], [1], line[:1]), np.array([0.5])).neighbours.shape == (1, 0)


def test_a_few_values_have_no_correlation() -> None:
    vectors, _ = two_groups(49)
    counts = np.full(49, 10)
    found = neighbourhood(common(counts, counts // 2 + np.arange(49) % 3, vectors), np.arange(49.0))
    assert np.isnan(found.correlation)


def test_alignment_is_that_of_centred_kernels() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(40, 3, 4))
    vectors -= vectors.mean(axis=0)
    found = linear_cka(vectors)

    def kernels_product(one: int, other: int) -> float:
        # HSIC of Gretton et al. (2005), with linear kernels.
        centring = np.eye(40) - 1 / 40
        kernels = [vectors[:, each] @ vectors[:, each].T for each in (one, other)]
        return float(np.trace(kernels[0] @ centring @ kernels[1] @ centring))

    for one in range(3):
        for other in range(3):
            norm = np.sqrt(kernels_product(one, one) * kernels_product(other, other))
            assert found[one, other] == pytest.approx(kernels_product(one, other) / norm)


def test_alignment_does_not_see_turns_and_scales_but_what_rows_have_in_common() -> None:
    generator = np.random.default_rng(2)
    rows = generator.normal(size=(5000, 4))
    turn, _ = np.linalg.qr(generator.normal(size=(4, 4)))
    vectors = np.stack([rows, 7 * rows @ turn, generator.normal(size=(5000, 4))], axis=1)
    found = linear_cka(vectors - vectors.mean(axis=0))
    assert found[0, 1] == pytest.approx(1)
    assert 0.2 * 4 / 5000 < found[0, 2] < 5 * 4 / 5000  # nothing in common: about D / n


def test_what_is_missing_or_diverged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="vectors of f are not finite: the training diverged"):
        refuse_not_finite(common([1], [0], np.array([[np.nan]], np.float32)))
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(EnvironmentFaultError, match=r"pip install 'dlrm\[baselines\]'"):
        map_vectors(np.zeros((20, 2), np.float32), 0)
