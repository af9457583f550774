"""Healing: a compressed module learns from the dense one on unlabeled data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .archive import noted
from .errors import CalibrationError, ModelError, OptionError
from .files import atomic_write, checked_destination
from .frontends.graph import run_backward
from .frontends.nn import Factored
from .frontends.nn.batches import Call, as_calls, blended, in_parts, outputs_of, runs_by_example, unpadded_in
from .frontends.nn.running import evaluation
from .frontends.program import is_usable
from .inside import Inside
from .optimizer import RotatedAdam
from .progress import counted
from .statistics import divergence_of, logits_among, without_padding

__all__ = ["Heal", "heal"]

_FORMAT = "tdc-heal 2"
_WARM = 0.05
_CLIP = 1.0
_LEAST_GAIN = 1e-3
_RATE, _OF_ROOT = 1e-2, 0.015
_NOISE, _PROBED = 3e-3, 8
_WORSE, _LOWER = 1.02, 4
_AVERAGED = 0.5
"""Of an epoch's steps, over how many the average of the parameters reaches back."""
_OUTPUT_BYTES = 1 << 28
_INSIDE = 0.9
Outputs = Mapping[str, Tensor]
_PLACE = ("done", "stale", "least", "last", "rate", "share")


@dataclass(frozen=True)
class Heal:
    """How to heal.

    ``epochs``: at most, fewer where ``patience`` of them in a row bring nothing more on the held-out part. ``rate``:
    the first steps move the entries of a parameter by this fraction of its root mean square; by default
    ``0.015 sqrt(d / S)``, at most 1e-2, of the divergence d at the start, which noise of a fraction e of each
    parameter's root mean square raises by ``S e^2`` (measured on a few held-out steps). Where an epoch makes it worse
    and none made it better, the work starts again: without what is ``inside``, and from then on, where it is worse by
    over 2 %, with a quarter of the rate. ``examples``: in a step, larger batches are cut. ``held_out``: the fraction of
    the steps' data that nothing is learnt from. ``inside``: the share in what is minimised, at first, of how far the
    inputs of the factored layers are from those in the dense model (see :class:`tdc.inside.Inside`; hints, Romero et
    al. 2015); it falls to zero as the rate does, and the rest is the outputs'. By default 0.9, and 0 for logits of
    positions: it brings all outputs nearer in few steps, but perplexity rose. ``blends``: the fraction of the steps in
    which each example is a blend of two (mixup, Zhang et al. 2018; with the dense model's outputs on the same blends,
    Beyer et al. 2022), where all inputs are floating point: it makes more of little data. ``checkpoint``: a file,
    written after each epoch, from which the same work goes on after an interruption; removed at the end.
    """

    epochs: int = 20
    rate: float | None = None
    examples: int = 32
    held_out: float = 0.1
    inside: float | None = None
    blends: float = 0.5
    patience: int = 4
    seed: int = 0
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, good in (
                ("epochs", self.epochs >= 1),
                ("rate", self.rate is None or 0 < self.rate < 1),
                ("examples", self.examples >= 1),
                ("held_out", 0 < self.held_out <= 0.5),
                ("inside", self.inside is None or 0 <= self.inside < 1),
                ("blends", 0 <= self.blends <= 1),
                ("patience", self.patience >= 1),
            )
            if not good
        ]
        if wrong:
            raise OptionError(f"Heal: {', '.join(f'{n}={getattr(self, n)!r}' for n in wrong)} is out of range")
        if self.checkpoint is not None:
            checked_destination(self.checkpoint)


def heal(
    small: nn.Module, model: nn.Module, batches: Any, *, config: Heal | None = None, progress: bool = True
) -> nn.Module:
    """Train the factors of ``small``, the biases beside them and the gains of normalisations, in place, so that its
    outputs come nearer to those of the dense ``model`` on ``batches``; no labels.

    Minimised is ``(1 - a) D + a E``, a falling from ``inside`` to 0, of the divergence D of the outputs (see
    :func:`tdc.statistics.divergence`) and the weighted errors E of what the factored layers read (see
    :class:`tdc.inside.Inside`; at the start E = D), by Adam in the eigenbasis of the gradients
    (:class:`tdc.optimizer.RotatedAdam`) with a cosine schedule. Judged after each epoch, by D alone, is the average of
    the parameters over the steps before (Polyak and Juditsky 1992), with weights that fall off exponentially over half
    an epoch: fits are so near to an optimum that single steps scatter around it by more than there is to gain. What was
    best on the held-out part is kept; where nothing beats the start, ``small`` stays as it was. The report of ``small``
    gets a remark with both figures. Data as for :func:`tdc.calibrate`, without padding; at least two steps of it.

    Returns:
        ``small``.

    Raises:
        ModelError: ``small`` has no factored layer, its parameters are not float32 or float64, or the outputs of the
            two models do not correspond, or it cannot run backwards.
        CalibrationError: data that the models cannot run on, or too little of it.
        OptionError: a checkpoint that belongs to other work.
    """
    return healed(small, model, list(as_calls(model, batches)), config or Heal(), progress=progress)


def healed(small: nn.Module, model: nn.Module, calls: Sequence[Call], config: Heal, *, progress: bool) -> nn.Module:
    """The same for batches as positional and keyword arguments."""
    calls = [call for call in calls if is_usable(call)]
    with evaluation(model), torch.no_grad():
        by_example = bool(calls) and runs_by_example(model, calls[0], config.examples)
    steps = [part for call in calls for part in (in_parts(call, config.examples) if by_example else [call])]
    apart = max(1, round(config.held_out * len(steps)))
    if len(steps) < 2:
        raise CalibrationError(
            f"healing needs at least 2 steps of {config.examples} examples; the data has {len(steps)}"
            + ("" if by_example else ", since its first axis does not count what the model gives outputs for")
        )
    order = torch.randperm(len(steps), generator=torch.Generator().manual_seed(config.seed)).tolist()
    config = config if by_example else replace(config, blends=0.0)
    work = _Work(small, model, [steps[k] for k in order[apart:]], [steps[k] for k in order[:apart]], config)
    with evaluation(model), evaluation(small), work.trained():
        try:
            before, after, epochs = work.run(progress)
        except BaseException:
            work.undo()
            raise
    kept = f"{before:.4g} -> {after:.4g}" if after < before else f"{before:.4g}, and none of the epochs was better"
    noted(
        small, "heal", f"divergence of the outputs on {apart} of {len(steps)} held-out steps: {kept}; {epochs} epochs"
    )
    return small


class _Work:
    """The state of one healing: parameters, Adam, and the best parameters so far."""

    def __init__(
        self, small: nn.Module, model: nn.Module, steps: Sequence[Call], apart: Sequence[Call], config: Heal
    ) -> None:
        self.small, self.model, self.steps, self.apart, self.config = small, model, steps, apart, config
        self.parameters = _trainable(small)
        sizes = [max(float(p.detach().square().mean().sqrt()), 1e-8) for p in self.parameters.values()]
        groups = [{"params": [p], "size": size} for p, size in zip(self.parameters.values(), sizes, strict=True)]
        self.optimizer = RotatedAdam(groups)
        self.rate, self.share = config.rate or 0.0, 0.0
        self.inside = Inside(small, model)
        self.logits: str | None = None
        self._dense: dict[int, Outputs] = {}
        self.done, self.stale = 0, 0
        self.start, self.least, self.last = math.inf, math.inf, math.inf
        self.first = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.best, self.average = self.first, {name: value.clone() for name, value in self.first.items()}

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Gradients of just these parameters inside; flags and gradients of all are as before after it."""
        every = [*self.small.parameters()]
        flags = [(p.requires_grad, p.grad) for p in every]
        own = {id(p) for p in self.parameters.values()}
        try:
            for p in every:
                p.requires_grad_(id(p) in own)
            yield
        finally:
            for p, (flag, gradient) in zip(every, flags, strict=True):
                p.requires_grad_(flag)
                p.grad = gradient

    def run(self, progress: bool) -> tuple[float, float, int]:
        """Divergences on the held-out part before and after, and the number of epochs."""
        outputs = self._outputs(self.model, self.steps[0])
        self.logits = logits_among(outputs)
        of_positions = self.logits is not None and outputs[self.logits].ndim > 2
        self.start = self.least = self.last = self.validated()
        share = self.config.inside if self.config.inside is not None else 0.0 if of_positions else _INSIDE
        if share:
            self.inside.weigh((self._run(call)[2:] for call in self.apart[:_PROBED]), self.start)
            self.share = share if self.inside.weights else 0.0
        self._resume()
        self.rate = self.rate or self._probed_rate()
        total = self.config.epochs * len(self.steps)
        with counted("healing", total, show=progress) as advance:
            for _ in range(self.done * len(self.steps)):
                advance()
            while self.done < self.config.epochs and self.stale < self.config.patience:
                self._epoch(total, advance)
                self._keep()
        self._put(self.best)
        if self.config.checkpoint is not None:
            Path(self.config.checkpoint).unlink(missing_ok=True)
        return self.start, self.least, self.done

    def undo(self) -> None:
        """All as at the start, from where a checkpoint goes on."""
        self._put(self.first)

    def _epoch(self, total: int, advance: Callable[[], None]) -> None:
        generator = torch.Generator().manual_seed(self.config.seed * 1000 + self.done)
        order = torch.randperm(len(self.steps), generator=generator).tolist()
        for step, k in enumerate(order, self.done * len(self.steps)):
            self.optimizer.zero_grad(set_to_none=True)
            mixed = blended(self.steps[k], generator) if self._draws_blend(generator) else None
            with torch.enable_grad():
                loss = self._minimised(mixed or self.steps[k], self.share * _cosine(step, total), kept=mixed is None)
                if not loss.requires_grad:
                    raise ModelError("the outputs of the compressed model have no gradient: is it run without?")
                if failed := run_backward(lambda given: given["loss"], {"loss": loss}):
                    raise ModelError(f"healing: {failed}")
            norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), _CLIP)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * group["size"] * _cosine(step, total)
            if bool(torch.isfinite(norm)):
                self.optimizer.step()
            self._average(step)
            advance()
        self.done += 1

    def _probed_rate(self) -> float:
        """The default rate: noise and its opposite, of which the mean leaves the second order."""
        probed = self.apart[:_PROBED]
        start = self.validated(probed)
        bent = 0.0
        for sign in (1, -1):
            generator = torch.Generator().manual_seed(self.config.seed)
            with torch.no_grad():
                for group in self.optimizer.param_groups:
                    (p,) = group["params"]
                    p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=sign * _NOISE * group["size"])
            bent += self.validated(probed) / 2
            self._put(self.best)
        curvature = (bent - start) / _NOISE**2
        return min(_RATE, _OF_ROOT * math.sqrt(max(start, 0.0) / curvature)) if curvature > 0 else _RATE

    def _draws_blend(self, generator: torch.Generator) -> bool:
        return float(torch.rand((), generator=generator)) < self.config.blends

    def _average(self, step: int) -> None:
        """Of the parameters after the last steps, with weights that fall off exponentially."""
        share = 1 / min(step + 2, max(1.0, _AVERAGED * len(self.steps)))
        with torch.no_grad():
            for name, p in self.parameters.items():
                self.average[name].lerp_(p, share)

    def _keep(self) -> None:
        """Judge the average; the steps go on from where they are."""
        now = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(self.average)
        value = self.validated()
        self._put(now)
        self.stale = 0 if value < self.last * (1 - _LEAST_GAIN) else self.stale + 1
        self.last = value
        if value < self.least:
            self.least, self.best = value, {name: tensor.clone() for name, tensor in self.average.items()}
        elif self.least == self.start and not value <= (1 if self.share else _WORSE) * self.start:  # NaN is worse, too
            self.rate, self.share = self.rate if self.share else self.rate / _LOWER, 0.0
            self.optimizer.state.clear()
            self._put(self.best)
            self.average = {name: tensor.clone() for name, tensor in self.best.items()}
        if self.config.checkpoint is not None:
            self._save(Path(self.config.checkpoint))

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(values[name])

    def validated(self, calls: Sequence[Call] | None = None) -> float:
        """The mean divergence of these steps, by default all that are held out."""
        calls = calls or self.apart
        with torch.no_grad():
            return sum(float(self._loss(call)) for call in calls) / len(calls)

    def _loss(self, call: Call, kept: bool = True) -> Tensor:
        """``kept``: the outputs of the dense model stay for the next time, where those of all steps have room."""
        wanted = self._dense.get(id(call)) if kept else None
        if wanted is None:
            with torch.no_grad():
                wanted = self._outputs(self.model, call)
            size = sum(value.nbytes for value in wanted.values())
            if kept and size * (len(self.steps) + len(self.apart)) <= _OUTPUT_BYTES:
                self._dense[id(call)] = wanted
        return self._apart(call, wanted, self._outputs(self.small, call))

    def _apart(self, call: Call, wanted: Outputs, given: Outputs) -> Tensor:
        if wanted.keys() != given.keys() or any(wanted[name].shape != given[name].shape for name in wanted):
            raise ModelError(
                "the two models do not give the same outputs: is the dense model that of the compressed one?"
            )
        unpadded = unpadded_in(self.model, call)
        return divergence_of(without_padding(wanted, unpadded), without_padding(given, unpadded), self.logits)

    def _minimised(self, call: Call, share: float, kept: bool) -> Tensor:
        """What a step makes less."""
        if not share:
            return self._loss(call, kept)
        wanted, given, *inputs = self._run(call)
        return (1 - share) * self._apart(call, wanted, given) + share * self.inside.distance(*inputs)

    def _run(self, call: Call) -> tuple[Outputs, Outputs, Outputs, Outputs]:
        """Of one run of both models: what the dense one and the small one give, and what their factored layers read."""
        unpadded = unpadded_in(self.model, call)
        with torch.no_grad(), self.inside.reading(self.model) as read:
            wanted = self._outputs(self.model, call)
        with self.inside.reading(self.small) as read_small:
            given = self._outputs(self.small, call)
        return wanted, given, without_padding(read, unpadded), without_padding(read_small, unpadded)

    def _outputs(self, model: nn.Module, call: Call) -> Outputs:
        return outputs_of(model, call, self.config.seed)

    # ---- checkpoints

    @property
    def _identity(self) -> dict[str, Any]:
        config = {key: value for key, value in asdict(self.config).items() if key != "checkpoint"}
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        return {"format": _FORMAT, "config": config, "steps": len(self.steps), "shapes": shapes, "start": self.start}

    def _save(self, path: Path) -> None:
        from safetensors.torch import save

        tensors = {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for name, p in self.parameters.items():
            tensors[f"now/{name}"] = p.detach()
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[p].items()}
        place = {key: getattr(self, key) for key in _PLACE}
        head_ = {"tdc": json.dumps({**self._identity, **place})}
        atomic_write(path, save({name: value.contiguous().cpu() for name, value in tensors.items()}, metadata=head_))

    def _resume(self) -> None:
        path = self.config.checkpoint
        if path is None or not Path(path).exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                found = json.loads((file.metadata() or {}).get("tdc", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise OptionError(f"the checkpoint {path} cannot be read: {error}") from error
        if {key: found.get(key) for key in self._identity} != self._identity:
            raise OptionError(f"the checkpoint {path} belongs to other work: remove it, or name another file")
        for key in _PLACE:
            setattr(self, key, found[key])
        self.best, self.average = (
            {n: tensors[f"{kind}/{n}"].to(p.device) for n, p in self.parameters.items()} for kind in ("best", "average")
        )
        self._put({name: tensors[f"now/{name}"] for name in self.parameters})
        for name, p in self.parameters.items():
            self.optimizer.state[p] = {
                key: tensors[f"{key}/{name}"].to(p.device if key != "step" else "cpu")
                for key in self.optimizer.KEYS
                if f"{key}/{name}" in tensors
            }


def _trainable(small: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of factored layers, and gains and biases of normalisations."""
    layers = {path for path, module in small.named_modules() if isinstance(module, Factored)}
    if not layers:
        raise ModelError("the model has no factored layer: nothing to heal")
    layers |= {path for path, module in small.named_modules() if "Norm" in type(module).__name__}
    found = {
        name: p for name, p in small.named_parameters() if name.rpartition(".")[0] in layers and p.is_floating_point()
    }
    if odd := sorted({str(p.dtype) for p in found.values()} - {"torch.float32", "torch.float64"}):
        raise ModelError(f"healing needs parameters in float32 or float64; these are {', '.join(odd)}")
    return found


def _cosine(step: int, total: int) -> float:
    """Up from zero over the first twentieth of the steps, and down to zero on a half wave."""
    warm = max(1, round(_WARM * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))
