"""The site as a reader meets it: it builds without a warning, leads nowhere wrong, and shows in a browser what it says."""

import copy
import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from bs4 import BeautifulSoup
from filelock import FileLock
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inventory import InventoryFile
from websockets.sync.client import connect

import perceptual_diffusion

ROOT = Path(__file__).parents[1]
WRONG = "wrong.html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module", params=["pages", pytest.param("pages and tutorials", marks=pytest.mark.slow)])
def site(request, tmp_path_factory):
    """The built site, which all processes of a test run share: folder, and the parsed page of each path."""
    common = tmp_path_factory.getbasetemp()
    common = (common.parent if "PYTEST_XDIST_WORKER" in os.environ else common) / f"site of {request.param}"
    folder, done = common / "html", common / "done"
    common.mkdir(exist_ok=True)
    with FileLock(common / "lock"):
        if not done.exists():
            command = [sys.executable, "docs/build.py", "--out", str(folder)]
            command += ["--no-gallery"] if request.param == "pages" else []
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert built.returncode == 0, built.stdout + built.stderr
            done.touch()
    pages = sorted(p for p in folder.rglob("*.html") if "_static" not in p.parts and p.name != WRONG)
    return folder, {p.relative_to(folder).as_posix(): BeautifulSoup(p.read_text("utf-8"), "html.parser") for p in pages}


def public_names():
    """Each public name of the library with what it names: those of a module's `__all__`, else what it defines or documents."""
    for found in pkgutil.walk_packages(perceptual_diffusion.__path__, "perceptual_diffusion."):
        if re.search(r"\.(_|cli\b)", found.name):
            continue
        module = importlib.import_module(found.name)
        names = getattr(module, "__all__", None)
        if names is None:
            names = [n for n, o in vars(module).items() if getattr(o, "__module__", None) == module.__name__]
            names += [name for owner, name in ModuleAnalyzer.for_module(module.__name__).find_attr_docs() if not owner]
        for name in names:
            if not name.startswith("_"):
                yield f"{module.__name__}.{name}", getattr(module, name)
    for name in perceptual_diffusion.__all__:
        yield f"perceptual_diffusion.{name}", getattr(perceptual_diffusion, name)


def test_no_public_name_is_missing_from_the_reference(site):
    folder, pages = site
    inventory = InventoryFile.loads((folder / "objects.inv").read_bytes(), uri="").data
    known = {name: item for kind in inventory if kind.startswith("py:") for name, item in inventory[kind].items()}
    public = dict(public_names())
    assert len(public) > 150
    # a class or function that is reached by several names stands under one of them
    documented = {id(public[name]) for name in known.keys() & public.keys()}
    missing = [name for name, value in public.items() if name not in known and id(value) not in documented]
    assert not missing, " ".join(missing)
    for name in known.keys() & public.keys():
        page, _, anchor = known[name].uri.replace("$", name).partition("#")
        assert pages[page].find(id=anchor), name


def test_links_anchors_and_files_lead_somewhere(site):
    folder, pages = site
    ids = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in pages.items()}
    wrong = []
    for path, page in pages.items():
        for tag in page.find_all(["a", "img", "link", "script", "source", "audio", "video", "iframe"]):
            link = tag.get("href") or tag.get("src")
            if link is None or link.startswith("data:"):
                continue
            if re.match(r"\w+:|//", link):
                if tag.name != "a":
                    wrong.append(f"{path}: {link} is not in the site")
                continue
            to, anchor = urldefrag(unquote(urljoin(path, link.split("?")[0])))
            if to and not (folder / to).is_file():
                wrong.append(f"{path}: {link} leads nowhere")
            elif anchor and to in ids and anchor not in ids[to]:
                wrong.append(f"{path}: {link} has no such anchor")
    assert not wrong, "\n".join(wrong)


def test_no_markup_is_left_as_text(site):
    for path, page in site[1].items():
        article = copy.copy(page.find("article") or page.body)
        for tag in article.select("pre, code, script, style, .math, dt.sig"):
            tag.extract()
        left = re.findall(r"\$[^$\n]+\$|\*\*\S|\]\(\S+\)|:\w+:`|`|\\(?:frac|hat|alpha|sigma)\b", article.get_text())
        assert left == [], path


class Browser:
    """One tab of a headless Chromium, driven over the DevTools protocol, which reaches this machine's own server alone."""

    def __init__(self, profile, stack):
        self.process = subprocess.Popen(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage",
                "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(self.process.wait, 30)
        stack.callback(self.process.terminate)
        written, until = profile / "DevToolsActivePort", time.monotonic() + 30
        while not (written.exists() and len(written.read_text().split()) == 2):
            assert self.process.poll() is None, "Chromium ended"
            assert time.monotonic() < until, "Chromium did not start"
            time.sleep(0.05)
        port, path = written.read_text().split()
        self.socket = stack.enter_context(connect(f"ws://127.0.0.1:{port}{path}", max_size=None))
        self.events, self.session, self.calls = [], None, 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Network", "Runtime"):
            self.call(f"{domain}.enable")

    def receive(self):
        message = json.loads(self.socket.recv(timeout=60))
        if "id" not in message:
            self.events.append((message["method"], message["params"]))
        return message

    def call(self, method, **params):
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := self.receive()).get("id") != self.calls:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        """Load a page at the width of a desk, and give what went wrong."""
        self.width(1280)
        self.events = []
        assert "errorText" not in self.call("Page.navigate", url=url), url
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self.receive()
        self.run("window.MathJax ? MathJax.startup.promise.then(() => 0) : 0")
        return [wrong for event in self.events if (wrong := fault(*event))]

    def run(self, script):
        """The value of an expression in the page, or of its promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def width(self, pixels):
        self.call("Emulation.setDeviceMetricsOverride", width=pixels, height=844, deviceScaleFactor=1, mobile=False)


def fault(method, params):
    """What an event says is wrong, if anything."""
    if method == "Log.entryAdded" and params["entry"]["level"] == "error":
        return params["entry"]["text"] + " " + params["entry"].get("url", "")
    if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
        return str([part.get("value", part.get("description")) for part in params["args"]])
    if method == "Runtime.exceptionThrown":
        return str(params["exceptionDetails"].get("exception", params["exceptionDetails"]))
    if method == "Network.loadingFailed" and not params.get("canceled"):
        return params["errorText"]
    if method == "Network.responseReceived" and params["response"]["status"] >= 400:
        return f"{params['response']['status']} {params['response']['url']}"
    return None


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def reader(site, tmp_path_factory):
    """A browser, and the address of the site."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: the pages were not looked at in a browser (apt-get install chromium)")
    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site[0]))))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        yield Browser(tmp_path_factory.mktemp("chromium"), stack), f"http://127.0.0.1:{server.server_port}/"


LOOK = """({
    formulas: document.querySelectorAll('.math').length,
    rendered: document.querySelectorAll('.math mjx-container > svg').length,
    faulty: document.querySelectorAll('[data-mml-node="merror"], mjx-container [fill="red"]').length,
    broken: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src),
})"""
OVERFLOW = """[document.scrollingElement, ...document.querySelectorAll('main, .bd-content, .bd-article-container, article')]
    .filter(e => e.scrollWidth > e.clientWidth + 1)
    .flatMap(e => [...e.querySelectorAll('*')].filter(
        i => i.getBoundingClientRect().right > e.getBoundingClientRect().right + 1 && !i.closest('pre, mjx-container, .pst-scrollable-table-container')))
    .slice(0, 4).map(e => e.outerHTML.slice(0, 120))"""
"""What makes the page, or the column of its text, wider than the window; tables and code scroll in boxes of their own."""


def test_every_page_shows_in_a_browser_without_a_fault(site, reader):
    browser, address = reader
    wrong, formulas = [], 0
    for path in site[1]:
        wrong += [f"{path}: {fault}" for fault in browser.open(address + path)]
        seen = browser.run(LOOK)
        formulas += seen["formulas"]
        if seen["rendered"] != seen["formulas"] or seen["faulty"] or seen["broken"]:
            wrong.append(f"{path}: {seen}")
        browser.width(390)
        wrong += [f"{path} is too wide for a phone: {wide}" for wide in browser.run(OVERFLOW)]
    assert not wrong, "\n".join(wrong)
    assert formulas > 50


def test_the_search_finds_the_objective(reader):
    browser, address = reader
    assert browser.open(address + "search.html?q=SelfPerceptualObjective") == []
    links = "[...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    until = time.monotonic() + 20
    while not any(
        "api/objective.html#perceptual_diffusion.SelfPerceptualObjective" in link for link in browser.run(links)
    ):
        assert time.monotonic() < until, browser.run(links)
        time.sleep(0.2)


def test_the_switcher_offers_this_version(reader):
    browser, address = reader
    assert browser.open(address + "api/objective.html") == []
    listed = json.loads((ROOT / "docs/_static/switcher.json").read_text("utf-8"))
    shown, until = "document.querySelector('.version-switcher__button').innerText.trim()", time.monotonic() + 20
    (now,) = [one["name"] for one in listed if perceptual_diffusion.__version__.startswith(one["version"] + ".")]
    while browser.run(shown) != now:
        assert time.monotonic() < until, browser.run(shown)
        time.sleep(0.1)


def test_the_browser_sees_what_is_wrong(reader, site):
    browser, address = reader
    page = site[0] / WRONG
    page.write_text(
        "<script>console.error('said')</script><script src='missing.js'></script><script>throw new Error('thrown')</script>"
        "<img src='https://example.com/a.png'><p class='math'>$x$</p><div style='width: 500px'>wide</div>"
    )
    wrong = " ".join(browser.open(address + WRONG))
    page.unlink()
    for sign in ("said", "404", "thrown", "ERR_NAME_NOT_RESOLVED"):
        assert sign in wrong
    seen = browser.run(LOOK)
    assert (seen["formulas"], seen["rendered"], seen["broken"]) == (1, 0, ["https://example.com/a.png"])
    browser.width(390)
    assert "wide</div>" in browser.run(OVERFLOW)[0]
