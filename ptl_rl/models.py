"""From a model's name to its folder: a Hugging Face folder, a shipped checkpoint, or one of the hub."""

from pathlib import Path
from typing import Any

from ptl_rl.config import ConfigError
from ptl_rl.errors import expanded
from ptl_rl.testbed import shipped_checkpoint

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "spiece.model", "sentencepiece.*")
"""Files of which a tokenizer has at least one."""
WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja", "*.model"]


def check_tokenizer(folder: Path) -> None:
    """Raise :class:`ConfigError` for a model's folder without a vocabulary.

    transformers would make an empty tokenizer of its configuration, for which every text is empty.
    """
    custom = folder / "tokenizer_config.json"
    has_code = custom.is_file() and '"auto_map"' in custom.read_text(errors="replace")
    if not has_code and not any(list(folder.glob(pattern)) for pattern in VOCABULARIES):
        raise ConfigError(
            f"{folder}: has no tokenizer (none of {', '.join(VOCABULARIES)}); copy its files from the model that it "
            "comes from"
        )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ConfigError: there is none, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:  # what transformers raises for files that do not fit
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{folder}: has no tokenizer that transformers can load ({reason})") from error


def resolve_model(name: str, weights: bool = True, setting: str = "model.path") -> Path:
    """Local folder of a model given as folder, 'testbed', 'testbed:NAME' or hub id; downloads a hub id.

    Args:
        weights: False fetches the configuration only.
        setting: what to call the name in errors.

    Raises:
        ConfigError: neither a folder nor to be had from the hub.
    """
    try:
        if shipped := shipped_checkpoint(name):
            return shipped
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from None
    path = expanded(name)
    if path.is_dir():
        return path.resolve()
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigError(
            f"{setting}: {name} is not a folder; name a Hugging Face folder, a model of the hub as OWNER/NAME, or a "
            "shipped one as testbed:llama"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=WEIGHT_PATTERNS if weights else ["config.json"]))
    except Exception as error:  # the hub client raises many kinds; all mean that the model cannot be had
        reason = str(error).split("\n")[0]
        raise ConfigError(
            f"{setting}: {name} is neither a folder nor a model that the hub gives ({reason}); offline, download it "
            f"elsewhere and give its folder as {setting}"
        ) from None
