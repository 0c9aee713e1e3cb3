"""``dit-triton``: a bundle as a model of Triton Inference Server. Without torch."""

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

EXAMPLES = (
    "dit-triton my.bundle -o repository --gpus 4",
    "dit-triton my.bundle -o repository --gpus 0 --engine onnxruntime --instances 2 --batch-size 4",
)
MOST_GPUS = 1024
logger = logging.getLogger("dit_runtime.triton")  # a command prints what is logged below dit_runtime


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-triton", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)

    from dit_serve.triton_files import TritonRequest, write_model

    written = write_model(
        TritonRequest(
            bundle=args.bundle,
            repository=args.output,
            name=args.name,
            gpus=args.gpus,
            instances=args.instances,
            batch_size=args.batch_size,
            most_waiting=args.max_queue,
            decoupled=not args.whole,
            in_place=args.in_place,
            force=args.force,
            engine=args.engine,
            precision=args.precision,
            store=args.store,
            size=args.size,
            threads=args.threads,
        )
    )
    logger.info("%s: engine %s; tritonserver --model-repository %s", written.folder, written.engine, args.output)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "dit-triton",
        "Write a bundle as a model of Triton Inference Server's Python backend. Each instance has an engine and a "
        "running batch, in which images of many requests share the steps. Where Triton runs, dit-export must be "
        "installed for its Python. Torch is not needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="bundle that dit-export wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("repository"), help="the model repository")
    parser.add_argument("--name", help="of the model (default: the bundle's)")
    parser.add_argument("--force", action="store_true", help="replace a model of that name that dit-triton wrote")
    parser.add_argument(
        "--in-place", action="store_true", help="let the model read the bundle where it is, instead of a copy"
    )
    how = parser.add_argument_group("how to serve")
    how.add_argument(
        "--gpus", type=_gpus, metavar="N", help="engines on N GPUs, 0 for the CPU (default: what Triton finds)"
    )
    how.add_argument("--instances", type=positive, default=1, help="engines on each GPU, or on the CPU")
    how.add_argument("--batch-size", type=positive, default=8, help="most images in the running batch of an engine")
    how.add_argument("--max-queue", type=positive, default=64, help="most requests that wait")
    how.add_argument(
        "--whole",
        action="store_true",
        help="one answer to a request, with all of its images, for clients that do not read streams",
    )
    how.add_argument("--engine", default="auto", help=ENGINE_HELP)
    how.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    how.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    how.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of the images (default: the first)")
    how.add_argument("--threads", type=thread_count(0), default=0, help="of the CPU; 0 lets the engine choose")
    return parser


def _gpus(text: str) -> int:
    """An argparse type: a number of GPUs."""
    if not (text.isdecimal() and len(text) < 5 and int(text) <= MOST_GPUS):
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected a whole number from 0 to {MOST_GPUS}")
    return int(text)


if __name__ == "__main__":
    main()
