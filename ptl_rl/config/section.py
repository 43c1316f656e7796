"""What every section of a recipe is, and the error that tells of a bad one."""

from pydantic import BaseModel, ConfigDict

from ptl_rl.errors import UserError


class ConfigError(UserError, ValueError):
    """A recipe that cannot be run; the message names the file, the setting and the remedy."""


class Section(BaseModel):
    """Frozen, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)
