"""What each tenant may do: requests at once and requests a minute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from servegym.serve.router.config import LimitConfig
from servegym.serve.router.errors import RequestError


@dataclass(slots=True)
class _Account:
    """What a tenant has used."""

    tokens: float
    concurrent: int = 0
    updated_s: float = -math.inf


class Limits:
    """Admits requests tenant by tenant.

    Args:
        default: Of tenants that are not named.
        tenants: Of those that are.
    """

    def __init__(self, default: LimitConfig, tenants: Mapping[str, LimitConfig]) -> None:
        self._default = default
        self._tenants = dict(tenants)
        self._accounts: dict[str, _Account] = {}  # of those with requests, or with a rate

    def of(self, tenant: str) -> LimitConfig:
        """Limits of a tenant."""
        return self._tenants.get(tenant, self._default)

    def enter(self, tenant: str, now_s: float) -> None:
        """Admit a request; every admitted one must `leave`.

        Raises:
            RequestError: If the tenant has too many, or too many a minute.
        """
        limit = self.of(tenant)
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(limit.requests_per_min or 0.0)
        if limit.max_concurrent is not None and account.concurrent >= limit.max_concurrent:
            raise RequestError(
                429,
                f"tenant {tenant} has {account.concurrent} requests in progress, its limit: "
                "wait for one to end",
                "concurrency_limit_exceeded",
                retry_after_s=1.0,
            )
        if limit.requests_per_min is not None:
            self._take(tenant, account, limit.requests_per_min, now_s)
        account.concurrent += 1

    def leave(self, tenant: str) -> None:
        """A request has ended."""
        account = self._accounts[tenant]
        account.concurrent -= 1
        if not account.concurrent and self.of(tenant).requests_per_min is None:
            del self._accounts[tenant]  # behind a gateway clients name themselves as they like

    def _take(self, tenant: str, account: _Account, per_min: float, now_s: float) -> None:
        """Take a token out of a bucket that holds a minute's worth."""
        if math.isfinite(account.updated_s):
            refill = (now_s - account.updated_s) * per_min / 60.0
            account.tokens = min(max(1.0, per_min), account.tokens + refill)
        else:
            account.tokens = max(1.0, per_min)
        account.updated_s = now_s
        if account.tokens < 1.0:
            raise RequestError(
                429,
                f"tenant {tenant} may send {per_min:g} requests a minute: send fewer",
                "rate_limit_exceeded",
                retry_after_s=(1.0 - account.tokens) * 60.0 / per_min,
            )
        account.tokens -= 1.0
