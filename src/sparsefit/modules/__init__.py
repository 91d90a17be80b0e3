"""LightningModules, and the models that they load."""
