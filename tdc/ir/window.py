"""Windows: how a convolution slides along one axis."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Window"]


@dataclass(frozen=True, slots=True)
class Window:
    """One window axis of ``size`` taps, ``dilation`` apart, moved by ``stride`` over an input padded with zeros.

    ``before`` and ``after`` are the padding at both ends; with ``auto`` (``upper`` or ``lower``) the padding follows
    from the length of the input, so that there are ``ceil(length / stride)`` positions (SAME of ONNX and TensorFlow),
    and the odd zero goes to that end.
    """

    axis: str
    size: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    auto: str = ""

    @property
    def extent(self) -> int:
        """Entries from the first tap to the last one."""
        return self.dilation * (self.size - 1) + 1

    @property
    def trivial(self) -> bool:
        """Whether every entry of the input is a position of its own: one tap, no stride, no padding."""
        return self.extent == 1 and self.stride == 1 and not self.before and not self.after

    def padding(self, length: int) -> tuple[int, int]:
        """Zeros before and after an input of that length."""
        if not self.auto:
            return self.before, self.after
        positions = -(-length // self.stride)
        total = max(0, (positions - 1) * self.stride + self.extent - length)
        small, large = total // 2, total - total // 2
        return (small, large) if self.auto == "upper" else (large, small)

    def positions(self, length: int) -> int:
        """How often the window fits into an input of that length; 0 if it never does."""
        before, after = self.padding(length)
        return max(0, (length + before + after - self.extent) // self.stride + 1)

    def __str__(self) -> str:
        pads = self.auto or (f"{self.before}" if self.before == self.after else f"{self.before}:{self.after}")
        parts = [f"{self.axis}={self.size}"]
        parts += [f"stride {self.stride}"] if self.stride != 1 else []
        parts += [f"dilation {self.dilation}"] if self.dilation != 1 else []
        parts += [f"pad {pads}"] if pads != "0" else []
        return " ".join(parts)
