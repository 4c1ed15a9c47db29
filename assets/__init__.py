"""GPU and model specifications, fitted kernel costs, scenarios and trained policies."""

if __name__ != "servegym.assets":
    raise ImportError(
        f"import servegym.assets, not {__name__}: a second copy of these modules would be loaded"
    )
