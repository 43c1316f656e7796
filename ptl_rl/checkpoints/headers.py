"""What a checkpoint's safetensors files say that they hold, and whether it is what its configuration describes.

Headers are read and no weights, except for a stored output head that has to equal the embedding. Without torch.
"""

import json
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ptl_rl.errors import what_stands_there
from ptl_rl.families import ModelShape, UnsupportedModelError, read_config_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
NO_WEIGHT = ".rotary_emb.inv_freq"
"""Ends the names of buffers that old versions of transformers stored, and all loaders pass over."""
ROWS = 8192
"""Of an embedding, compared at a time."""


def opened(path: Path, framework: str = "np") -> Any:
    """A safetensors file, whose header is read.

    Raises:
        UnsupportedModelError: it is missing, cut short or no safetensors file.
    """
    try:
        return safe_open(path, framework)
    except (SafetensorError, OSError) as error:
        reason = what_stands_there(path) or f"cannot be read ({error}); download or write it again"
        raise UnsupportedModelError(f"{path}: {reason}") from None


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it.

    Raises:
        UnsupportedModelError: no safetensors weights or damaged ones, or an index that names a missing file.
    """
    index = folder / INDEX
    if index.exists():
        files = {name: folder / file for name, file in _weight_map(index).items()}
    elif (folder / SINGLE).exists():
        with opened(folder / SINGLE) as file:
            files = dict.fromkeys(file.keys(), folder / SINGLE)
    elif shards := sorted(folder.glob("model-*-of-*.safetensors")):
        raise UnsupportedModelError(f"{folder}: {shards[0].name} needs {INDEX} beside it; download that, too")
    else:
        raise UnsupportedModelError(
            f"{folder}: no model.safetensors; only safetensors weights are read (convert with save_pretrained)"
        )
    missing = sorted({str(path) for path in files.values() if not path.exists()})
    if missing:
        raise UnsupportedModelError(f"{folder}: the index names files that do not exist: {', '.join(missing)}")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_bytes().decode())["weight_map"]
        files = set(names.values())
        odd = [file for file in files if not isinstance(file, str) or Path(file).name != file]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = what_stands_there(index) or f"is no index of weights ({type(error).__name__}: {error})"
        raise UnsupportedModelError(f"{index}: {reason}") from None
    if odd:
        raise UnsupportedModelError(f"{index}: names {str(odd[0])[:200]}, which is not a file of this folder")
    return names


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:2]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def check_weights(folder: Path, shape: ModelShape) -> None:
    """Hold every tensor's name, shape and type against ``shape``, which the folder's ``config.json`` gave.

    Raises:
        UnsupportedModelError: a file cannot be read, the checkpoint is quantised or an adapter, or tensors are missing,
            left over, of another shape or in two files.
    """
    values = read_config_json(folder)
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(
            f"{folder}: adapter_config.json makes it an adapter of another model; merge it into that one "
            "(merge_and_unload), or remove the file if that is done"
        )
    quantised = "is quantised, and pruning and training need the weights themselves: take the model before quantisation"
    if method := values.get("quantization_config") or values.get("compression_config"):
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UnsupportedModelError(f"{folder}: {quantised} (quantization_config: {method}, in config.json)")
    found = _found(folder)
    expected, kind = shape.tensors(), shape.family.model_type
    for name, (_, dtype, _) in found.items():
        if dtype not in FLOATS and not name.endswith(NO_WEIGHT):
            raise UnsupportedModelError(f"{folder}: {quantised} ({name} is {dtype})")
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    extra = {name for name in extra if not name.endswith(NO_WEIGHT)}
    embeddings, head = f"{shape.family.embeddings}.weight", f"{shape.family.head}.weight"
    if shape.tied and head in extra and embeddings in found:  # published so, as a copy: Qwen3-0.6B
        extra.remove(head)
        if not _equal(found[embeddings][0], embeddings, found[head][0], head):
            raise UnsupportedModelError(
                f"{folder}: {head} is not {embeddings}, though tie_word_embeddings {_tied(values)} makes the two one; "
                "set tie_word_embeddings to false in config.json if the model has a head of its own, else remove the "
                "tensor"
            )
    if missing == {head} and not extra:
        raise UnsupportedModelError(
            f"{folder}: {head} is missing, though tie_word_embeddings {_tied(values)} gives the model a head of its "
            "own; set tie_word_embeddings to true in config.json if its head is the embedding, else download it again"
        )
    if missing or extra:
        parts = [f"lack {_some(missing)}"] * bool(missing) + [f"have {_some(extra)} beside them"] * bool(extra)
        raise UnsupportedModelError(
            f"{folder}: the weights are not those of its config.json, a {kind} of {shape.num_hidden_layers} blocks: "
            f"they {' and '.join(parts)}; take the configuration and the weights that belong together"
        )
    for name, wanted in expected.items():
        if found[name][2] != wanted:
            raise UnsupportedModelError(
                f"{folder}: {name} is of shape {list(found[name][2])}, but config.json, a {kind}, makes it "
                f"{list(wanted)}; take the configuration and the weights that belong together"
            )


def _tied(values: dict[str, Any]) -> str:
    if "tie_word_embeddings" not in values:
        return f"(not set; by default of {values['model_type']})"
    return str(values["tie_word_embeddings"]).lower()


def _found(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """File, type and shape of every tensor in the files that loaders read; raises where loaders would not agree."""
    files = checkpoint_files(folder)
    paths = sorted(set(files.values()))
    single = folder / SINGLE
    others = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    if (folder / INDEX).exists():
        if single.exists() and single not in paths:
            raise UnsupportedModelError(
                f"{folder}: has {SINGLE} beside an index of other files, and loaders disagree on which they read; "
                "remove the one that is not the model's"
            )
    elif len(others) > 1:
        other = next(path for path in others if path != single)
        raise UnsupportedModelError(
            f"{folder}: has {other.name} beside {SINGLE}, and vLLM reads every *.safetensors; remove what is not the "
            "model's"
        )
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for path in paths:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                if files.get(name) != path:
                    raise UnsupportedModelError(
                        f"{path}: holds {name}, which the index {'has in another file' if name in files else 'lacks'}; "
                        "download or write the model again"
                    )
                view = file.get_slice(name)
                found[name] = path, view.get_dtype(), tuple(view.get_shape())
    if absent := files.keys() - found.keys():
        raise UnsupportedModelError(
            f"{files[min(absent)]}: lacks {_some(absent)}, which the index says it holds; download it again"
        )
    return found


def _equal(one: Path, name: str, other: Path, other_name: str) -> bool:
    """Whether two matrices are the same."""
    import torch

    with ExitStack() as stack:
        first, second = (
            stack.enter_context(opened(path, "pt")).get_slice(key) for path, key in ((one, name), (other, other_name))
        )
        rows, *_ = shape = first.get_shape()
        return shape == second.get_shape() and all(
            torch.equal(first[start : start + ROWS].float(), second[start : start + ROWS].float())
            for start in range(0, rows, ROWS)
        )
