"""TensorFlow without the rewriting of graphs, for processes that trace much and run little."""

import tensorflow as tf


def use_plain_graphs() -> None:
    """Runs the graphs of this process as they were traced, from now on."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def are_used() -> bool:
    """Whether this process runs graphs as they were traced."""
    return bool(tf.config.optimizer.get_experimental_options().get("disable_meta_optimizer"))
