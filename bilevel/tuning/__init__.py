"""The commands: tuning the penalty of a linear model, cleaning labels with a few trusted ones."""
