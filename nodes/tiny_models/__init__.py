"""ComfyUI's MODEL, CLIP and VAE built exactly from a small diffusers-layout folder; imports comfy, never diffusers."""
