"""The address at which gateways find the picker."""

from __future__ import annotations

import grpc

from servegym.errors import ConfigError
from servegym.serve.picker.config import PickerListenConfig


def bind(server: grpc.aio.Server, listen: PickerListenConfig) -> int:
    """Let a server listen, by TLS if there is a certificate; return its port.

    Raises:
        ConfigError: If the address cannot be listened on, or a certificate cannot be used.
    """
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    address = f"{host}:{listen.port}"
    try:
        if listen.certificate is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, _credentials(listen)))
    except RuntimeError:  # gRPC writes the reason to the standard error alone
        why = "is the port taken?"
        if listen.certificate is not None:
            why = f"is the port taken, or are {listen.certificate} and {listen.key} no pair of PEM?"
        raise ConfigError(f"the picker cannot listen on {address}: {why}") from None


def _credentials(listen: PickerListenConfig) -> grpc.ServerCredentials:
    assert listen.certificate is not None
    assert listen.key is not None
    try:
        pair = listen.key.read_bytes(), listen.certificate.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair])
