"""One ``run(config)`` each, readable top to bottom."""
