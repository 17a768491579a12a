"""Measure the speed of drawing faces: rows per second of one core, with drawing and PNG encoding timed separately.

    python benchmarks/synthesize.py [--rows 100] [--sizes 64 128 256] [--variety faces]

A row consists of two drawings, line art and a warped view, encoded as four PNG files in memory. Time is CPU time of the
process, so other work on the machine affects it little; nothing is written to disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable

import numpy as np
import PIL

from animediffusion.pipelines.synthetic.dataset import DrawnRow, make_row
from animediffusion.pipelines.synthetic.variety import FACES, Variety
from animediffusion.platform.images.codec import encode_png


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("--rows", type=int, default=100, help="rows at 64 px; fewer at larger sizes")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    arguments.add_argument("--variety", type=Variety.parse, default=FACES, metavar="PRESET|NAME=SHARE,...")
    options = arguments.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"Pillow {PIL.__version__}, NumPy {np.__version__}\n")  # fmt: skip
    print("| size | draw, ms/row | encode, ms/row | rows/s per core |")
    print("|-----:|-------------:|---------------:|----------------:|")
    for size in options.sizes:
        count = max(5, options.rows * 64 // size)
        draw, encode = measure(size, count, options.variety)
        print(f"| {size} | {draw * 1e3:.1f} | {encode * 1e3:.1f} | {1 / (draw + encode):.1f} |")


def measure(size: int, count: int, variety: Variety) -> tuple[float, float]:
    """Return the CPU seconds per row for drawing and for encoding."""
    make_row(1, 0, size, variety)  # The first call also builds tables of curve weights, which must not be timed.
    rows: list[DrawnRow] = []
    draw = _cpu_seconds(lambda: rows.extend(make_row(0, index, size, variety) for index in range(count)))
    encode = _cpu_seconds(lambda: [encode_png(array) for row in rows for array in row])
    return draw / count, encode / count


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
