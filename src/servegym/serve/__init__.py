"""Policies in front of live engines: runtime, live state, router and adapters."""
