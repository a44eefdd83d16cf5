"""What a checkpoint file says of its model's prediction and noise levels: by marks among its tensors, by its header."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import OneStepError
from ..core.tensor_file import Header, read_tensors

UNET = "model.diffusion_model."
# By ComfyUI's own rule (supported_models.SD20.model_type): this bias is spread in models that predict v.
SPREAD_IN_V = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
HEADER = "modelspec.prediction_type"
WORDS = {
    "": None, "epsilon": False, "eps": False, "e": False, "noise": False,
    "v": True, "v_prediction": True, "v-prediction": True, "v_pred": True, "v-pred": True, "vpred": True,
}  # fmt: skip
EDM = {
    "edm_mean": "EDM's noise levels over scaled latents (Playground v2.5)",
    "edm_std": "EDM's noise levels over scaled latents (Playground v2.5)",
    "edm_vpred": "v under EDM's noise levels (CosXL)",
}


@dataclass(frozen=True)
class Prediction:
    """v: else the noise. zero_terminal: whether the noisiest level is noise alone."""

    v: bool
    zero_terminal: bool = False


def prediction_in(path: Path, header: Header, sd2: bool) -> Prediction:
    """By the marks in the file, which win, else by its header, else noise. Raises OneStepError for what is not served.

    sd2: whether ComfyUI's rule for SD2 is asked too. A header that contradicts a mark is logged.
    """
    refuse_marks(path, header)
    marks, header_says = marks_of(header), header.metadata.get(HEADER, "").strip().lower()
    spread = sd2 and "v_pred" not in marks and _spread(path, header)
    mark = "the tensor v_pred" if "v_pred" in marks else "the spread of a norm" if spread else ""
    said = WORDS.get(header_says)
    if not mark and header_says not in WORDS:
        raise OneStepError(
            f"{path.name[:80]} says in its header that it predicts {header_says[:40]!r}, which is not served for this "
            "kind of model: use one that predicts noise or v"
        )
    if mark and header_says and said is not True:
        logging.warning(
            "OneStep: %s is marked as predicting v by %s, and its header says %r: it is read as predicting v",
            *(path.name[:80], mark, header_says[:40]),
        )
    v = bool(mark) or said is True
    if "ztsnr" in marks and not v:
        raise OneStepError(
            f"{path.name[:80]} is marked as zero-terminal SNR (ztsnr), but not as predicting v, and noise cannot be "
            "predicted from noise alone: export it again with its mark v_pred, or use its base"
        )
    return Prediction(v, "ztsnr" in marks)


def refuse_marks(path: Path, header: Header) -> None:
    """Raises OneStepError, by name, for marks of a prediction or of noise levels that are not served."""
    for mark in sorted(marks_of(header)):
        root = mark.split(".")[0]
        if root.startswith("edm"):
            what = EDM.get(root, "EDM's noise levels")
            raise OneStepError(
                f"{path.name[:80]} is marked {mark[:60]!r}: it was trained with {what}, which are not supported yet: "
                "use a base that predicts noise or v on Stable Diffusion's own levels"
            )
        if re.fullmatch(r"\w+_pred(iction)?", mark) and mark not in ("v_pred", "eps_pred"):
            raise OneStepError(
                f"{path.name[:80]} is marked {mark[:60]!r}, a prediction that is not served for this kind of model: "
                "use one that predicts noise or v"
            )


def marks_of(header: Header) -> set[str]:
    """Names of the tensors that belong to no part: among them a model's marks, with or without its root."""
    bare = (key.removeprefix(UNET).removeprefix("model.") for key in header.tensors)
    return {key for key in bare if key.count(".") <= ("edm" in key)}


def _spread(path: Path, header: Header) -> bool:
    if SPREAD_IN_V not in header.tensors:
        return False
    return float(read_tensors(path, [SPREAD_IN_V])[SPREAD_IN_V].float().std(unbiased=False)) > 0.09
