"""Addresses of servers."""

from urllib.parse import urlsplit

from megatron_oprd.errors import UserError


def check_url(url: str, setting: str) -> None:
    """Refuses a text that is no address of a server.

    Args:
        url: The text.
        setting: The setting or option that it was given as.

    Raises:
        UserError: It is no address.
    """
    parts = urlsplit(url)
    try:
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        has_port = False
    others = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if parts.scheme != "http" or not parts.hostname or not has_port or any(others):
        raise UserError(
            f"{setting} = {url} is not an address of a server; it has to look like "
            "http://127.0.0.1:8000"
        )
