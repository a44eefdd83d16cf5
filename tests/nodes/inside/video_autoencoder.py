"""video_autoencoder.py FOLDER WORK: a folder's autoencoder of videos in ComfyUI, with pictures.safetensors."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from onestep.nodes.autoencoder import decoded, encoded
from onestep.nodes.tiny_models.autoencoder import load_vae
from onestep.nodes.tiny_models.latents import fit_preview_colours, latent_format

folder, work = map(Path, sys.argv[1:])
pictures = load_file(work / "pictures.safetensors")["pictures"].movedim(1, -1)
with torch.inference_mode():
    vae, latent = load_vae(folder), latent_format(folder)
    fit_preview_colours(latent, vae)
    latents = latent.process_in(encoded(vae, pictures))
    out = {"latents": latents, "decoded": decoded(vae, latent.process_out(latents)).movedim(-1, 1)}
    out["colours"] = torch.tensor(latent.latent_rgb_factors)
save_file({name: value.contiguous() for name, value in out.items()}, work / "out.safetensors")
