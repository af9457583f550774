"""Saved models: one safetensors file with all tensors, the plan and the report. No code, no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from . import targets
from .decompositions import shared
from .errors import ModelError, PlanError
from .files import atomic_write, checked_destination
from .frontends.nn import Factored
from .frontends.nn.restore import Saved, restore
from .frontends.nn.running import copy_without
from .ir import Decline, Plan, Remark
from .passes.propose_layouts import lowered
from .report import Report

__all__ = ["load", "save", "stored_report"]

M = TypeVar("M", bound=nn.Module)
_FORMAT = "tdc-model"
_VERSION = 1
RECORD = "_tdc_report"


def save(small: nn.Module, path: str | Path) -> None:
    """Write a compressed module: tensors, plan and report in one safetensors file, all or nothing; equal models,
    equal bytes.

    Tensors that several names share are stored once.

    Raises:
        ModelError: the module was not made by TDC.
        DestinationError: the path cannot be written.
    """
    from safetensors.torch import save as to_bytes

    checked_destination(path)
    record = small.__dict__.get(RECORD)
    if record is None:
        raise ModelError("this module was not made by tdc.compress or tdc.load: use torch.save or safetensors for it")
    made, plan = record
    _check_told(small, plan)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in small.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ModelError(f"{name} of the model's state is no tensor but a {type(tensor).__name__}: use torch.save")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    head = {
        "format": _FORMAT,
        "version": _VERSION,
        "aliases": aliases,
        "plan": plan.to_json(),
        "report": made.to_json(),
    }
    atomic_write(path, to_bytes(tensors, metadata={"tdc": json.dumps(head)}))


def _check_told(small: nn.Module, plan: Plan) -> None:
    """Raises ModelError if a factored layer is not in the plan, so that the file could not be loaded."""
    told = {name.removesuffix(".weight") for c in plan.choices if not c.is_dense for name in c.site.names}
    modules = small.named_modules(remove_duplicate=False)
    if other := [path for path, module in modules if isinstance(module, Factored) and path not in told]:
        raise ModelError(
            f"{', '.join(other[:3])} was factored by an earlier compression, which the last plan does not tell: "
            f"compress once with one plan, or use torch.save"
        )


def load(path: str | Path, model: M) -> M:
    """A copy of ``model`` (the dense architecture; its weights do not matter and may be on ``meta``) with a saved
    state.

    ``path`` is a file from :func:`save`, or a folder that ``save_pretrained`` of a compressed transformers model wrote.

    Raises:
        ModelError: the file cannot be read, or holds no TDC model.
        PlanError: it does not fit the architecture; the message names the site or the tensors.
    """
    head, tensors = _read(Path(path))
    plan = Plan.from_json(head["plan"])
    new = copy_without(model)
    target = targets.get(plan.target)
    rows: list[Saved] = []
    for choice in sorted(plan.choices, key=lambda choice: choice.site.order):
        if not choice.is_dense:
            try:
                layout, block = lowered(target, choice)
            except ValueError as error:
                raise PlanError(f"{choice.site.name}: {error}") from error
            if isinstance(block, Decline):
                raise PlanError(f"{choice.site.name}: {block.reason}")
            joint = (choice.joint.group, shared(layout)) if choice.joint else (0, frozenset[str]())
            rows.append(Saved(choice.site, block, choice.decomposition, *joint, fewer_units="o" in choice.kept))
    restore(new, rows, tensors, head.get("aliases", {}))
    new.__dict__[RECORD] = record = (Report.from_json(head["report"]), plan)
    note_in_config(new, record)
    return new


def stored_report(path: Path) -> Report:
    """The report in a ``.tdc`` or ``.onnx`` file. Raises ModelError."""
    if path.suffix.lower() == ".onnx":
        from .frontends.onnx import file_size, load_model

        text = load_model(path).metadata_props.get("tdc.report")
        if text is None:
            raise ModelError(f"{path} was not made by TDC: it has no report")
        made = Report.from_json(text)
        return replace(made, files=(made.files[0], file_size(path))) if made.files else made
    return Report.from_json(_read(path)[0]["report"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Head and tensors; copies, because mapped ones are not aligned and matrix products then round otherwise."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        return _read_pretrained(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            head = json.loads((file.metadata() or {}).get("tdc", "{}"))
            if head.get("format") != _FORMAT or head.get("version") != _VERSION:
                raise ModelError(f"{path} is not a TDC model file of version {_VERSION}")
            aliases = head.get("aliases")
            if not {"plan", "report"} <= set(head) or not isinstance(aliases, dict) or not _texts(aliases.values()):
                raise ModelError(f"{path} is damaged: its head lacks the plan, the report or the aliases")
            return head, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ModelError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read: {error}") from error


def _texts(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def noted(small: nn.Module, stage: str, reason: str) -> None:
    """One more remark in the report of a compressed module, if it has one."""
    record = small.__dict__.get(RECORD)
    if record is not None:
        made, plan = record
        small.__dict__[RECORD] = (replace(made, remarks=(*made.remarks, Remark("", stage, reason))), plan)


def note_in_config(small: nn.Module, record: tuple[Report, Plan] | None) -> None:
    """Put plan and report into a transformers model's ``config``, so that a ``save_pretrained`` folder can be
    loaded again; None takes them out.

    The model must be saved under its own names: the renaming to the names of older checkpoints
    (``_weight_conversions``, by default for Mixtral, ViT and others) knows no factors, and is switched off.
    """
    config = getattr(small, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return
    if record is not None:
        config.tdc = {"plan": record[1].to_json(), "report": record[0].to_json()}
        small.__dict__["_weight_conversions"] = []
    elif hasattr(config, "tdc"):
        del config.tdc
        small.__dict__.pop("_weight_conversions", None)


def _read_pretrained(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tdc")
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index} names files outside its folder")
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{folder} cannot be read as a saved model: {error}") from error
    if not isinstance(head, dict) or not {"plan", "report"} <= set(head):
        raise ModelError(f"{folder} was not saved from a TDC model: its config.json has no plan")
    return head, tensors
