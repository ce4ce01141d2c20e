"""Files of raw rows to files of probabilities: formats, a pipeline, and what survives a kill."""
