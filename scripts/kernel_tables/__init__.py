"""Readers of measured kernel tables, which the fitting scripts and their tests use."""
