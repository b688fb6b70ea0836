"""The report: its numbers, files as they are, hostile text, 20,000 traces; the page in a headless browser.
Also what else shows a run: the terminal's line, TensorBoard."""

import fcntl
import importlib.util
import json
import math
import os
import pty
import random
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny

import exprl
from experiments import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
HOSTILE = ('</script><script>document.title = "owned"</script>', "<!-- <script> -->",
           "<img src=x onerror=alert(1)>", "a\u2028b\u2029c", "nul\0 and half a pair \ud800", "DATA",
           "&lt;b&gt; \\u003c ]]> ${1}`'\"", "")


def lines(records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def trace(text="### a\n1\n### b\n2", **more) -> dict:
    return dict(step=1, problem="train/1", text=text, grades=[0.5], correct=False, advantage=[0.0, 0.0],
                finished=True, tokens=len(text), judge="") | more


def write_run(folder: Path, traces, metrics=None, **settings) -> Path:
    """A run's folder by hand, in the form that exprl.py writes."""
    folder.mkdir(parents=True)
    tiny.problems_file(folder.parent / "train.jsonl")
    settings = dict(data=[str(folder.parent / "train.jsonl")], method="outcome", overlong="zero", group=4,
                    steps=2, seed=0, out=str(folder), lr=1e-6) | settings
    (folder / "config.json").write_text(json.dumps({"settings": settings, "train_fingerprint": ""}))
    metrics = metrics or [dict(step=step, score=0.5, accuracy=0.25, length=9.0) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text(lines(metrics))
    (folder / "rollouts.jsonl").write_text(lines(traces))
    return folder


def evaluation(step, value):
    return {"step": step, "pass@1": value, "pass@1_low": value / 2, "pass@1_high": 2 * value, "length": 700.0}


def embedded(page: bytes) -> dict:
    """What the browser's JSON.parse gets: all text up to the first thing that ends the script tag."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script', page.decode(), re.S)
    return json.loads(found[1])


# ---- numbers -----------------------------------------------------------------------------------------------


def test_a_real_run_is_read_whole(tmp_path):
    """Also holds the report to exprl.py's names, and its fingerprint of the data to exprl.fingerprint's."""
    run = tmp_path / "mini"
    flags = "--steps 2 --questions 2 --group 2 --eval-limit 4 --eval-n 2 --eval-k 1 2".split()
    tiny.inside(*flags, "--out", run)
    report.main([str(run)])
    page = embedded((run / "report.html").read_bytes())
    assert page["notices"] == [] and page["runs"][0]["step"] == 2 and page["ks"] == ["pass@1", "pass@2"]
    assert [c["name"] for c in page["curves"]][:4] == ["score", "accuracy", "pass@1", "pass@2"]
    assert all(c["about"] for c in page["curves"]), "a metric that README's table does not explain"
    assert [len(page["heldOut"][0][k]) for k in page["ks"]] == [2, 2]
    assert len(page["traces"]) == 8 and [row[1] for row in page["traces"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    known = page["problems"][page["runs"][0]["settings"]["training data"]]
    assert {row[3] for row in page["traces"]} == set(known) and all(all(texts) for texts in known.values())


def test_seeds_become_a_band_and_other_settings_do_not(tmp_path):
    def run(name, scores, value, **settings):
        metrics = [evaluation(0, 0.1), *(dict(step=i, score=s) for i, s in enumerate(scores, 1)),
                   evaluation(9, value)]
        return write_run(tmp_path / name, [], metrics, **settings)

    runs = [run("a", [0.1, 0.2, 0.9], 0.2, seed=0), run("b", [0.3, 0.6], 0.4, seed=1),
            run("c", [0.7], 0.3, lr=1e-3)]
    page = report.build(runs, 60)
    assert page["groups"] == ["a and 1 more", "c"]
    assert [c["name"] for c in page["curves"]] == ["score", "pass@1"], "no length: it is the evaluations'"
    band, line = page["curves"][0]["lines"]
    assert band["x"] == [1, 2] and band["y"] == pytest.approx([0.2, 0.4]), "at steps that both have reached"
    assert (band["low"], band["high"]) == ([0.1, 0.2], [0.3, 0.6])
    assert line == {"group": 1, "x": [1], "y": [0.7], "low": [None], "high": [None]}
    rows = {row["label"]: row["pass@1"] for row in page["heldOut"]}
    assert rows["a"] == [(0, 0.1, 0.05, 0.2), (9, 0.2, 0.1, 0.4)]
    assert rows["mean of a and 1 more"][1] == (9, pytest.approx(0.3), 0.2, 0.4) and len(rows) == 4


def test_numbers_that_json_has_not(tmp_path):
    run = write_run(tmp_path / "r", [trace(grades=[math.nan, 0.123456789], advantage=[-math.inf, 1.0])],
                    [dict(step=1, score=math.nan, accuracy=0.5, grad_norm=None, per_domain={"math": 1})])
    page = embedded(report.render(report.build([run], 60)))
    assert page["traces"][0][5] == [None, 0.1235] and page["traces"][0][7] == [None, 1.0]
    assert [c["name"] for c in page["curves"]] == ["accuracy"]


def test_metrics_by_domain_and_by_step_of_the_trace(tmp_path):
    parts = [{"math": {"score": 0.2}, "code": {"score": 0.8}}, {"math": {"score": 0.4}}]
    metrics = [dict(step=i, score=0.5, domains=part, step_grades=[0.5 * i, None, 0.25][: 4 - i])
               for i, part in enumerate(parts, 1)]
    curves = {c["name"]: c for c in report.build([write_run(tmp_path / "r", [], metrics)], 60)["curves"]}
    assert list(curves) == ["score", "step_grades", "score (math)", "score (code)"]
    assert curves["score (math)"]["lines"][0]["y"] == [0.2, 0.4] and curves["score (code)"]["about"]
    assert (line := curves["step_grades"]["lines"][0])["x"] == [1, 3] and line["y"] == [0.75, 0.25]


def test_evaluations_on_different_things_are_not_joined(tmp_path):
    runs = [write_run(tmp_path / name / name, [], [evaluation(step, value) | {"held_out": what}
                                                   for step, value, what in points])
            for name, points in (("a", [(0, 0.1, "60 tokens"), (2, 0.2, "160 tokens"), (4, 0.4, "160 tokens")]),
                                 ("b", [(4, 0.3, "60 tokens")]))]
    page = report.build(runs, 60)
    assert [row["pass@1"] for row in page["heldOut"]] == [[(2, 0.2, 0.1, 0.4), (4, 0.4, 0.2, 0.8)],
                                                          [(4, 0.3, 0.15, 0.6)]]
    assert "a: 1 of its evaluations" in page["notices"][0] and "160 tokens" in page["notices"][0]
    assert "a: 160 tokens; b: 60 tokens." in page["notices"][1]


def test_groups_by_step_problem_and_size(tmp_path):
    ids = ["train/1"] * 8 + ["train/2"] * 3  # a problem twice in a step, then a group that lacks a trace
    run = write_run(tmp_path / "r", [trace(problem=i) for i in ids] + [trace(step=2)])
    assert [row[1] for row in report.build([run], 60)["traces"]] == [0] * 4 + [1] * 4 + [2] * 3 + [3]


# ---- files as they are -------------------------------------------------------------------------------------


def test_a_run_still_going_on(tmp_path):
    run = write_run(tmp_path / "r", [trace()] * 4, steps=50)
    whole = (run / "rollouts.jsonl").read_bytes()
    line = json.dumps(trace("é" * 9), ensure_ascii=False).encode()
    for cut in range(len(line)):  # inside a character too
        (run / "rollouts.jsonl").write_bytes(whole + line[:cut])
        page = report.build([run], 60)
        assert len(page["traces"]) == 4 and page["notices"] == [], cut
    (run / "metrics.jsonl").write_text("")
    (run / "rollouts.jsonl").unlink()
    page = report.build([run], 60)
    assert page["curves"] == [] and page["traces"] == [] and page["heldOut"] == [{"label": "r", "group": 0}]
    (run / "metrics.jsonl").write_text('{"step": 1, "score": 0.5}\nbroken\n[]\n')
    assert report.build([run], 60)["notices"] == ["r: 2 broken lines of its .jsonl files are left out."]


def test_missing_or_changed_data_is_said(tmp_path):
    run = write_run(tmp_path / "r", [trace()])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"train_fingerprint": "0123456789abcdef"}))
    page = report.build([run], 60)
    assert "not just what it trained on" in page["notices"][0] and page["problems"]["0123456789abcdef"]
    (tmp_path / "train.jsonl").unlink()
    page = report.build([run], 60)
    assert "only the ids" in page["notices"][0] and page["traces"][0][3] == "train/1"
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "r", [trace(text, judge=text, problem=text) for text in HOSTILE])
    page = report.render(report.build([run], 60))
    assert [row[4] for row in embedded(page)["traces"]] == [t.replace("\ud800", "?") for t in HOSTILE]
    assert page.count(b"<script") == 2 and page.count(b"</script>") == 2 and b"<!--" not in page
    assert not re.search(rb"(?:src|href)=.?(?:https?:)?//|@import|url\(", page), "something from the network"


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """20,000 traces of 1,000 characters in 100 steps, and the seconds that their report took."""
    rng = random.Random(0)
    words = "therefore the number of apples is twice what Anna had before she gave some away".split()
    steps = [f"### Step {k}\n{' '.join(rng.choices(words, k=50))}\n" for k in range(100)]
    traces = [trace("".join(rng.choices(steps, k=4)) + f"\\boxed{{{i}}}", step=1 + i // 200, judge="Score: 3",
                    problem=f"train/{1 + i // 8 % 12}", grades=[rng.random()], correct=rng.random() < 0.4,
                    advantage=[rng.gauss(0, 1)] * 2) for i in range(20_000)]
    metrics = [dict(step=i, score=i / 100) for i in range(1, 101)]
    run = write_run(tmp_path_factory.mktemp("big") / "r", traces, metrics, group=8)
    start = time.perf_counter()
    report.main([str(run)])
    return run, time.perf_counter() - start


def test_20000_traces_in_seconds_and_megabytes(big):
    run, seconds = big
    read, wrote = (run / "rollouts.jsonl").stat().st_size / 1e6, (run / "report.html").stat().st_size / 1e6
    print(f"{read:.1f} MB read, {wrote:.1f} MB written in {seconds:.1f} s")
    assert seconds < 30 and wrote < read
    page = report.build([run], read / 9.5)
    assert sorted({row[2] for row in page["traces"]}) == [*range(1, 100, 10), 100]
    assert "every 10th step" in page["notices"][0]


# ---- terminal and TensorBoard ------------------------------------------------------------------------------


def on_a_terminal(command, columns: int) -> str:
    """What the command writes to a terminal so wide."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = tiny.start(*command, stdout=its, stderr=its)
    os.close(its)
    written = b""
    try:
        while data := os.read(ours, 1 << 16):
            written += data
    except OSError:  # Linux's way to say that nobody holds the other end any more
        pass
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_live_line_on_a_terminal_and_plain_lines_in_a_log(tmp_path):
    home, flags = tiny.training_world(tmp_path)
    flags += ["--eval-data", home / "eval.jsonl", "--eval-n", 2, "--eval-k", 1]
    written = on_a_terminal(["exprl.py", *flags, "--steps", 3, "--out", home / "live"], 70)
    live = re.findall(r"\rstep [123]/3 ([^\r\n]*)", written)
    facts = r"\d+ s left  score 0\.\d{3}  accuracy \d+\.\d%  length \d+  unread 0%  [\d,]+ tok/s"
    assert re.search(r"^\S+ +\d+ s left  score 0\.\d{3}  accuracy \d+\.\d%", live[0])
    assert max(map(len, live)) <= 70 - len("step 1/3 "), "the line is broken in two"
    assert " left" not in live[-1] and not re.search(r"^step 1/3  ", written, re.M)
    log = tiny.inside(*flags, "--steps", 3, "--out", home / "log")
    assert re.search(r"^step 1/3  " + facts + r"  \d+\.\d s$", log.stdout, re.M)
    assert not re.search(r"[\r\x1b]", log.stdout + log.stderr) and "evaluating" not in log.stdout + log.stderr


def test_the_time_left_in_words():
    seconds = (3.2, 99, 101, 720, 5999, 6001, 86400)
    assert [exprl.duration(s) for s in seconds] == "3 s,99 s,2 min,12 min,100 min,1.7 h,24.0 h".split(",")


def test_tensorboard_is_asked_for_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        exprl.parse(["--log", "tensorboard"])
    assert "pip install tensorboard" in capsys.readouterr().err


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                      reason="pip install tensorboard")
    home, flags = tiny.training_world(tmp_path)
    flags += ["--eval-data", home / "eval.jsonl", "--eval-n", 2, "--eval-k", 1, "--save-every", 2]
    tiny.inside(*flags, "--steps", 3, "--log", "tensorboard", "--out", home / "run")
    shutil.rmtree(home / "run/checkpoints/step_3")  # as if killed before it: step 3 is done again
    tiny.inside("--resume", home / "run", "--steps", 4)
    events = accumulator.EventAccumulator(str(home / "run/tensorboard")).Reload()
    logged = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    lines = exprl.read_jsonl(home / "run/metrics.jsonl")
    assert logged["training/score"] == [(m["step"], pytest.approx(m["score"])) for m in lines if "score" in m]
    assert [step for step, _ in logged["training/score"]] == [1, 2, 3, 4]
    assert [step for step, _ in logged["held-out/pass@1"]] == [0, 4]


# ---- in a browser ------------------------------------------------------------------------------------------


class Browser:
    """Chromium, driven over the two pipes of its DevTools protocol: JSON messages that end in a zero byte."""

    def __init__(self, folder: Path):
        os.mkfifo(folder / "in"), os.mkfifo(folder / "out")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<"$0/in" 4>"$0/out"', folder, CHROMIUM, *flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.out, self.into = os.open(folder / "in", os.O_WRONLY), os.open(folder / "out", os.O_RDONLY)
        self.buffer, self.sent, self.events, self.session = b"", 0, [], {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.into], [], [], 120)[0], "the browser gave no answer in two minutes"
            data = os.read(self.into, 1 << 20)
            assert data, "the browser ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (message := self.receive()).get("id") != self.sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def open(self, page: Path, width=1200, height=800, scheme="light") -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self.receive())

    def js(self, code: str):
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **{"text": key} if len(key) == 1 else {})

    def mouse(self, kind: str, selector: str, across: float) -> None:
        box = self.js(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + across * box["width"], box["y"] + box["height"] / 2
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def set(self, id: str, value: str) -> None:
        self.js(f"$({id!r}).value = {json.dumps(value)}; $({id!r}).dispatchEvent(new Event('input'))")

    def complaints(self) -> list:
        bad = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded",
               "Page.javascriptDialogOpening")
        asked = [e for e in self.events if e["method"] == "Network.requestWillBeSent"
                 and not e["params"]["request"]["url"].startswith("file:")]
        return [e for e in self.events if e["method"] in bad] + asked


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.session = {}
    browser.call("Browser.close")
    browser.process.wait(20)
    os.close(browser.out), os.close(browser.into)


@pytest.fixture
def page(tmp_path):
    """Three runs, two of them seeds: a group of four traces with known grades, and a Process group."""
    metrics = [evaluation(0, 0.1), *(dict(step=i, score=i / 9, accuracy=i / 10, lr=1e-6) for i in (1, 2)),
               evaluation(2, 0.3)]
    process = trace("Opening.\n### one\n1\n#### no step\n### two\n2, as it was", step=2, problem="train/2",
                    tokens=50, grades=[0.2, 0.7], advantages=[-0.5, 0.5], advantage=[-0.5, 0.5])
    traces = [trace("### a\nlow", grades=[0.1], advantage=[-1.2, -1.2], tokens=30, finished=False),
              trace("### a\nhigh", grades=[0.9], advantage=[1.2, 1.2], tokens=10, correct=True,
                    judge="Score: 5"),
              trace("### a\nwrong but liked", grades=[1.0], advantage=[0.4, 0.4], tokens=20),
              trace("### a\nnot read", grades=[None], tokens=40, domain="physics"), *[process] * 4]
    runs = [write_run(tmp_path / "a", traces, metrics), write_run(tmp_path / "b", [], metrics, seed=1),
            write_run(tmp_path / "c", traces, metrics, lr=1e-3, method="process")]
    report.main([*map(str, runs), "--out", str(tmp_path / "report.html")])
    return tmp_path / "report.html"


CONTRAST = """(() => { // the text that stands out least: [ratio, element], as WCAG 2 counts
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true })
  const luminance = layers => { // of colours laid over each other
    for (const layer of layers) { pixel.fillStyle = layer; pixel.fillRect(0, 0, 1, 1) }
    const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    return .2126 * r + .7152 * g + .0722 * b
  }
  const found = []
  for (const node of document.querySelectorAll("body *:not(script, option)")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim())) continue
    const behind = []
    for (let n = node; n; n = n.parentElement)
      behind.unshift(getComputedStyle(n).backgroundColor,
        ...getComputedStyle(n).backgroundImage.match(/color\\([^)]*\\)/) ?? []) // a tint is a gradient
    const ink = getComputedStyle(node)[node instanceof SVGElement ? "fill" : "color"]
    const [dark, light] = [luminance(behind), luminance([...behind, ink])].sort((a, b) => a - b)
    found.push([(light + .05) / (dark + .05), node.outerHTML.slice(0, 200)])
  }
  return found.sort((a, b) => a[0] - b[0])[0] })()"""
FIRST = "document.querySelector('#row0').innerText"
COUNT = "$('count').textContent"


@needs_browser
@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 1200), ("light", 360), ("dark", 360)])
def test_opens_without_complaint_in_both_schemes_and_widths(browser, page, scheme, width):
    browser.open(page, width, scheme=scheme)
    assert browser.complaints() == []
    assert browser.js("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert browser.js("document.querySelectorAll('#main figure').length") == 3  # score, accuracy, pass@1
    assert browser.js("document.querySelectorAll('#engine figure').length") == 1  # lr
    assert browser.js("document.querySelectorAll('#heldOut tr').length") == 1 + 4
    assert browser.js("$('differing').innerText").split() == (
        "a b c method outcome outcome process seed 0 1 0 lr 1e-06 1e-06 0.001".split())
    contrast, where = browser.js(CONTRAST)
    assert contrast >= 4.5, where
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(19, 21, 24)") == (scheme == "dark")


@needs_browser
def test_filters_sorts_and_searches(browser, page):
    browser.open(page)
    assert browser.js(COUNT) == "16 of 16 traces" and "step 2" in browser.js(FIRST)
    for sort, expected in [("oldest", "low"), ("best", "wrong but liked"), ("worst", "low"),
                           ("gap", "wrong but liked"), ("longest", "2, as it was"), ("shortest", "high")]:
        browser.set("sort", sort)
        assert browser.js(FIRST).split("\n")[-1] == expected, sort
    browser.set("sort", "best")
    assert browser.js("view.at(-1).text").endswith("not read")
    browser.set("sort", "gap")  # a cut-off trace has its grade from --overlong: no judge disagrees there
    assert browser.js("view.filter(t => !t.run).slice(-2).map(t => t.text.slice(6))") == ["low", "not read"]
    for which, many in [("right", 2), ("wrong", 14), ("unread", 2), ("cut", 2), ("all", 16)]:
        browser.set("which", which)
        assert browser.js(COUNT) == f"{many} of 16 traces", which
    browser.set("run", "2"), browser.set("step", "1")
    assert browser.js(COUNT) == "4 of 16 traces"
    browser.set("run", ""), browser.set("step", "")
    for query, many in [("NOT READ", 2), ("score: 5", 2), ("train/2", 8), ("REF0", 8), ("o.t", 0), ("(", 0),
                        ("\\boxed{2}", 8), ("physics", 2)]:
        browser.set("query", query)
        assert browser.js(COUNT) == f"{many} of 16 traces", query
    browser.set("query", "but LIKED")
    assert browser.js("document.querySelector('.chosen mark').textContent") == "but liked"
    browser.set("query", "nowhere")
    assert browser.js("$('detail').innerText") == "No trace matches." and browser.complaints() == []


@needs_browser
def test_a_group_side_by_side_with_tints_grades_and_replies(browser, page):
    browser.open(page)
    browser.set("query", "low")
    detail = browser.js("$('detail').innerText")
    assert "What is 0 + 0?" in detail and "REF0: twice 0" in detail and "4 traces, 1 right" in detail
    cards = browser.js("[...document.querySelectorAll('.group h3')].map(h => [h.innerText, h.offsetTop])")
    assert [text for text, _ in cards] == ["1.00 ✗ wrong", "0.90 ✓ right", "0.10 ✗ wrong", "unread ✗ wrong"]
    assert len({top for _, top in cards}) == 1, "not side by side"
    assert browser.js("document.querySelector('.chosen h3').innerText") == "0.10 ✗ wrong"
    steps = """[...document.querySelectorAll('%s .step[title]')].map(s =>
      [getComputedStyle(s).borderLeftStyle + " " + getComputedStyle(s).borderLeftColor, s.title])"""
    up, down, neither = "solid rgb(0, 103, 168)", "dashed rgb(184, 74, 0)", "solid rgb(221, 221, 221)"
    assert browser.js(steps % ".group") == [
        [up, "grade 1.00 (5.0 of 5), advantage +0.40"], [up, "grade 0.90 (4.6 of 5), advantage +1.20"],
        [down, "grade 0.10 (1.4 of 5), advantage −1.20"], [neither, "grade unread, advantage +0.00"]]
    assert browser.js("document.querySelector('.group details').textContent") == "judge's replyScore: 5"
    browser.set("query", "opening")  # Process: the opening joins the first graded step; "####" opens none
    assert browser.js(steps % ".chosen") == [[down, "grade 0.20 (1.8 of 5), advantage −0.50"],
                                             [up, "grade 0.70 (3.8 of 5), advantage +0.50"]]
    first, second = browser.js("[...document.querySelectorAll('.chosen .step')].map(s => s.innerText)")
    assert "Opening.\n### one\n1\n#### no step" in first and "### two\n2" in second
    assert browser.js("steps({ text: 'no step', perStep: true, grades: [] })") == ["no step"]


@needs_browser
def test_by_keyboard_alone(browser, page):
    browser.open(page)
    browser.press("/")
    assert browser.js("document.activeElement.id") == "query" and browser.js("$('query').value") == ""
    browser.js("$('list').focus()")
    for key, expected in [("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", 15), ("ArrowDown", 15),
                          ("Home", 0)]:
        browser.press(key)
        assert browser.js("chosen") == expected
        assert browser.js("$($('list').getAttribute('aria-activedescendant')).ariaSelected") == "true"
    browser.js("document.querySelector('#main svg[tabindex]').focus()")
    assert "step 2" in browser.js("document.querySelector('#main figure').innerText")
    browser.press("ArrowLeft")
    assert "step 1" in browser.js("document.querySelector('#main figure').innerText")
    assert browser.complaints() == []


@needs_browser
def test_by_pointer(browser, page):
    browser.open(page)
    chart = "document.querySelector('#main svg[tabindex]').closest('figure').innerText"
    browser.mouse("mouseMoved", "#main svg[tabindex]", 0.2)
    assert "step 1" in browser.js(chart)
    browser.mouse("mouseMoved", "h1", 0.5)
    assert "step 2" in browser.js(chart)
    browser.js("$('list').scrollIntoView()")
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, "#row2", 0.5)
    assert browser.js("chosen") == 2 and browser.complaints() == []


@needs_browser
def test_hostile_text_in_the_browser(browser, tmp_path):
    traces = [trace(text, judge=text, problem=text, correct=None, grades=[0.5, None],
                    advantages=[1.0, math.nan]) for text in HOSTILE]  # and grades that fit no "###" steps
    run = write_run(tmp_path / "r", traces, group=2)
    report.main([str(run)])
    browser.open(run / "report.html", 360)
    for place, text in enumerate(HOSTILE):
        browser.js(f"choose({place})")
        assert text.replace("\ud800", "?") in browser.js("document.querySelector('.chosen').textContent")
    assert browser.js("document.title") == "ExpRL report" and browser.complaints() == []
    assert browser.js("document.querySelectorAll('img, iframe, script').length") == 2  # our own scripts
    empty = write_run(tmp_path / "new" / "r", [])
    (empty / "metrics.jsonl").unlink(), (empty / "rollouts.jsonl").unlink()
    report.main([str(empty)])
    browser.open(empty / "report.html")
    assert "No traces yet." in browser.js("document.body.innerText") and browser.complaints() == []


@needs_browser
def test_20000_traces_are_fast_to_use(browser, big):
    start = time.perf_counter()
    browser.open(big[0] / "report.html")
    opened = time.perf_counter() - start
    assert browser.js(COUNT) == "20,000 of 20,000 traces"
    assert browser.js("document.querySelectorAll('.row').length") < 60, "the list draws more than is in sight"
    timed = "(() => { const t = performance.now(); %s; return performance.now() - t })()"
    find = browser.js(timed % "$('query').value = 'anna had'; filter()")
    sort = browser.js(timed % "$('query').value = ''; $('sort').value = 'gap'; filter()")
    step = browser.js(timed % "for (let i = 0; i < 50; i++) choose(i * 300)") / 50
    print(f"opened in {opened:.1f} s, search {find:.0f} ms, sort {sort:.0f} ms, choice {step:.1f} ms")
    assert opened < 30 and find < 2000 and sort < 2000 and step < 200
    browser.js("$('list').scrollTop = 1e9")
    browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert browser.js("!!document.getElementById('row19999')") and browser.complaints() == []
