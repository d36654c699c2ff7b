"""The network under decisions, its reward and state; the environments."""
