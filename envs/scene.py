"""One moment of an environment as rows to look at, drawn as text or as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.errors import ConfigError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

#: Size of a picture; lower if there are few rows.
WIDTH, MAX_HEIGHT = 960, 540
_ROW = 34.0
_LEFT, _TOP, _NAME, _BAR, _NOTE = 12, 66, 170, 130, 230
_INK, _FAINT, _BACK, _TRACK = (32, 33, 36), (128, 134, 139), (255, 255, 255), (232, 234, 237)
#: Colours of requests by class, and of stages by job; a colour-blind-safe set.
_COLOURS = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (170, 150, 20),
    (110, 110, 110),
)


class Row(NamedTuple):
    """A replica, a device, a job or a request.

    Attributes:
        name: What it is.
        fill: Share of the bar that is full, 0 to 1.
        active: Colours of what it runs.
        waiting: Colours of what waits there.
        note: What else there is to say.
        lit: Whether the decision that is due may choose it.
        down: Whether it is out of order.
    """

    name: str
    fill: float
    active: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    note: str = ""
    lit: bool = False
    down: bool = False


class Scene(NamedTuple):
    """What is to be seen of one environment.

    Attributes:
        title: Scenario and time.
        question: The decision that is due.
        bar: What the bars mean.
        cells: What the squares mean.
        rows: What there is, the same number at any time of an environment where possible.
        num_rows: For how many rows there is to be room.
    """

    title: str
    question: str
    bar: str
    cells: str
    rows: tuple[Row, ...]
    num_rows: int


def progress(name: str, env: Any, played: Literal["requests", "jobs"]) -> str:
    """Say how far an episode is.

    Args:
        name: The scenario's.
        env: A row of `State.env` of the simulator that plays it.
        played: What the episode consists of.
    """
    return (
        f"{name}   {env['now_s']:.2f} s   {env['num_ended']} of {env[f'num_{played}']} {played}"
        f" have ended, {env['in_system']} in the system"
    )


def as_text(scene: Scene) -> str:
    """Draw with characters: `#` runs, `.` waits, `>` may be chosen, `x` is out of order."""
    lines = [scene.title, scene.question, f"{'':24}{scene.bar:16.15}{scene.cells}"]
    for row in scene.rows:
        full = round(row.fill * 10)
        mark = "x" if row.down else ">" if row.lit else " "
        cells = _shown("#" * len(row.active) + "." * len(row.waiting), 40)
        lines.append(
            f"{mark} {row.name[:20]:20}  [{'=' * full:10}]    {cells:44}{row.note}".rstrip()
        )
    return "\n".join(lines) + "\n"


def _shown(cells: str, most: int) -> str:
    return cells if len(cells) <= most else f"{cells[:most]}+{len(cells) - most}"


def as_image(scene: Scene) -> NDArray[np.uint8]:
    """Draw a picture, `uint8[height, WIDTH, 3]`; the height is even and the same for a `num_rows`.

    Raises:
        ConfigError: If Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ConfigError(
            'render_mode "rgb_array" needs Pillow: pip install pillow, or use "ansi"'
        ) from error
    height = min(_ROW, (MAX_HEIGHT - _TOP - 8) / max(1, scene.num_rows))
    image = Image.new("RGB", (WIDTH, 2 * int((_TOP + 9 + scene.num_rows * height) / 2)), _BACK)
    draw = ImageDraw.Draw(image)
    font, small = (ImageFont.load_default(size) for size in (15, max(8, min(13, height * 0.62))))
    draw.text((_LEFT, 8), scene.title, _INK, font)
    draw.text((_LEFT, 28), scene.question, _FAINT, font)
    draw.text((_LEFT + _NAME, 50), scene.bar, _FAINT, ImageFont.load_default(11))
    draw.text((_LEFT + _NAME + _BAR + 14, 50), scene.cells, _FAINT, ImageFont.load_default(11))
    for i, row in enumerate(scene.rows[: scene.num_rows]):
        _draw_row(draw, row, _TOP + i * height, height, small)
    hidden = len(scene.rows) - scene.num_rows
    if hidden > 0:
        draw.text((WIDTH - _NOTE, 50), f"{hidden} more not shown", _FAINT, small)
    return np.asarray(image).copy()


def _draw_row(draw: ImageDraw, row: Row, top: float, height: float, font: Any) -> None:
    middle, half = top + height / 2, max(2.0, height / 2 - max(1.0, height / 9))
    if row.lit:
        draw.rectangle((3, middle - half, 7, middle + half), _COLOURS[2])
    ink = _FAINT if row.down else _INK
    draw.text((_LEFT, middle), row.name, ink, font, anchor="lm")
    x: float = _LEFT + _NAME
    draw.rectangle((x, middle - half, x + _BAR, middle + half), _TRACK)
    if row.fill > 0:
        draw.rectangle(
            (x, middle - half, x + _BAR * min(1.0, row.fill), middle + half), _COLOURS[0]
        )
    x += _BAR + 14
    end = WIDTH - _NOTE - 10
    side = max(3.0, min(2 * half, 14.0, (end - x) / max(1, len(row.active) + len(row.waiting))))
    for filled, cells in ((True, row.active), (False, row.waiting)):
        for colour in cells:
            if x + side > end:
                break
            box = (x, middle - side / 2, x + side - 2, middle + side / 2 - 1)
            paint = _COLOURS[colour % len(_COLOURS)]
            draw.rectangle(box, paint if filled else _BACK, paint)
            x += side
        x += 4
    note = "down" if row.down else row.note
    draw.text((WIDTH - _NOTE, middle), note, ink, font, anchor="lm")
