"""Learned policies: networks, the masked actor-critic and imitation from a heuristic."""

if __name__ != "servegym.agents":
    raise ImportError(
        f"import servegym.agents, not {__name__}: a second copy of these modules would be loaded"
    )
