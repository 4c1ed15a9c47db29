"""Names of episodes by content: what has the same name is the same episode, and no repeat."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike

from servegym.cluster.spec import Episode, Faults
from servegym.workflow.online.spec import Episode as JobEpisode

#: Of seconds and of other fractions that count.
_DECIMALS = 6
_FAULTS = ("time_s", "replica", "kind", "value")


def requests_key(episode: Episode) -> bytes:
    """Name what a stream of requests asks of a cluster.

    How their lengths are foreseen and which SLO class they were drawn is no part of it: other
    draws of these are no other traffic.
    """
    table = episode.table
    return _digest(
        table.arrival_s,
        table.prompt_tokens,
        table.output_tokens,
        table.after,
        table.delay_s,
        table.prefix_offsets,
        table.prefix_keys,
        table.prefix_ends,
    )


def episode_key(episode: Episode, *, noisy: bool) -> bytes:
    """Name an episode: its requests, fleet and faults, and its noise if there is any."""
    return requests_key(episode) + _digest(
        episode.type_idx,
        episode.speed,
        *_faults(episode.faults),
        episode.noise_seed if noisy else 0,
    )


def jobs_key(episode: JobEpisode) -> bytes:
    """Name an episode of jobs: what they are and when they come, fleet, faults and noise."""
    jobs = episode.jobs
    return _digest(
        episode.arrival_s,
        episode.type_idx,
        episode.speed,
        *_faults(episode.faults),
        episode.noise_seed if episode.noise_sigma else 0,
        () if episode.job_idx is None else episode.job_idx,
        *(
            column
            for job in jobs
            for column in (
                job.kind,
                job.duration_s,
                job.tool_s,
                job.prompt_tokens,
                job.output_tokens,
                job.parent,
                job.child,
                job.data_bytes,
                job.shared_tokens,
                job.hidden,
                job.deadline_s,
                job.weight,
            )
        ),
    )


def _faults(faults: Faults) -> list[ArrayLike]:
    return [getattr(faults, name) for name in _FAULTS]


def _digest(*columns: ArrayLike) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for column in columns:
        values = np.ascontiguousarray(column)
        if values.dtype.kind == "f":
            # processors with other vector instructions draw other last bits of logarithms
            values = np.round(values, _DECIMALS) + 0.0  # no -0.0
        found.update(f"{values.dtype}{values.shape}".encode())
        found.update(values.tobytes())
    return found.digest()
