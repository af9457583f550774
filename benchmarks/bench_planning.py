"""How good the planner is: predicted against measured losses, its choice against the best one, and what it rests on.

    python benchmarks/bench_planning.py EXPERIMENT... [--cache FOLDER]

Every loss is measured on data that served neither for the statistics nor for the sensitivities.

`spearman`, `spearman-minilm`, `spearman-vgg11`: the sum of sensitivity times error against the measured divergence of
30 random plans of one size, and whether weights by depth, fitted to half of the plans, put the others in a better
order. `regret`: the planner's choice against the best of all 6^5 plans of a chain of five layers, on the same net.
`draws`: both on that net with ten other draws of the random projections in the metric.
scikit-learn's digits in a random order: 0 to 895 to train and calibrate on, 896 to 1023 for the sensitivities, the
other 773 to measure on. VGG11, here and below: training images from 0 for the statistics (1,024 unless said), 20000 to
20255 for the sensitivities, and the first development images to measure on (256 here, 512 in E2, 2,000 in E9, whose
losses are of 512, and 1,500 in E11, whose statistics are of 512).

`E2`: errors that plans predict and reports state against the change of one layer's output on other images: layers of
all kinds with VGG11's weights on what its second convolution reads, for 1,024 training images and 512 development
images; and VGG11's own layers, statistics of 2,048 images. `E9`: fewer and more calibration images, and sentences for
MiniLM (of Python's documentation or WikiText-2: the first N of a random order, then 32 for the sensitivities and 256
to measure on at its end). `E11`: BatchNorm folded or not, biases corrected or not, statistics of the norms estimated
anew.

Rows are added to results/planning.csv, each as soon as it is found, in place of earlier ones of the same name. Of the
other experiments of that kind, tests show these. E1 (closed forms): tests/unit/decompositions/test_low_rank.py
(optimum, eigenvalue tail, three forms of it, singular moments), test_convolution_fits.py,
tests/unit/passes/test_anchor.py. E3 (weighted fits): tests/unit/decompositions/test_modes.py (sweeps only improve; 25
% below the Frobenius fit in the metric and above it in the weight), test_cp.py,
tests/contracts/test_decompositions.py (errors fall along the lattice); on VGG11 results/vgg11_fits.csv (Tucker-2) and
results/cp.csv. E8 (exact at full rank): tests/contracts/test_decompositions.py and tests/end_to_end/test_formats.py
for every format, test_convolutions.py, test_nn_door.py, test_onnx_convolutions.py, test_onnx_door.py and
test_torch_compile_families.py for bias, groups, stride, dilation, ties and round trips.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from planning_calibration import images, sentences
from planning_common import digits, minilm, vgg11
from planning_errors import own_layers, predicted_errors
from planning_norms import norms
from planning_orders import spearman_of
from planning_regret import draws, regret

EXPERIMENTS: dict[str, Callable[[Path | None], None]] = {
    "spearman": lambda cache: spearman_of(digits(), 0.5, cache),
    "spearman-vgg11": lambda cache: spearman_of(vgg11(), 0.2, cache, most=10, anchors=False),
    "spearman-minilm": lambda cache: spearman_of(minilm(), 0.6, cache, most=8, anchors=False),
    "regret": lambda cache: regret(digits(), cache),
    "draws": lambda cache: draws(digits()),
    "E2": lambda cache: predicted_errors(),
    "E2-vgg11": own_layers,
    "E9-vgg11": images,
    "E9-minilm": lambda cache: sentences(),
    "E11": norms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--cache", type=Path, help="folder to keep statistics in, between runs")
    given = parser.parse_args()
    for name in given.experiments:
        torch.manual_seed(0)
        EXPERIMENTS[name](given.cache)


if __name__ == "__main__":
    main()
