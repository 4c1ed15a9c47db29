"""Costs of your own hardware: measured kernels, engine step logs, and a few steps of a new GPU."""
