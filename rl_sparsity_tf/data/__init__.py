"""What users pass to fit, checked: forms, labels, weights, metrics, data sets."""
