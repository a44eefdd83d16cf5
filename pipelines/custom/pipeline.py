"""For `DiffusionPipeline.from_pretrained(MODEL, custom_pipeline=<this folder>)`, which runs a copy of this file."""

try:
    from onestep.pipelines.one_step import OneStepPipeline
except ImportError as error:
    raise ImportError("install OneStep first: pip install . in its folder") from error

__all__ = ["OneStepPipeline"]
