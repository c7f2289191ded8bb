"""router.toml and the environment, read into frozen facts; every problem located. Nothing here imports trio."""

from trio_router.config.environment import CONFIG_PATH, read_variables
from trio_router.config.files import file_problems, model_file_problems, model_problem, unusable_reason
from trio_router.config.flags import last_value, slots_in
from trio_router.config.load import load_config
from trio_router.config.places import (
    BadModelPath,
    LlamaServer,
    LlamaServerNotFound,
    LlamaServerUnusable,
    find_llama_server,
    missing_package,
    resolve_model_path,
)
from trio_router.config.problems import ConfigError, Problem
from trio_router.config.ranges import OutOfRange
from trio_router.config.schema import (
    ApiConfig,
    BackendTransport,
    KeyConfig,
    ModelConfig,
    PriorityBound,
    RouterConfig,
    SystemConfig,
)

__all__ = [
    "CONFIG_PATH",
    "ApiConfig",
    "BackendTransport",
    "BadModelPath",
    "ConfigError",
    "KeyConfig",
    "LlamaServer",
    "LlamaServerNotFound",
    "LlamaServerUnusable",
    "ModelConfig",
    "OutOfRange",
    "PriorityBound",
    "Problem",
    "RouterConfig",
    "SystemConfig",
    "file_problems",
    "find_llama_server",
    "last_value",
    "load_config",
    "missing_package",
    "model_file_problems",
    "model_problem",
    "read_variables",
    "resolve_model_path",
    "slots_in",
    "unusable_reason",
]
