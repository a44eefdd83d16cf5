"""published_trees.py CONFIGS OUT: bind the published models' full networks in ComfyUI's classes, without weights."""

import json
import sys
from pathlib import Path

import comfy.ops
from comfy.ldm.anima.model import Anima
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.krea2.model import SingleStreamDiT
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.pixart.pixartms import PixArtMS
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel

from onestep.core.families import bind_comfy, detect

CLASSES = {"unet": UNetModel, "sd3": OpenAISignatureMMDITWrapper, "flux": Flux, "z_image": NextDiT, "flux2": Flux}
CLASSES["qwen_image"] = QwenImageTransformer2DModel
CLASSES["anima"] = Anima
CLASSES["krea2"] = SingleStreamDiT
CLASSES["wan"] = WanModel
CLASSES["chroma"] = Chroma
CLASSES["lumina2"] = NextDiT
CLASSES["pixart"] = PixArtMS

report = {}
for name, (family, config) in json.loads(Path(sys.argv[1]).read_text()).items():
    network = CLASSES[family](**config, device="meta", operations=comfy.ops.disable_weight_init)
    targets = bind_comfy(detect(network), network, config)
    report[name] = [[target.name, target.shape_a(1), target.shape_b(1)] for target in targets]
Path(sys.argv[2]).write_text(json.dumps(report))
