"""Gymnasium and PettingZoo environments over the compiled cluster simulator."""

if __name__ != "servegym.envs":
    raise ImportError(
        f"import servegym.envs, not {__name__}: a second copy of these modules would be loaded"
    )
