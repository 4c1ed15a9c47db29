"""The same examples on every machine: a failure is a change, not luck."""

from __future__ import annotations

import os

from hypothesis import settings

# what is compiled depends on what is in the cache: tests of what a program says are not about it
os.environ["SERVEGYM_COMPILE_NOTICE"] = "0"
settings.register_profile("servegym", derandomize=True, deadline=None)
settings.load_profile("servegym")
