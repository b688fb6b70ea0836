"""Which wording and readout lets a small judge see whether a trace agrees with the reference?

    python sample.py --model M --data train.jsonl --limit 48 --n 4 --max-new-tokens 280 --temperature 0.8 \\
        --out traces.jsonl
    python experiments/judge_wording.py --judge M --data train.jsonl --traces traces.jsonl --problems 1 24
    python experiments/judge_wording.py ... --problems 25 48 --variants conclusion      # rows not searched on

A row per variant and reference (right, wrong), appended to results/judge_wording.csv: AUROC against exact
match with its 95% interval over problems, and, among wrong traces, the correlation of the reading with
progress: the share of the reference's intermediate results that the trace states (numbers that are not in the
question). Traces that were cut off are left out. To try a wording: one line in VARIANTS.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sample import LM, Sampler, load_lm, pick_device, pick_dtype, problems_or_exit  # noqa: E402
from data import Problem, extract_answer  # noqa: E402
from judge import ASK, CONCLUDE, CONCLUSION, DOMAINS, OUTCOME, STEM, USER, auroc, correlation  # noqa: E402
from judge import interval_over_problems, read_traces, with_reference  # noqa: E402

BRIEF = """\
You check a student's work on a problem against a reference solution that is known to be right. You grade \
how far the work agrees with the reference: 1 - it arrives at another answer, or at none; 2 - mostly wrong; \
3 - partly right, unfinished or with an error; 4 - right but for a trifle; 5 - it arrives at the reference's \
answer."""
RUBRIC = OUTCOME.format(**DOMAINS["math"])
WITHOUT = re.sub(r"<reference>.*</reference>\n\n", "", USER, flags=re.DOTALL)  # not shown before the trace
NAMED = "The right answer is {answer}. "
YES = "Does the trace arrive at the right answer? Reply with Yes or No."
PAIR = "Reference's final answer: {answer}\nTrace's final answer: {guess}\n"  # {guess} is found by code
FREE = CONCLUDE, WITHOUT  # no rubric: the trace is to be brought to its end
# name: (system prompt, before the trace, asked after it, forced stem, what is read)
VARIANTS = {
    "rubric": (RUBRIC, USER, ASK["expected"], STEM, "digits"),
    "rubric, answer named": (RUBRIC, USER, NAMED + ASK["expected"], STEM, "digits"),
    "brief": (BRIEF, USER, ASK["expected"], STEM, "digits"),
    "brief, answer named": (BRIEF, USER, NAMED + ASK["expected"], STEM, "digits"),
    "brief, reference last": (BRIEF, WITHOUT, "Reference: {reference}\n\n" + ASK["expected"], STEM, "digits"),
    "brief, both answers": (BRIEF, USER, PAIR + ASK["expected"], STEM, "digits"),
    "yes": (BRIEF, USER, NAMED + YES, "", "yes"),
    "yes, both answers": (BRIEF, USER, PAIR + "Are these two the same? Reply with Yes or No.", "", "yes"),
    "conclusion": (*FREE, "", CONCLUSION, "answer"),  # judge.py's readout likelihood
    "conclusion in a sentence": (*FREE, "", "The trace concludes that the final answer is \\boxed{",
                                 "answer"),
    "whole reference": (*FREE, "", "", "reference"),
    "the reference's numbers": (*FREE, "", "", "numbers"),
}


def readings(lm: LM, sampler: Sampler, variant: str, shown: dict[str, Problem], records: list[dict]) -> list:
    """One number a trace, larger = better: expected grade, logit of Yes less No, or mean log-prob."""
    system, before, ask, stem, kind = VARIANTS[variant]
    tok = lm.tokenizer

    def encode(text):
        return tok.encode(text, add_special_tokens=False)

    def quote(text):
        return tok.encode(text, add_special_tokens=False, split_special_tokens=True)

    prompts, forks, numbers = [], [], []
    for r in records:
        p = shown[r["problem"]]
        slots = {"question": p.question, "reference": p.solution, "answer": p.answer, "trace": "@@trace@@",
                 "guess": extract_answer(r["text"]) or "none"}
        user = re.sub(r"\{(\w+)\}", lambda m: slots[m[1]], before + ask)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = tok.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False,
                                       tokenize=False)
        head, rest = text.split("@@trace@@")
        prompts.append(encode(head) + quote(r["text"]))
        target = quote(p.answer + "}" if kind == "answer" else p.solution)
        numbers.append(torch.tensor([kind != "numbers" or tok.decode([t]).strip().isdigit() for t in target]))
        forks.append([(len(prompts[-1]), encode(rest) + encode(stem), target)])
    plain = [[(cut, suffix) for cut, suffix, _ in some] for some in forks]
    if kind == "digits":
        logits = sampler.next_logits(prompts, [encode(STEM + digit)[-1] for digit in "12345"], plain)
        return (logits.softmax(-1) @ torch.arange(1.0, 6.0)).tolist()
    if kind == "yes":
        no, yes = sampler.next_logits(prompts, [encode(word)[0] for word in ("No", "Yes")], plain).T
        return (yes - no).tolist()
    logps = sampler.target_logprobs(prompts, forks)
    return [float(logp[some].mean()) for logp, some in zip(logps, numbers)]


def progress(problem: Problem, text: str) -> float:
    """Share of the reference's intermediate results that stand in the trace; NaN where it has none."""
    def numbers(t):
        return {n.replace(",", "") for n in re.findall(r"\d[\d,]*(?:\.\d+)?", t)}

    steps = problem.solution[: problem.solution.rfind("\\boxed")]
    results = {n.replace(",", "") for n in re.findall(r"=\s*\$?(\d[\d,]*(?:\.\d+)?)", steps)}
    results -= numbers(problem.question) | {problem.answer.replace(",", "")}
    return len(results & numbers(text)) / len(results) if results else float("nan")


def row(judge: str, variant: str, condition: str, problems: list[Problem], records: list[dict], read) -> dict:
    by_id, read = {p.id: p for p in problems}, np.array(read)
    correct = np.array([bool(r["correct"]) for r in records])
    ids = np.array([r["problem"] for r in records])
    made = np.array([progress(by_id[r["problem"]], r["text"]) for r in records])
    wrong = ~correct & ~np.isnan(made)
    low, high = interval_over_problems(ids, lambda rows: auroc(read[rows], correct[rows]), 0)
    return {"judge": judge, "variant": variant, "reference": condition, "problems": len(set(ids)),
            "traces": len(records), "right": int(correct.sum()), "auroc": f"{auroc(read, correct):.3f}",
            "low": f"{low:.3f}", "high": f"{high:.3f}",
            "progress_corr": f"{correlation(made[wrong], read[wrong]):.2f}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--judge", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--traces", required=True)
    parser.add_argument("--problems", type=int, nargs=2, default=(1, 24), help="first and last row of --data")
    parser.add_argument("--per-kind", type=int, default=4, help="right and wrong traces per problem, at most")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--csv", type=Path, default=ROOT / "experiments/results/judge_wording.csv")
    args = parser.parse_args()
    problems = problems_or_exit(args.data, "train", need_solution=True)
    records, seen = [], {}
    wanted = {p.id for p in problems[args.problems[0] - 1 : args.problems[1]]}
    for r in read_traces(args.traces, problems):
        kind = r["problem"], r["correct"]
        seen[kind] = seen.get(kind, 0) + r["finished"]
        if r["finished"] and r["problem"] in wanted and seen[kind] <= args.per_kind:
            records.append(r)
    asked = {r["problem"] for r in records}
    problems = [p for p in problems if p.id in asked]
    device = pick_device("auto")
    lm = load_lm(args.judge, device, pick_dtype(args.dtype, device))
    sampler = Sampler(lm.model)
    for variant in args.variants:
        for condition in ("right", "wrong"):
            shown = with_reference(problems, condition, "", 0)
            read = readings(lm, sampler, variant, shown, records)
            write(args.csv, row(Path(lm.name).name, variant, condition, problems, records, read))


def write(path: Path, line: dict) -> None:
    print(line, flush=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        table = csv.DictWriter(file, line)
        if new:
            table.writeheader()
        table.writerow(line)


if __name__ == "__main__":
    main()
