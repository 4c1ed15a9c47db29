"""The newest tables that a peer ships; runs beside the peers."""

from __future__ import annotations

from functools import cache

from aiconfigurator_core.sdk.perf_database import get_latest_database_version

#: Version of the engine whose tables are the newest, of a system and a backend. It takes seconds to
#: look up; and what AISimulate takes by default are older tables, which lack more shapes.
newest_tables = cache(get_latest_database_version)
