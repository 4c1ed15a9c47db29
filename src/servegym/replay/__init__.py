"""Replay of a live router's decision log: prediction against observation, drift, refits."""
