"""The search: episodes, finals, the run's folder, the result, comparisons."""
