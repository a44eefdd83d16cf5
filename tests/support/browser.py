"""Drive a running ComfyUI's front end in headless Chromium (selenium; Debian packages chromium and chromium-driver)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,1000", "--no-first-run"),
    # rasterised by the processor itself: an emulated GPU takes several times as long
    *("--disable-gpu", "--disable-background-networking"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)
# What a bare front end logs by itself: absent per-user files, and its own early access to the graph.
HARMLESS = (
    *("user.css", "user.js", "workflows", "templates", "userdata", "favicon", "/api/assets"),
    "before initialization",
    "missingModelMetadata",
)
READY = "return !!(window.app && window.app.graph && window.app.extensionManager && document.querySelector('canvas'))"
SETTINGS = """
const [vue, done] = arguments;
(async () => {
  const settings = window.app.extensionManager.setting;
  await settings.set('Comfy.TutorialCompleted', true);
  await settings.set('Comfy.VueNodes.Enabled', vue);
  await settings.set('Comfy.Workflow.ShowMissingModelsWarning', false);
  done(null);
})().catch(error => done(String(error)))"""
LOAD = """
const [workflow, api, done] = arguments;
(async () => {
  if (api) await window.app.loadApiJson(workflow, 'test'); else await window.app.loadGraphData(workflow);
  done(null);
})().catch(error => done(String(error.stack || error)))"""
QUEUE = """
const done = arguments[0];
window.__events = [];
const api = window.app.api || window.comfyAPI.api.api;
for (const name of ['execution_start', 'progress', 'progress_state', 'executed', 'execution_success', 'execution_error',
                    'execution_interrupted', 'b_preview_with_metadata'])
  api.addEventListener(name, () => window.__events.push(name));
window.app.queuePrompt(0, 1).then(answer => done(String(answer))).catch(error => done('error ' + error))"""
ENDED = "return window.__events.some(e => ['execution_success','execution_error','execution_interrupted'].includes(e))"
NODE_TYPES = "return (window.app.rootGraph || window.app.graph)._nodes.map(node => node.type)"


def why_no_browser() -> str:
    """'' if a browser can be driven, else what is missing."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return "no chromium and chromedriver on the PATH"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (it belongs to the [dev] extra)"
    return ""


class Page:
    """One browser window showing ComfyUI."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def script(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_script(text, *arguments)

    def asynchronous(self, text: str, *arguments: Any) -> Any:
        return self.driver.execute_async_script(text, *arguments)

    def until(self, text: str, seconds: float = 60) -> Any:
        """Wait until a script returns something true; that value."""
        deadline, trouble = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            try:
                if found := self.script(text):
                    return found
            except Exception as error:
                trouble = error
            time.sleep(0.25)
        raise AssertionError(f"never true in the page: {text} ({trouble})")

    def load(self, workflow: dict[str, Any]) -> list[str]:
        """Load a workflow, UI or API format; the types of the nodes now in the graph."""
        trouble = self.asynchronous(LOAD, workflow, "nodes" not in workflow)
        assert trouble is None, trouble
        return list(self.script(NODE_TYPES))

    def queue(self, seconds: float = 300) -> list[str]:
        """Press Run and wait for the end; the names of the events seen."""
        answer = self.asynchronous(QUEUE)
        assert not answer.startswith("error"), answer
        self.until(ENDED, seconds)
        return list(self.script("return window.__events"))

    def dismiss(self) -> None:
        """Close the template browser that greets a new user."""
        time.sleep(1)
        if self.script("return !!document.querySelector('[role=dialog]')"):
            self.driver.switch_to.active_element.send_keys("\ue00c")  # Escape
            self.until("return !document.querySelector('[role=dialog]')", 10)

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))

    def errors(self) -> list[str]:
        """Console errors that are not the bare front end's own."""
        lines = [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        return [line for line in lines if not any(word in line for word in HARMLESS)]


@contextmanager
def open_page(url: str, vue: bool = False) -> Iterator[Page]:
    """Chromium on a server's front end; vue=True turns on Nodes 2.0."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        driver.set_script_timeout(120)
        driver.get(url)
        page = Page(driver)
        page.until(READY, 180)
        trouble = page.asynchronous(SETTINGS, vue)
        assert trouble is None, trouble
        page.dismiss()
        yield page
    finally:
        driver.quit()
