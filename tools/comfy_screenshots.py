"""What a user sees: screenshots of the shared workflows in a real ComfyUI, in both renderers, at 1600x857.

    python tools/comfy_screenshots.py OUT                          # everything: about ten minutes of two cores
    python tools/comfy_screenshots.py OUT --only 1 5 --renderer nodes2

Of each workflow: as it opens, while it trains, after it; of a trainer also from near. Then of what a user gets wrong.
Runs are cut to some dozens of updates. Needs what the browser's tests need: a ComfyUI (COMFYUI_DIR, COMFYUI_PYTHON),
chromium, chromedriver and selenium.
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import browser  # noqa: E402
import comfy_support  # noqa: E402
import own_pictures  # noqa: E402

WIDTH, HEIGHT = 1600, 857
RENDERERS = {"litegraph": False, "nodes2": True}
TRAINERS = ("OneStepDistil", "OneStepTrainAdapter")
# A run of about half a minute on a CPU that still shows phases, a curve and pictures.
SHORT = {
    **{"steps": 60, "pairs": 32, "warm_start": 20, "critic_warm_up": 5, "method.states": 4, "batch": 4, "warm_up": 1},
    **{"watch_every": 10, "watch_samples": 24, "preview_every": 10, "preview_samples": 6, "teacher_steps": 6},
}
OPEN = """
const [workflow, name, done] = arguments;
window.app.loadGraphData(workflow, true, true, name, {openSource: 'template'})
  .then(() => done(null)).catch(error => done(String(error.stack || error)))"""
SET = """
const [types, values] = arguments;
for (const node of window.app.rootGraph._nodes) {
  if (!types.includes(node.type)) continue;
  for (const widget of node.widgets)
    if (widget.name in values) { widget.value = values[widget.name]; widget.callback?.(widget.value); }
}"""
NEAR = """
const [types] = arguments;
const node = window.app.rootGraph._nodes.find(node => types.includes(node.type));
const canvas = window.app.canvas;
canvas.ds.scale = Math.min(1, 760 / (node.size[1] + 30));
canvas.centerOnNode(node);
canvas.setDirty(true, true);"""
MEASURED = "return !!document.querySelector('.onestep-chart polyline')"
NEEDS_FILES = "return !!window.app.rootGraph._nodes.find(node => node.type === 'UNETLoader')"
TRAINS = "return !!window.app.rootGraph._nodes.find(node => arguments[0].includes(node.type))"
LEFT = "return !!document.querySelector('.onestep-chart polyline') || " + browser.ENDED.removeprefix("return ")
# Those that a workflow names and no pack brings, empty.
OWN_FILES = (
    *("diffusion_models/z_image_bf16.safetensors", "text_encoders/qwen_3_4b.safetensors", "vae/ae.safetensors"),
    *("diffusion_models/flux-2-klein-base-4b.safetensors", "vae/flux2-vae.safetensors"),
    *("diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors", "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
    "vae/wan_2.1_vae.safetensors",
    *("diffusion_models/anima-base-v1.0.safetensors", "text_encoders/qwen_3_06b_base.safetensors"),
    "vae/qwen_image_vae.safetensors",
    "diffusion_models/qwen_image_2512_fp8_e4m3fn.safetensors",
    "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "diffusion_models/Chroma1-HD-fp8mixed.safetensors",
    "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
    *("diffusion_models/lumina_2_model_bf16.safetensors", "text_encoders/gemma_2_2b_fp16.safetensors"),
    *("diffusion_models/PixArt-Sigma-XL-2-512-MS.safetensors", "text_encoders/t5xxl_fp16.safetensors"),
    "vae/sdxl_vae.safetensors",
    *("diffusion_models/krea2_raw_fp8_scaled.safetensors", "text_encoders/qwen3vl_4b_fp8_scaled.safetensors"),
)
# What a user gets wrong: which node's widgets are set to what. Two are refused as they are queued, one as it runs.
ERRORS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "name": (TRAINERS, {"name": "CON", "sizes": "32x32"}),
    "size": (TRAINERS, {"sizes": "large"}),
    "prompt-file": (("OneStepPromptList",), {"file": "no such file.txt"}),
    "while-it-runs": (TRAINERS, {"accumulation": 3, "batch": 4}),
}


class Photographer:
    """One page, and the folder where its pictures go."""

    def __init__(self, page: browser.Page, server: Any, out: Path, renderer: str) -> None:
        self.page, self.server, self.out, self.renderer = page, server, out, renderer
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def shoot(self, name: str, settle: float = 2.0, running: bool = False) -> None:
        """``settle``: seconds, for the page draws when it likes. A run that is ``running`` leaves it the processor
        meanwhile; otherwise the page may still load its pictures."""
        path = self.out / f"{name} {self.renderer}.png"
        if running:
            self.server.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(settle)
            told = self.page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        finally:
            self.server.process.send_signal(signal.SIGCONT)
        path.write_bytes(base64.b64decode(told["data"]))
        print(path, flush=True)

    def open(self, path: Path) -> None:
        """As a click on the template's card opens it."""
        trouble = self.page.asynchronous(OPEN, json.loads(path.read_text(encoding="utf-8")), path.stem)
        assert trouble is None, trouble
        time.sleep(1)

    def workflow(self, path: Path) -> None:
        """As it opens; where it needs no files of one's own, while it runs and after it too."""
        self.open(path)
        self.shoot(f"{path.stem} 1 open")
        if self.page.script(NEEDS_FILES):
            return None
        if not self.page.script(TRAINS, TRAINERS):
            self.page.queue(300)
            return self.shoot(f"{path.stem} 3 after")
        self.page.script(SET, TRAINERS, SHORT | {"name": f"{path.stem.split()[0]} {self.renderer}"})
        self.page.asynchronous(browser.QUEUE)
        self.until(browser.ENDED.replace("execution_success", "progress"), 120)
        self.shoot(f"{path.stem} 2 begins", 0.5, running=True)
        self.until(LEFT, 300)
        self.shoot(f"{path.stem} 2 trains", 1, running=True)
        self.page.script(NEAR, TRAINERS)
        self.shoot(f"{path.stem} 2 trains near", 1, running=True)
        self.until(browser.ENDED, 600)
        self.shoot(f"{path.stem} 3 after near")
        self.page.asynchronous(
            "const done = arguments[0]; window.app.extensionManager.command.execute("
            "'Comfy.Canvas.FitView').then(() => done(null)).catch(e => done(String(e)))"
        )
        self.shoot(f"{path.stem} 3 after")

    def until(self, script: str, seconds: float) -> None:
        self.page.until(script, seconds)

    def error(self, path: Path, name: str) -> None:
        """A graph that is refused: its notice, and the panel."""
        types, values = ERRORS[name]
        self.open(path)
        self.page.script(SET, TRAINERS, SHORT | {"name": f"wrong {name} {self.renderer}"})
        self.page.script(SET, types, values)
        self.page.asynchronous(browser.QUEUE)
        self.page.until("return !!document.querySelector('.p-toast-message')", 120)
        self.shoot(f"error {name}")
        self.page.script("for (const cross of document.querySelectorAll('.p-toast-close-button')) cross.click()")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--only", nargs="*", help="of the workflows those whose names begin so; 'error' for the errors")
    parser.add_argument("--renderer", choices=[*RENDERERS], help="one of the two")
    args = parser.parse_args()
    if missing := browser.why_no_browser():
        sys.exit(missing)
    install = comfy_support.find_comfy()
    if isinstance(install, str):
        sys.exit(install)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base, server_with_pack(install, Path(base)) as server:
        for renderer in [args.renderer] if args.renderer else RENDERERS:
            with browser.open_page(server.url, RENDERERS[renderer]) as page:
                photograph(Photographer(page, server, args.out, renderer), args.only)
        (args.out / "server.log").write_text(server.log(), encoding="utf-8")
    return 0


def server_with_pack(install: comfy_support.ComfyInstall, base: Path) -> Any:
    """The pack under the name that a clone gives it, which ComfyUI writes at every node; no previews, as by default."""
    comfy_support.place_pack(base / "custom_nodes", "OneStep")
    for place in OWN_FILES:
        (base / "models" / place).parent.mkdir(parents=True, exist_ok=True)
        (base / "models" / place).touch()
    own_pictures.pictures_in(base / "input" / "my-pictures")
    return comfy_support.running_server(install, base, "--preview-method", "none")


def photograph(camera: Photographer, only: list[str] | None) -> None:
    def wanted(name: str) -> bool:
        return not only or name.startswith(tuple(only))

    paths = sorted((ROOT / "workflows").glob("*.json"))
    for path in paths:
        if wanted(path.stem):
            camera.workflow(path)
    for name in ERRORS:
        if wanted("error"):
            camera.error(paths[0], name)
    for line in camera.page.errors():
        print("console:", line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
