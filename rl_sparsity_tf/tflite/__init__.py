"""Files as files: read, edit, store sparse or as integers, run, time, inspect."""
