"""Flower's client of the server, held to the one server that this hospital has enrolled at.

Flower follows a redirect to any machine, also without TLS, with the request's body: a hospital's signature
and updates. Our own front redirects a held pull to itself (`/v1/fleet/pull-messages?held=N`); no other
redirect is needed.
"""

from typing import Any

import httpx
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

_FLEET = "/v1/fleet/"


class GuardedFleetClient(FleetHttpClient):
    """Every request is a POST to the Fleet API of its own server; another one fails before it is sent.

    It fails as a broken connection does, so that Flower tries again. Its words must not hold "certificate",
    "ssl" or "tls": these are final to Flower.
    """

    def __init__(self, base_url: str, **options: Any) -> None:
        super().__init__(base_url, **options)
        self._server = _place(httpx.URL(base_url))
        self._client.event_hooks = {"request": [self._stay]}  # called before every hop

    def _stay(self, request: httpx.Request) -> None:
        stays = _place(request.url) == self._server and request.url.path.startswith(_FLEET)
        if not stays or request.method != "POST":
            raise httpx.RemoteProtocolError("the server pointed to another place", request=request)

    def _send(self, context: ProtobufRequestContext, *, stream: bool = False) -> httpx.Response:
        try:
            return super()._send(context, stream=stream)
        except httpx.TooManyRedirects as error:  # the end of a SuperNode's loop otherwise
            raise httpx.RemoteProtocolError(
                "the server points in circles", request=context.request
            ) from error


def _place(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
