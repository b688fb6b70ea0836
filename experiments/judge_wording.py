r"""Which wording and readout lets a small judge see whether a trace agrees with the reference?

    python sample.py --model M --data D --limit 56 --n 4 --max-new-tokens 256 --temperature 0.8 --out t.jsonl
    python experiments/judge_wording.py --judge M --data D --traces t.jsonl --problems 1 24

A row per variant and reference, appended to judge_wording.csv: AUROC against exact match with its 95%
interval over problems, and, among wrong traces, the correlation of the reading with progress: the share of
the reference's intermediate results (numbers that are not in the question) that the trace states, over all
and with each problem's means taken off (progress_within: what a group of traces is told). Reference "both":
the reading with the right reference less that with another problem's. Traces cut off are left out. Variants
that start alike share a pass over the trace. To try a wording: one entry in VARIANTS. --readouts: judge.py's.

The one that is chosen is to be reported by judge.py, on rows that were not searched.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import LM, TEMPLATE_OPTIONS, Sampler, load_lm, pick_device, pick_dtype  # noqa: E402
from sample import problems_or_exit  # noqa: E402
from data import Problem, extract_answer  # noqa: E402
from judge import ASK, CONCLUDE, CONCLUSION, DIGITS, READOUTS, STEM, UNSEEN, USER, Judge, rubric  # noqa: E402
from judge import auroc, centred, correlation, expected_grade, scores, verdicts_on  # noqa: E402
from judge import interval_over_problems, read_traces, with_ask, with_reference  # noqa: E402

RUBRIC = rubric("outcome", "math")
BRIEF = """\
You check a student's work on a problem against a reference solution that is known to be right. You grade \
how far the work agrees with the reference: 1 - it arrives at another answer, or at none; 2 - mostly wrong; \
3 - partly right, unfinished or with an error; 4 - right but for a trifle; 5 - it arrives at the reference's \
answer."""
ASKED = with_ask(ASK["expected"], behind=False)  # as judge.py does for an expected grade
GRADE = "\n\n" + ASK["expected"]
NAMED = "\n\nThe reference arrives at {answer}."
PAIR = "\n\nReference's final answer: {answer}\nTrace's final answer: {guess}"  # {guess} is found by code
LAST = "\n\n<reference>\n{reference}\n</reference>"
YES = "\n\nDoes the trace arrive at the right answer? Reply with Yes or No."
SAME = "\n\nAre these two the same? Reply with Yes or No."
SENTENCE = "The trace concludes that the final answer is \\boxed{"
# name: (system prompt, shown up to the trace's end, asked behind it, forced stem, what is read)
VARIANTS = {
    "rubric, asked behind": (RUBRIC, USER, GRADE, STEM, "digits"),
    "rubric, asked in front": (RUBRIC, ASKED, "", STEM, "digits"),  # judge.py's readout expected
    "rubric, answer named": (RUBRIC, ASKED, NAMED, STEM, "digits"),
    "brief": (BRIEF, ASKED, "", STEM, "digits"),
    "brief, answer named": (BRIEF, ASKED, NAMED, STEM, "digits"),
    "brief, both answers": (BRIEF, ASKED, PAIR, STEM, "digits"),
    "brief, reference last": (CONCLUDE, UNSEEN, LAST + "\n\n" + BRIEF + GRADE, STEM, "digits"),
    "yes": (CONCLUDE, UNSEEN, NAMED + YES, "", "yes"),
    "yes, both answers": (CONCLUDE, UNSEEN, PAIR + SAME, "", "yes"),
    "conclusion": (CONCLUDE, UNSEEN, "", CONCLUSION, "{answer}}"),  # half of judge.py's readout likelihood
    "conclusion in a sentence": (CONCLUDE, UNSEEN, "", SENTENCE, "{answer}}"),
    "results": (CONCLUDE, UNSEEN, "", "The work finds these results: ", "{results}"),
    "results behind the conclusion": (CONCLUDE, UNSEEN, "", CONCLUSION + "{answer}}, found by way of ",
                                      "{results}"),
    "whole reference": (CONCLUDE, UNSEEN, "", "", "{reference}"),
}


def numbers(text: str) -> list[str]:
    return [n.replace(",", "") for n in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def results_of(problem: Problem) -> list[str]:
    """The reference's intermediate results, in order: numbers behind "=" that the question does not have."""
    steps = problem.solution.rpartition("\\boxed")[0] or problem.solution
    found = numbers(" ".join(re.findall(r"=\s*\$?(\d[\d,]*(?:\.\d+)?)", steps)))
    known = numbers(problem.question + " " + problem.answer)
    return [n for n in dict.fromkeys(found) if n not in known]


def progress(problem: Problem, text: str) -> float:
    """Share of the reference's intermediate results that stand in the trace; NaN where it has none."""
    results = results_of(problem)
    return float(np.mean([n in numbers(text) for n in results])) if results else float("nan")


def readings(lm: LM, sampler: Sampler, alike: list[str], shown: list[dict[str, Problem]],
             records: list[dict]) -> np.ndarray:
    """(conditions, variants, traces): larger = better. Expected grade, logit of Yes less No, or mean log-prob
    of a text (NaN if it is empty). `alike`: variants with the same two first entries; shown: for each
    condition the problems by id, of which the first is the one shown before the trace's end."""
    tok, out = lm.tokenizer, np.full((len(shown), len(alike), len(records)), np.nan)

    def encode(text):
        return tok.encode(text, add_special_tokens=False)

    prompts, asked, sought = [], [], []  # forks of a trace: (place in out, cut, suffix[, target])
    for i, r in enumerate(records):
        asked.append([]), sought.append([])
        for c, by_id in enumerate(shown):
            p = by_id[r["problem"]]
            slots = {"question": p.question, "reference": p.solution, "answer": p.answer,
                     "results": ", ".join(results_of(p)), "trace": "@@trace@@",
                     "guess": extract_answer(r["text"]) or "none"}

            def fill(text):
                return re.sub(r"\{(\w+)\}", lambda m: slots[m[1]], text)

            for v, name in enumerate(alike):
                system, before, ask, stem, wanted = VARIANTS[name]
                text = tok.apply_chat_template(
                    [{"role": "system", "content": system}, {"role": "user", "content": fill(before + ask)}],
                    add_generation_prompt=True, tokenize=False, **TEMPLATE_OPTIONS)
                head, rest = text.split("@@trace@@")
                if len(prompts) == i:
                    prompts.append(encode(head) + tok.encode(r["text"], add_special_tokens=False,
                                                             split_special_tokens=True))
                fork = (c, v, i), len(prompts[i]), encode(rest) + encode(fill(stem))
                if wanted in ("digits", "yes"):
                    asked[i].append(fork)
                elif p.answer and (target := encode(fill(wanted))):
                    sought[i].append((*fork, target))
    if asked[0]:
        ids = [encode(STEM + digit)[-1] for digit in DIGITS] + [encode(word)[0] for word in ("No", "Yes")]
        logits = sampler.next_logits(prompts, ids, [[fork[1:] for fork in forks] for forks in asked])
        places = [place for forks in asked for place, *_ in forks]
        for place, grade, (no, yes) in zip(places, expected_grade(logits[:, :5]), logits[:, 5:].tolist()):
            out[place] = yes - no if VARIANTS[alike[place[1]]][4] == "yes" else grade
    if any(sought):
        logps = sampler.target_logprobs(prompts, [[fork[1:] for fork in forks] for forks in sought])
        for place, logp in zip([place for forks in sought for place, *_ in forks], logps):
            out[place] = float(logp.mean())
    return out


def row(problems: list[Problem], records: list[dict], read: np.ndarray) -> dict:
    by_id, known = {p.id: p for p in problems}, ~np.isnan(read)
    records, read = [r for r, k in zip(records, known) if k], read[known]
    correct = np.array([bool(r["correct"]) for r in records])
    ids = np.array([r["problem"] for r in records])
    made = np.array([progress(by_id[r["problem"]], r["text"]) for r in records])
    wrong = ~correct & ~np.isnan(made)
    low, high = interval_over_problems(ids, lambda rows: auroc(read[rows], correct[rows]), 0)
    return {"problems": len(set(ids)), "traces": len(records), "right": int(correct.sum()),
            "auroc": f"{auroc(read, correct):.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}",
            "progress_corr": f"{correlation(made[wrong], read[wrong]):.2f}",
            "progress_within": f"{correlation(*centred(ids[wrong], made[wrong], read[wrong])):.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--traces", required=True)
    parser.add_argument("--problems", type=int, nargs=2, default=(1, 24), help="first and last row of --data")
    parser.add_argument("--per-kind", type=int, default=4, help="right and wrong traces per problem, at most")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--readouts", nargs="*", choices=READOUTS, default=[], help="of judge.py")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--csv", type=Path, default=Path("judge_wording.csv"))
    args = parser.parse_args()
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    problems = problems_or_exit(args.data, "train", need_solution=True)
    records, seen = [], {}
    wanted = {p.id for p in problems[args.problems[0] - 1 : args.problems[1]]}
    for r in read_traces(args.traces, problems):
        kind = r["problem"], r["correct"]
        finished = r.get("finished", True)
        seen[kind] = seen.get(kind, 0) + finished
        if finished and r["problem"] in wanted and seen[kind] <= args.per_kind:
            records.append(r)
    if not records:
        raise SystemExit("no finished trace of these --problems: name others, or sample them")
    asked = {r["problem"] for r in records}
    problems = [p for p in problems if p.id in asked]
    device = pick_device("auto")
    lm = load_lm(args.judge, device, pick_dtype(args.dtype, device))
    sampler = Sampler(lm.model)
    shown = [with_reference(problems, condition, "", 0) for condition in ("right", "wrong")]

    def report(name, right, wrong):
        for condition, read in (("right", right), ("wrong", wrong), ("both", right - wrong)):
            rows = f"{Path(args.data[0]).stem} {args.problems[0]}-{args.problems[1]}"
            write(args.csv, {"judge": Path(lm.name).name, "rows": rows, "variant": name,
                             "reference": condition} | row(problems, records, read))

    for start in dict.fromkeys(VARIANTS[name][:2] for name in args.variants):
        alike = [name for name in args.variants if VARIANTS[name][:2] == start]
        # a prompt that shows no reference before the trace's end is read once for both
        parts = [[some] for some in shown] if "{reference}" in start[1] else [shown]
        found = np.concatenate([readings(lm, sampler, alike, some, records) for some in parts])
        for v, name in enumerate(alike):
            report(name, *found[:, v])
    for readout in args.readouts:
        judge = Judge(lm.model, lm.tokenizer, readout=readout)
        report(f"readout {readout}", *(scores(verdicts_on(judge, problems, records, condition, 0))
                                       for condition in ("right", "wrong")))


def write(path: Path, line: dict) -> None:
    print(line, flush=True)
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, line, lineterminator="\n")
        if not file.tell():
            table.writeheader()
        table.writerow(line)


if __name__ == "__main__":
    main()
