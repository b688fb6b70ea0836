"""Problems: schemas, bad rows, files, and the hub through a cache laid out by hand. About 10 s of CPU time.

Run: pytest tests/test_data.py
"""
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings, strategies as st

from data import BadRows, Problem, is_correct, load_problems

GSM8K = {"question": "Ann has 3 boxes of 6 eggs and eats 1,000. How many?",
         "answer": "She has 3*6=<<3*6=18>>18 eggs.\nIt is $<<18-1000=-982>>-982.\n#### -982"}
MATH = {"problem": "Halve one.", "level": "Level 1", "type": "Algebra",
        "solution": r"First \boxed{2}, no: it is $\boxed{\frac{1}{2}}$."}
AIME = {"id": 60, "problem": "Count.", "solution": "One, two, ... so 73.", "answer": 73, "url": "none"}
PLAIN = {"question": "Why?", "solution": "Because.", "answer": "so", "domain": "physics"}


def write(path, rows):
    """Rows (or raw lines) as the file's suffix asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# ---- schemas ----

@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_schemas(tmp_path, suffix):
    assert load_problems(write(tmp_path / f"a.{suffix}", [GSM8K]), need_solution=True) == [Problem(
        "a/1", GSM8K["question"], "She has 3*6=18 eggs.\nIt is $-982.\n\\boxed{-982}", "-982", "math")]
    assert load_problems(write(tmp_path / f"b.{suffix}", [MATH]), need_solution=True) == [Problem(
        "b/1", "Halve one.", MATH["solution"], r"\frac{1}{2}", "math")]
    assert load_problems(write(tmp_path / f"c.{suffix}", [AIME]), need_solution=True) == [Problem(
        "c/60", "Count.", AIME["solution"], "73", "math")]
    assert load_problems(write(tmp_path / f"d.{suffix}", [PLAIN]), need_solution=True) == [Problem(
        "d/1", "Why?", "Because.", "so", "physics")]
    pope = {("gemini_solution" if key == "solution" else key): value for key, value in AIME.items()}
    assert load_problems(write(tmp_path / f"p.{suffix}", [pope]), need_solution=True) == [Problem(
        "p/60", "Count.", AIME["solution"], "73", "math")]
    both = {**GSM8K, "solution": "Because.", "id": 3}
    assert load_problems(write(tmp_path / f"e.{suffix}", [both]), need_solution=True) == [Problem(
        "e/3", GSM8K["question"], "Because.", "-982", "math")]


def test_every_answer_is_right_in_its_own_solution(tmp_path):
    for problem in load_problems(write(tmp_path / "a.jsonl", [GSM8K, MATH, {**AIME, "idx": 9}])):
        assert is_correct(problem.solution, problem.answer)


def test_mixed_schemas_and_null_columns_in_one_file(tmp_path):
    """A parquet file has all columns in every row; those of other schemas are null."""
    problems = load_problems(write(tmp_path / "a.parquet", [
        {"question": None, "problem": None, "solution": None, "answer": None, "id": None, **row}
        for row in (GSM8K, {**MATH, "id": "m"}, {**PLAIN, "id": "p"})]))
    assert [problem.id for problem in problems] == ["a/1", "a/m", "a/p"]
    assert [problem.answer for problem in problems] == ["-982", r"\frac{1}{2}", "so"]


def test_what_is_needed(tmp_path):
    no_solution = write(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": 2}])
    assert load_problems(no_solution)[0] == Problem("a/1", "1+1?", "", "2", "math")
    with pytest.raises(BadRows, match="line 1: no reference"):
        load_problems(no_solution, need_solution=True)
    no_answer = write(tmp_path / "b.jsonl", [{"problem": "Prove it.", "solution": "In 3 steps."}])
    assert load_problems(no_answer, need_answer=False)[0].answer == ""
    with pytest.raises(BadRows, match="line 1: no answer"):
        load_problems(no_answer)


def test_order_and_ids(tmp_path):
    """Ids point at the line, in the order of the specs; equal stems are told apart by their folders."""
    one = write(tmp_path / "x" / "a.jsonl", [GSM8K, "", MATH, {**AIME, "unique_id": "u"}])
    two = write(tmp_path / "y" / "a.jsonl", [MATH])
    assert [problem.id for problem in load_problems(one)] == ["a/1", "a/3", "a/60"]
    assert [problem.id for problem in load_problems([two, one])] == ["y/a/1", "x/a/1", "x/a/3", "x/a/60"]
    beside = write(tmp_path / "x" / "a.json", [MATH])
    assert [problem.id for problem in load_problems([beside, one])][:2] == ["a.json/1", "a.jsonl/1"]
    with pytest.raises(ValueError, match="twice"):
        load_problems([one, one])


# ---- bad rows ----

BAD_ROWS = {
    "not JSON": ('{"question": ', "invalid JSON"),
    "endless nesting": ("[" * 100_000, "invalid JSON"),
    "no object": ("[1, 2]", "not an object"),
    "no question": ({**PLAIN, "question": None}, "no question"),
    "empty question": ({**PLAIN, "question": " \n"}, "no question"),
    "question not a text": ({**PLAIN, "question": ["Why?"]}, "`question` is not a text"),
    "solution not a text": ({**PLAIN, "solution": 5}, "`solution` is not a text"),
    "answer not a text": ({**PLAIN, "answer": True}, "`answer` is not a text"),
    "answer not a number": ({**PLAIN, "answer": float("nan")}, "`answer` is not a text"),
    "NUL": ({**PLAIN, "solution": "a\0b"}, r"`solution` holds .*x00' at 1"),
    "lone surrogate": ({**PLAIN, "question": "a\ud800"}, "`question` holds .*ud800' at 1"),
    "no answer": ({"problem": "1+1?", "solution": "It is 2."}, "no answer"),
    "box not closed": ({"problem": "1+1?", "solution": "It is \\boxed{2"}, "no answer"),
    "no ####": ({**GSM8K, "answer": "So\n18"}, "`answer` has several lines but none '####"),
    "#### before its end": ({**GSM8K, "answer": "#### So\n\\boxed{18}"}, "`answer` has several lines"),
    "nothing after ####": ({**GSM8K, "answer": "So\n####"}, "no answer"),
    "same id": ({**PLAIN, "id": "first"}, "the id of line 1 again"),
    "id is a list": ({**PLAIN, "id": [1]}, "`id` is not a text"),
    "empty id": ({**PLAIN, "id": " "}, "`id` is empty"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(tmp_path, name, capsys):
    row, reason = BAD_ROWS[name]
    file = write(tmp_path / "rows.jsonl", [{**PLAIN, "id": "first"}, PLAIN, row, GSM8K])
    with pytest.raises(BadRows, match=rf"(?s)rows\.jsonl: 1 of 4 rows .*line 3: {reason}.*--skip-bad-rows"):
        load_problems(file)
    kept = load_problems(file, skip_bad_rows=True)
    assert [problem.id for problem in kept] == ["rows/first", "rows/2", "rows/4"]
    assert "1 of 4 rows are bad\n  line 3: " in capsys.readouterr().err


def test_bad_utf8_is_one_bad_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(PLAIN).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(BadRows, match="line 2: invalid JSON"):
        load_problems(str(file))


def test_five_reasons_then_a_count(tmp_path):
    file = write(tmp_path / "a.jsonl", [PLAIN] * 9 + ["nonsense"] * 8)
    with pytest.raises(BadRows) as error:
        load_problems(file)
    assert str(error.value).count("invalid JSON") == 5 and "and 3 more" in str(error.value)


def test_a_wrong_file_is_not_skipped(tmp_path):
    file = write(tmp_path / "a.jsonl", [PLAIN] + ["nonsense"] * 2)
    with pytest.raises(BadRows, match="2 of 3"):
        load_problems(file, skip_bad_rows=True)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_unknown_schema(tmp_path, suffix):
    file = write(tmp_path / f"a.{suffix}", [{"prompt": "Why?", "response": "So."}])
    with pytest.raises(BadRows, match=r"(?s)found: prompt, response\. Known schemas: .*GSM8K.*MATH.*AIME"):
        load_problems(file, skip_bad_rows=True)


# ---- files ----

def test_bom_crlf_and_line_separator(tmp_path):
    file = tmp_path / "a.jsonl"
    text = json.dumps({**PLAIN, "question": "One\u2028two"}, ensure_ascii=False)
    file.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n\r\n{text}\r\n".encode())
    assert [problem.question for problem in load_problems(str(file))] == ["One\u2028two"] * 2


@pytest.mark.parametrize("text", [
    json.dumps([PLAIN, MATH]), json.dumps({"version": 1, "data": [PLAIN, MATH]}, indent=1),
    json.dumps({"id": "set", "domain": "math", "rows": [PLAIN, MATH]}),
    json.dumps(PLAIN) + "\n" + json.dumps(MATH)])
def test_json_layouts(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert [problem.id for problem in load_problems(str(tmp_path / "a.json"))] == ["a/1", "a/2"]


def test_a_single_row_may_hold_a_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"question": "q", "answer": "1", "tags": ["a", "1"]}))
    assert [problem.answer for problem in load_problems(str(tmp_path / "a.json"))] == ["1"]


@pytest.mark.parametrize("name, content, reason", [
    ("a.jsonl", b"", "no rows"), ("a.jsonl", b"\n\n", "no rows"), ("a.json", b"[]", "no rows"),
    ("a.json", b"", "invalid JSON"), ("a.json", b"[{}", "invalid JSON"), ("a.json", b"7", "not an object"),
    ("a.parquet", b"", "not a readable"), ("a.parquet", b"PAR1" * 9, "not a readable"),
    ("a.csv", b"a,b", "not a .parquet")])
def test_unusable_file(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{reason}"):
        load_problems(str(tmp_path / name), skip_bad_rows=True)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".parquet"]))
def test_any_bytes_are_refused_with_a_reason(tmp_path_factory, content, suffix):
    file = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    file.write_bytes(content)
    with pytest.raises(BadRows, match="bytes"):
        load_problems(str(file))


def test_folder_takes_one_split(tmp_path):
    """A folder's test file must never train."""
    write(tmp_path / "my_train.jsonl", [PLAIN])
    write(tmp_path / "my_test.jsonl", [MATH, GSM8K])
    write(tmp_path / "dataset_infos.json", {"x": 1})
    (tmp_path / "README.md").write_text("text")
    assert [problem.id for problem in load_problems(str(tmp_path))] == ["my_train/1"]
    assert len(load_problems(str(tmp_path), split="test")) == 2
    assert len(load_problems(f"{tmp_path}::test")) == 2
    with pytest.raises(ValueError, match="no split dev but test, train"):
        load_problems(str(tmp_path), split="dev")


def test_folder_without_splits_is_taken_whole(tmp_path):
    write(tmp_path / "contest.jsonl", [PLAIN])
    write(tmp_path / "latest.parquet", [MATH])
    assert len(load_problems(str(tmp_path), split="test")) == 2


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.jsonl", "no/where.jsonl", "a/b/c", "", "../x:y"])
def test_no_such_file(tmp_path, monkeypatch, spec):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such file|holds no"):
        load_problems(spec)


@pytest.mark.parametrize("files, outcome", [  # of data sets on the hub, or of copies of them
    ({"test.jsonl": [MATH]}, "no split train but test: .*:default:test"),
    ({"train/part.jsonl": [MATH], "test/part.jsonl": [MATH]}, ["part/1"]),
    ({"aime-I.jsonl": [AIME], "aime-II.jsonl": [AIME]}, ["aime-I/60", "aime-II/60"]),
    ({"algebra/train.jsonl": [MATH], "geometry/train.jsonl": [MATH]},
     r"name one of its configs \(algebra, geometry\): .*:algebra"),
    ({"algebra/train.jsonl": [MATH]}, ["train/1"]),
    ({"main/train.jsonl": [MATH], "socratic/train.jsonl": [MATH, MATH]}, ["train/1"]),
    ({"data/train-00000-of-00002.parquet": [MATH], "data/train-00001-of-00002.parquet": [MATH]},
     ["train-00000-of-00002/1", "train-00001-of-00002/1"]),
    ({"data/train-00000-of-00002.parquet": [MATH]}, "only 1 of the 2 parts of data/train-00000-of-00002"),
    ({"load.py": ["import this"]}, "holds no .parquet, .jsonl, .json file"),
])
def test_layouts(tmp_path, files, outcome):
    for name, rows in files.items():
        write(tmp_path / name, rows)
    if isinstance(outcome, list):
        assert [problem.id for problem in load_problems(str(tmp_path))] == outcome
    else:
        with pytest.raises(ValueError, match=outcome):
            load_problems(str(tmp_path))


# ---- the hub, through its local cache ----

def hub_cache(home, files):
    """The hub's layout: blobs, a snapshot of links to them, and the branch that names the snapshot."""
    root = home / "hub" / "datasets--some--sums"
    for number, (name, rows) in enumerate(files.items()):
        link, blob = root / "snapshots" / "c0ffee" / name, root / "blobs" / f"{number:040x}"
        write(blob.with_suffix(Path(name).suffix), rows)
        blob.with_suffix(Path(name).suffix).rename(blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c0ffee")


LOAD = """import sys, data
try:
    for problem in data.load_problems(sys.argv[1], split=sys.argv[2]):
        print(problem.id)
except ValueError as error:
    print("ValueError", error)
"""


def load(home, spec, split="train", **environment):
    """Ids or error, and stderr, of load_problems in a fresh process, by default one that is offline."""
    environment = {**os.environ, "HF_HOME": str(home), **(environment or {"HF_HUB_OFFLINE": "1"})}
    done = subprocess.run([sys.executable, "-c", LOAD, spec, split], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_hub_layout_of_gsm8k(tmp_path):
    hub_cache(tmp_path, {"main/train-00000-of-00001.parquet": [GSM8K], "README.md": ["text"],
                         "main/test-00000-of-00001.parquet": [GSM8K, GSM8K],
                         "socratic/train-00000-of-00001.parquet": [GSM8K] * 3, "main/train.jsonl": [GSM8K]})
    ids, errors = load(tmp_path, "some/sums")
    assert ids == "train-00000-of-00001/1"  # not the same rows again from the .jsonl
    assert "nothing from the hub" in errors and "c0ffee" in errors
    assert load(tmp_path, "some/sums:main:test")[0] == "test-00000-of-00001/1\ntest-00000-of-00001/2"
    assert load(tmp_path, "some/sums:socratic")[0].count("\n") == 2


def test_hub_out_of_reach_says_what_to_do(tmp_path):
    output = load(tmp_path, "some/sums")[0]
    for part in ("some/sums", "OfflineModeIsEnabled", str(tmp_path), "hf download", "--data", "HF_HOME"):
        assert part in output


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as listing and downloading some/sums takes; some/locked needs a login."""

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        status, headers = 200, {"ETag": '"e7a9"', "X-Repo-Commit": "c0ffee" + "0" * 34}
        body = json.dumps(PLAIN)
        if self.path in ("/api/datasets/some/sums", "/api/datasets/some/locked"):
            files = ["README.md", "data/train.jsonl", "data/test.jsonl", "data/train.csv"]
            body = json.dumps({"id": self.path[14:], "siblings": [{"rfilename": file} for file in files]})
        elif "locked" in self.path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif not self.path.startswith("/datasets/some/sums/resolve/main/"):
            status, headers = 404, {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body.encode())

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_hub_download(tmp_path):
    """Only the split's file is downloaded, into the usual cache, which serves when the hub is gone."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    hub.requests = []
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "NO_PROXY": "127.0.0.1"}
    assert load(tmp_path, "some/sums", **environment) == ("train/1", "")
    assert [request for request in hub.requests if request.startswith("GET /datasets")] == [
        "GET /datasets/some/sums/resolve/main/data/train.jsonl"]
    assert "some/locked: download failed: GatedRepoError" in load(tmp_path, "some/locked", **environment)[0]
    assert "RepositoryNotFoundError" in load(tmp_path, "some/typo", **environment)[0]
    hub.shutdown()
    hub.server_close()
    ids, errors = load(tmp_path, "some/sums", **environment)
    assert ids == "train/1" and "nothing from the hub" in errors
    assert "no split test but train" in load(tmp_path, "some/sums", "test")[0]  # it was not downloaded


# ---- domains and options ----


@pytest.mark.parametrize("row", [
    {"choices": ["Mars", "Venus", "Earth"], "answer": 1},  # MMLU
    {"choices": {"label": ["A", "B", "C"], "text": ["Mars", "Venus", "Earth"]}, "answerKey": "B"},  # ARC
    {"options": ["Mars", "Venus", "Earth"], "answer": "B", "answer_index": 1},  # MMLU-Pro
    {"options": {"A": "Mars", "B": "Venus", "C": "Earth"}, "answer": "Venus"},
    {"options": ["Mars", "Venus", "Earth"], "solution": "Its air keeps the heat.\n\\boxed{B}"},
])
def test_options_are_shown_in_the_question(tmp_path, row):
    row = {"question": "Which is hottest?", "solution": "Venus: its air keeps the heat."} | row
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    problem, = load_problems(str(tmp_path / "p.jsonl"))
    assert "Which is hottest?\n\nA) Mars\nB) Venus\nC) Earth\n" in problem.question
    assert (problem.answer, problem.domain) == ("B", "choice")
    assert problem.solution.endswith("\n\\boxed{B}")  # what the judge compares with


@pytest.mark.parametrize("row, answer", [
    ({"choices": {"label": ["1", "2", "3"], "text": ["2", "1", "4"]}, "answerKey": "2"}, "2"),
    ({"choices": ["B", "O", "A"], "answer": "B"}, "B"),
    ({"choices": ["10", "3", "2"], "answer": "2"}, "C"),
    ({"answer": 7**400}, str(7**400)),  # no float is as large
    ({"answer": 72.0}, "72"), ({"answer": -0.0}, "0"), ({"answer": 0.5}, "0.5"),  # pandas writes 72 so
    ({"choices": [f"o{i}" for i in range(26)], "answer": 25}, "Z"),
])
def test_an_answer_is_a_letter_or_a_number(tmp_path, row, answer):
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "q"} | row) + "\n")
    assert load_problems(str(tmp_path / "p.jsonl"))[0].answer == answer


@pytest.mark.parametrize("row, reason", [
    ({"choices": ["one"], "answer": 0}, "2 to 26 texts"),
    ({"choices": [1, 2], "answer": 0}, "2 to 26 texts"),
    ({"choices": [f"o{i}" for i in range(27)], "answer": 0}, "2 to 26 texts"),  # the 27th would be no option
    ({"choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}, "2 to 26 texts"),
    ({"choices": {"label": None, "text": None}, "answerKey": "A"}, "2 to 26 texts"),
    ({"choices": {"label": "AB", "text": "xy"}, "answerKey": "A"}, "2 to 26 texts"),
    ({"choices": {"label": ["A", "A"], "text": ["x", "y"]}, "answerKey": "A"}, "2 to 26 texts"),
    ({"choices": {"label": ["A", "B"], "text": ["x", "y", "z"]}, "answerKey": "A"}, "2 to 26 texts"),
    ({"choices": ["x", "y"], "answer": "z"}, "none of the choices"),
    ({"choices": ["x", "y"], "answer": 2}, "none of the choices"),
    ({"choices": ["x", "y"]}, "no answer"),
])
def test_bad_options_are_bad_rows(tmp_path, row, reason):
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "q"} | row) + "\n")
    with pytest.raises(BadRows, match=reason):
        load_problems(str(tmp_path / "p.jsonl"))


def test_a_domain_before_the_file_is_for_rows_that_name_none(tmp_path):
    rows = [{"question": "q", "answer": "1"}, {"question": "r", "answer": "2", "domain": "code"}]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.domain for p in load_problems(f"science={file}")] == ["science", "code"]
    (tmp_path / "q.jsonl").write_text(file.read_text())
    both = load_problems([str(file), f"science={tmp_path / 'q.jsonl'}"])
    assert [p.domain for p in both] == ["math", "code", "science", "code"]
