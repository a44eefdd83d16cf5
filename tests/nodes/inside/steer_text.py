"""steer_text.py: which tokens CLIP Text Encode (Negative) takes for a text's own; one line of JSON, name -> facts.

ComfyUI's own tokenizers and text encoders of each layout, a few channels wide.
"""

import json
import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.sd3_clip
import torch
from comfy_steering import fill

import nodes as core
from onestep.core.errors import OneStepError
from onestep.nodes.steer_text import OWN, EncodeNegative, encode_negative, own_tokens

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
QWEN = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
T5 = {"d_model": 4096, "d_ff": 8, "d_kv": 8, "num_heads": 2, "num_layers": 1}
SMALL = {
    "clip_l_model_config": CLIP,
    "clip_g_model_config": CLIP,
    "t5xxl_model_config": T5,
    "qwen3_4b_model_config": QWEN,
}
sd3, flux = comfy.text_encoders.sd3_clip, comfy.text_encoders.flux
LAYOUTS = {
    "sd15": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    "sd3": (sd3.SD3Tokenizer, sd3.sd3_clip(dtype_t5=torch.float32)),
    "sd3 without T5": (sd3.SD3Tokenizer, sd3.sd3_clip(t5=False)),
    "sd3 with T5 alone": (sd3.SD3Tokenizer, sd3.sd3_clip(False, False, dtype_t5=torch.float32)),
    "flux": (flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float32)),
    "klein": (flux.KleinTokenizer, flux.klein_te()),
    "pixart": (comfy.text_encoders.pixart_t5.PixArtTokenizer, comfy.text_encoders.pixart_t5.pixart_te(torch.float32)),
}
LONG = "a very old lighthouse in a storm by the sea, " * 9
TEXTS = {"empty": "", "short": "a red dragon", "weighed": "a (red:1.3) dragon", "long": LONG}
told = {}


def clip_of(name):
    tokenizer, model = LAYOUTS[name]
    target = comfy.supported_models_base.ClipTarget(tokenizer, partial(model, dtype=torch.float32))
    clip = comfy.sd.CLIP(target, parameters=1, state_dict={}, model_options={"dtype": torch.float32, **SMALL})
    fill(clip.cond_stage_model)
    return clip


def by_hand(clip, name, text):
    """CLIP's tokens up to the one that ends each 77 of them, of the padded text; T5's of the text read at its own
    length."""
    tokens, model = clip.tokenize(text), clip.cond_stage_model
    if name == "klein":
        return model.encode_token_weights(
            {"qwen3_4b": [[pair for pair in tokens["qwen3_4b"][0] if pair[0] != 151643]]}
        )[0]
    if name == "pixart":
        return model.encode_token_weights({"t5xxl": [[pair for pair in tokens["t5xxl"][0] if pair[0] != 0]]})[0]
    batches = tokens["l"]
    ends = [next(i for i, pair in enumerate(batch) if pair[0] == 49407) + 1 for batch in batches]
    short = [[pair for pair in batch if pair[0] != 0] for batch in tokens.get("t5xxl", [])]
    of_t5 = model.t5xxl.encode_token_weights(short)[0] if getattr(model, "t5xxl", None) is not None else None
    if name in ("flux", "sd3 with T5 alone"):
        return of_t5
    whole = clip.encode_from_tokens(tokens)
    of_clip = torch.cat([whole[:, 77 * i : 77 * i + end] for i, end in enumerate(ends)], 1)
    return of_clip if of_t5 is None else torch.cat([of_clip, of_t5], 1)


with torch.inference_mode():
    for name in LAYOUTS:
        clip = clip_of(name)
        for kind, text in TEXTS.items():
            (found,) = encode_negative(clip, text)
            (plain,) = core.CLIPTextEncode().encode(clip, text)[0]
            own, expected = found[1][OWN][0], by_hand(clip, name, text)
            same = torch.equal(found[0], plain[0])
            if plain[1]["pooled_output"] is not None:
                same = same and torch.equal(found[1]["pooled_output"], plain[1]["pooled_output"])
            near = own.shape == expected.shape and float((own - expected).abs().max() / expected.std()) < 1e-5
            told[f"{name}, {kind}"] = [same, near, own.shape[1], plain[0].shape[1]]

    padded = torch.cat([torch.randn(1, 5, 8), torch.zeros(1, 7, 8)], 1)
    masked = torch.randn(1, 12, 8)
    mask = (torch.arange(12) < 4)[None].long()
    encoded = EncodeNegative.execute(clip_of("sd15"), "red").args[0]
    kept = core.ConditioningSetTimestepRange().set_range(encoded, 0.1, 0.5)[0]
    joined = core.ConditioningCombine().combine(encoded, kept)[0]
    told["lengths"] = [
        *(own_tokens(text)[0][0].shape[1] for text in ([[padded, {}]], [[masked, {"attention_mask": mask}]])),
        *(own[0].shape[1] for own in own_tokens(joined)),
    ]
    changed = {
        "plain": core.CLIPTextEncode().encode(clip_of("sd15"), "red")[0],
        "joined": core.ConditioningConcat().concat(encoded, encoded)[0],
        "zeroed": core.ConditioningZeroOut().zero_out(encoded)[0],
        "mixed": core.ConditioningAverage().addWeighted(encoded, encoded, 0.5)[0],
    }
    for name, text in changed.items():
        try:
            own_tokens(text)
        except OneStepError as error:
            told[f"refused {name}"] = str(error)
    try:
        EncodeNegative.execute(None, "red")
    except OneStepError as error:
        told["refused nothing"] = str(error)
print(json.dumps(told))
