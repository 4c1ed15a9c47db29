"""Dispatch heuristics, planners and oracles, one rule a file."""

if __name__ != "servegym.baselines":
    raise ImportError(
        f"import servegym.baselines, not {__name__}: a second copy of these modules would be loaded"
    )
