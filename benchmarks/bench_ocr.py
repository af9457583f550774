"""The text detector of PP-OCR v4 (an ONNX file of `rapidocr-onnxruntime`), on images of drawn text.

    pip install --no-deps rapidocr-onnxruntime && python benchmarks/bench_ocr.py

48 images for the statistics, 8 for the sensitivities, 16 of each of two sizes to measure on: disjoint, seed 0. Change:
squared difference of the output map from the dense one, over the square of the dense one; agreement: intersection over
union of the two maps of text at threshold 0.3. Times: one thread, dense and compressed in turn, 25 repeats, as dense
over compressed.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import resident_growth, write_rows

import tdc
from tdc.measure import interleaved

WORDS = (
    "the quick brown fox jumps over a lazy dog while tensor trains contract slowly 2026 invoice total 48.50 "
    "Paris Lyon street No. 17 open daily from 9 to 18 please keep right exit platform B"
).split()
SIZES = ((320, 320), (480, 640))
FORMATS = ("input_svd", "output_svd", "spatial_svd", "tucker2", "svd")
METHODS: dict[str, dict[str, Any]] = {
    "SVD, no data": {"allow": ("output_svd", "svd"), "metric": "weight"},
    "input metric, without gathers": {"allow": FORMATS},
    "input metric (default)": {},
    "input metric, anchored": {"anchored": True},
}


def main() -> None:
    source = detector()
    maker = random.Random(0)
    calibration = [{"x": image(maker, SIZES[k % 2])} for k in range(48)]
    probe = [{"x": image(maker, SIZES[k % 2])} for k in range(8)]
    held_out = {size: [{"x": image(maker, size)} for _ in range(16)] for size in SIZES}
    statistics = tdc.calibrate(source, calibration, probe=probe)
    dense = session(source)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for keep in (0.7, 0.5):
            for method, how in METHODS.items():
                options = dict(how)
                path = Path(folder) / "small.onnx"
                known: dict[str, Any] = {} if options.get("metric") == "weight" else {"statistics": statistics}
                if options.pop("anchored", False):
                    known["calibration"] = calibration
                report = tdc.compress_onnx(source, path, budget=f"params={keep}", **known, **options)
                row: dict[str, object] = {"method": method, "keep": keep, "sites": report.replaced}
                row["candidates"] = len(report.sites)
                row["file kept"] = f"{path.stat().st_size / source.stat().st_size:.4f}"
                row["resident kept"] = f"{growth(path, held_out) / growth(source, held_out):.3f}"
                small = session(path)
                for size, batches in held_out.items():
                    row |= compared(dense, small, batches, f"{size[0]}x{size[1]}")
                print(row, flush=True)
                rows.append(row)
    write_rows("ocr", rows)


def compared(dense: Any, small: Any, batches: list[dict[str, np.ndarray]], size: str) -> dict[str, object]:
    """Change of the output map, agreement of the text that is found, and times."""
    pairs = [(dense.run(None, batch)[0], small.run(None, batch)[0]) for batch in batches]
    change = sum(np.square(a - b).sum() for a, b in pairs) / sum(np.square(a).sum() for a, _ in pairs)
    both = sum(((a > 0.3) & (b > 0.3)).sum() for a, b in pairs)
    either = sum(((a > 0.3) | (b > 0.3)).sum() for a, b in pairs)
    times = interleaved({k: lambda s=s: s.run(None, batches[0]) for k, s in (("dense", dense), ("small", small))})
    return {
        f"change {size}": f"{change:.5f}",
        f"agreement {size}": f"{both / either:.4f}",
        f"speed {size} min": f"{times['dense'].minimum / times['small'].minimum:.3f}",
        f"speed {size} median": f"{times['dense'].median / times['small'].median:.3f}",
    }


def growth(path: Path, held_out: dict[tuple[int, int], list[dict[str, np.ndarray]]]) -> int:
    return resident_growth(path, held_out[SIZES[1]][0])


def image(maker: random.Random, size: tuple[int, int]) -> np.ndarray:
    """(1, 3, height, width) float32 as the detector takes it: words in random places, sizes and colours."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = size
    background = tuple(maker.randrange(140, 256) for _ in range(3))
    canvas = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(canvas)
    for _ in range(maker.randrange(4, 14)):
        text = " ".join(maker.sample(WORDS, maker.randrange(1, 5)))
        place = (maker.randrange(-20, width - 40), maker.randrange(0, height - 20))
        colour = tuple(maker.randrange(0, 110) for _ in range(3))
        draw.text(place, text, fill=colour, font=ImageFont.load_default(maker.randrange(10, 40)))
    pixels = np.asarray(canvas, dtype=np.float32) / 255
    return ((pixels - 0.5) / 0.5).transpose(2, 0, 1)[None].copy()


def detector() -> Path:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None:
        raise SystemExit("skipped: pip install --no-deps rapidocr-onnxruntime")
    return Path(package.origin).parent / "models" / "ch_PP-OCRv4_det_infer.onnx"


def session(path: Path) -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
