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
#: Of what is asked, and of a bar that is full but for a little.
_ASKED, _FULL, _NEARLY_FULL = (0, 110, 80), (213, 94, 0), 0.95
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
        behind: Shares of smaller bars below that one.
    """

    name: str
    fill: float
    active: tuple[int, ...] = ()
    waiting: tuple[int, ...] = ()
    note: str = ""
    lit: bool = False
    down: bool = False
    behind: tuple[float, ...] = ()


class Scene(NamedTuple):
    """What is to be seen of one environment.

    Attributes:
        title: Scenario and time.
        question: The decision that is due.
        bar: What the bars mean.
        cells: What the squares mean.
        rows: What there is, the same number at any time of an environment where possible.
        num_rows: For how many rows there is to be room.
        ended: Share of the episode's requests or jobs that have ended.
        legend: What colours mean, if that has to be said: names and numbers.
        last: What was done last.
    """

    title: str
    question: str
    bar: str
    cells: str
    rows: tuple[Row, ...]
    num_rows: int
    ended: float
    legend: tuple[tuple[str, int], ...] = ()
    last: str = ""


def share_ended(env: Any, played: Literal["requests", "jobs"]) -> float:
    """Say which share of an episode has ended; arguments as `progress`."""
    return float(env["num_ended"]) / float(env[f"num_{played}"])


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
    last = f"   (last: {scene.last})" if scene.last else ""
    heading = f"{'':24}{scene.bar:16.15}{scene.cells}"
    lines = [scene.title, scene.question + last, heading]
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
    font, small, tiny = (
        ImageFont.load_default(size) for size in (15, max(8, min(13, height * 0.62)), 11)
    )
    draw.rectangle((0, 0, WIDTH, 2), _TRACK)
    draw.rectangle((0, 0, round(WIDTH * scene.ended), 2), _COLOURS[2])
    draw.text((_LEFT, 8), scene.title, _INK, font)
    draw.text((_LEFT, 29), scene.question, _ASKED, font)
    draw.text((WIDTH - _LEFT, 29), scene.last, _FAINT, font, anchor="ra")
    draw.text((_LEFT + _NAME, 51), scene.bar, _FAINT, tiny)
    draw.text((_LEFT + _NAME + _BAR + 14, 51), scene.cells, _FAINT, tiny)
    x: float = WIDTH - _LEFT
    for name, colour in reversed(scene.legend):
        x -= draw.textlength(name, tiny)
        draw.text((x, 11), name, _INK, tiny)
        x -= 15
        draw.rectangle((x, 12, x + 10, 22), _COLOURS[colour % len(_COLOURS)])
        x -= 12
    for i, row in enumerate(scene.rows[: scene.num_rows]):
        _draw_row(draw, row, _TOP + i * height, height, small)
    hidden = len(scene.rows) - scene.num_rows
    if hidden > 0:
        draw.text((WIDTH - _NOTE, 51), f"{hidden} more not shown", _FAINT, tiny)
    return np.asarray(image).copy()


def _draw_row(draw: ImageDraw, row: Row, top: float, height: float, font: Any) -> None:
    middle, half = top + height / 2, max(2.0, height / 2 - max(1.0, height / 9))
    if row.lit:
        draw.rectangle((3, middle - half, 7, middle + half), _COLOURS[2])
    ink = _FAINT if row.down else _INK
    draw.text((_LEFT, middle), row.name, ink, font, anchor="lm")
    x: float = _LEFT + _NAME
    part = 2 * half / (2 + len(row.behind))  # the GPU's bar is as high as two of the others
    bottom = middle - half
    for i, fill in enumerate((row.fill, *row.behind)):
        top, bottom = bottom, bottom + (part if i else 2 * part)
        draw.rectangle((x, top, x + _BAR, bottom - (1 if row.behind else 0)), _TRACK)
        if fill > 0:
            paint = _FULL if fill >= _NEARLY_FULL else _COLOURS[0]
            if i:  # a full tier forgets what was used longest ago, and nobody waits
                paint = _COLOURS[4]
            right = x + _BAR * min(1.0, fill)
            draw.rectangle((x, top, right, bottom - (1 if row.behind else 0)), paint)
    _draw_cells(draw, row, x + _BAR + 14, WIDTH - _NOTE - 10, middle, half)
    note = "down" if row.down else row.note
    draw.text((WIDTH - _NOTE, middle), note, ink, font, anchor="lm")


def _draw_cells(
    draw: ImageDraw, row: Row, left: float, right: float, middle: float, half: float
) -> None:
    """Draw what runs and what waits as squares, in as many lines as make them largest."""
    count = len(row.active) + len(row.waiting)
    if not count:
        return
    sides = [min(14.0, 2 * half / n, (right - left) / -(-count // n)) for n in (1, 2, 3)]
    side = max(3.0, *sides)
    per_line = max(1, int((right - left) / side))
    lines = min(-(-count // per_line), max(1, int(2 * half / side)))
    top = middle - lines * side / 2
    for i, colour in enumerate((*row.active, *row.waiting)[: per_line * lines]):
        x, y = left + i % per_line * side, top + i // per_line * side
        paint = _COLOURS[colour % len(_COLOURS)]
        draw.rectangle(
            (x, y, x + side - 2, y + side - 2), paint if i < len(row.active) else _BACK, paint
        )
