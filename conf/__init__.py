"""The config groups, packaged as `loraplus_hydra.conf`.

Hydra imports this package when it opens `pkg://loraplus_hydra.conf`, so the schema is known to every app that composes
these configs, whether or not it imports anything else of ours.
"""

from loraplus_hydra.config.schema import register

register()
