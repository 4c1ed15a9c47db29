"""The same examples on every machine: a failure is a change, not luck."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("servegym", derandomize=True, deadline=None)
settings.load_profile("servegym")
