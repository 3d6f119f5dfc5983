"""Another number of workers, or another ZeRO stage: DeepSpeed's universal checkpoint, one folder a parameter.

https://www.deepspeed.ai/tutorials/universal-checkpointing/ (arXiv 2406.18820). DeepSpeed converts; what it writes from
ZeRO 3 its ZeRO 1 and 2 cannot read, and the other way round (0.19.8: shapes, step counts and the optimizer's global
state stand in other places). `convert_to_universal` writes one form that all of them read.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from calumma.platform import storage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from calumma.platform.training.assignment import Checkpoint

_TAG = "state"
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # of ZeRO 0-2, of 3
# The only parts of the model file that are read: the weights come from the parameters' folders.
_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size", "ds_config")
_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def load(engine: DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """Weights, optimizer state and counters of a checkpoint of other partitioning; every worker calls it.

    Raises StorageError when it was written without ZeRO, or is to be loaded without.
    """
    if min(checkpoint.manifest.report["zero_stage"], engine.zero_optimization_stage()) < 1:
        raise storage.StorageError(
            f"{checkpoint.uri}: its optimizer state cannot be carried between ZeRO stage 0 and another stage; keep "
            "`zero_stage`, or start a stage from it with `initial`"
        )
    groups = [{k: v for k, v in group.items() if k != "params"} for group in _wrapped_optimizer(engine).param_groups]
    with local_checkpoint(checkpoint.files, converted=True) as path:
        _restore_frozen(engine, path)
        engine._config.load_universal_checkpoint = True  # what {"checkpoint": {"load_universal": true}} sets
        try:
            loaded, _ = engine.load_checkpoint(str(path), tag=_TAG, load_lr_scheduler_states=False)
        finally:
            engine._config.load_universal_checkpoint = False
    if loaded is None:
        raise storage.StorageError(f"{checkpoint.uri}: DeepSpeed did not find its files in the universal checkpoint")
    # ZeRO 3 gives all groups the settings of the first, and so the norms its weight decay.
    for group, ours in zip(_wrapped_optimizer(engine).param_groups, groups, strict=True):
        group |= ours
    # It also gives all of them one and the same step count, which each then raises: Adam's bias correction runs away.
    for state in _wrapped_optimizer(engine).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@contextmanager
def local_checkpoint(uri: str, converted: bool = False) -> Iterator[Path]:
    """The files of a checkpoint as a local folder, fetched (and `converted`) once a node by the first of its workers.

    All workers enter and leave together. A local folder is used where it is. An error of one is an error of all.
    """
    if not storage.is_remote(uri) and not converted:
        yield storage.local_path(uri)
        return
    first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    token = _broadcast(uuid.uuid4().hex)
    target = Path(tempfile.gettempdir(), f"calumma-checkpoint-{token}")
    try:
        error = None
        if first:
            try:
                _download(uri, target, converted)
            except Exception as raised:
                error = f"worker {dist.get_rank()} on {socket.gethostname()}: {raised}"
        _raise_on_all(error, uri)
        yield target
        dist.barrier()
    finally:
        if first:
            shutil.rmtree(target, ignore_errors=True)


def convert_to_universal(source: Path, target: Path) -> None:
    """The DeepSpeed checkpoint in `source` (files of one tag) as a universal checkpoint that ZeRO 1, 2 and 3 read."""
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True, exist_ok=True)
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: a worker must not fork under its threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    model = torch.load(_first_model_file(source), map_location="cpu", weights_only=False)
    shapes = {name: shape for group in _groups(model["param_shapes"]) for name, shape in group.items()}
    common = target / "zero" / "optimizer_state.pt"
    state = torch.load(common, map_location="cpu", weights_only=False)
    step = _step(state, source)
    for name, shape in shapes.items():
        _normalize_parameter(target / "zero" / name, shape, step)
    _write_frozen(model, shapes, source, target)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    kept = {key: state[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad") if key in state}
    kept |= {"ds_version": state.get("ds_version", model.get("ds_version")), "param_groups": groups}
    kept["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(kept, common)
    for name in _MODEL_FILES:
        torch.save({"module": {}, **{key: model[key] for key in _COUNTERS if key in model}}, target / name)
    for path in target.glob("zero_pp_rank_[1-9]*_model_states.pt"):
        path.unlink()


def _download(uri: str, target: Path, converted: bool) -> None:
    if not converted:
        storage.download(uri, target)
        return
    with storage.local_copy(uri) as source:
        convert_to_universal(source / _TAG, target / _TAG)


def _normalize_parameter(folder: Path, shape: Any, step: Any) -> None:
    """One parameter's folder in the form that every stage reads: tensors in their shape, and the step count."""
    for name in _STATES:
        path = folder / f"{name}.pt"
        if not path.is_file():
            continue
        saved = torch.load(path, map_location="cpu", weights_only=False)
        tensor = saved["param"] if isinstance(saved, dict) else saved
        torch.save({"cat_dim": 0, "param": tensor.reshape(shape)}, path)
    torch.save(step, folder / "step.pt")


def _write_frozen(model: dict[str, Any], trained: dict[str, Any], source: Path, target: Path) -> None:
    """Weights that no optimizer knows, say those below an adapter: `frozen.pt`. ZeRO 3 has cut them up, too."""
    module = model.get("module") or {}
    frozen = {name: tensor for name, tensor in module.items() if name not in trained and tensor.numel()}
    if shapes := model.get("frozen_param_shapes"):
        ranks = sorted(source.glob("zero_pp_rank_*_mp_rank_00_model_states.pt"), key=_rank)
        parts = [torch.load(path, map_location="cpu", weights_only=False)["frozen_param_fragments"] for path in ranks]
        for name, shape in shapes.items():
            if ranks:
                whole = torch.cat([part[name].flatten() for part in parts])
                frozen[name] = whole[: shape.numel()].reshape(shape)
    torch.save(frozen, target / "frozen.pt")


def _rank(path: Path) -> int:
    return int(path.name.removeprefix("zero_pp_rank_").partition("_")[0])


def _restore_frozen(engine: DeepSpeedEngine, path: Path) -> None:
    import deepspeed

    frozen = torch.load(path / _TAG / "frozen.pt", map_location="cpu")
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad or name not in frozen:
            continue
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
            if parameter.shape == frozen[name].shape:
                parameter.data.copy_(frozen[name])


def _wrapped_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that ZeRO's wraps."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _first_model_file(source: Path) -> Path:
    found = [source / name for name in _MODEL_FILES if (source / name).is_file()]
    if not found:
        raise storage.NotFound(f"{source} holds none of {', '.join(_MODEL_FILES)}: it is no DeepSpeed checkpoint")
    return found[0]


def _groups(shapes: Any) -> list[dict[str, Any]]:
    return list(shapes) if isinstance(shapes, list) else [shapes]


def _step(state: dict[str, Any], source: Path) -> Any:
    """Optimizer steps taken, which DeepSpeed keeps with each partition."""
    path = sorted(source.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))[0]
    shard = torch.load(path, map_location="cpu", weights_only=False)["optimizer_state_dict"]
    inner = shard.get("base_optimizer_state") or shard["optimizer_state_dict"]
    for values in inner["state"].values():
        if "step" in values:
            return values["step"]
    return next(group["step"] for group in inner["param_groups"] if "step" in group)


def _broadcast(value: str) -> str:
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _raise_on_all(error: str | None, uri: str) -> None:
    """Raises StorageError on every worker when one of them met an error."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if failed := [message for message in errors if message]:
        raise storage.StorageError(f"{uri} cannot be read: {failed[0]}")
