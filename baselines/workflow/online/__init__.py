"""Schedulers of jobs that arrive over time: one family of rules a file."""
