"""Loading of models: built-in ones, local folders, hub ids."""

from compress.models.loading import builtin_names, load_pipeline, model_hash, pipeline_folder

__all__ = ["builtin_names", "load_pipeline", "model_hash", "pipeline_folder"]
