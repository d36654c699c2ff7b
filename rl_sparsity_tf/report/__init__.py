"""What people see of a run: a page, and plots, from its files or a result."""
