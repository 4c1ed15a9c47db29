"""Training runs: PPO, heuristic tuning, checkpoints and logs."""

if __name__ != "servegym.train":
    raise ImportError(
        f"import servegym.train, not {__name__}: a second copy of these modules would be loaded"
    )
