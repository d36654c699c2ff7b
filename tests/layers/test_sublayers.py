"""Paths to the layers inside layers."""

import pytest
import tf_keras as keras
from zoo import Block, layers

from rl_sparsity_tf.errors import ArgumentError
from rl_sparsity_tf.layers.structure import (
    direct_sublayers,
    follow,
    named_sublayers,
    owner_of,
    unreachable_sublayers,
)


class Holder(layers.Layer):
    """Layers in every kind of attribute."""

    def __init__(self):
        super().__init__()
        self.plain = layers.Dense(2)
        self.again = self.plain
        self.listed = [layers.Dense(2), [layers.Dense(2)], "text"]
        self.named = {"a": layers.Dense(2), "b/c": layers.Dense(2), "z": 4}
        self.network = keras.Sequential([layers.Input((2,)), layers.Dense(2), layers.ReLU()])
        self.metric = keras.metrics.Mean()


def test_attributes_lists_and_dicts_lead_to_the_layers():
    holder = Holder()
    found = dict(named_sublayers(holder))
    assert set(found) == {"plain", "listed/0", "listed/1/0", "named/a", "network"}
    assert found["plain"] is holder.plain
    assert found["listed/1/0"] is holder.listed[1][0]
    assert found["network"] is holder.network


def test_every_path_leads_back_to_its_layer():
    for layer in (
        Holder(),
        Block(4, 2),
        layers.Bidirectional(layers.LSTM(2)),
        layers.RNN([layers.LSTMCell(2), layers.GRUCell(2)]).cell,
        layers.TimeDistributed(layers.Dense(2)),
        keras.Sequential([layers.Input((2,)), layers.Dense(2), layers.Dense(2)]),
    ):
        pairs = list(named_sublayers(layer))
        assert pairs
        for path, sublayer in pairs:
            assert follow(layer, path) is sublayer


def test_graphs_count_their_layers_without_inputs():
    inputs = keras.Input((2,))
    dense = layers.Dense(2)
    model = keras.Model(inputs, layers.ReLU()(dense(inputs)))
    assert [path for path, _ in named_sublayers(model)] == ["0", "1"]
    assert follow(model, "0") is dense
    assert follow(model, "0/kernel") is dense.kernel
    assert follow(model, "2") is None


def test_metrics_are_no_sublayers():
    holder = Holder()
    assert holder.metric not in direct_sublayers(holder)
    assert len(direct_sublayers(holder)) == 6


def test_layers_that_no_attribute_leads_to_are_told():
    holder = Holder()
    assert unreachable_sublayers(holder) == [holder.named["b/c"]]
    assert unreachable_sublayers(layers.Bidirectional(layers.LSTM(2))) == []


@pytest.mark.parametrize(
    "path", ["nothing", "plain/nothing", "listed/9", "listed/x", "listed/-1", "named/y", "plain/0"]
)
def test_paths_that_lead_nowhere(path):
    assert follow(Holder(), path) is None


def test_the_empty_path_is_the_layer_itself():
    holder = Holder()
    assert follow(holder, "") is holder


def test_owners_hold_the_weights():
    layer = layers.LSTM(2)
    layer.build((None, 3, 2))
    assert owner_of(layer, "cell/kernel") == (layer.cell, "kernel")
    dense = layers.Dense(2)
    dense.build((None, 2))
    assert owner_of(dense, "kernel") == (dense, "kernel")


@pytest.mark.parametrize("attribute", ["cell/colonel", "call/kernel", "cell/kernel/x"])
def test_weights_that_are_not_there_are_refused(attribute):
    layer = layers.LSTM(2, name="mine")
    layer.build((None, 3, 2))
    message = f"Layer 'mine' of class LSTM has no '{attribute}'.*such as 'kernel' or 'cell/kernel'"
    with pytest.raises(ArgumentError, match=message):
        owner_of(layer, attribute)


def test_layers_that_are_not_built_have_no_weights():
    with pytest.raises(ArgumentError, match="a built layer"):
        owner_of(layers.LSTM(2), "cell/kernel")
