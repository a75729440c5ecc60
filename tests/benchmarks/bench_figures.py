"""CPU time of drawing persons on one core, against decoding the same pictures from PNG.

python tests/benchmarks/bench_figures.py
"""

import io
import statistics
import sys
import time

from PIL import Image

from preprocessing.figures import draw_figure

NUM_PERSONS, NUM_ROUNDS = 20, 5
SIZES = ((64, 64), (128, 64), (256, 176), (512, 512))


def to_png(size: tuple[int, int], person: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw_figure(person, 0, size=size, seed=0).image).save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    for size in SIZES:
        pictures = [to_png(size, person) for person in range(NUM_PERSONS)]
        drawing, decoding = [], []
        for _ in range(NUM_ROUNDS):
            start = time.process_time()
            for person in range(NUM_PERSONS):
                draw_figure(person, 0, size=size, seed=0)
            middle = time.process_time()
            for picture in pictures:
                Image.open(io.BytesIO(picture)).load()
            decoding.append((time.process_time() - middle) / NUM_PERSONS * 1e3)
            drawing.append((middle - start) / NUM_PERSONS * 1e3)
        ratio = statistics.median(d / p for d, p in zip(drawing, decoding, strict=True))
        ms = statistics.median(drawing)
        sys.stdout.write(
            f"{size[0]}x{size[1]}: {ms:.1f} ms of CPU an image, {1e3 / ms:.0f} images/s, "
            f"x {ratio:.0f} of decoding it\n"
        )


if __name__ == "__main__":
    main()
