"""What calibration gathers: second moments of inputs, and how much each site's error moves the model's output."""

from .divergence import divergence
from .moments import WIDEST, Collector, Moments
from .store import SiteStatistics, Statistics, shrunk

__all__ = ["WIDEST", "Collector", "Moments", "SiteStatistics", "Statistics", "divergence", "shrunk"]
