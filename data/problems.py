r"""Problems, what a run asks of a model, and the readers that make them from local files or the hub's data sets.

A row is one of these (other columns are ignored)
  GSM8K   question, answer       reasoning that ends in a line "#### 18"
  MATH    problem, solution      the answer is in the solution's last \boxed{}
  AIME    problem, solution, answer
  plain   question, solution, answer, domain
GSM8K's solutions lose their calculator marks (<<48/2=24>>), and the closing "#### 18" becomes "\boxed{18}": the
form that the policy is asked for, and no line that could be taken for a "###" step.

Left out: chat-style rows, CSV, compressed files, data sets that the hub holds only as a loading script.
Try it: python -c "import data; print(data.load_problems('openai/gsm8k:main:test')[0])"
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .answers import extract_answer

SUFFIXES = (".parquet", ".jsonl", ".json")  # in order of preference where the hub has a data set in several
COLUMNS = ("id", "idx", "unique_id", "question", "problem", "solution", "answer", "domain")
SCHEMAS = ("question + answer with '#### 18' (GSM8K), problem + solution with \\boxed{} (MATH), "
           "problem + solution + answer (AIME), question + solution + answer + domain")
MAX_BAD_SHARE = 0.5  # of a file's rows; with more it is the wrong file, and nothing is skipped
_REMEDY = ("Download it where there is a network (hf download OWNER/NAME --repo-type dataset --local-dir FOLDER) "
           "and pass --data FOLDER or --data file.jsonl; or copy a filled cache and set HF_HOME to it; or unset "
           "HF_HUB_OFFLINE if it is set.")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT = re.compile(r"(?:^|[-_./ ])(train|test|validation|valid|val|dev)(?=[-_./ ])", re.I)
_SHARD = re.compile(r"\d{5}-of-(\d{5})")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL is never text, and tokenizers refuse half a surrogate pair


@dataclass(frozen=True)
class Problem:
    id: str  # "<file stem>/<the row's own id, else its line or row number from 1>"
    question: str
    solution: str  # the hidden reference; "" if there is none and none was needed
    answer: str  # the final answer; "" if there is none and none was needed
    domain: str


class BadRows(ValueError):
    """Rows that cannot be used; the message names file, row, reason and remedy."""


def load_problems(spec: str | list[str], *, split: str = "train", skip_bad_rows: bool = False,
                  need_solution: bool = False, need_answer: bool = True) -> list[Problem]:
    """All problems of a .jsonl, .json or .parquet file, of a folder of such files, of a data set on the hub
    ("openai/gsm8k", or with config and split "openai/gsm8k:main:test"), or of a list of these, in order.

    split: which files to take where names of files or folders tell splits apart; a split in the spec wins.
    skip_bad_rows: drop bad rows and say so on stderr. Otherwise, or if more than half are bad: BadRows.
    need_solution, need_answer: is a row without one bad? (Judges need references, exact match needs answers.)
    Raises ValueError when there is no such file, the hub is out of reach, or config or split are unclear.
    """
    files = [file for one in ([spec] if isinstance(spec, str) else spec) for file in _find_files(one, split)]
    if len({file.absolute() for file in files}) < len(files):
        raise ValueError(f"the same file is named twice: {max(files, key=files.count)}")
    depth, names = 0, []
    while len(set(names)) < len(files):  # equal stems get as many folders in front as it takes to differ
        depth += 1
        names = ["/".join(file.absolute().with_suffix("").parts[-depth:]) for file in files]
    return [problem for file, name in zip(files, names)
            for problem in _load_file(file, name, skip_bad_rows, need_solution, need_answer)]


# ---- rows ----

def _load_file(file: Path, name: str, skip_bad_rows: bool, need_solution: bool, need_answer: bool) -> list[Problem]:
    problems, bad, places, columns = [], [], {}, None
    for place, row in _read_rows(file):
        try:
            if isinstance(row, Exception):
                raise ValueError(f"invalid JSON: {row}")
            if not isinstance(row, dict):
                raise ValueError(f"not an object with columns but {type(row).__name__}")
            columns = columns or list(row)
            problem = _read_problem(row, name, place, need_solution, need_answer)
            if problem.id in places:
                raise ValueError(f"the id of {places[problem.id]} again: {problem.id!a}")
            places[problem.id] = place
            problems.append(problem)
        except ValueError as reason:
            bad.append(f"{place}: {reason}")
    total = len(problems) + len(bad)
    if not total:
        raise BadRows(f"{file}: no rows")
    if not bad:
        return problems
    more = [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
    summary = "\n  ".join([f"{file}: {len(bad)} of {total} rows are bad", *bad[:5], *more])
    skippable = len(bad) <= MAX_BAD_SHARE * total
    if skip_bad_rows and skippable:
        print(f"skipped rows: {summary}", file=sys.stderr)
        return problems
    if not problems and columns:
        summary += f"\nColumns found: {', '.join(columns)}. Known schemas: {SCHEMAS}."
    raise BadRows(f"{summary}\nCorrect the rows{', or drop them with --skip-bad-rows' if skippable else ''}.")


def _read_problem(row: dict, name: str, place: str, need_solution: bool, need_answer: bool) -> Problem:
    question = _text(row, "question") or _text(row, "problem")
    solution, answer = _text(row, "solution"), _text(row, "answer")
    if not question:
        raise ValueError("no question: column `question` or `problem` is missing or empty")
    if not solution and "####" in answer:  # GSM8K
        reasoning, _, answer = (part.strip() for part in re.sub("<<[^<>\n]*>>", "", answer).rpartition("####"))
        solution = f"{reasoning}\n\\boxed{{{answer}}}" if reasoning and answer else reasoning
    elif solution and not answer and ("\\boxed" in solution or "\\fbox" in solution):  # MATH
        answer = extract_answer(solution) or ""
    if not solution and "\n" in answer:
        raise ValueError("`answer` has several lines but none '#### <final answer>' at its end")
    if need_solution and not solution:
        raise ValueError("no reference: column `solution` is missing or empty (only evaluation does without)")
    if need_answer and not answer:
        raise ValueError("no answer: neither in column `answer` nor in a \\boxed{} of the solution")
    own = next((row[key] for key in ("id", "idx", "unique_id") if row.get(key) is not None), place.split()[1])
    if type(own) not in (int, str) or not str(own).strip():
        raise ValueError(f"the id is neither a number nor a text: {own!a:.40}")
    return Problem(f"{name}/{own}", question, solution, answer, _text(row, "domain") or "math")


def _text(row: dict, key: str) -> str:
    """The column's text without outer spaces; "" if it is missing or null. An answer may be a number."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "answer" and type(value) in (int, float) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is not a text: {value!a:.40}")
    unusable = _UNUSABLE.search(value)
    if unusable:
        raise ValueError(f"`{key}` holds the unusable character {unusable[0]!a} at {unusable.start()}")
    return value.strip()


def _read_rows(file: Path):
    """Yields ("line 3" or "row 3", counted from 1; the row, or the exception that reading it gave)."""
    if file.suffix == ".parquet":
        import pyarrow
        from pyarrow.parquet import ParquetFile
        try:
            table = ParquetFile(file)
            names = table.schema_arrow.names
            wanted = [name for name in names if name in COLUMNS] or names  # images and the like stay on disk
            rows = (row for batch in table.iter_batches(1024, columns=wanted) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        except (pyarrow.ArrowException, OSError) as error:
            raise BadRows(f"{file}: not a readable parquet file: {error}") from error
        return
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    # A .json file with one object a line is JSON lines; one that is a single object reads the same either way.
    if file.suffix == ".json" and not _is_json(data.split(b"\n", 1)[0], dict):
        try:
            rows = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRows(f"{file}: invalid JSON: {error}") from error
        lists = [one for one in rows.values() if isinstance(one, list)] if isinstance(rows, dict) else [rows]
        if len(lists) != 1 or not isinstance(lists[0], list):
            raise BadRows(f"{file}: a list of rows is needed, or an object that holds one list")
        yield from ((f"row {number}", row) for number, row in enumerate(lists[0], 1))
        return
    for number, line in enumerate(data.split(b"\n"), 1):  # not splitlines: U+2028 may stand inside a text
        if line.strip():
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                row = error
            yield f"line {number}", row
