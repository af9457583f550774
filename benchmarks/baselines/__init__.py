"""Published methods, written from their papers, to be compared with TDC at equal parameters or multiply-adds.

All take layers as matrices (outputs, inputs; of convolutions with the window among the inputs) and store two factors,
``r (m + n)`` numbers, where that is less than the dense weight. What each was checked against:

* ``svd`` (truncated SVD, uniform keep) and ``svd_llm`` (Wang et al. 2024, uniform keep, its formula without the later
  update): SmolLM2-135M on WikiText-2, perplexity over dense at keep 0.9 / 0.8 / 0.6. An independent script measured
  1.90 / 2.44 / 5.36 for SVD-LLM, and millions for plain SVD.
* ``asvd`` (Yuan et al. 2023): alpha 0.5, ratios from a threshold on each layer's own loss. Its published models need
  more memory than a small machine has: unchecked, but for the ordering svd < asvd < svd_llm that its successors report.
* ``balf`` (its allocator): checked on layers of known spectra, where the greatest sum of energies is known by
  enumeration (``python benchmarks/bench_baselines.py check``).
* ``alds`` (Liebenwein et al. 2021): the least largest relative error, with splits of the inputs; checked the same way.
* ``vbmf`` (Kim et al. 2016; Nakajima et al. 2013): ranks without a budget, by ``tdc.planning.suggest.evbmf``, which is
  checked in the tests on weights with noise of known variance.
"""

from .layers import Layer, layers_of, with_weights
from .methods import BASELINES, Answer, balf_ranks

__all__ = ["BASELINES", "Answer", "Layer", "balf_ranks", "layers_of", "with_weights"]
