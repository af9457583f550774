"""The backend ``tdc`` of ``torch.compile``, found through the entry-point group ``torch_dynamo_backends``."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._settings import Settings, log

__all__ = ["tdc_backend"]


def tdc_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo with its weights decomposed; ``options`` as in :class:`tdc._settings.Settings`.

    The module and the graph stay as they are. Whatever goes wrong in here leads to the graph being compiled without
    TDC, and is logged; with ``strict`` it is raised.

    Raises:
        OptionError, CalibrationError, PlanError: options that cannot be right, or name files that cannot be read.
    """
    settings = _settings(options, mode)
    if _wants_gradients(gm, example_inputs, settings):
        return _without(gm, example_inputs, settings)
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    try:
        made = _compiled(gm, example_inputs, settings)
    except (RestartAnalysis, SkipFrame):
        raise
    except Exception as error:
        if settings.strict:
            raise
        _check_there(example_inputs, error)
        log.warning("tdc: a graph is compiled without TDC. %s: %s", type(error).__name__, error)
        made = None
    return made if made is not None else _without(gm, example_inputs, settings)


def _compiled(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any] | None:
    """The graph as TDC runs it; None if it has nothing to do."""
    from ._compiled import Graph
    from ._parts import keep
    from .frontends.fx.normalise import held_by_the_model, normalise

    if not any(held_by_the_model(gm, example_inputs)):
        return None
    captured = normalise(gm, example_inputs)
    graph = Graph(captured, settings, example_inputs)
    if not graph.weights:
        return None
    instance = graph.instance(example_inputs)
    if instance.part.state in ("gathering", "planning"):
        graph.use_dense(_without(gm, example_inputs, settings))
        return graph
    instance.settle(late=False, args=example_inputs)
    if not instance.replaced:
        _check_there(example_inputs, instance.part.error)
        keep(instance.part, [example_inputs[k] for k in graph.roots])
        return None
    return graph


def _check_there(example_inputs: Sequence[Any], error: BaseException | None) -> None:
    """Raises ModelError if the graph cannot run dense, since weights were released."""
    from ._compiled import is_released
    from .errors import ModelError

    if any(is_released(tensor) for tensor in example_inputs):
        raise ModelError(
            "weights of this model were released (release_weights=True), and this graph of it needs them: compile all "
            "shapes before, or without that option"
        ) from error


def _without(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> Callable[..., Any]:
    from ._lowering import lower_given

    return lower_given(gm, example_inputs, settings.inner, settings.mode)


def _wants_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> bool:
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
    if wanted and settings.training == "error":
        from .errors import ModelError

        raise ModelError("gradients are wanted: call the model under torch.no_grad(), or require none of its weights")
    if wanted and not settings.warned:
        settings.warned.append(True)
        warnings.warn(
            "tdc: gradients are wanted, so the model runs dense: call it under torch.no_grad() or "
            "torch.inference_mode() to run it decomposed; to train factors, use tdc.compress",
            stacklevel=2,
        )
    return wanted


_recent: deque[Settings] = deque(maxlen=8)
"""Kept where no graph does: a model that runs dense has none."""
_known: weakref.WeakValueDictionary[tuple[int, str | None], Settings] = weakref.WeakValueDictionary()


def _settings(options: Mapping[str, Any] | None, mode: str | None) -> Settings:
    """One for all graphs of a compiled model: torch hands the same mapping over each time, with the same values."""
    key = (id(options), mode)
    found = _known.get(key)
    if found is None or not found.is_of(options):
        found = _known[key] = Settings.parse(options, mode)
        _recent.append(found)
    return found
