"""How a network recovers: least squares, masks that learn, statistics."""
