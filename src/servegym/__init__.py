"""servegym: train, judge and ship schedulers for LLM serving clusters."""

__version__ = "0.1.0"
