"""A user's way: ComfyUI's server with a clone of this repository, an example workflow in Chromium, the picture, an error on the
node. Needs chromium and playwright; COMFYTP_SCREENSHOTS names a folder for pictures of what the browser showed."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import checkpoints
import pytest
from conftest import ROOT

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
CHECKPOINT = "v1-5-pruned-emaonly.safetensors"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    for folder in ("models/checkpoints", "custom_nodes", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True)
    (base / "custom_nodes" / "ComfyTP").symlink_to(ROOT)
    checkpoints.write_sd15(base / "models/checkpoints" / CHECKPOINT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-auto-launch"]
    log = base / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=os.environ["COMFYUI_PATH"], stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/object_info/MultiGPUDiffusionModel").read()
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(1)
        yield url, base, log
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def page(server):
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(240_000)
        page.goto(server[0])
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager")
        yield page
        browser.close()


def workflow(name):
    graph = json.loads((ROOT / "example_workflows" / name).read_text())
    small = {"EmptyLatentImage": [64, 64, 1], "KSampler": [42, "fixed", 2, 4.0, "euler", "normal", 1.0]}
    for node in graph["nodes"]:
        node["widgets_values"] = small.get(node["type"], node["widgets_values"])
    return graph


def show(page, graph):
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    page.evaluate("() => { const ds = window.app.canvas.ds; ds.scale = 0.75; ds.offset = [60, 60]; window.app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(1000)


def picture(page, name):
    folder = os.environ.get("COMFYTP_SCREENSHOTS")
    if folder:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{folder}/{name}.png")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "example_workflows").glob("*.json")))
def test_an_example_opens_with_every_node_known_and_every_wire_in_place(page, name):
    graph = json.loads((ROOT / "example_workflows" / name).read_text())
    show(page, graph)
    known = page.evaluate("() => window.app.graph._nodes.map(node => [node.type, node.has_errors || false, node.constructor.nodeData != null])")
    assert sorted(entry[0] for entry in known) == sorted(node["type"] for node in graph["nodes"])
    assert all(data for _, _, data in known)
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    wires = sum(isinstance(value, list) for node in prompt.values() for value in node["inputs"].values())
    assert wires == len(graph["links"])
    # Every widget's value is one that the node takes: no value slipped to a neighbour.
    for node in graph["nodes"]:
        assert list(prompt[str(node["id"])]["inputs"].values()), node["type"]
    (ours,) = (node for node in prompt.values() if node["class_type"] == "MultiGPUDiffusionModel")
    assert ours["inputs"]["gpu_ids"] == "0,1" and ours["inputs"]["memory_mode"] == "balanced" and ours["inputs"]["verbose"] is False
    picture(page, name.removesuffix(".json"))


def test_a_queued_workflow_ends_with_its_picture(page, server):
    _, base, log = server
    show(page, workflow("sd15.json"))
    page.evaluate("() => window.app.queuePrompt(0)")
    deadline = time.monotonic() + 400
    while not list((base / "output").glob("multi_gpu_sd15*.png")):
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        page.wait_for_timeout(500)
    page.wait_for_function("() => window.app.graph._nodes.some(node => node.type === 'SaveImage' && node.imgs && node.imgs.length)")
    page.wait_for_timeout(1500)
    picture(page, "queued")
    text = log.read_text(errors="replace")
    assert "loaded" in text and "cpu:1" in text and "plain PyTorch" not in text and "Traceback" not in text


def test_wrong_ids_show_their_error_on_the_node(page, server):
    show(page, workflow("sd15.json"))
    page.evaluate(
        """() => { const node = window.app.graph._nodes.find(node => node.type === 'MultiGPUDiffusionModel');
        node.widgets.find(widget => widget.name === 'gpu_ids').value = '0,0'; }"""
    )
    page.evaluate("() => window.app.queuePrompt(0)")
    said = page.get_by_text("cpu:0 stands twice in '0,0'; devices here: cpu:0 to cpu:63")
    details = page.get_by_text("View details")  # newer pages show the reason behind two clicks
    details.or_(said).first.wait_for()
    if details.count():
        details.first.click()
        page.locator("[aria-label*=nfo]").first.click()
    said.first.wait_for()
    page.wait_for_timeout(1000)
    picture(page, "wrong_ids")
    marked = page.evaluate("() => Object.values(window.app.lastNodeErrors).map(errors => errors.class_type)")  # what frames nodes red
    assert marked == ["MultiGPUDiffusionModel"]


def test_the_help_page_is_served(server):
    url, _, _ = server
    served = [p for p in ("ComfyTP", "comfytp") if _found(f"{url}/extensions/{p}/docs/MultiGPUDiffusionModel.md")]
    assert served


def _found(url):
    with contextlib.suppress(OSError):
        return "Multi-GPU Diffusion Model" in urllib.request.urlopen(url).read().decode()
    return False
