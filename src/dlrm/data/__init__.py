"""Raw logs to stored batches: formats, vocabularies, preparation and reading."""
