"""Metrics of engines that are read, and the router's own that are shown."""
