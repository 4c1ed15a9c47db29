"""Routers before the same replicas tell each other what they have there."""
