"""The ComfyUI host: the only place that imports comfy."""
