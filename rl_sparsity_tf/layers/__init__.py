"""A Keras model and its kernels: groups, operations, plans; wrap and strip."""
