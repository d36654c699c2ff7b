"""Cutting a kernel's groups into buckets of similar saliency."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_sparsity_tf.allocation.ranking import saliency_of
from rl_sparsity_tf.environment.buckets import bucket_edges, near_edges, split_buckets
from rl_sparsity_tf.layers.groups import GROUPS, Grouping

modest = settings(max_examples=50, deadline=None)
sparsities = st.floats(0, 1, exclude_min=True, exclude_max=True)


@pytest.mark.parametrize("cut", [bucket_edges, near_edges])
@modest
@given(st.integers(1, 5000), st.integers(1, 40), sparsities)
def test_edges_are_increasing_and_cover_everything(cut, groups, buckets, sparsity):
    edges = cut(groups, buckets, sparsity)
    assert edges.dtype == np.int64
    assert len(edges) == min(buckets, groups) + 1
    assert (edges[0], edges[-1]) == (0, groups)
    assert (np.diff(edges) >= 1).all()


def test_the_documented_edges():
    expected = [0, 481, 708, 821, 877, 900, 933, 967, 1000]
    assert bucket_edges(1000, 8, 0.9).tolist() == expected
    assert bucket_edges(1, 8, 0.9).tolist() == [0, 1]
    assert bucket_edges(2, 8, 0.9).tolist() == [0, 1, 2]
    assert bucket_edges(9, 1, 0.9).tolist() == [0, 9]


@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.99])
def test_edges_near_a_plan_divide_its_density_by_equal_factors(sparsity):
    edges = near_edges(1_000_000, 8, sparsity)
    densities = 1 - edges[1:-1] / 1_000_000
    np.testing.assert_allclose(densities[1:] / densities[:-1], 2**-0.25, rtol=1e-3)
    assert densities[0] == pytest.approx(2 * (1 - sparsity))
    assert 1 - sparsity == pytest.approx(densities[4])


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("buckets", [2, 4, 8, 12])
def test_one_edge_lies_at_the_target_and_buckets_become_smaller_towards_it(sparsity, buckets):
    edges = bucket_edges(10_000, buckets, sparsity)
    assert round(10_000 * sparsity) in edges
    below = np.diff(edges[edges <= round(10_000 * sparsity)])
    assert (np.diff(below) <= 1).all()
    beyond = np.diff(edges[edges >= round(10_000 * sparsity)])
    assert beyond.max() - beyond.min() <= 1


@modest
@given(
    st.sampled_from(GROUPS),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 12),
    sparsities,
    st.integers(0, 2**31),
)
def test_buckets_partition_the_groups_in_order_of_saliency(
    group, inputs, outputs, buckets, sparsity, seed
):
    rng = np.random.default_rng(seed)
    grouping = Grouping(group, inputs, outputs)
    matrix = rng.integers(-2, 3, (inputs, outputs)).astype(np.float32)  # many ties
    saliency = saliency_of(matrix, grouping)
    assert saliency.shape == (grouping.count,)
    assert (saliency >= 0).all()
    edges = bucket_edges(grouping.count, buckets, sparsity)
    parts = split_buckets(saliency, edges)
    assert [len(part) for part in parts] == np.diff(edges).tolist()
    together = np.concatenate(parts)
    np.testing.assert_array_equal(np.sort(together), np.arange(grouping.count))
    assert (np.diff(saliency[together]) >= 0).all()
    tied = np.diff(saliency[together]) == 0
    assert (np.diff(together)[tied] > 0).all()  # ties by position


def test_saliency_does_not_depend_on_the_scale_of_the_kernel():
    matrix = np.random.default_rng(0).normal(size=(10, 3))
    grouping = Grouping("block4", 10, 3)
    np.testing.assert_allclose(saliency_of(matrix * 1e-4, grouping), saliency_of(matrix, grouping))
    np.testing.assert_array_equal(saliency_of(matrix * 0, grouping), np.zeros(9))
    one = saliency_of(np.ones((10, 3)), grouping)
    np.testing.assert_allclose(one, 1.0)  # a shorter tail block is no less salient
