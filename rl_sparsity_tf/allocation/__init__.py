"""Targets, budgets, and every way to allocate without evaluating a network."""
