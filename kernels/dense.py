"""Linear layers that stay dense, on the kernel of one product where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from tdc.ir import Block, Equation, Op

__all__ = ["KernelLinear", "can_use_kernels"]

_PRODUCT = Op("matmul", "y", ("x", "weight"), Equation.parse("b i, o i -> b o"))


def can_use_kernels(layer: nn.Module) -> bool:
    """Whether it is torch's linear layer, as it is, on the processor."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and layer.weight.is_cpu


class KernelLinear(nn.Linear):
    """``y = x W' + b``, by another way to run where one is to be asked first. A linear layer becomes one by its class
    alone, and so does it go back; copies and files have a linear layer of torch. With a parametrization it runs as one.
    """

    stands_for = nn.Linear

    @property
    def own(self) -> Block:
        """The block of one product."""
        outputs, inputs = self.weight.shape
        return Block((("weight", (outputs, inputs)),), (_PRODUCT,), "y", (("o", outputs), ("i", inputs)))

    @property
    def shared(self) -> None:
        """Nothing."""
        return None

    @property
    def factors(self) -> dict[str, Tensor]:
        """The weight."""
        return {"weight": self.weight}

    def use(self, run: Callable[..., Tensor | None] | None, shared: object = None) -> None:
        """Ask ``run(input, factors, bias)`` first; with None the layer is one of torch again."""
        self.__dict__.pop("_runner", None)
        self.__dict__.pop("_quick", None)
        if run is None:
            if type(self) is KernelLinear:
                self.__class__ = nn.Linear  # type: ignore[assignment]
        else:
            self.__dict__["_runner"] = run

    def forward(self, input: Tensor) -> Tensor:
        run: Callable[[Tensor, Mapping[str, Tensor], Tensor | None], Tensor | None] | None
        if (quick := self.__dict__.get("_quick")) is not None and (result := quick(input)) is not None:
            return result
        run, weight = self.__dict__.get("_runner"), self._parameters.get("weight")  # the quickest way to them
        if run is None or weight is None or type(self) is not KernelLinear:
            return super().forward(input)
        bias = self._parameters["bias"]
        result = run(input, {"weight": weight}, bias)
        if result is None:
            return functional.linear(input, weight, bias)
        if self.__dict__.get("_quick", run) is not None and hasattr(run, "quick"):
            self.__dict__["_quick"] = run.quick({"weight": (self._parameters, "weight")}, self._parameters)
        return result

    def _get_name(self) -> str:
        return "Linear"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_runner", "_quick")}
        return nn.Linear, (self.in_features, self.out_features, False, "meta"), state
