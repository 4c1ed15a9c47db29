"""What figures have in common; matplotlib is needed here only."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from servegym.errors import ConfigError
from servegym.whole_files import write_whole

#: Okabe-Ito: distinguishable with every kind of colour vision.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#000000",
)
#: What `save_figure` writes.
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
_LINES = ("-", "--", ":")


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to memory."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("a report needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 10,
            "legend.frameon": False,
        }
    )
    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's ending, whole or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=110)
    pyplot().close(figure)
    write_whole({path: buffer.getvalue()})


def as_image(figure: Any, alt: str) -> str:
    """Return a figure as an HTML image with its data inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line; with three times as many as colours they repeat."""
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": _LINES[i // len(PALETTE) % 3]}
