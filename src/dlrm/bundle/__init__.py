"""A trained model as a folder of its own, for other programs."""
