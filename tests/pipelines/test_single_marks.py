"""What a single file says of its prediction and noise levels: marks among its tensors win over its header."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from narrowed import narrowed
from safetensors.torch import save_file
from single_checkpoints import changed, checkpoint

from onestep.core.errors import OneStepError
from onestep.core.tensor_file import read_header
from onestep.pipelines.single_file import FIRST, KINDS, kind_of, load_single_file, predicts_v
from onestep.pipelines.single_marks import HEADER, SPREAD_IN_V, prediction_in

EMPTY = torch.empty(0)
SDXL = {"conditioner.embedders.0.transformer.x": torch.zeros(1), "conditioner.embedders.1.model.x": torch.zeros(1)}


def file_of(folder: Path, marks: dict[str, torch.Tensor], says: str | None = None) -> Path:
    """A table of an SDXL checkpoint with these marks and this word in its header."""
    path = folder / "x.safetensors"
    metadata = None if says is None else {HEADER: says, "modelspec.title": "a merge"}
    save_file({FIRST: torch.zeros(320, 4, 3, 3), **SDXL, **marks}, path, metadata)
    return path


SAYS = [None, "", " ", "epsilon", "EPS", "v", "v_prediction", "flow", "a typing error"]
MARKS = [
    {"v_pred": EMPTY},
    {"v_pred": torch.zeros(1)},
    {"v_pred": torch.tensor(0.0), "ztsnr": EMPTY},
    {"model.v_pred": EMPTY},
]


@pytest.mark.parametrize("says", SAYS)
@pytest.mark.parametrize("marks", MARKS, ids=[str(list(marks)) for marks in MARKS])
def test_a_mark_wins_over_every_header(
    marks: dict[str, torch.Tensor], says: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(tmp_path, marks, says)
    with caplog.at_level(logging.WARNING):
        found = prediction_in(path, read_header(path), sd2=False)
    assert found.v and found.zero_terminal == ("ztsnr" in marks)
    contradicts = (says or "").strip() and says not in ("v", "v_prediction")
    assert bool(caplog.messages) == bool(contradicts)
    assert not contradicts or (says or "").lower() in caplog.messages[0] and "v_pred" in caplog.messages[0]


@pytest.mark.parametrize("says", [None, "", "epsilon", "EPS", "noise"])
def test_without_marks_it_is_noise(says: str | None, tmp_path: Path) -> None:
    path = file_of(tmp_path, {}, says)
    assert not predicts_v(path, read_header(path), KINDS[0])


@pytest.mark.parametrize("says", ["v", "V", "v_prediction", "v-prediction", "vpred"])
def test_without_marks_the_header_is_heard(says: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, {}, says)
    assert predicts_v(path, read_header(path), KINDS[0])


@pytest.mark.parametrize("says", ["flow", "rf", "x0", "sample", "velocity of something", "0"])
def test_a_header_that_is_not_served_is_refused(says: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, {}, says)
    with pytest.raises(OneStepError, match=f"predicts '{says}'"):
        predicts_v(path, read_header(path), KINDS[0])


UNSERVED = {
    "Playground": ({"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}, "edm_mean.*Playground"),
    "half of Playground": ({"edm_std": torch.ones(1, 4, 1, 1)}, "edm_std.*EDM"),
    "CosXL": (
        {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)},
        "edm_vpred.*EDM",
    ),
    "CosXL's largest alone": ({"edm_vpred.sigma_max": torch.tensor(80.0)}, "edm_vpred.sigma_max"),
    "EDM beside v": ({"edm_vpred.sigma_min": torch.tensor(0.1), "v_pred": EMPTY}, "edm_vpred.sigma_min"),
    "EDM under the network's root": ({"model.diffusion_model.edm_vpred.sigma_max": torch.tensor(9.0)}, "edm_vpred"),
    "another EDM": ({"edm_sigma_data": torch.tensor(0.5)}, "edm_sigma_data"),
    "another prediction": ({"flow_pred": EMPTY}, "flow_pred.*not served"),
    "x0": ({"x0_prediction": EMPTY}, "x0_prediction.*not served"),
    "zero terminal SNR without v": ({"ztsnr": EMPTY}, "ztsnr.*v_pred"),
}


@pytest.mark.parametrize("says", [None, "epsilon", "v"])
@pytest.mark.parametrize("case", UNSERVED)
def test_what_is_not_served_is_refused_by_name(case: str, says: str | None, tmp_path: Path) -> None:
    marks, why = UNSERVED[case]
    path = file_of(tmp_path, marks, says)
    header = read_header(path)
    if case == "zero terminal SNR without v" and says == "v":
        assert prediction_in(path, header, sd2=False).zero_terminal
        return
    with pytest.raises(OneStepError, match=why) as caught:
        predicts_v(path, header, kind_of(path, header))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", narrowed(["sd15", "sdxl"], "sd15"))
@pytest.mark.parametrize("says", [None, "epsilon"])
def test_a_marked_file_becomes_a_pipeline_that_predicts_v(kind: str, says: str | None, tmp_path: Path) -> None:
    _, file, configs = checkpoint(kind, tmp_path, v_pred=EMPTY, ztsnr=EMPTY)
    changed(file, lambda state: None, None if says is None else {HEADER: says})
    scheduler = load_single_file(file, torch.float32, configs).scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr
    assert float(scheduler.alphas_cumprod[-1]) == 0


@pytest.mark.parametrize(("says", "kind"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_sd2_goes_by_its_header_where_nothing_marks_it(says: str, kind: str, tmp_path: Path) -> None:
    _, file, configs = checkpoint("sd2", tmp_path)
    changed(file, lambda state: None, {HEADER: says})
    assert load_single_file(file, torch.float32, configs).scheduler.config.prediction_type == kind


@pytest.mark.parametrize(("spread", "says", "v"), [(0.2, None, True), (0.2, "epsilon", True), (0.01, None, False)])
def test_sd2_is_told_by_comfyuis_rule(spread: float, says: str | None, v: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({SPREAD_IN_V: spread * torch.randn(320)}, path, None if says is None else {HEADER: says})
    assert predicts_v(path, read_header(path), KINDS[1]) is v
