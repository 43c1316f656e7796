"""Everything that a recipe may say, typed and validated; no other room defines settings.

``recipe.py`` reads them from YAML. Imports neither torch nor ray, so that ``ptl plan`` and ``ptl --help`` start at once
and a bad recipe is refused before anything heavy begins. ``verl_keys.py`` is the table from fields to verl's own keys,
which ``ptl_rl/recovery/verl_config.py`` renders and ``reference.py`` documents; other verl keys stand under ``verl:``.
"""

from ptl_rl.config.data import DataConfig, DecontaminateConfig, FieldMap, SourceConfig
from ptl_rl.config.evaluation import EvalConfig
from ptl_rl.config.pruning import (
    CHANNEL_CRITERIA,
    CalibrationConfig,
    ContrastConfig,
    CriterionConfig,
    ScheduleConfig,
)
from ptl_rl.config.recovery import AnyRecovery, CptConfig, DistillConfig, GrpoConfig, RecoveryConfig
from ptl_rl.config.reward import RewardConfig
from ptl_rl.config.run import (
    EvaluationConfig,
    GateConfig,
    ModelConfig,
    ResourcesConfig,
    RunConfig,
    WatchdogConfig,
)
from ptl_rl.config.score import ScoreConfig
from ptl_rl.config.section import ConfigError, Section
