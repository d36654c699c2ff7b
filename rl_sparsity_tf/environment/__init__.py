"""The network under decisions, its reward and state; the two environments."""
