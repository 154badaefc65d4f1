"""Listen and dial addresses, and the rule that plaintext stays on loopback."""

from __future__ import annotations

import ipaddress

from opd_mesh.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """``"host:port"`` or ``"[v6]:port"`` → (host, port). Raises :class:`ConfigError`."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is not host:port (port 0 lets the system choose)", field="listen")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether traffic to ``host`` stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_secure(address: str, *, tls: bool, insecure: bool) -> None:
    """Raises :class:`ConfigError` for plaintext on anything but loopback, unless ``insecure`` was said."""
    host, _ = split_address(address)
    if not tls and not insecure and not is_loopback(host):
        raise ConfigError(
            f"{address} is reachable from other machines, and there is no TLS: set server.tls (cert_file, key_file), "
            "listen on 127.0.0.1, or pass --insecure where the network itself is trusted",
            field="listen",
        )
