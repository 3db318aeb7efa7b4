"""Names of the files in a run's folder."""

# The names are an interface: a change needs a line in the CHANGELOG.
CONFIG = "config.yaml"
PARAM_GROUPS = "param_groups.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
FIGURE = "train.png"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
HYDRA = ".hydra"

WRITTEN = (
    CONFIG,
    PARAM_GROUPS,
    METRICS,
    RESULT,
    FIGURE,
    ADAPTER,
    CHECKPOINTS,
)  # HYDRA is Hydra's

# The file of a sweep's folder with the sweep's name, its command and its swept keys.
SWEEP = "sweep.json"
