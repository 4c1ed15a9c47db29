"""Draw work for peers, and compare their answers and ours with what was measured.

python -m peers.compare draw measurements.csv.gz 4 work.json
python -m peers.compare report measurements.csv.gz 4 aiconfigurator=answers.jsonl ...
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from servegym.commands.console import make_console
from servegym.errors import ConfigError
from servegym.validate.document import write_markdown
from servegym.validate.published import read_published
from servegym.validate.score import METRICS, RowScore, Skipped, aggregate, score_rows
from servegym.validate.tables import TextTable

from .work import as_json, drawn, figures_of

HEADS = {"tpot_s": "TPOT", "ttft_s": "TTFT", "e2e_s": "E2E", "output_tokens_per_s": "throughput"}
#: Ends of the ranges of clients.
CLIENTS = (4, 16, 64, 256)
#: What is particular to one row in a peer's refusal: names, keys, paths and numbers.
PARTICULAR = re.compile(r"\{.*\}|'[^']*'|\"[^\"]*\"|\S*/\S+/\S*|(?<![\w.])\d[\d,.]*")
#: What goes before it: the layers that the reason came through.
LAYERS = re.compile(r".*\b\w+Error: ")


class Pair(NamedTuple):
    """A figure of a row: relative errors of ours and of a peer's.

    Attributes:
        ours: Relative to what was measured; 0.1 is 10 % too much.
        peer: Likewise.
    """

    ours: float
    peer: float


def pairs(scores: Sequence[RowScore], peer: Mapping[str, Mapping[str, float]]) -> dict[str, list]:
    """Return `Pair`s of each metric, of the rows that both did.

    Args:
        scores: Ours.
        peer: Its figures by row.
    """
    found: dict[str, list[Pair]] = {metric: [] for metric in METRICS}
    for score in scores:
        theirs = peer.get(score.row.row_id, {})
        for metric, figure in score.figures.items():
            if metric in theirs:
                found[metric].append(Pair(figure.error, theirs[metric] / figure.measured - 1.0))
    return found


def table(
    title: str,
    scores: Sequence[RowScore],
    peers: Mapping[str, Mapping[str, Mapping[str, float]]],
    key: Callable[[RowScore], tuple[int, str]],
) -> TextTable:
    """Lay out both errors of groups of rows, a line for each peer.

    Args:
        title: Ends with what the groups are by.
        scores: Ours.
        peers: Figures of each by row.
        key: Place of a row's group among the groups, and its name.
    """
    rows = []
    for place in [(-1, "all"), *sorted({key(score) for score in scores})]:
        for name, figures in peers.items():
            group = [
                score
                for score in scores
                if place in ((-1, "all"), key(score)) and score.row.row_id in figures
            ]
            if group:
                both = pairs(group, figures)
                cells = (_cell(both[metric]) for metric in HEADS)
                rows.append((place[1], name, str(len(group)), *cells, _nearer(group, figures)))
    return TextTable(
        title,
        (title.rsplit("by ", 1)[-1], "peer", "rows", *HEADS.values(), "nearer"),
        rows,
        "Median absolute error of servegym's figure / of the peer's (rows with that figure), on "
        "rows that both did. Nearer: in how many of them servegym's TPOT, or throughput where no "
        "TPOT was measured, is the nearer one.",
    )


def _cell(both: Sequence[Pair]) -> str:
    if not both:
        return "-"
    ours, peer = (100 * aggregate(errors).median for errors in zip(*both, strict=True))
    return f"{ours:.1f} / {peer:.1f} ({len(both)})"


def _nearer(group: Sequence[RowScore], figures: Mapping[str, Mapping[str, float]]) -> str:
    """How often ours is nearer in the figure that speaks most of the step time."""
    nearer = []
    for score in group:
        name = next(name for name, figure in score.figures.items() if figure is score.main)
        [both] = pairs([score], {score.row.row_id: figures[score.row.row_id]})[name] or [None]
        if both is not None:
            nearer.append(abs(both.ours) < abs(both.peer))
    return f"{100 * sum(nearer) / len(nearer):.0f} %" if nearer else "-"


def clients(score: RowScore) -> tuple[int, str]:
    """Return a range of clients, for `table`."""
    if score.plan.loop == "offline":
        return len(CLIENTS) + 1, "all queued"
    for place, most in enumerate(CLIENTS):
        if score.plan.concurrency <= most:
            return place, f"up to {most}"
    return len(CLIENTS), f"over {CLIENTS[-1]}"


def refusals(
    peers: Mapping[str, Sequence[Mapping[str, Any]]], ours: Sequence[Skipped]
) -> TextTable:
    """Count what peers and we refused of the drawn rows, by reason."""
    counts = Counter(
        (name, general(str(answer["refused"])))
        for name, answers in peers.items()
        for answer in answers
        if "refused" in answer
    )
    counts.update(("servegym", general(item.reason)) for item in ours)
    return TextTable(
        "Refused of the drawn rows",
        ("by", "reason", "rows"),
        [(name, reason, str(count)) for (name, reason), count in sorted(counts.items())],
    )


def general(reason: str) -> str:
    """Return a reason without the layers that it came through and without what is of one row."""
    return PARTICULAR.sub("...", LAYERS.sub("", reason)).removesuffix(" at ...")[:100].strip()


def not_asked(left_out: Sequence[Skipped]) -> TextTable:
    """Count the replayed rows about which peers were not asked, by reason."""
    counts = Counter(item.reason for item in left_out)
    return TextTable(
        "Replayed by servegym, and not put to the peers",
        ("reason", "rows"),
        [(reason, str(count)) for reason, count in counts.most_common()],
    )


def answers_of(path: Path, wanted: set[str]) -> list[dict[str, Any]]:
    """Read what a peer said of the rows wanted; it may have been asked about others, too.

    Raises:
        ConfigError: If it has not been asked about one of them.
    """
    told = (json.loads(line) for line in path.read_text().splitlines())
    found = [answer for answer in told if answer["row_id"] in wanted]
    missing = wanted - {answer["row_id"] for answer in found}
    if missing:
        raise ConfigError(
            f"{path.name} has no answer about {len(missing)} of {len(wanted)} rows: ask the peer on"
        )
    return found


def main() -> None:
    """Draw or report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("draw", "report"))
    parser.add_argument("published", type=Path)
    parser.add_argument("per_group", type=int)
    parser.add_argument("files", nargs="+", help="work.json, or NAME=answers.jsonl of each peer")
    parser.add_argument("--load", choices=("closed", "offline"), help="rows of one kind of load")
    parser.add_argument("--document", type=Path, help="where to write the tables, too")
    told = parser.parse_args()
    rows, left_out = drawn(read_published(told.published), told.per_group)
    if told.load:
        rows = [(row, piece) for row, piece in rows if piece.queued == (told.load == "offline")]
    if told.command == "draw":
        Path(told.files[0]).write_text(as_json([piece for _, piece in rows]))
        print(f"{len(rows)} rows")
        return
    named = dict(text.split("=", 1) for text in told.files)
    wanted = {row.row_id for row, _ in rows}
    answers = {name: answers_of(Path(path), wanted) for name, path in named.items()}
    scores, skipped = score_rows([row for row, _ in rows], {})
    figures = {name: figures_of(found) for name, found in answers.items()}
    title = "The same rows through other simulators, error in %"
    first, *others = [
        table(f"{title}, by GPU", scores, figures, lambda score: (0, score.plan.setup.gpu)),
        table(f"{title}, by engine", scores, figures, lambda score: (0, score.plan.family)),
        table(f"{title}, by model", scores, figures, lambda score: (0, score.plan.setup.model)),
        table(f"{title}, by clients", scores, figures, clients),
    ]
    tables = [
        first,
        *(each._replace(note="") for each in others),  # it is the same
        refusals(answers, skipped),
        not_asked(left_out),
    ]
    for each in tables:
        make_console().print(each.rich())
    if told.document:
        write_markdown("peers", tables, told.document)


if __name__ == "__main__":
    main()
