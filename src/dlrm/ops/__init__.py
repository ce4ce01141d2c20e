"""Native kernels, each with a plain twin that says what it computes."""
