"""The diffusers host: the only place that imports diffusers."""
