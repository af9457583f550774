"""What calibration gathers: second moments of inputs, and how much each site's error moves the model's output."""

from .divergence import Probe, divergence, divergence_of, logits_among, without_padding
from .moments import WIDEST, Collector, Gradients, Moments
from .store import Importance, SiteStatistics, Statistics, damped, shrunk

__all__ = [
    "WIDEST",
    "Collector",
    "Gradients",
    "Importance",
    "Moments",
    "Probe",
    "SiteStatistics",
    "Statistics",
    "damped",
    "divergence",
    "divergence_of",
    "logits_among",
    "shrunk",
    "without_padding",
]
