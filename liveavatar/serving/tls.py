"""The authorities that far servers are checked against, read once: making a context takes longer than a picture lasts."""

from __future__ import annotations

import asyncio
import ssl
from functools import cache


async def context() -> ssl.SSLContext:
    """httpx's, for `verify=` of its clients; made beside the event loop."""
    return await asyncio.to_thread(_made)


@cache
def _made() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()
