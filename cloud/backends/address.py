"""Where a server is: its url, checked, and the proxy on the way to it.

What a url may be is decided here, and that a key never travels in clear over a network unless somebody said so. What is
sent there is the business of `cloud.backends.connections` and `cloud.backends.transport`.
"""

from __future__ import annotations

import base64
import os
import sys
from urllib.parse import SplitResult, unquote, urlsplit

from cloud.errors import ConfigurationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["Address", "Proxy"]

_PORTS: Final = {"http": 80, "https": 443}


class Proxy:
    """A proxy for HTTP between this machine and the server.

    Attributes:
        host, port: Where it listens.
        url: Without credentials, for messages.
        headers: What each request to it carries: its credentials, if it has any.
    """

    __slots__ = ("headers", "host", "port", "url")

    def __init__(self, url: str) -> None:
        parts = _split(url if "://" in url else f"http://{url}", "The proxy in the environment")
        self.host = _host(parts)
        self.port = parts.port or _PORTS["http"]
        self.url = _shown(parts)
        if parts.scheme != "http":
            raise ConfigurationError(
                f"The proxy {self.url} in the environment cannot be used: only proxies that speak HTTP can. "
                "Set https_proxy and http_proxy to one, or name the server in no_proxy."
            )
        self.headers: dict[str, str] = {}
        if parts.username is not None:
            credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.headers["Proxy-Authorization"] = f"Basic {base64.b64encode(credentials).decode()}"


class Address:
    """Where a server is and how to get there.

    Args:
        url: ``https://host[:port][/path]``. ``http://`` is for this machine only (``localhost``, 127.0.0.0/8, ``::1``),
            unless ``insecure``. A path in front of the server's own is kept.
        insecure: Allow ``http://`` to any host; everything, the key too, can then be read and changed on the way.

    Attributes:
        url: As given, without slashes at its end; it holds no secret.
        secure: TLS is spoken.
        host, port: The server's.
        authority: Host and port as the header ``Host`` has them.
        base: The path in front of every path of the server; empty, or with a slash at its beginning only.
        proxy: What to connect to instead, as ``https_proxy``, ``http_proxy`` and ``no_proxy`` (or the system) say. None
            for this machine, always.

    Raises:
        ConfigurationError: The url is not of that form, carries a user or password, or is ``http://`` to another
            machine; or the proxy is of a kind that cannot be used.
    """

    __slots__ = ("authority", "base", "host", "port", "proxy", "secure", "url")

    def __init__(self, url: str, *, insecure: bool = False) -> None:
        parts = _split(url, "The url of the server")
        shown = _shown(parts)
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError(
                f"The url {shown} carries a user or password, which would appear in logs. Leave it out, and give the "
                "key as api_key and api_secretkey."
            )
        if parts.query or parts.fragment:
            raise ConfigurationError(f"The url of the server is no more than {shown}: leave out what follows.")
        self.secure = parts.scheme == "https"
        self.host = _host(parts)
        self.port = parts.port or _PORTS[parts.scheme]
        self.base = parts.path.rstrip("/")
        self.url = shown.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = host if self.port == _PORTS[parts.scheme] else f"{host}:{self.port}"
        here = _is_loopback(self.host)
        if not self.secure and not here and not insecure:
            raise ConfigurationError(
                f"{self.url} is another machine, and http:// would send your key and data in clear. Use https://, or "
                "pass insecure=True if the network between is one that you trust."
            )
        self.proxy = None if here else _proxy(parts.scheme, self.host, self.port)

    def __repr__(self) -> str:
        return f"Address({self.url!r})"


def _is_loopback(host: str) -> bool:
    """Tell whether a host is this machine, going by its name alone."""
    if host.lower() == "localhost":
        return True
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _split(url: str, what: str) -> SplitResult:
    problem = ""
    try:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or parts.port == 0:
            problem = "is not one"
        elif not (url.isascii() and url.isprintable()) or " " in url:
            # urlsplit drops newlines and tabs without a word.
            problem = "has characters that no url has"
    except ValueError:
        # Not as the cause: its text quotes parts of the url.
        raise ConfigurationError(f"{what} cannot be read: {_unsaid(url)!r}. Use https://host:port.") from None
    if problem:
        raise ConfigurationError(f"{what} {problem}: {_unsaid(url)!r}. Use https://host:port.")
    return parts


def _host(parts: SplitResult) -> str:
    assert parts.hostname is not None
    return unquote(parts.hostname)  # %25 before the zone of a link-local address


def _unsaid(url: str) -> str:
    """The url without what may be a password."""
    before, at, after = url.rpartition("@")
    return f"{before.partition('://')[0]}://…@{after}" if at else url


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _proxy(scheme: str, host: str, port: int) -> Proxy | None:
    set_here = any(name.lower().endswith("_proxy") for name in os.environ)
    if not set_here and sys.platform not in ("darwin", "win32"):
        return None  # without its import, of 20 ms
    from urllib.request import getproxies, proxy_bypass

    url = getproxies().get(scheme)
    return Proxy(url) if url and not proxy_bypass(f"{host}:{port}") else None
