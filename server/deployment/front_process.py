"""The process that serves the front.

From the command line: `python -m server.deployment.front_process --help`.
"""

import argparse
import asyncio
import asyncio.sslproto
import contextlib
import functools
import logging
import resource
import sys
from pathlib import Path

import uvicorn

from server.deployment.connections import HANDSHAKE_S, IDLE_S, BoundedConnection
from server.deployment.front import Front, FrontSettings
from server.deployment.rings import look_for_rings
from server.deployment.seldom import Seldom

TLS_BUFFER_BYTES = 32 * 2**10
"""What a connection reads at once, kept as long as it is open: two TLS records."""
_MOST_FILES = 65_536


def main() -> None:
    """Serve until SIGTERM."""
    options = _parser().parse_args()
    host, _, port = options.listen.rpartition(":")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Seldom())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = FrontSettings(
        upstream=options.upstream,
        authority=options.authority,
        state=options.state,
        roster=options.roster or options.state.absolute().parent / "roster.json",
        max_body_bytes=options.max_body_mb * 2**20,
        max_reply_bytes=options.max_reply_mb * 2**20,
        max_requests=options.max_requests,
        hold_s=options.hold_s,
    )
    _allow_files()
    look_for_rings()
    config = configuration(Front(settings), options.certificate, options.key, settings.max_requests)
    config.host, config.port = host.strip("[]"), int(port)
    server = uvicorn.Server(config)
    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=new_loop) as runner,
    ):
        runner.run(server.serve())
    sys.exit(0 if server.started else 3)


def configuration(front: Front, certificate: Path, key: Path, max_requests: int) -> uvicorn.Config:
    """How the front is served; where it listens is still to be said."""
    return uvicorn.Config(
        front,
        http=BoundedConnection,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
        access_log=False,
        log_level="warning",
        log_config=None,
        lifespan="on",
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=2 * max_requests + 50,
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=2,
    )


def new_loop() -> asyncio.AbstractEventLoop:
    """Make asyncio's event loop with a shorter TLS handshake and smaller buffers, which uvloop has not."""
    loop = asyncio.new_event_loop()
    # A hundred connections of asyncio's usual 256 KiB would be as much as the smaller models.
    asyncio.sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES
    quick = functools.partial(loop.create_server, ssl_handshake_timeout=HANDSHAKE_S)
    loop.create_server = quick  # type: ignore[method-assign]
    return loop


def _allow_files() -> None:
    """A connection is an open file; the usual limit of 1024 is less than the connections allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--listen", required=True, help="host:port that is open to the hospitals")
    parser.add_argument("--upstream", required=True, help="host:port of the SuperLink")
    parser.add_argument("--authority", type=Path, required=True, help="CA certificate of the SuperLink")
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder of the bell and the news")
    parser.add_argument("--roster", type=Path, help="default: roster.json beside that folder")
    parser.add_argument("--max-body-mb", type=int, default=16)
    parser.add_argument("--max-reply-mb", type=int, default=512, help="all parts of one reply, MiB")
    parser.add_argument("--max-requests", type=int, default=400)
    parser.add_argument("--hold-s", type=float, default=20.0)
    return parser


if __name__ == "__main__":
    main()
