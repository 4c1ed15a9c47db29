"""Gantt charts as a page: a vector chart a schedule, with times and relatives under the cursor."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from servegym.typing import IntArray
from servegym.workflow.schedule import Schedule

_ROW, _BAR, _WIDTH, _LABEL = 22.0, 18.0, 1000.0, 110.0
#: Narrower bars, in units of the chart's width, get no name: it would not fit.
_NAMED = 26.0

#: What `gantt_svg` needs in the page around it.
STYLE = """
.gantt { overflow-x: auto; } .gantt svg { display: block; height: auto; }
.gantt rect.task { stroke: white; stroke-width: .5; } .gantt text { font: 10px system-ui; }
.gantt text.name { fill: white; text-anchor: middle; pointer-events: none; }
.gantt text.axis, .gantt text.device { fill: currentColor; } .gantt line { stroke: #8884; }
.gantt svg.chosen rect.task { opacity: .25; }
.gantt svg.chosen rect.self, .gantt svg.chosen rect.parent, .gantt svg.chosen rect.child {
  opacity: 1; }
.gantt rect.task.parent, .gantt rect.task.child { stroke: currentColor; stroke-width: 2; }
.gantt rect.task.child { stroke-dasharray: 4 2; }
"""
#: Makes the tasks that one waits for (outlined) and those that wait for it (dashed) stand out.
SCRIPT = """
for (const svg of document.querySelectorAll('.gantt svg')) {
  const bars = new Map([...svg.querySelectorAll('rect.task')].map(b => [b.dataset.task, b]));
  const mark = (bar, on) => {
    svg.classList.toggle('chosen', on);
    bar.classList.toggle('self', on);
    for (const kind of ['parent', 'child'])
      for (const other of (bar.dataset[kind] || '').split(' '))
        if (bars.has(other)) bars.get(other).classList.toggle(kind, on);
  };
  for (const bar of bars.values()) {
    bar.addEventListener('mouseenter', () => mark(bar, true));
    bar.addEventListener('mouseleave', () => mark(bar, false));
  }
}
for (const zoom of document.querySelectorAll('input.zoom'))
  zoom.addEventListener('input', () => {
    for (const svg of document.querySelectorAll('.gantt svg'))
      svg.style.width = 100 * zoom.value + '%';
  });
"""


def gantt_svg(
    schedule: Schedule, palette: Sequence[str], span_s: float, group: IntArray | None = None
) -> str:
    """Draw a schedule as SVG: one row a device, one bar a task.

    Args:
        schedule: What to draw.
        palette: Colours, taken in turn by the tasks of a device.
        span_s: Length of the time axis, so that charts below each other compare.
        group: Tasks with the same number have the same colour instead, `int64[num_tasks]`.
    """
    flow = schedule.workflow
    g = flow.graph
    span_s = span_s or 1.0  # of tasks that take no time
    scale = (_WIDTH - _LABEL) / span_s
    parts = []
    for tick_s in _ticks(span_s):
        x = _LABEL + tick_s * scale
        end = flow.num_devices * _ROW
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{end:g}"/>')
        parts.append(f'<text class="axis" x="{x:.1f}" y="{end + 13:g}">{tick_s:g} s</text>')
    for p, device in enumerate(flow.devices):
        y = p * _ROW + 14
        parts.append(f'<text class="device" x="0" y="{y:g}">{html.escape(device[:18])}</text>')
    turn = np.zeros(flow.num_devices, int)
    for v in np.lexsort((schedule.finish_s, schedule.start_s)):
        p, start_s = int(schedule.device_idx[v]), float(schedule.start_s[v])
        x, y = _LABEL + start_s * scale, p * _ROW + (_ROW - _BAR) / 2
        width = max((float(schedule.finish_s[v]) - start_s) * scale, 0.5)
        parents = g.parent[g.pred_edge[g.pred_start[v] : g.pred_start[v + 1]]]
        children = g.child[g.succ_start[v] : g.succ_start[v + 1]]
        name = html.escape(flow.tasks[v])
        number = turn[p] if group is None else group[v]
        parts.append(
            f'<rect class="task" x="{x:.2f}" y="{y:g}" width="{width:.2f}" height="{_BAR:g}"'
            f' fill="{palette[number % len(palette)]}" data-task="{v}"'
            f' data-parent="{_numbers(parents)}" data-child="{_numbers(children)}">'
            f"<title>{name} on {html.escape(flow.devices[p])}: {start_s:.6g} to"
            f" {schedule.finish_s[v]:.6g} s</title></rect>"
        )
        if width > _NAMED:
            shown = html.escape(flow.tasks[v][: int(width / 6)])
            middle = x + width / 2
            parts.append(f'<text class="name" x="{middle:.1f}" y="{y + 13:g}">{shown}</text>')
        turn[p] += 1
    height = flow.num_devices * _ROW + 18
    return (
        f'<div class="gantt"><svg viewBox="0 0 {_WIDTH:g} {height:g}" style="width:100%"'
        f' role="img" aria-label="Gantt chart">{"".join(parts)}</svg></div>'
    )


def gantt_page(schedules: Mapping[str, Schedule], palette: Sequence[str]) -> str:
    """Return a page with a chart of each schedule on the same time axis; it needs nothing else."""
    flow = next(iter(schedules.values())).workflow
    span_s = max(schedule.makespan_s for schedule in schedules.values())
    charts = "".join(
        f"<h2>{html.escape(name)}, {schedule.makespan_s:.6g} s</h2>"
        + gantt_svg(schedule, palette, span_s)
        for name, schedule in schedules.items()
    )
    title = html.escape(flow.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin: 1.4rem 0 .3rem; }}
{STYLE}</style></head><body>
<h1>{title}: {flow.num_tasks} tasks on {flow.num_devices} devices</h1>
<p><label>zoom <input class="zoom" type="range" min="1" max="20" step="0.5" value="1"></label>
A task under the cursor shows its times; what it waits for is outlined, what waits for it is
dashed.</p>
{charts}<script>{SCRIPT}</script></body></html>
"""


def _numbers(values: IntArray) -> str:
    return " ".join(str(value) for value in values)


def _ticks(span_s: float) -> list[float]:
    """About eight round times from 0 to `span_s`."""
    raw = span_s / 8
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw)
    return [float(k * step) for k in range(int(span_s / step) + 1)]
