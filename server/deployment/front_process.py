"""The process that serves the front.

From the command line: `python -m server.deployment.front_process --help`.
"""

import argparse
import logging
from pathlib import Path

import uvicorn

from server.deployment.front import Front, FrontSettings


def main() -> None:
    """Serve until SIGTERM."""
    options = _parser().parse_args()
    host, _, port = options.listen.rpartition(":")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = FrontSettings(
        upstream=options.upstream,
        authority=options.authority,
        state=options.state,
        max_body_bytes=options.max_body_mb * 2**20,
        max_requests=options.max_requests,
        hold_s=options.hold_s,
    )
    uvicorn.run(
        Front(settings),
        host=host.strip("[]"),
        port=int(port),
        ssl_certfile=str(options.certificate),
        ssl_keyfile=str(options.key),
        access_log=False,
        log_level="warning",
        log_config=None,
        lifespan="on",
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=2 * settings.max_requests + 50,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=2,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--listen", required=True, help="host:port that is open to the hospitals")
    parser.add_argument("--upstream", required=True, help="host:port of the SuperLink")
    parser.add_argument("--authority", type=Path, required=True, help="CA certificate of the SuperLink")
    parser.add_argument("--certificate", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder of the bell and the news")
    parser.add_argument("--max-body-mb", type=int, default=16)
    parser.add_argument("--max-requests", type=int, default=400)
    parser.add_argument("--hold-s", type=float, default=20.0)
    return parser


if __name__ == "__main__":
    main()
