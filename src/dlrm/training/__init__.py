"""Optimizers, the step, and the loop around it."""
