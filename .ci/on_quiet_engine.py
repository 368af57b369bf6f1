"""A pytest plugin: whoever asks Ignite for an Engine gets the one of create_trainer."""

import ignite.engine
import ignite.engine.engine

from ice_engine.quiet_engine import QuietEngine

ignite.engine.Engine = ignite.engine.engine.Engine = QuietEngine
