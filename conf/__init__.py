"""The config groups, packaged as `loraplus_hydra.conf`.

Hydra imports this package when it opens `pkg://loraplus_hydra.conf`. So the schema is registered in every app that
composes these configs, even if the app imports nothing else from loraplus_hydra.
"""

from loraplus_hydra.config.schema import register

register()
