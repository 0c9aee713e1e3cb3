"""``dit-serve``: images over HTTP, from one running batch. Without torch."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from dit_runtime.commands.common import (
    ENGINE_HELP,
    PRECISION_HELP,
    PRECISIONS,
    STORE_HELP,
    Parser,
    image_size,
    positive,
    run,
    thread_count,
)
from dit_serve.request import PORT, ServeRequest

EXAMPLES = (
    "dit-serve my.bundle",
    "dit-serve my.bundle --port 8000 --batch-size 16 --token SECRET --host 0.0.0.0 --hosts images.example.org",
)
logger = logging.getLogger("dit_runtime.serve")  # a command prints what is logged below dit_runtime


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-serve", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)

    from dit_serve.serving import serve

    serve(
        ServeRequest(
            bundles=tuple(args.bundle),
            host=args.host,
            port=args.port,
            hosts=tuple(args.hosts),
            token=args.token,
            batch_size=args.batch_size,
            most_waiting=args.max_queue,
            tables=tuple(args.table),
            timeout=args.timeout,
            engine=args.engine,
            precision=args.precision,
            store=args.store,
            sizes=tuple(args.size),
            threads=args.threads,
        ),
        announce=lambda line: logger.info("%s", line),
    )
    return 0


def _parser() -> Parser:
    parser = Parser(
        "dit-serve",
        "Serve a bundle over HTTP. Requests of many callers share one running batch: images join and leave it between "
        "two steps, whatever their steps, samplers and guidance. SIGTERM lets running images finish. Torch is not "
        "needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, nargs="+", help="bundles that dit-export wrote; the first is the default")
    where = parser.add_argument_group("where to listen")
    where.add_argument("--host", default="127.0.0.1", help="address to listen on; 127.0.0.1 is for this machine alone")
    where.add_argument("--port", type=_port, default=PORT, help="0 takes a free one")
    where.add_argument(
        "--hosts", nargs="+", default=(), metavar="NAME", help="names under which others ask, or * for all names"
    )
    where.add_argument("--token", help="what callers must send as Authorization: Bearer TOKEN")
    how = parser.add_argument_group("how to serve")
    how.add_argument("--batch-size", type=positive, default=8, help="most images in the running batch")
    how.add_argument("--max-queue", type=positive, default=64, help="most images that wait")
    how.add_argument("--timeout", type=_seconds, default=300.0, help="seconds for a request that names none")
    how.add_argument(
        "--table", type=Path, nargs="+", default=(), metavar="JSON", help="sampler tables, such as dit-tune's"
    )
    how.add_argument("--engine", default="auto", help=f"{ENGINE_HELP}; auto takes only an engine that is verified")
    how.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    how.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    how.add_argument(
        "--size",
        type=image_size,
        nargs="+",
        default=(),
        metavar="HEIGHTxWIDTH",
        help="of the images (default: the bundle's first); each size has an engine and a batch of its own",
    )
    how.add_argument("--threads", type=thread_count(0), default=0, help="of the CPU; 0 lets the engine choose")
    return parser


def _port(text: str) -> int:
    """An argparse type: a port of TCP."""
    if not (text.isdecimal() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected a port from 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    """An argparse type: seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected seconds above 0 and at most 86400")
    return seconds


if __name__ == "__main__":
    main()
