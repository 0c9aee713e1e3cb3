"""What the demo model's decoder costs in FP16 and in BF16: PyTorch's own, on the FP32 latents of a bundle's records.

python benchmarks/fashion_mnist/decoder_precision.py build/demo/fp16.bundle
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.pipeline import Reference

from dit_runtime.bundle.reader import open_bundle
from dit_runtime.verify.image_rungs import worst_psnr
from dit_runtime.verify.metrics import relative_l2

CHECKPOINT = Path(__file__).parent / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="an export of the demo model, whose records have the latents")
    record = open_bundle(parser.parse_args().bundle).records("images")
    reference, latents = Reference(load_checkpoint(Source(str(CHECKPOINT)))), torch.from_numpy(record["latents"])
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with torch.inference_mode(), reference.at_precision(torch.float32, dtype):
            decoded = reference.decode(latents)
        error = relative_l2(decoded.double().numpy(), record["decoded"])
        level, _ = worst_psnr(reference.images_from_decoded(decoded), record["images"])
        print(f"decoder in {name}: relative error {error:.2e}, worst image {level:.1f} dB")


if __name__ == "__main__":
    main()
