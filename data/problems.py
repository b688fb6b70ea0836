r"""Problems, what a run asks of a model, and their readers: local files, data sets on the hub.

A row is one of these (other columns are ignored)
  GSM8K   question, answer       reasoning that ends in a line "#### 18"
  MATH    problem, solution      the answer is in the solution's last \boxed{}
  AIME    problem, solution, answer; POPE (the paper's data) names the solution `gemini_solution`
  plain   question, solution, answer, domain
  choice  any of these with `choices` or `options` (ARC, MMLU, MMLU-Pro): they are written into the question
GSM8K's solutions lose their calculator marks (<<48/2=24>>), and the closing "#### 18" becomes "\boxed{18}":
the form that the policy is asked for, and no line that could be taken for a "###" step. The domain picks the
judge's rubric; rows that name none are "math", or what stands before the file: "science=minerva_math.jsonl".

Left out: chat-style rows, CSV, compressed files, data sets that the hub holds only as a loading script.
Try it: python -c "import data; print(data.load_problems('openai/gsm8k:main:test')[0])"
"""
import hashlib
import json
import math
import re
import sys
from dataclasses import astuple, dataclass
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from .answers import last_box

SUFFIXES = (".parquet", ".jsonl", ".json")  # in order of preference where the hub has a data set in several
COLUMNS = ("id", "idx", "unique_id", "question", "problem", "solution", "gemini_solution", "answer", "domain",
           "choices", "options", "answerKey")
SCHEMAS = ("question + answer with '#### 18' (GSM8K), problem + solution with \\boxed{} (MATH), "
           "problem + solution + answer (AIME), question + solution + answer + domain; choices or options")
MAX_BAD_SHARE = 0.5  # of a file's rows; with more it is the wrong file, and nothing is skipped
_REMEDY = ("Where there is a network: hf download OWNER/NAME --repo-type dataset --local-dir FOLDER; "
           "then pass --data FOLDER or --data FILE.jsonl. Or copy a filled cache and set HF_HOME to it. If "
           "HF_HUB_OFFLINE is set and need not be, unset it.")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")
_SPLIT = re.compile(rf"(?:^|[-_./ ])({'|'.join(_SPLITS)})(?=[-_./ ])", re.I)
_SHARD = re.compile(r"\d{5}-of-(\d{5})")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # NUL is never text, and tokenizers refuse half a surrogate pair


@dataclass(frozen=True)
class Problem:
    id: str  # "<file stem>/<the row's own id, else its line or row number from 1>"
    question: str
    solution: str  # the hidden reference; "" if there is none and none was needed
    answer: str  # the final answer; "" if there is none and none was needed
    domain: str


def fingerprint(problems: list[Problem]) -> str:
    """Are these the problems of another day? Equal for equal lists."""
    return hashlib.sha256(json.dumps([astuple(p) for p in problems]).encode()).hexdigest()[:16]


class BadRows(ValueError):
    """Rows that cannot be used; the message names file, row, reason and remedy."""


def load_problems(spec: str | list[str], *, split: str = "train", skip_bad_rows: bool = False,
                  need_solution: bool = False, need_answer: bool = True) -> list[Problem]:
    """All problems of a .jsonl, .json or .parquet file, of a folder of such files, of a data set on the hub
    ("openai/gsm8k", or with config and split "openai/gsm8k:main:test"), or of a list of these, in order.
    "science=FILE" gives the rows of FILE that name no domain that one.

    split: which files to take where names of files or folders tell splits apart; a split in the spec wins.
    skip_bad_rows: drop bad rows and say so on stderr. Otherwise, or if more than half are bad: BadRows.
    need_solution, need_answer: is a row without one bad? (Judges need references, exact match needs answers.)
    Raises ValueError when there is no such file, the hub is out of reach, or config or split are unclear.
    """
    specs = [spec] if isinstance(spec, (str, Path)) else spec
    files, domains = [], []
    for domain, one in map(split_domain, map(str, specs)):
        files += _find_files(one, split)
        domains += [domain] * (len(files) - len(domains))
    full = [file.absolute() for file in files]
    if len(set(full)) < len(full):
        raise ValueError(f"the same file is named twice: {max(full, key=full.count)}: name it once")
    paths = [file.with_suffix("") for file in full]
    if len(set(paths)) < len(paths):  # a.json beside a.jsonl
        paths = full
    depth, names = 0, []
    while len(set(names)) < len(paths):  # equal stems get as many folders in front as it takes to differ
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in paths]
    return [problem for file, name, domain in zip(files, names, domains)
            for problem in _load_file(file, name, domain, skip_bad_rows, need_solution, need_answer)]


# ---- rows ----

def _load_file(file: Path, name: str, domain: str, skip_bad_rows: bool, need_solution: bool,
               need_answer: bool) -> list:
    problems, bad, places, columns = [], [], {}, None
    for place, row in _read_rows(file):
        try:
            if isinstance(row, Exception):
                raise ValueError(f"invalid JSON: {row}")
            if not isinstance(row, dict):
                raise ValueError(f"not an object with columns but {type(row).__name__}")
            columns = columns or list(row)
            problem = _read_problem(row, name, place, domain, need_solution, need_answer)
            if problem.id in places:
                raise ValueError(f"the id of {places[problem.id]} again: {problem.id!a}")
            places[problem.id] = place
            problems.append(problem)
        except ValueError as reason:
            bad.append(f"{place}: {reason}")
    total = len(problems) + len(bad)
    if not total:
        raise BadRows(f"{file}: no rows: write a problem a line, as {SCHEMAS}")
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


def _read_problem(row: dict, name: str, place: str, domain: str, need_solution: bool,
                  need_answer: bool) -> Problem:
    question = _text(row, "question") or _text(row, "problem")
    solution, options = _text(row, "solution") or _text(row, "gemini_solution"), _options(row)
    answer = _chosen(row, options, solution) if options else _text(row, "answer")
    if not question:
        raise ValueError("no question: column `question` or `problem` is missing or empty")
    if options:
        question += "\n\n" + "\n".join(f"{letter}) {text}" for letter, text in options.items())
        question += "\n\nGive the letter of the right option as the final answer."
        if solution and answer and last_box(solution) is None:
            solution += f"\n\\boxed{{{answer}}}"
    elif "####" in answer.rpartition("\n")[2]:  # GSM8K
        reasoning, answer = (re.sub("<<[^<>\n]*>>", "", part).strip() for part in answer.rsplit("####", 1))
        solution = solution or (f"{reasoning}\n\\boxed{{{answer}}}" if reasoning and answer else reasoning)
    elif not answer:  # MATH. A last number would be a guess: enough for a trace, not for a reference
        answer = last_box(solution) or ""
    if not solution and "\n" in answer:
        raise ValueError("`answer` has several lines but none '#### <final answer>' at its end")
    if need_solution and not solution:
        raise ValueError("no reference: column `solution` is missing or empty")
    if need_answer and not answer:
        raise ValueError("no answer: neither in column `answer` nor in a \\boxed{} of the solution")
    key = next((key for key in COLUMNS[:3] if row.get(key) is not None), None)
    own = place.split()[1] if key is None else row[key] if type(row[key]) is int else _text(row, key)
    if own == "":
        raise ValueError(f"`{key}` is empty")
    domain = _text(row, "domain") or domain or ("choice" if options else "math")
    return Problem(f"{name}/{own}", question, solution, answer, domain)


def _options(row: dict) -> dict[str, str]:
    """Letter -> text of a multiple-choice row's options, in order; {} for other rows. Given as a list of
    texts, as {letter: text}, or as ARC's {"label": [...], "text": [...]}."""
    given = row.get("choices") or row.get("options")
    if not given:
        return {}
    pairs = []  # zip_longest: a letter without a text, or a text without one, is no text
    if isinstance(given, list):
        pairs = list(zip_longest("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(given)], given))
    elif isinstance(given, dict) and set(given) != {"label", "text"}:
        pairs = list(given.items())
    elif isinstance(given, dict) and all(type(column) is list for column in given.values()):
        pairs = list(zip_longest(given["label"], given["text"]))
    if not (all(type(text) is str and not _UNUSABLE.search(text) for pair in pairs for text in pair)
            and 2 <= len(dict(pairs)) == len(pairs) <= 26):
        raise ValueError(f"`choices` are not 2 to 26 texts: {given!a:.40}")
    return {letter: text.strip() for letter, text in pairs}


def _chosen(row: dict, options: dict[str, str], solution: str) -> str:
    """The right option's letter. `answer`, `answerKey` or the solution's box has it, or its place from 0, or
    its text."""
    if type(row.get("answer")) is int and 0 <= row["answer"] < len(options):
        return list(options)[row["answer"]]
    answer = _text(row, "answer") or _text(row, "answerKey") or last_box(solution) or ""
    if answer in options:  # also where another option's text is that letter
        return answer
    named = [letter for letter, text in options.items() if text == answer]
    if answer and not named:
        raise ValueError(f"the answer {answer!a:.40} is none of the choices {', '.join(options)}")
    return named[0] if named else ""


def _text(row: dict, key: str) -> str:
    """The column's text without outer spaces; "" if it is missing or null. An answer may be a number."""
    value = row.get(key)
    if value is None:
        return ""
    if key == "answer" and (type(value) is int or type(value) is float and math.isfinite(value)):
        return str(int(value) if value == int(value) else value)  # pandas makes 72 a 72.0
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
            parquet = ParquetFile(file)
            names = parquet.schema_arrow.names
            wanted = [name for name in names if name in COLUMNS] or names  # images and the like stay on disk
            rows = (row for batch in parquet.iter_batches(1024, columns=wanted) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise BadRows(f"{file}: not a readable parquet file: {error}") from error
        return
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if file.suffix == ".json":
        try:
            rows = json.loads(data)
        except (ValueError, RecursionError) as error:
            rows = None  # objects one below the other are JSON lines, whatever the suffix
            if not data.lstrip().startswith(b"{"):
                raise BadRows(f"{file}: invalid JSON: {error}") from error
        if isinstance(rows, dict):  # {"version": 1, "data": [...]}, or a single row
            lists = [value for value in rows.values() if isinstance(value, list)]
            rows = lists[0] if len(lists) == 1 and rows.keys().isdisjoint(("question", "problem")) else [rows]
        if isinstance(rows, list):
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
            return
    for number, line in enumerate(data.split(b"\n"), 1):  # not splitlines: U+2028 may stand inside a text
        if line.strip():
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                row = error
            yield f"line {number}", row


# ---- files ----

def split_domain(spec: str) -> tuple[str, str]:
    """"science=FILE" -> ("science", "FILE"); ("", spec) without a domain."""
    found = re.fullmatch(r"([A-Za-z][\w-]*)=(.+)", spec)
    return found.groups() if found and not Path(spec).exists() else ("", spec)


def _find_files(spec: str, split: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{spec}: not a {', '.join(SUFFIXES)} file: convert it to one of these")
        return [path]
    source, config, own_split = (spec, "", "") if path.is_dir() else (*spec.split(":", 2), "", "")[:3]
    folder, split = Path(source).expanduser(), own_split or split
    if folder.is_dir():
        return [folder / name for name in _choose_files(_list_files(folder), spec, config, split)]
    if folder.suffix in SUFFIXES or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise ValueError(f"{spec}: no such file or folder, nor a hub name (owner/name[:config[:split]]): "
                         "check the path")
    return _hub_files(source, spec, config, split)


def _hub_files(source: str, spec: str, config: str, split: str) -> list[Path]:
    """The data set's files in the hub's local cache, downloaded where they are missing."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HUB_CACHE
    cache = Path(HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}"
    snapshot = None
    try:
        names = [file.rfilename for file in HfApi().dataset_info(source).siblings]
    except Exception as error:  # no network, offline mode, proxy, no access, unknown name: the cache may do
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        try:  # by hand: the library refuses a snapshot of which only the needed files were downloaded
            snapshot = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
            names = _list_files(snapshot)
            if not names:
                raise FileNotFoundError(snapshot)
        except OSError:
            raise ValueError(f"{spec}: no file or folder of that name, nothing from the hub ({reason}), "
                             f"no copy in its cache ({cache}).\n{_REMEDY}") from error
        print(f"{spec}: nothing from the hub ({reason}), using {snapshot}", file=sys.stderr)
    chosen = _choose_files(names, spec, config, split)
    suffix = min((PurePosixPath(name).suffix for name in chosen), key=SUFFIXES.index)
    chosen = [name for name in chosen if name.endswith(suffix)]  # some data sets are there in two formats
    if snapshot is not None:
        return [snapshot / name for name in chosen]
    try:
        return [Path(hf_hub_download(source, name, repo_type="dataset")) for name in chosen]
    except Exception as error:  # needs a login, the network went away, the disk is full
        raise ValueError(f"{spec}: download failed: {type(error).__name__}: {error}\n{_REMEDY}") from error


def _list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _choose_files(names: list[str], spec: str, config: str, split: str) -> list[str]:
    """The files of one config and one split; paths: main/train-00000-of-00001.parquet, data/test.jsonl.
    A config is a folder; data/ and none are "default". A split is a word in a file's or folder's name; files
    without one are left out, unless none has one: then all are taken."""
    configs, splits = {}, {}
    for name in names:
        *folders, file = PurePosixPath(name).parts
        if PurePosixPath(file).suffix in SUFFIXES and file not in _METADATA and not name.startswith("."):
            own = "/".join(part for part in folders if part.lower() not in ("data", *_SPLITS))
            configs.setdefault(own or "default", []).append(name)
    if not configs:
        raise ValueError(f"{spec}: holds no {', '.join(SUFFIXES)} file: name the folder or file that does")
    source = spec.split(":")[0]
    if not config:
        config = next((one for one in ("main", "default") if one in configs), "")
    if not config and len(configs) == 1:
        config = min(configs)
    if config not in configs:
        raise ValueError(f"{spec}: name one of its configs ({', '.join(configs)}): {source}:{min(configs)}")
    for name in configs[config]:
        words = _SPLIT.findall(name)
        splits.setdefault(words[-1].lower() if words else "", []).append(name)
    chosen = splits[""] if list(splits) == [""] else splits.get(split)
    if not chosen:
        found = [word for word in splits if word]
        raise ValueError(f"{spec}: no split {split} but {', '.join(found)}: {source}:{config}:{found[0]}")
    for name in chosen:
        shards = _SHARD.search(name)
        here = sum(_SHARD.sub("", other) == _SHARD.sub("", name) for other in chosen)
        if shards and here != int(shards[1]):
            raise ValueError(f"{spec}: only {here} of the {int(shards[1])} parts of {name} are here: "
                             "download the others, too")
    return chosen
