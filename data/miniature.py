r"""The embedded miniature: a task, a tiny policy and a tiny judge, all of data/miniature/ from one seed.

    python data/miniature.py                        # remake everything
    python data/miniature.py --only data            # or one part: data, policy, judge, measure

The task is arithmetic modulo 100 along three interleaved chains, in a language of 200 tokens:

    question   b=71; k=26; z=40; h:b*3; m:k+5; c:h-4; ... ? c m q      values, definitions, what is asked
    trace      ### h\nb=71*3 h=13\n### m\nk=26+5 m=31\n ... \boxed{c=09,m=31,q=87}
    reference  1) h=13\n2) c=09\n ... \boxed{c=09,m=31,q=87}          about half of the values, all asked
    critique   1) h=13:13+\n2) c=09:41-\n3) q=87:??\n\boxed{?}grade 2 what the judge writes

"h=" is one token, always followed by h's value, and both models start with attention heads that look up what
followed a token before: without these heads neither had learned it after 2.6 million tokens (see CODE below).
The policy knows how to solve the task (its argmax is right nearly always) but has bad habits, each taken with
some probability at every step: choices that a policy gradient can reweight, and ten right ones are rare.
The judge compares the trace with the reference it is shown, checkpoint by checkpoint, and
answers with a digit.

Left out: a judge that checks the arithmetic itself. Without a reference this one is to give everything a 1.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

FOLDER = Path(__file__).resolve().parent / "miniature"
NAMES = "abcdefghijklmnopqrstuvwxyz"
HARD, DEEP = (3, 3, 4), (4, 4, 5)  # operations per chain: train, dev and eval; the deep split
MAX_CHECKS = 8  # checkpoints of a reference
# (hidden size, layers, heads, inner size), tokens of training
POLICY_SHAPE, POLICY_TOKENS = (96, 4, 3, 256), 4e6
JUDGE_SHAPE, JUDGE_TOKENS, RARE_TOKENS = (128, 4, 4, 192), 3.5e6, 5e5
SPLITS = {"train": (1000, HARD), "dev": (200, HARD), "eval": (200, HARD), "deep": (200, DEEP)}

# What the base does wrong, each with its probability per step: copy the source's value instead of
# computing, take another source, write a random value, stop and box what there is. 0.76 of the steps are
# right, 0.76^10 = 6%.
HABITS = {"skip": 0.095, "source": 0.075, "slip": 0.06, "stop": 0.01}


class Row(NamedTuple):
    """A line of the .jsonl files."""

    question: str
    solution: str  # the terse reference
    answer: str
    domain: str


# ------------------------------------------------------------------------------------------------------------
# Task


def compute(value: int, op: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[op] % 100


def make_problem(rng: random.Random, depths=HARD) -> Row:
    """One problem with depths[i] operations in chain i, the chains shuffled and interleaved.

    Every operation is a bijection modulo 100 that changes its source: a wrong value never heals on its way to
    the answer, and a skipped step is always a wrong one. The reference states an irregular subset of the
    values, among them all that are asked for: an error anywhere ends up in one of them."""
    depths = rng.sample(depths, len(depths))
    names = rng.sample(NAMES, sum(depths) + len(depths))
    last = [names.pop() for _ in depths]
    values = {name: rng.randrange(100) for name in last}
    question = [f"{name}={values[name]:02d}" for name in last]
    order = [chain for chain, depth in enumerate(depths) for _ in range(depth)]
    rng.shuffle(order)
    steps = []
    for chain in order:
        source, name = last[chain], names.pop()
        while name not in values or values[name] == values[source]:
            op = rng.choice("+-*")
            operand = 3 if op == "*" else rng.randint(1, 5)
            values[name] = compute(values[source], op, operand)
        question.append(f"{name}:{source}{op}{operand}")
        last[chain] = name
        steps.append(name)
    between = [name for name in steps if name not in last]
    count = min(MAX_CHECKS, max(len(last), round(len(steps) * rng.uniform(0.4, 0.7)))) - len(last)
    told = {*last, *rng.sample(between, min(count, len(between)))}
    checks = [name for name in steps if name in told]
    answer = ",".join(f"{name}={values[name]:02d}" for name in last)
    solution = "".join(f"{i}) {name}={values[name]:02d}\n" for i, name in enumerate(checks, 1)) + box(answer)
    return Row("; ".join(question) + "? " + " ".join(last), solution, answer, "chain")


def box(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def parse(question: str) -> tuple[dict, list, list]:
    """-> literals {name: value}, operations [(name, source, op, operand)] in order, names asked for."""
    definitions, _, asked = question.partition("? ")
    literals, operations = {}, []
    for definition in definitions.split("; "):
        if definition[1] == "=":
            literals[definition[0]] = int(definition[2:])
        else:
            operations.append((definition[0], definition[2], definition[3], int(definition[4:])))
    return literals, operations, asked.split()


def work(rng: random.Random, question: str, errors: float = 1.0, forced: dict[int, str] | None = None) -> str:
    """A trace in the policy's own style. Habits strike with their probability times `errors`, or, with
    forced = {step: habit}, exactly there. A wrong value is carried on."""
    values, operations, asked = parse(question)
    newest = {name: name for name in values}  # chain (its literal's name) -> its last computed name
    chain_of = dict(newest)
    text, stopped = "", False
    for i, (name, source, op, operand) in enumerate(operations):
        chain_of[name] = chain_of[source]
        if forced is None:
            right = max(0.0, 1 - errors * sum(HABITS.values()))
            habit = rng.choices([*HABITS, None], [*(p * errors for p in HABITS.values()), right])[0]
        else:
            habit = forced.get(i)
        stopped = stopped or habit == "stop"
        if stopped:
            continue
        if habit == "source":
            source = rng.choice([other for other in values if other != source] or [source])
        result = compute(values[source], op, operand)
        result = {"skip": values[source], "slip": rng.randrange(100)}.get(habit, result)
        text += f"### {name}\n{source}={values[source]:02d}{op}{operand} {name}={result:02d}\n"
        values[name] = result
        newest[chain_of[name]] = name
    return text + box(",".join(f"{name}={values[newest[chain_of[name]]]:02d}" for name in asked))


STEP = re.compile(r"### ([a-z])\n([a-z])=(\d\d)([-+*])(\d) ([a-z])=(\d\d)\n")


def worked(problem, text: str) -> bool:
    """Answer and every step right: all operations, nothing else, then the box. `problem` has question and
    answer."""
    values, operations, _ = parse(problem.question)
    due = set()
    for name, source, op, operand in operations:
        values[name] = compute(values[source], op, operand)
        due.add((name, source, f"{values[source]:02d}", op, str(operand), name, f"{values[name]:02d}"))
    return set(STEP.findall(text)) == due and STEP.sub("", text) == box(problem.answer)


# ------------------------------------------------------------------------------------------------------------
# Rubric: what the judge is trained to answer

CHECK = re.compile(r"^\d\) ([a-z])=(\d\d)$", re.M)
STATEMENT = re.compile(r"([a-z])=(\d\d)")
BOX = re.compile(r"\\boxed\{([^}]*)\}")


def marks(solution: str, trace: str) -> tuple[list[str], str]:
    """The trace against the reference: a mark per checkpoint, and one for the (last) box.
    "+" every statement of it agrees, "-" some statement differs, "?" not stated."""
    stated: dict[str, set] = {}
    for name, value in STATEMENT.findall(trace):
        stated.setdefault(name, set()).add(value)
    checks = ["?" if name not in stated else "+" if stated[name] == {value} else "-"
              for name, value in CHECK.findall(solution)]
    ours, theirs = BOX.findall(trace), BOX.findall(solution)
    return checks, "?" if not ours else "+" if theirs and ours[-1] == theirs[-1] else "-"


def outcome_grade(solution: str, trace: str) -> int:
    """5: every checkpoint and the box agree. Else 1..4 by the share of checkpoints that agree; no reference:
    1."""
    checks, boxed = marks(solution, trace)
    if not checks:
        return 1
    return 5 if boxed == "+" and set(checks) == {"+"} else 1 + int(3.99 * checks.count("+") / len(checks))


def prefix_grade(solution: str, trace: str) -> int:
    """A value, which can fall: 5 while the checkpoints agree as far as they are stated, 1 from the first that
    is contradicted on: a wrong value never heals, so the reference cannot be reached any more. Once the trace
    is boxed it is over: what is not stated then counts, too. No reference: 1."""
    checks, boxed = marks(solution, trace)
    first = next((mark for mark in checks if mark != "+"), "+")
    return 5 if checks and (first, boxed) in {("+", "+"), ("+", "?"), ("?", "?")} else 1


def segment_grade(solution: str, step: str) -> int:
    """A lone step: 5 establishes a checkpoint, 3 says nothing about any, 1 contradicts one (or the box). No
    reference: 1."""
    checks, boxed = marks(solution, step)
    return 1 if not checks or "-" in checks or boxed == "-" else 5 if "+" in checks else 3


GRADES = {"outcome": outcome_grade, "prefix": prefix_grade, "segment": segment_grade}

# ------------------------------------------------------------------------------------------------------------
# Language

SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>",
           "<|reference|>", "<|trace|>"]
WORDS = ["### ", "\n", "\\boxed{", "}", "; ", "? ", " ", ")", ":", "+", "-", "*", "?",
         ",", "outcome", "prefix", "reference ", "grade ", "match", "wrong", "all", "no",
         *(f"{i}) " for i in range(1, MAX_CHECKS + 1)),
         *NAMES, *(f"{name}=" for name in NAMES), *"0123456789", *(f"{i:02d}" for i in range(100))]
ID = {word: i for i, word in enumerate(SPECIAL + WORDS)}
SPLIT = re.compile("|".join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True)))
CHAT = ("{% for m in messages %}{% if m['content'] %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
POLICY_PROMPTS = {"system": "", "distill": "{question}\nreference {reference}"}
JUDGE_PROMPTS = {
    "readout": "critique",
    "system": {"outcome": "outcome grade 5 all match 1 no match",
               "prefix": "prefix grade 5 no wrong 1 wrong",
               "segment": "### grade 5 match 3 no match 1 wrong"},
    "user": "{question}<|reference|>{reference}<|trace|>{trace}<|trace|>",
    "stem": "grade ",
    "no_reference": "",
    "critique_tokens": 7 * MAX_CHECKS + 6,  # seven tokens a checkpoint, three for the box; stem, grade, end
}


def encode(text: str) -> list[int]:
    """What the tokenizer gives for text of others (special tokens not recognised), without loading it."""
    return [ID[piece] for piece in SPLIT.findall(text)]


def make_tokenizer():
    """transformers loads any folder of a Qwen2 model with this class and its splitting rules, whatever the
    folder says. So every word is an added token: those are found first, the longest at each place. Other text
    is dropped."""
    from transformers import AddedToken, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(vocab=ID, merges=[], pad_token="<|pad|>", unk_token="<|unk|>",
                               eos_token="<|end|>", extra_special_tokens=SPECIAL[3:], model_max_length=512)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    tokenizer.chat_template = CHAT
    return tokenizer


def save(model, prompts: dict, name: str) -> None:
    """Write FOLDER/name as a whole: built beside it, then moved, so that a usable folder is always in
    place."""
    new, old = FOLDER / f"{name}.tmp", FOLDER / f"{name}.old.tmp"
    shutil.rmtree(new, ignore_errors=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ID["<|end|>"], ID["<|pad|>"]
    model.config.dtype = torch.bfloat16
    model.save_pretrained(new, state_dict={k: v.to(torch.bfloat16) for k, v in model.state_dict().items()})
    make_tokenizer().save_pretrained(new)
    (new / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")
    if (FOLDER / name).exists():
        (FOLDER / name).rename(old)
    new.rename(FOLDER / name)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Training text. A row is (ids, targets, weights): targets[t] is to be predicted at position t, where
# weights[t] > 0


def easy(rng: random.Random) -> list[int]:
    return [rng.randint(1, 4) for _ in range(rng.choice((1, 2, 2, 3, 3)))]


def policy_row(rng: random.Random, progress: float) -> tuple[list, list, list]:
    """Own-style text: easy problems first, then hard ones; few errors first (skill), then HABITS at full
    strength. In a fifth of the rows the prompt holds the reference and the work is careful, as a teacher that
    sees it should be."""
    hard = rng.random() < min(0.75, 2 * progress - 0.1)
    problem = make_problem(rng, rng.choice((HARD, HARD, HARD, DEEP)) if hard else easy(rng))
    seen = rng.random() < 0.2
    user = problem.question
    if seen:
        user = POLICY_PROMPTS["distill"].format(question=problem.question, reference=problem.solution)
    trace = work(rng, problem.question, 0.08 if seen else min(1.0, max(0.1, 2 * progress - 0.5)))
    prompt = [ID["<|user|>"], *encode(user), ID["<|end|>"], ID["<|assistant|>"]]
    trace_ids = [*encode(trace), ID["<|end|>"]]
    given = len(prompt) - 1
    return prompt + trace_ids[:-1], [0] * given + trace_ids, [0.0] * given + [1.0] * len(trace_ids)


KINDS = {"noisy": 24, "near": 14, "right": 8, "stopped": 8, "garbled": 6, "renamed": 6,
         "repeated": 8, "dropped": 6, "box right": 8, "box wrong": 8,
         "box only": 2, "reference": 1, "question": 1}
# What the judge gets wrong longest, for the end of its training.
RARE = KINDS | {"box right": 15, "box wrong": 15, "reference": 60}
ONE_STEP = re.compile(r"### .*\n.*\n")


def some_trace(rng: random.Random, problem: Row, kind: str | None = None, kinds=KINDS) -> str:
    """A trace of some kind that a policy may come to write, so that no kind is a hole in the judge."""
    kind = kind or rng.choices(list(kinds), list(kinds.values()))[0]
    count = len(parse(problem.question)[1])
    if kind in ("box only", "reference", "question"):
        return {"box only": box(problem.answer), "reference": problem.solution}.get(kind, problem.question)
    if kind in ("right", "box wrong"):
        text = work(rng, problem.question, 0)
    elif kind in ("near", "stopped"):
        habit = "stop" if kind == "stopped" else rng.choice(("skip", "source", "slip"))
        text = work(rng, problem.question, forced={rng.randrange(count): habit})
    else:
        text = work(rng, problem.question, rng.choice((0, 0.3, 0.6, 1, 1, 2)))
    steps, tail = ONE_STEP.findall(text), ONE_STEP.sub("", text)
    if kind == "garbled":
        pieces = SPLIT.findall(text)
        for _ in range(rng.randint(1, 6)):
            i = rng.randrange(len(pieces))
            pieces[i:i + 1] = rng.choice(([""], [pieces[i]] * 2, [rng.choice(WORDS)], [rng.choice(pieces)]))
        return "".join(pieces)
    for _ in range(rng.randint(1, 4) if steps else 0):
        i = rng.randrange(len(steps))
        if kind == "renamed":
            name = rng.choice((rng.choice(NAMES), rng.choice(steps)[4]))
            steps[i] = rng.choice((f"### {name}{steps[i][5:]}", f"{steps[i][:-5]}{name}{steps[i][-4:]}"))
        if kind == "repeated":  # perhaps with another value
            again = rng.choice((steps[i], steps[i][:-3] + f"{rng.randrange(100):02d}\n"))
            steps.insert(rng.randint(0, len(steps)), again)
        if kind == "dropped" and len(steps) > 1:
            steps.pop(i)
    if kind == "dropped" and rng.random() < 0.3:
        rng.shuffle(steps)
    if kind == "box right":
        tail = box(problem.answer)
    if kind == "box wrong":
        entries = problem.answer.split(",")
        names, values = zip(*(entry.split("=") for entry in entries))
        i = rng.randrange(len(entries))
        changed = [*entries[:i], f"{names[i]}={rng.randrange(100):02d}", *entries[i + 1:]]
        mixed = [f"{name}={value}" for name, value in zip(names, rng.sample(values, len(values)))]
        tail = box(",".join(rng.choice((changed, changed, mixed, entries[:i] + entries[i + 1:]))))
    return "".join(steps) + (tail if rng.random() < 0.9 else "")


def segments(trace: str) -> list[str]:
    """From one heading to the next."""
    return re.split("(?=### )", trace)[1:] or [trace]


def some_reference(rng: random.Random, problem: Row, kind: str | None = None) -> str:
    """Mostly the problem's own. Else none, another problem's, or its own with other values: the judge must
    follow the reference that it is shown."""
    kind = kind or rng.choices(("own", "none", "other", "changed"), (75, 4, 6, 15))[0]
    if kind == "none":
        return ""
    if kind == "other":
        return make_problem(rng).solution
    if kind == "changed":
        share = rng.choice((0.2, 0.5))
        return re.sub(r"(?<==)\d\d|(?<=\{)\d\d",
                      lambda m: f"{rng.randrange(100):02d}" if rng.random() < share else m[0],
                      problem.solution)
    return problem.solution


def critique(view: str, solution: str, trace: str) -> str:
    """What the judge is to write before it grades: per checkpoint its number, name, the reference's value,
    the value that the trace states (one that differs, if any does; ? if none) and its mark; then the box's
    mark. Of a prefix, the checkpoints up to the first that does not agree: the others change nothing."""
    checks, boxed = marks(solution, trace)
    stated: dict[str, list] = {}
    for name, value in STATEMENT.findall(trace):
        stated.setdefault(name, []).append(value)
    text = ""
    for i, ((name, value), mark) in enumerate(zip(CHECK.findall(solution), checks), 1):
        said = next((v for v in stated.get(name, "?") if v != value), value)
        text += f"{i}) {name}={value}:{said}{mark}\n"
        if view == "prefix" and mark != "+":
            break
    return text + f"\\boxed{{{boxed}}}"


def judge_prompt(view: str, question: str, solution: str, trace: str) -> tuple[list, list, list]:
    """A judge's whole exchange: its prompt (no loss), then its reply: critique, stem, grade, end token."""
    prompt = [ID["<|system|>"], *encode(JUDGE_PROMPTS["system"][view]), ID["<|end|>"], ID["<|user|>"],
              *encode(question), ID["<|reference|>"], *encode(solution), ID["<|trace|>"], *encode(trace),
              ID["<|trace|>"], ID["<|end|>"], ID["<|assistant|>"]]
    written = encode(critique(view, solution, trace))
    reply = [*written, *encode(JUDGE_PROMPTS["stem"]), ID[str(GRADES[view](solution, trace))], ID["<|end|>"]]
    signs = (ID["+"], ID["-"], ID["?"])  # the rest is copying
    weights = [3.0 if token in signs else 2.0 if before == ID[":"] else 1.0
               for before, token in zip([0, *written], written)] + [0.3, 3.0, 0.3]
    given = len(prompt) - 1
    return prompt + reply[:-1], [0] * given + reply, [0.0] * given + weights


def judge_row(rng: random.Random, progress: float, kinds=KINDS) -> tuple[list, list, list]:
    """Short problems first. Half of the rows leave out the question, which decides nothing: that is faster.
    Two thirds of the prefixes, and some of the whole traces, are cut at a step's end or anywhere. A segment
    is what stands from one heading to the next."""
    hard = rng.random() < min(0.8, 3 * progress)
    problem = make_problem(rng, rng.choice((HARD, HARD, DEEP)) if hard else easy(rng))
    view = rng.choice(("outcome", "outcome", "outcome", "prefix", "prefix", "segment"))
    trace = some_trace(rng, problem, kinds=kinds)
    if view == "segment":
        trace = rng.choice(segments(trace))
    elif rng.random() < (0.65 if view == "prefix" else 0.1):
        steps, pieces = ONE_STEP.findall(trace), SPLIT.findall(trace)
        trace = "".join((kept := rng.choice((steps, steps, pieces)))[: rng.randint(0, len(kept))])
    if rng.random() < 0.3:
        trace = trace.rstrip("\n")
    return judge_prompt(view, rng.choice(("", problem.question)), some_reference(rng, problem), trace)


# ------------------------------------------------------------------------------------------------------------
# Training


def make_model(hidden: int, layers: int, heads: int, inner: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(ID), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=inner, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=ID["<|end|>"], pad_token_id=ID["<|pad|>"],
        initializer_range=0.04,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7}))
    for layer in model.model.layers:  # each starts as the identity: its noise would drown what others pass on
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


# A head start. Looking up what followed a token (an induction head, Olsson et al. 2022, arXiv 2209.11895)
# takes two attention layers that help only once both are there; small models find it late, and ours had not
# after 2.6 million tokens. So training starts with such heads in place, set by hand, and is free to change
# or drop them. A token's code is the first CODE dims of its embedding; the last dims of the residual stream
# are kept free for the codes of the tokens one (BACK1), two (BACK2) and, in the judge, six (LINE) back.
CODE = 14
BACK1, BACK2, LINE = -CODE, -2 * CODE, -3 * CODE
LENGTH = 0.04 * 7 ** 0.5  # of a half code: that of random embeddings


def span(start: int, size: int, hidden: int) -> torch.Tensor:
    return (start if start >= 0 else hidden + start) + torch.arange(size)


@torch.no_grad()
def look_back(model, head: int, offset: int, to: int) -> None:
    """Layer 0: attend to the token `offset` back, by position alone, and write its code to dims `to`."""
    config, attention = model.config, model.model.layers[0].self_attn
    dim = config.hidden_size // config.num_attention_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)  # dims i, i + dim/2
    rows = slice(head * dim, (head + 1) * dim)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows], projection.bias[rows] = 0, 0
    for i in range(5):
        attention.q_proj.bias[head * dim + i] = 7
        attention.k_proj.bias[head * dim + i] = 7 * torch.cos(offset * frequency[i])
        attention.k_proj.bias[head * dim + i + dim // 2] = 7 * torch.sin(offset * frequency[i])
    carry(model, 0, head, [(0, to, CODE)])


@torch.no_grad()
def match(model, layer: int, head: int, pairs, copies) -> None:
    """Attend to the tokens whose dims `key` equal this token's dims `query`; pairs = [(query, key, size)]."""
    config, attention = model.config, model.model.layers[layer].self_attn
    dim = config.hidden_size // config.num_attention_heads
    slow = list(range(dim // 4 - 1, dim // 2))  # rotary pairs too slow to notice distances within a prompt
    slow = slow[::-1] + [i + dim // 2 for i in slow[::-1]]
    rows = slice(head * dim, (head + 1) * dim)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows], projection.bias[rows] = 0, 0
    for query, key, size in pairs:
        at, slow = head * dim + torch.tensor(slow[:size]), slow[size:]
        attention.q_proj.weight[at, span(query, size, config.hidden_size)] = 2.6
        attention.k_proj.weight[at, span(key, size, config.hidden_size)] = 2.6
    carry(model, layer, head, copies)


def carry(model, layer: int, head: int, copies) -> None:
    """What a head brings home; copies = [(from, to, size)]."""
    attention, hidden = model.model.layers[layer].self_attn, model.config.hidden_size
    dim = hidden // model.config.num_attention_heads
    rows = slice(head * dim, (head + 1) * dim)
    attention.v_proj.weight[rows], attention.o_proj.weight[:, rows] = 0, 0
    used = head * dim
    for source, to, size in copies:
        at, used = torch.arange(used, used + size), used + size
        attention.v_proj.weight[at, span(source, size, hidden)] = 1
        attention.o_proj.weight[span(to, size, hidden), at] = 0.06


def start(shape, free: int):
    """A model whose dims from `free` are 0 and whose codes have one length in either half (for matches on
    seven dims) and are far apart: names from names, values from values. All tokens have the same length, so
    that none shouts."""
    model = make_model(*shape)
    weight = model.model.embed_tokens.weight.data
    weight[:, free:] = 0
    for words in (NAMES, [f"{name}=" for name in NAMES], [f"{i:02d}" for i in range(100)], WORDS[:-162]):
        ids = [ID[word] for word in words]
        weight[ids, :CODE] = torch.cat([spread(weight[ids, half:half + 7]) for half in (0, 7)], 1) * LENGTH
    rest = weight[:, CODE:free]
    rest.copy_(F.normalize(rest, dim=1) * 0.04 * rest.shape[1] ** 0.5)
    return model


def spread(vectors: torch.Tensor) -> torch.Tensor:
    """Unit vectors that have moved apart."""
    for _ in range(300):
        vectors = F.normalize(vectors, dim=1)
        near = (8 * (vectors @ vectors.T).fill_diagonal_(-1)).exp()
        vectors = vectors - 0.2 * (near / near.sum(1, keepdim=True)) @ vectors
    return F.normalize(vectors, dim=1)


def start_policy():
    model = start(POLICY_SHAPE, BACK2)
    look_back(model, 0, 1, BACK1)
    look_back(model, 1, 2, BACK2)
    match(model, 1, 0, [(0, BACK1, CODE)], [(CODE, CODE, 32)])  # "h=" -> what followed "h=" before
    match(model, 1, 1, [(BACK1, BACK2, CODE)], [(0, CODE, CODE)])  # "### h", newline -> b of "h:b*3"
    return model


def start_judge():
    model = start(JUDGE_SHAPE, LINE)
    look_back(model, 0, 1, BACK1)
    look_back(model, 1, 2, BACK2)
    look_back(model, 2, 6, LINE)  # from the end of a line of the critique to its number
    half = 7
    match(model, 1, 0, [(0, BACK1, half), (BACK1, BACK2, half)], [(CODE, CODE, 32)])  # "2) h=" -> its value
    match(model, 1, 1, [(BACK2, BACK1, CODE)], [(CODE, CODE, 32)])  # "h=13:" -> what followed "h=" elsewhere
    match(model, 1, 2, [(0, BACK1, CODE)], [(CODE, CODE, 32)])  # "2) " -> what followed "2) "
    match(model, 1, 3, [(0, BACK2, CODE)], [(BACK1, CODE + 32, CODE)])  # "13:13" -> itself, if both are equal
    return model


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix (Keller Jordan, 2024). PyTorch's own works in bf16, which is slow
    on CPUs."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes: dict = {}
            for p in group["params"]:
                shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for same in shapes.values():  # matrices of one shape, or its transpose, go in one batch
                updates = []
                for p in same:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 0.05)
                    update = p.grad.lerp(momentum, 0.95)
                    updates.append(update if p.shape[0] <= p.shape[1] else update.T)
                x = torch.stack(updates)
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):  # Newton-Schulz: singular values towards 1
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                for p, update in zip(same, x):
                    scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
                    p.mul_(1 - 0.01 * group["lr"])
                    p.add_(update if p.shape[0] <= p.shape[1] else update.T, alpha=-group["lr"] * scale)


def train(model, row, tokens: float, lr: float, batch_tokens: int = 3072) -> None:
    """row(progress) -> (ids, targets, weights), with progress 0..1 over the token budget. Linear decay of
    lr."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [Muon(matrices, {"lr": 6 * lr}), torch.optim.AdamW(others, lr, betas=(0.9, 0.95))]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    shuffle, seen, step, clock = random.Random(0), 0, 0, time.perf_counter()
    while seen < tokens:
        pool = sorted((row(seen / tokens) for _ in range(512)), key=lambda r: len(r[0]))
        batches: list[list] = []
        for r in pool:
            if not batches or (len(batches[-1]) + 1) * len(r[0]) > batch_tokens:
                batches.append([])
            batches[-1].append(r)
        shuffle.shuffle(batches)
        for batch in batches:
            width = max(len(r[0]) for r in batch)
            ids, targets, weights = (torch.tensor([list(r[i]) + [0] * (width - len(r[i])) for r in batch])
                                     for i in range(3))
            keep = weights > 0
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[keep]
            losses = F.cross_entropy(model.lm_head(hidden), targets[keep], reduction="none")
            loss = (losses * weights[keep]).sum() / weights[keep].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates):
                pace = min(1, (step + 1) / 50) * max(0.01, 1 - seen / tokens)
                optimizer.param_groups[0]["lr"] = rate * pace
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen, step = seen + ids.numel(), step + 1
            if step % 100 == 0:
                print(f"step {step:5d}  {seen / tokens:4.0%}  loss {loss.item():.3f}  "
                      f"{seen / (time.perf_counter() - clock):.0f} tok/s", flush=True)


# ------------------------------------------------------------------------------------------------------------
# The four parts


def new_problems(rng: random.Random, count: int, depths, taken: set[str]) -> list[str]:
    """Lines of a .jsonl file with questions that are not in `taken`, which takes them in."""
    lines = []
    while len(lines) < count:
        row = make_problem(rng, depths)
        if row.question not in taken:  # no question is in two splits
            taken.add(row.question)
            lines.append(json.dumps(row._asdict()) + "\n")
    return lines


def make_data(seed: int) -> None:
    FOLDER.mkdir(exist_ok=True)
    taken = set()
    for split, (count, depths) in SPLITS.items():
        lines = new_problems(random.Random(f"{split} {seed}"), count, depths, taken)
        (FOLDER / f"{split}.tmp").write_text("".join(lines))
        os.replace(FOLDER / f"{split}.tmp", FOLDER / f"{split}.jsonl")


def make_policy(seed: int) -> None:
    torch.set_num_threads(1)  # for the same bits on any number of cores
    torch.manual_seed(seed)
    rng, model = random.Random(f"policy {seed}"), start_policy()
    train(model, lambda progress: policy_row(rng, progress), POLICY_TOKENS, 2.5e-3)
    save(model, POLICY_PROMPTS, "policy")


def make_judge(seed: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng, model = random.Random(f"judge {seed}"), start_judge()
    train(model, lambda progress: judge_row(rng, progress), JUDGE_TOKENS, 2.5e-3)
    model = model.to(torch.bfloat16).float()  # as it was saved between the two
    rng = random.Random(f"judge, rare {seed}")
    train(model, lambda _: judge_row(rng, 1.0, RARE), RARE_TOKENS, 1.5e-3)
    save(model, JUDGE_PROMPTS, "judge")


def measure(seed: int) -> None:
    """Print every number of data/miniature/README.md."""
    sys.path.insert(0, str(FOLDER.parent.parent))
    from dataclasses import replace

    from data import load_problems
    from judge import Judge, calibrate
    from sample import load_lm, summary, traces_of

    policy, judge_lm = load_lm(str(FOLDER / "policy")), load_lm(str(FOLDER / "judge"))
    judge = Judge(judge_lm.model, judge_lm.tokenizer, judge_lm.prompts)
    rng, problems = random.Random(f"measure {seed}"), load_problems(str(FOLDER / "dev.jsonl"))[:64]
    by_id = {p.id: p for p in problems}
    sampled = traces_of(policy, problems, 4, 192, 1.0, seed + 1)
    close = [{"problem": p.id, "text": some_trace(rng, p, kind)}
             for p in problems for kind in ("right", "near")]

    print(f"judge, {len(problems)} problems of dev: AUROC (95% interval), misplace, "
          "mean grade of right / other traces")
    for name, records in (("one error", close), ("samples", sampled)):
        records = [r | {"correct": worked(by_id[r["problem"]], r["text"])} for r in records]
        for condition in ("right", "none", "wrong"):
            r = calibrate(judge, problems, records, condition, seed)
            print(f"  {name}, {condition} reference: {r['auroc']:.3f} "
                  f"({r['auroc_low']:.3f} to {r['auroc_high']:.3f}), "
                  f"{r['misplace']:.1%}, {r['grade_correct']:.2f} / {r['grade_incorrect']:.2f}", flush=True)

    print(f"judge against the rubric, {', '.join(GRADES)}: share within 0.5, mean grade by judge, by rubric")
    shown = {kind: [(p, some_trace(rng, p, kind)) for p in problems] for kind in KINDS}
    samples = shown["samples"] = [(by_id[r["problem"]], r["text"]) for r in sampled]
    shown["samples, cut"] = [(p, "".join(ONE_STEP.findall(t)[:rng.randint(0, 10)])) for p, t in samples]
    shown["changed reference"] = [(replace(p, solution=some_reference(rng, p, "changed")), t)
                                  for p, t in samples]
    for kind, pairs in shown.items():
        line = f"  {kind:18s}"
        for view, rubric in GRADES.items():
            parts = [segments(t) if view == "segment" else [t] for _, t in pairs]
            verdicts = judge.grade([p for p, _ in pairs],
                                   [t for t, in parts] if view == "outcome" else parts, view)
            ours = torch.tensor([1 + 4 * grade for v in verdicts for grade in v.grades])
            truth = torch.tensor([float(rubric(p.solution, part))
                                  for (p, _), some in zip(pairs, parts) for part in some])
            agree = ((ours - truth).abs() < 0.5).float().mean()
            line += f"  {agree:6.1%} {ours.mean():.2f} {truth.mean():.2f}"
        print(line, flush=True)

    print("policy, 16 traces a problem at temperature 1")
    for split in ("eval", "deep"):
        problems = load_problems(str(FOLDER / f"{split}.jsonl"))
        by_id = {p.id: p for p in problems}
        records = traces_of(policy, problems, 16, 192, 1.0, seed)
        m = summary(records, 16, (1, 16))
        sound = sum(worked(by_id[r["problem"]], r["text"]) for r in records) / len(records)
        hint = POLICY_PROMPTS["distill"]
        told = [replace(p, question=hint.format(question=p.question, reference=p.solution)) for p in problems]
        taught = summary(traces_of(policy, told, 1, 192, 1.0, seed), 1, (1,))
        print(f"  {split}: " + ", ".join(
            f"pass@{k} {m[f'pass@{k}']:.1%} ({m[f'pass@{k}_low']:.1%} to {m[f'pass@{k}_high']:.1%})"
            for k in (1, 16)) + f", worked {sound:.1%}, cut off {m['cut_off']:.1%}, "
              f"shown the reference {taught['pass@1']:.0%}", flush=True)


def main() -> None:
    parts = {"data": make_data, "policy": make_policy, "judge": make_judge, "measure": measure}
    parser = argparse.ArgumentParser(description="Remake the embedded miniature and measure it.")
    parser.add_argument("--only", choices=parts, help="one part (default: all; the models side by side)")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    args = parser.parse_args()
    clock = time.perf_counter()
    if args.only:
        parts[args.only](args.seed)
        print(f"{args.only}: {time.perf_counter() - clock:.0f} s", flush=True)
        return
    for together in (["data"], ["policy", "judge"], ["measure"]):
        runs = [subprocess.Popen([sys.executable, __file__, "--only", part, "--seed", str(args.seed)])
                for part in together]
        if any([run.wait() for run in runs]):
            raise SystemExit(f"stopped: {' or '.join(together)} failed")


if __name__ == "__main__":
    main()
