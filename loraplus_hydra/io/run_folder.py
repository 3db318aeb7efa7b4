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

WRITTEN = (CONFIG, PARAM_GROUPS, METRICS, RESULT, FIGURE, ADAPTER, CHECKPOINTS)  # by us; HYDRA is Hydra's own

# A sweep's folder: its name, its command and the keys that it varies.
SWEEP = "sweep.json"
