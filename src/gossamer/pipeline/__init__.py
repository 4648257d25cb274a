"""From a recipe to a finished, exported, measured model: engine, export and report put together."""
