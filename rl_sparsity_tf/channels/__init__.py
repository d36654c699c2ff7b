"""Which channels are one; shrink, permute, count, predict latency."""
