"""From a model's name to its folder: a Hugging Face folder, a shipped checkpoint, or one of the hub."""

from pathlib import Path
from typing import Any

from ptl_rl.checkpoints.headers import check_weights
from ptl_rl.config import ConfigError
from ptl_rl.errors import expanded, what_stands_there
from ptl_rl.families import ModelShape, UnsupportedModelError, read_prunable_shape, read_shape
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


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ConfigError: there is none, one that transformers cannot read, or another model's.
    """
    from transformers import AutoTokenizer

    check_tokenizer(folder)
    for path in sorted(path for pattern in VOCABULARIES for path in folder.glob(pattern)):
        if reason := what_stands_there(path):
            raise ConfigError(f"{path}: {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = tokenizer.encode("1 + 1 = 2", add_special_tokens=False)
    except Exception as error:  # of every kind, tokenizers raises a bare one, and each is about these files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder}: has no tokenizer that transformers can load ({reason}); copy its files from the model that it "
            "comes from"
        ) from error
    if not ids:
        raise ConfigError(f"{folder}: its tokenizer makes nothing of text; copy its files from the model it comes from")
    embedded = read_shape(folder).vocab_size
    if tokenizer.vocab_size > embedded:  # without tokens that were added, which some models never read
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, but the model {embedded} embeddings; copy the "
            "tokenizer of the model that it comes from"
        )
    return tokenizer


def open_model(name: str, *, setting: str = "model", prunable: bool = False) -> tuple[Path, ModelShape]:
    """Folder and shape of a model whose files fit each other, by their headers; a hub id is downloaded.

    Args:
        setting: what to call the name in errors.
        prunable: refuse models that other methods made.

    Raises:
        UserError: it cannot be found, or :func:`check_weights` refuses it.
    """
    folder = resolve_model(name, setting=setting)
    shape = read_prunable_shape(folder) if prunable else read_shape(folder)
    check_weights(folder, shape)
    return folder, shape


def check_readable(folder: Path) -> None:
    """Raise :class:`UnsupportedModelError` for a configuration that transformers refuses.

    Other methods' models are known to workers alone, and are not looked at.
    """
    from transformers import AutoConfig

    if not read_shape(folder).family.prunable:
        return
    try:
        AutoConfig.from_pretrained(folder)
    except Exception as error:  # of every kind: each setting has a check of its own
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"{folder / 'config.json'}: transformers cannot read it ({reason})") from error


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
    try:
        if path.is_dir():
            return path.resolve()
    except OSError as error:
        raise ConfigError(f"{setting}: {name[:80]}: {error.strerror}") from None
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
