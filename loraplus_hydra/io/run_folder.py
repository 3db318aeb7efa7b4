"""Names of the files in a run's folder."""

# The names are an interface: a change needs a line in the CHANGELOG.
CONFIG = "config.yaml"
PARAM_GROUPS = "param_groups.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
FIGURE = "train.png"
ADAPTER = "adapter"
ADAPTER_EMA = "adapter_ema"  # the average of the weights, only of a run with trainer.ema
CHECKPOINTS = "checkpoints"
RUNGS = "rungs.json"  # only of a job of a halved sweep
HARNESS = "harness"  # results of `evaluate RUN harness=[...]`
HYDRA = ".hydra"

WRITTEN = (
    CONFIG,
    PARAM_GROUPS,
    METRICS,
    RESULT,
    FIGURE,
    ADAPTER,
    ADAPTER_EMA,
    CHECKPOINTS,
    RUNGS,
)  # HYDRA is Hydra's
FOLDERS = (ADAPTER, ADAPTER_EMA, CHECKPOINTS, HYDRA)  # all others are files

# The file of a sweep's folder with the sweep's name, its command and its swept keys.
SWEEP = "sweep.json"
# In a sweep's folder: the decisions of a halved sweep.
HALVING = "halving.json"
# In a sweep's folder: the answer of `tune`, and the folder of its winner's rates for --config-dir.
TUNE = "tune.json"
TUNED = "experiment"
