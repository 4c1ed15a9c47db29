"""`servegym leaderboard`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from servegym.commands.console import make_console, require_writable
from servegym.errors import ConfigError
from servegym.evaluate.leaderboard import (
    ENTRIES,
    leaderboard_table,
    make_entry,
    read_entries,
    recorded_entries,
    write_entry,
    write_page,
)
from servegym.evaluate.suite import load_record, load_suite


@dataclass(frozen=True)
class Leaderboard:
    """Judge policies on a fixed suite of scenarios and put them on a page beside the rules."""

    policies: tuple[str, ...] = ()
    """Rules and files of learned policies, each an entry of its own that plays the scenarios it
    can; `NAME:tuned` is tuned on the training split of each. Without any: the page alone."""
    name: str | None = None
    """Make one entry of this name out of all policies: each scenario is played by the first of them
    that can."""
    suite: str = "servegym-bench-v2"
    """Bundled suite, or a folder with one."""
    out: Path = Path("leaderboard")
    """Folder of the entries, a JSON file each, and of the page, `index.html`; other entries
    that lie there are shown too."""

    def run(self) -> None:
        """Play, print and write."""
        if self.name is not None and not self.policies:
            raise ConfigError(f"entry {self.name} needs policies: name some with --policies")
        page = self.out / "index.html"
        require_writable(page)
        suite = load_suite(self.suite)
        record = load_record(suite)
        console = make_console()
        entries: dict[str, tuple[str, ...]] = {text: (text,) for text in self.policies}
        if self.name is not None:
            entries = {self.name: self.policies}
        for name, texts in entries.items():
            shown = Path(name).name
            with console.status("") as status:
                entry = make_entry(suite, record, shown, texts, progress=status.update)
            console.print(f"entry: {write_entry(entry, self.out)}")
        mine = read_entries(suite, self.out)
        names = {entry["name"] for entry in mine}
        known = [*read_entries(suite, suite.folder / ENTRIES), *recorded_entries(suite, record)]
        others = [entry for entry in known if entry["name"] not in names]
        console.print(leaderboard_table(suite, [*mine, *others]))
        write_page(suite, record, [*mine, *others], page)
        console.print(f"page: {page}")
