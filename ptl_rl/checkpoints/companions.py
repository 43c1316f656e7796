"""What stands beside a model's weights. It stays what the source has, whatever loaded the weights meanwhile.

Written back by transformers, a tokenizer may change its class and a configuration its keys (rope parameters among
them), so that other versions read another model, and a generation configuration that it finds odd is lost.
"""

import json
import shutil
from pathlib import Path
from typing import Any

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "*.model",
)
"""Files that belong to the model; what else lies in a run's checkpoint, its rollouts for one, is the run's."""
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
"""Of a ``config.json``: transformers obeys them on loading, so a checkpoint that is written names none."""


def copy_companions(source: Path, out: Path) -> None:
    """Copy the files of :data:`COMPANIONS` as they are; those of ``out`` that the source has not, go."""
    for pattern in COMPANIONS:
        for stale in out.glob(pattern):
            stale.unlink()
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copy2(path, out / path.name)


def write_config(source: Path, out: Path, dtype: str | None = None, **changes: Any) -> None:
    """Write the source's ``config.json`` with changes.

    Args:
        dtype: of the weights, where it is another one than the source's; under the name that the source has for it.
    """
    values = json.loads((source / "config.json").read_text()) | changes
    for key in ATTENTION_KEYS:
        values.pop(key, None)
    if dtype is not None:
        values["torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"] = dtype
    (out / "config.json").write_text(json.dumps(values, indent=2) + "\n")
