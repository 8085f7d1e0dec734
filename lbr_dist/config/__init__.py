"""The configuration of a run; `run.py` holds the tree, `file.py` reads it. Imports no torch."""

from lbr_dist.config.cluster import ClusterConfig, SlurmConfig
from lbr_dist.config.run import (
    STAGES,
    CheckpointConfig,
    DataConfig,
    Dtype,
    EngineConfig,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    StageName,
    require_columns,
    sequence_tokens,
    to_dict,
)
from lbr_dist.config.stages import LearnConfig, OptimizerConfig, Pooling, RepresentConfig, TargetsConfig

__all__ = [
    "STAGES",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "Dtype",
    "EngineConfig",
    "EvaluateConfig",
    "LearnConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Pooling",
    "RepresentConfig",
    "RunConfig",
    "SlurmConfig",
    "StageName",
    "TargetsConfig",
    "require_columns",
    "sequence_tokens",
    "to_dict",
]
