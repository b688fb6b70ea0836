"""ExpRL (arXiv 2606.17024): mid-train a language model with a judge's dense rewards. One file, one loop.

    python exprl.py                                   # the embedded miniature, a few minutes on two CPU cores
    python exprl.py --model Qwen2.5-1.5B              # GSM8K from the hub; the start model is the judge
    python exprl.py --model M --judge J --data problems.jsonl --eval-data held_out.jsonl --method process
    python exprl.py --model runs/NAME/checkpoints/step_N --data D --preset paper-stage2           # Stage II
    python exprl.py --resume runs/NAME                # goes on exactly where the newest checkpoint stands
    torchrun --nproc_per_node=8 exprl.py --model M ...                  # eight GPUs: section "Processes"

    problems -> prompt ids -> rollouts -> grades -> token advantages -> loss -> update

The policy sees the question only, the judge question, reference and trace. `train_step` is the table of
contents; each method is one function that turns traces into token advantages (section "Methods"). The method
is in the sections "One step", "Methods" and "Loss and update"; what follows them keeps a run going: models
and checkpoints, several processes, the loop with its logs, the command line.

Departures from the paper's released code, one a line (README.md has all of them):
- the judge writes no reply by default: an expected grade over five digit tokens, or a small one a likelihood
- an unread grade removes its trace from loss, KL and group statistics; it never counts as the worst grade
- the loss is by default the mean over all sampled tokens of an update, however it is split into micro-batches
- one optimizer update per step by default (ratio 1, no pass for old log-probs); `--updates` for more
- a trace is cut off if it has no end token, not if it has a certain length
- Process: a heading opens its own step; EndNorm and GroupNorm as in the paper's equations, not as coded
- SFT keeps the system prompt and AdamW's betas (0.9, 0.999), the paper's are (0.9, 0.95)
- self-distillation takes the sampler's log-probs, so the student needs one pass
Left out: asynchronous sampling, tensor parallelism, LoRA, value models, tools and several turns.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from pathlib import Path

# On a CPU oneDNN and PyTorch keep a compiled product per shape, 1,024 by default, and every step brings new
# shapes: memory would grow for hundreds of steps. Read when torch is loaded.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import MINIATURE, Problem, fingerprint, is_correct, split_domain
from judge import DOMAINS, HEADING, READOUTS, Judge, Verdict, corr_in_groups, gamed, short_calibration
from judge import with_reference
from kernels import pack, packed_attention, policy_head, reverse_kl, token_advantages, token_logprob
from kernels.policy_head import HeadLoss
from kernels.token_logprob import fast_dtype
from sample import LM, Refused, Rollout, Sampler, covers, jsonl, leave_out, load_lm, no_traceback, pick_device
from sample import pick_dtype, problems_or_exit, require_plain_head, resolve_model, summary, traces_of
from sample import with_room, write_atomically
from transformers import AttentionInterface  # behind sample: see the note there on the name `kernels`

# The name has no mask function registered with it, so transformers builds no mask.
AttentionInterface.register("exprl_packed", packed_attention)


@dataclass(frozen=True)
class Settings:
    """One line per flag: its name, its default, and (behind #) its help; a comment alone heads a group."""

    # models and data
    model: str = ""  # policy: folder, hub id or bare well-known name; default: the preset's, or the miniature
    judge: str = ""  # judge model; default: the policy's own start, frozen, as in the paper
    data: tuple[str, ...] = ("openai/gsm8k",)  # training data: .jsonl, .json, .parquet files or hub data sets
    eval_data: tuple[str, ...] = ()  # held-out problems; default: GSM8K's test split beside GSM8K, else none
    max_prompt_tokens: int = 2048  # longer questions are reported and left out, never cut
    skip_bad_rows: bool = False  # count and drop bad rows of the data instead of stopping
    # sampling
    questions: int = 32  # problems per step
    group: int = 8  # traces per problem
    max_new_tokens: int = 1024  # a trace is cut off here
    temperature: float = 0.8  # of sampling, and of every log-prob in the loss
    max_rows: int = 256  # traces decoded at the same time: lower it if memory runs out while sampling
    cache_gb: float = 0.0  # keys and values of policy and judge, each; 0: what training leaves; on a CPU 4
    # judging
    readout: str = ""  # expected, critique, generate, likelihood (see judge.py); default: its own, or by size
    reference: str = "right"  # what the judge sees as reference: right, none, wrong (another problem's)
    step_view: str = "prefix"  # process: the judge sees the trace up to a step's end, or the lone segment
    overlong: str = "zero"  # a trace cut off: zero (process: advantage 0), last (step 0), judge (as is), drop
    check_judge: int = 8  # before step 1, does it rank the traces of so many problems? 0 = no such check
    max_unread: float = 0.5  # stop when more than this share of what a step gives the judge cannot be read
    # method, from grades to advantages
    method: str = "outcome"  # outcome (a grade a trace), process (a step), grpo (exact match), sft, distill
    norm: str = "std"  # std: (s - mean) / std in the group (GRPO); mean: s - mean (Dr. GRPO)
    process_norm: str = "delta"  # process: delta, end, step-mean; see kernels/token_advantages.py
    step_credit: str = "zero"  # process, delta, a lone step: zero (Eq. 2), or score (the authors' code)
    outcome_domains: tuple[str, ...] = ()  # process: domains whose traces get one grade, under --norm
    distill_kl: str = "token"  # distill: log-ratio of the sampled token, or full: KL over the vocabulary
    # optimisation
    steps: int = 200  # training steps; one step samples, judges and updates once
    lr: float = 1e-6  # AdamW
    schedule: str = "constant"  # of the learning rate: constant, or cosine down to 0
    warmup: float = 0.0  # share of the steps over which the learning rate rises from 0
    weight_decay: float = 0.01  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    updates: int = 1  # optimizer updates per step, each on its share of the step's problems
    kl: float = 1e-3  # weight of the k3 KL to the frozen start; 0 = no reference model
    entropy_bonus: float = 0.0  # weight of the policy's entropy per token
    clip_low: float = 0.2  # the ratio is clipped below 1 - this
    clip_high: float = 0.28  # and above 1 + this (clip-higher)
    dual_clip: float = 3.0  # bound of the loss for a negative advantage, as a multiple of it
    loss_mean: str = "token"  # mean over an update's tokens; trace: mean of its traces' sums (Eq. 1)
    microbatch_tokens: int = 8192  # rows x longest row per forward and backward: lower if memory runs out
    checkpoint_activations: bool = False  # recompute activations in the backward pass: slower, less memory
    # run
    seed: int = 0  # of data order and sampling: a step's batch is a function of (seed, step)
    eval_every: int = 50  # evaluate before the first step, after the last and every so many; 0 = none between
    eval_limit: int = 200  # only so many held-out problems, of each domain in turn
    eval_n: int = 4  # traces per held-out problem
    eval_k: tuple[int, ...] = (1, 4)  # pass@k for these k
    save_every: int = 50  # checkpoint every so many steps, and after the last; 0 = only after the last
    keep: int = 2  # checkpoints to keep
    show_every: int = 10  # print a sampled trace with its grade every so many steps; 0 = never
    log: str = "files"  # files (.jsonl), or tensorboard: its event files too, for `tensorboard --logdir runs`
    out: str = ""  # the run's folder; default: runs/<model>-<method>-<time>-<process>
    device: str = "auto"  # auto, cpu, cuda, cuda:1; under torchrun each process takes the GPU of its number
    judge_device: str = ""  # of the judge: a device, or +4 for the GPU four after this process's own
    dtype: str = "auto"  # of sampling and forward passes: auto, float32, bfloat16; master weights are float32
    dry_run: bool = False  # print the memory these flags need, computed and in one full-length step; no run


# The paper's 1,516 problems: POPE, whose references a Gemini wrote, and InT.
PAPER_DATA = ("CohenQu/POPE-hard-dataset-Qwen3-4B-Instruct-32k-128-filtered-iter3-gemini-success::test",
              "d1shs0ap/unified-hard-set-with-student-solutions-guided-rl")
# What a method changes in the defaults. Then: preset, the preset for the method, the flags given.
METHOD_DEFAULTS = {"sft": dict(kl=0.0, schedule="cosine", warmup=0.1), "distill": dict(kl=0.0)}
PRESETS = {
    # The embedded default: a policy and a judge of a few MB on arithmetic chains.
    "miniature": {
        "": dict(model=str(MINIATURE / "policy"), judge=str(MINIATURE / "judge"),
                 data=(str(MINIATURE / "train.jsonl"),), eval_data=(str(MINIATURE / "eval.jsonl"),),
                 steps=20, max_new_tokens=160, temperature=1.0, lr=3e-4, kl=0.0, microbatch_tokens=8192,
                 eval_every=0, eval_limit=128, eval_n=16, eval_k=(1, 16), save_every=0, show_every=4),
    },
    # The paper's Stage I (arXiv 2606.17024 and its code; 8 GPUs), but for the judge's readout and view.
    "paper": {
        "": dict(model="Qwen/Qwen3-4B-Instruct-2507", data=PAPER_DATA, max_new_tokens=16384,
                 max_prompt_tokens=4096, temperature=0.8, lr=1e-6, clip_low=0.2, eval_every=10,
                 checkpoint_activations=True),
        "outcome": dict(questions=36, group=10, steps=230, kl=1e-3, clip_high=0.28, updates=2, save_every=30),
        "process": dict(questions=36, group=16, steps=230, kl=1e-3, clip_high=0.26, save_every=30),
        "grpo": dict(questions=32, group=16, steps=235, kl=1e-3, clip_high=0.26, updates=2, save_every=20,
                     overlong="judge"),
        "sft": dict(questions=32, steps=94, save_every=47),
        "distill": dict(questions=32, group=16, steps=235, lr=1e-7, save_every=30),
    },
    # The paper's Stage II: 32 problems an update by its text, 16 by its code. A ratio clip of 4 is no clip.
    "paper-stage2": {
        "": dict(method="grpo", data=PAPER_DATA, questions=32, group=32, steps=500, max_new_tokens=16384,
                 max_prompt_tokens=4096, temperature=0.8, lr=1e-6, kl=0.0, norm="mean", overlong="judge",
                 clip_low=1.0, clip_high=4.0, entropy_bonus=1e-4, grad_clip=0.3, loss_mean="trace",
                 save_every=50, eval_every=50, checkpoint_activations=True),
    },
}
JUDGED = ("outcome", "process")  # the methods that need a judge
TRAINING = "training problems"


class Stop(Exception):
    """Ends a run in order: the last completed step is saved, `records` of an unfinished one too, and the
    message shown. by: the number of the signal that asked for it, if one did. broken: the weights are of no
    use, and are not saved. refused: these flags would be refused again (see sample.Refused)."""

    def __init__(self, message: str, records: list[dict] = (), by: int | None = None, broken: bool = False,
                 refused: bool = False):
        super().__init__(message)
        self.records, self.by, self.broken, self.refused = records, by, broken, refused


# ------------------------------------------------------------------------------------------------------------
# One step


def batch_for(problems: list[Problem], settings: Settings, step: int) -> list[Problem]:
    """The problems of a step (1-based), a pure function of (seed, step): resuming needs no data state.

    Each epoch is a fresh permutation; a step may straddle two epochs, and no problem is dropped."""
    batch, permutations = [], {}
    for i in range((step - 1) * settings.questions, step * settings.questions):
        epoch, place = divmod(i, len(problems))
        if epoch not in permutations:
            permutations[epoch] = np.random.default_rng([settings.seed, epoch]).permutation(len(problems))
        batch.append(problems[permutations[epoch][place]])
    return batch


def train_step(state: "State", settings: Settings, step: int) -> tuple[dict, list[dict]]:
    """Sample, grade, turn grades into token advantages, update. Returns metrics and trace records."""
    enter(state, "sampling")
    places = share(settings.questions, settings.updates)  # all of them, unless there are several processes
    with together(state):
        traces = sample_traces(state, settings, step, places)
    tokens = total(sum(len(r.token_ids) for r in traces.rollouts))
    traces = replace(traces, mean_length=tokens / total(len(traces.rollouts)))
    enter(state, "judging")
    judged = state.judge.tokens if state.judge else 0
    with together(state):
        batch = METHODS[settings.method](state, settings, traces)
        records = trace_records(step, traces, batch)
    records = in_order(places, records)
    metrics = trace_metrics(settings, records)
    if (metrics["unread"] or 0) > settings.max_unread:
        raise Stop(f"step {step}: {metrics['unread']:.0%} of the traces that the judge got have a grade that "
                   f"could not be read, more than --max-unread {settings.max_unread:.0%}. Its replies "
                   "stand at the end of rollouts.jsonl; calibrate it with `python judge.py`, or take another "
                   "--judge or --readout", records)
    enter(state, "training")
    lr = learning_rate(settings, step)
    update_metrics = update(state, settings, batch, lr)
    enter(state, "logging")
    sampling, judging, training = (state.took[phase] for phase in ("sampling", "judging", "training"))
    sampled = settings.method != "sft"
    for r in records:
        state.seen[r["problem"]] = state.seen.get(r["problem"], False) or r["correct"]
    return {
        "step": step,
        **metrics,
        "unsolved": 1 - mean(state.seen.values()) if sampled else None,
        **update_metrics,
        "lr": lr,
        "sample_tok_s": tokens / sampling if sampled else None,
        "judge_tok_s": total(state.judge.tokens - judged) / judging if state.judge else None,
        "train_tok_s": tokens / training,
        "seconds": sampling + judging + training,
        "peak_gb": max(gather(peak_gb(state.device))),
    }, records if sampled else []


def sample_traces(state: "State", settings: Settings, step: int, places: list[int]) -> "Traces":
    """`group` traces for each of the step's problems at `places`; for SFT, their references."""
    batch = batch_for(state.train, settings, step)
    problems = [batch[place] for place in places]
    prompts = [state.policy.chat(p.question) for p in problems]  # the reference never reaches the policy
    if settings.method == "sft":
        return references(state.policy, problems, prompts)
    rollouts = state.sampler.sample(prompts, settings.group, settings.max_new_tokens, settings.temperature,
                                    seed=settings.seed << 32 | step, places=places)
    if any(math.isnan(sum(r.logprobs)) for r in rollouts):
        raise broken(state)
    return Traces.of(state.policy, [p for p in problems for _ in range(settings.group)], rollouts)


def broken(state: "State") -> Stop:
    return Stop("the policy's log-probs are not finite: " + (
        "an update spoilt its weights, which are not saved: go on with a lower --lr" if state.step else
        "look at the weights of --model, or try --dtype float32"), broken=True)


def trace_metrics(settings: Settings, records: list[dict]) -> dict:
    """The metrics that a step's records give, those of a problem side by side."""
    sampled, judged = settings.method != "sft", settings.method in JUDGED
    group = settings.group if sampled else 1
    moving = [r["advantage"] != [0.0, 0.0] for r in records]
    tokens = sum(r["tokens"] for r in records)
    graded = [r for r in records if r.get("judge") != CUT_OFF]  # others have their grade from --overlong

    def score(record) -> float | None:
        return None if None in record["grades"] else mean(record["grades"])

    def averages(some: list[dict]) -> dict:
        return {"score": mean(s for s in map(score, some) if s is not None) if judged else None,
                "accuracy": mean(r["correct"] for r in some) if sampled else None}

    metrics = {
        **averages(records),
        "length": tokens / len(records),
        "headings": mean(len(HEADING.findall(r["text"])) for r in records),
        "cut_off": mean(not r["finished"] for r in records),
        "unread": (mean(None in r["grades"] for r in graded) or 0.0) if judged else None,
        "zero_groups": mean(not any(moving[i : i + group]) for i in range(0, len(records), group)),
    }
    domains = sorted({r["domain"] for r in records})
    if len(domains) > 1:
        metrics["domains"] = {d: averages([r for r in records if r["domain"] == d]) for d in domains}
    if judged:
        scores = list(map(score, records))
        groups = ([s for s in scores[i : i + group] if s is not None] for i in range(0, len(scores), group))
        metrics["score_spread"] = mean(np.std(some) for some in groups if some)
        # a trace cut off has its grade from --overlong, not from the judge
        metrics["judge_corr"] = corr_in_groups([score(r) if r["finished"] else None for r in records],
                                               [r["correct"] for r in records], group)
    if settings.method == "process":  # the mean grade of first, second, ... steps that could be read
        columns = zip_longest(*(r["grades"] for r in records if r["domain"] not in settings.outcome_domains))
        metrics["step_grades"] = [mean(g for g in column if g is not None) for column in columns]
    if settings.method == "distill":
        metrics["teacher_kl"] = sum(r["teacher_kl"] * r["tokens"] for r in records) / tokens
    return metrics


@dataclass(frozen=True)
class Traces:
    """A step's traces in parallel lists (N), those of a problem side by side."""

    problems: list[Problem]
    rollouts: list[Rollout]
    texts: list[str]
    correct: list[bool]
    mean_length: float = math.nan  # tokens, over the whole step's traces: a process may hold a part of them

    @classmethod
    def of(cls, policy: LM, problems, rollouts) -> "Traces":
        texts = [policy.text(r.token_ids) for r in rollouts]
        correct = [is_correct(text, p.answer, r.finished) for text, p, r in zip(texts, problems, rollouts)]
        return cls(problems, rollouts, texts, correct)


@dataclass(frozen=True)
class Batch:
    """A step's traces as tensors (N,T), right-padded; entry t of each is about token t."""

    ids: torch.Tensor  # (N,T) prompt and trace
    mask: torch.Tensor  # (N,T) true on sampled tokens
    sampled_logp: torch.Tensor  # (N,T) log-probs as the sampler saw them
    lengths: list[int]  # (N) tokens per row, for packing
    read: torch.Tensor  # (N,) false = the judge could not be read: the row is in no loss
    advantages: torch.Tensor | None = None  # (N,T)
    old_logp: torch.Tensor | None = None  # (N,T) under the weights before the step's first update
    step_ids: torch.Tensor | None = None  # (N,T) the token's step, -1 outside the trace
    verdicts: tuple[Verdict, ...] = ()  # (N)
    teacher: "Batch | None" = None  # distill, full KL: the same traces behind the teacher's prompts
    notes: dict = field(default_factory=dict)  # name -> (N,) numbers of the method's own, for the records

    def pick(self, rows: list[int]) -> "Batch":
        """What the loss needs of `rows`, no wider than their longest."""
        lengths = [self.lengths[row] for row in rows]

        def cut(tensor):
            return None if tensor is None else tensor[rows, :max(lengths)]

        teacher = self.teacher and self.teacher.pick(rows)
        return Batch(cut(self.ids), cut(self.mask), cut(self.sampled_logp), lengths, self.read[rows],
                     cut(self.advantages), cut(self.old_logp), teacher=teacher)


def collate(rollouts: list[Rollout], device) -> Batch:
    def padded(rows):
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)

    prompts, traces = [len(r.prompt_ids) for r in rollouts], [len(r.token_ids) for r in rollouts]
    return Batch(padded([*r.prompt_ids, *r.token_ids] for r in rollouts),
                 padded([False] * p + [True] * t for p, t in zip(prompts, traces)),
                 padded([0.0] * p + list(r.logprobs) for p, r in zip(prompts, rollouts)),
                 [p + t for p, t in zip(prompts, traces)],
                 torch.ones(len(rollouts), dtype=torch.bool, device=device))


def trace_records(step: int, traces: Traces, batch: Batch) -> list[dict]:
    """The lines of rollouts.jsonl."""
    records = []
    for i, r in enumerate(traces.rollouts):
        advantages = batch.advantages[i][batch.mask[i]].cpu()
        problem = traces.problems[i]
        record = {"step": step, "problem": problem.id, "domain": problem.domain, "text": traces.texts[i],
                  "grades": [], "correct": traces.correct[i],
                  "advantage": [float(advantages.min()), float(advantages.max())],
                  "finished": r.finished, "tokens": len(r.token_ids)}
        record |= {name: float(values[i]) for name, values in batch.notes.items()}
        if batch.verdicts:
            first = batch.step_ids[i][batch.mask[i]].cpu().diff(prepend=torch.tensor([-1])) != 0
            record |= {"grades": [None if math.isnan(g) else g for g in batch.verdicts[i].grades],
                       "advantages": advantages[first].tolist(), "judge": batch.verdicts[i].raw}
        records.append(record)
    return records


# ------------------------------------------------------------------------------------------------------------
# Methods: (state, settings, traces) -> Batch with advantages


def outcome(state: "State", settings: Settings, traces: Traces) -> Batch:
    """ExpRL-Outcome: one grade for the whole trace, normalised in its problem's group (sec. 3)."""
    verdicts = grade_whole(state, settings, traces, range(len(traces.rollouts)))
    return credit(settings, collate(traces.rollouts, state.device), verdicts)


def process(state: "State", settings: Settings, traces: Traces) -> Batch:
    """ExpRL-Process: a grade after each step; a step's tokens get differences of grades (Eq. 2).

    Problems of --outcome-domains get one grade per trace, normalised in the group, in the same batch."""
    by_trace = [i for i, p in enumerate(traces.problems) if p.domain in settings.outcome_domains]
    by_step = [i for i, p in enumerate(traces.problems) if p.domain not in settings.outcome_domains]
    starts = {i: step_starts(state.policy, traces.rollouts[i].token_ids) for i in by_step}
    verdicts = (grade_whole(state, settings, traces, by_trace)
                | grade_steps(state, settings, traces, by_step, starts))
    return credit(settings, collate(traces.rollouts, state.device), verdicts, starts)


def grpo(state: "State", settings: Settings, traces: Traces) -> Batch:
    """Sparse GRPO: exact match 0/1 in the place of a grade. A Stage I baseline, and Stage II."""
    verdicts, open_ = cut_off(settings, traces, range(len(traces.rollouts)))
    verdicts |= {i: Verdict((float(traces.correct[i]),)) for i in open_}
    return credit(settings, collate(traces.rollouts, state.device), verdicts)


def sft(state: "State", settings: Settings, traces: Traces) -> Batch:
    """Imitation: the reference is the trace and each of its tokens has advantage 1. At ratio 1 the gradient
    is that of the negative log-likelihood."""
    batch = collate(traces.rollouts, state.device)
    return replace(batch, advantages=batch.mask.float())


def distill(state: "State", settings: Settings, traces: Traces) -> Batch:
    """On-policy self-distillation: the teacher is the frozen start, shown the reference in its prompt.

    A_t = log pi_T - log pi_S on the sampled token, which makes the policy gradient that of the reverse KL per
    token; each trace weighs the same. With --distill-kl full, `update` takes that KL over the vocabulary."""
    batch = collate(traces.rollouts, state.device)
    prompts = [state.policy.chat(hinted_question(state.policy, p)) for p in traces.problems]
    teacher = collate([replace(r, prompt_ids=tuple(prompt)) for r, prompt in zip(traces.rollouts, prompts)],
                      state.device)
    gap = torch.zeros_like(batch.sampled_logp)
    # The same tokens behind two prompts: in row order, the flat entries of both are the same tokens.
    hinted = all_logprobs(state.reference, settings, teacher, list(range(len(teacher.lengths))))
    gap[batch.mask] = hinted[teacher.mask] - batch.sampled_logp[batch.mask]
    lengths = batch.mask.sum(1, keepdim=True)
    weights = batch.mask * (traces.mean_length / lengths.clamp(min=1))
    full = settings.distill_kl == "full"
    return replace(batch, advantages=weights if full else gap * weights, teacher=teacher if full else None,
                   notes={"teacher_kl": -gap.sum(1) / lengths[:, 0].clamp(min=1)})


METHODS = {"outcome": outcome, "process": process, "grpo": grpo, "sft": sft, "distill": distill}


def grade_whole(state, settings, traces, rows) -> dict[int, Verdict]:
    """Row -> Verdict with one grade, for the traces at `rows`."""
    verdicts, open_ = cut_off(settings, traces, rows)
    given = state.judge.grade([state.shown[traces.problems[i].id] for i in open_],
                              [traces.texts[i] for i in open_], "outcome")
    return verdicts | dict(zip(open_, given))


def grade_steps(state, settings, traces, rows, starts) -> dict[int, Verdict]:
    """Row -> Verdict with a grade per step; none (advantage 0) for a trace cut off under --overlong zero."""
    verdicts, open_ = cut_off(settings, traces, rows, by_step=True)
    steps = []
    for i in open_:
        ids = traces.rollouts[i].token_ids
        steps.append([state.policy.text(ids[a:b]) for a, b in zip(starts[i], [*starts[i][1:], len(ids)])])
    given = state.judge.grade([state.shown[traces.problems[i].id] for i in open_], steps, settings.step_view)
    for i, verdict in zip(open_, given):
        if settings.overlong == "last" and not traces.rollouts[i].finished:
            verdict = Verdict((*verdict.grades[:-1], 0.0), verdict.raw)
        verdicts[i] = verdict
    return verdicts


CUT_OFF = "cut off at the length limit"


def cut_off(settings, traces, rows, by_step=False) -> tuple[dict[int, Verdict], list[int]]:
    """--overlong -> (verdicts of traces cut off, the rows that are to be graded)."""
    grades = {"zero": () if by_step else (0.0,), "last": None if by_step else (0.0,),  # see grade_steps
              "judge": None, "drop": (math.nan,)}[settings.overlong]
    verdicts = {i: Verdict(grades, CUT_OFF) for i in rows
                if grades is not None and not traces.rollouts[i].finished}
    return verdicts, [i for i in rows if i not in verdicts]


def credit(settings: Settings, batch: Batch, verdicts: dict[int, Verdict], starts=None) -> Batch:
    """Grades -> one advantage per token. Rows in `starts` (row -> the tokens at which steps open) have steps
    and get --process-norm, the others a single grade and --norm."""
    starts, device = starts or {}, batch.mask.device
    verdicts = tuple(verdicts[i] for i in range(len(batch.lengths)))
    n_steps = torch.tensor([len(v.grades) for v in verdicts], device=device)
    grades = pad_sequence([torch.tensor(v.grades or (0.0,), dtype=torch.float32) for v in verdicts],
                          batch_first=True).to(device)  # (N,S)
    step_ids = torch.where(batch.mask, 0, -1)
    for i, opens in starts.items():
        opens = torch.tensor(opens[:max(1, len(verdicts[i].grades))])  # cut off, without grades: one
        tokens = torch.arange(int(batch.mask[i].sum()))
        step_ids[i, batch.mask[i]] = torch.bucketize(tokens, opens, right=True).to(device) - 1
    by_step = torch.tensor([i in starts for i in range(len(verdicts))], device=device)
    process_norm = settings.process_norm.replace("-", "_")
    advantages = torch.zeros_like(batch.sampled_logp)
    for rows, norm in ((~by_step, settings.norm), (by_step, process_norm)):
        advantages[rows] = token_advantages(grades[rows], n_steps[rows], step_ids[rows], settings.group, norm)
    if process_norm == "delta" and settings.step_credit == "score":
        lone = by_step & (n_steps == 1)
        advantages[lone] = grades[lone, :1].nan_to_num() * batch.mask[lone]
    read = ~grades.isnan().any(1)
    return replace(batch, advantages=advantages, step_ids=step_ids, verdicts=verdicts, read=read)


def step_starts(lm: LM, token_ids) -> list[int]:
    """The token at which each step of a trace opens. A line that starts with exactly three # opens one; what
    stands before the first heading is a step, too. Fragments under MIN_STEP tokens join the next step, or the
    last one; beyond MAX_STEPS the rest is one step."""
    decoded = {t: lm.text([t]) for t in set(token_ids)}
    pieces = [decoded[t] for t in token_ids]  # text is never encoded back: steps are places in the ids
    ends = np.cumsum([len(piece) for piece in pieces])
    headings = [m.start() for m in HEADING.finditer("".join(pieces))]
    starts = [0]
    for token in np.searchsorted(ends, headings, side="right").tolist():
        if token - starts[-1] >= MIN_STEP:
            starts.append(token)
    if len(starts) > 1 and len(pieces) - starts[-1] < MIN_STEP:
        starts.pop()
    return starts[:MAX_STEPS]


MIN_STEP, MAX_STEPS = 4, 32


def references(policy: LM, problems: list[Problem], prompts) -> Traces:
    """For SFT: each problem's reference as a trace of it."""
    targets = [reference_ids(policy, problem) for problem in problems]
    return Traces.of(policy, problems, [Rollout(tuple(prompt), tuple(ids), (0.0,) * len(ids), True)
                                         for prompt, ids in zip(prompts, targets)])


def reference_ids(policy: LM, problem: Problem) -> list[int]:
    """What SFT imitates: the reference and the end of the turn."""
    return [*policy.quote(problem.solution), policy.turn_end]


TEACHER = (
    "{question}\n\nHere is a worked solution. Study it until you see why it is right; then close it and "
    "solve the problem in your own words, without mentioning it.\n\n{reference}"
)


def hinted_question(policy: LM, problem: Problem) -> str:
    """What the teacher of self-distillation is asked: the question, with the reference behind it."""
    slots = {"{question}": problem.question, "{reference}": problem.solution}
    return re.sub(r"\{(?:question|reference)\}", lambda m: slots[m[0]],
                  policy.prompts.get("distill", TEACHER))


# ------------------------------------------------------------------------------------------------------------
# Loss and update


class Pass(torch.nn.Module):
    """The policy as one module from ids to loss: FSDP holds embedding and head gathered from end to end."""

    def __init__(self, lm: torch.nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, ids, mask, head) -> HeadLoss:
        hidden, tokens = predictors(self.lm, ids, mask)
        return head(hidden, self.lm.get_output_embeddings().weight, tokens)


def predictors(lm: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor):
    """The tokens at `mask` (N,T) and the states they were predicted from -> hidden (M,d), tokens (M,), flat
    in row order.

    The one place that shifts by one. Rows are padded on the right and attention is causal, so no sampled
    token can see padding."""
    after = mask[:, 1:]
    if lm.config._attn_implementation == "exprl_packed":
        tokens, positions, places, packed = pack(ids, mask)
        hidden = lm.base_model(input_ids=tokens[None], position_ids=positions[None], use_cache=False,
                               packed=packed).last_hidden_state[0]
        # Traces of a prompt share its last token. hidden[...] would add their gradients in whatever order the
        # threads of a CPU come, index_select does not.
        return hidden.index_select(0, places[:, :-1][after]), ids[:, 1:][after]
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][after], ids[:, 1:][after]


@torch.no_grad()
def logprobs(lm: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probs of the tokens at `mask` (N,T), of a model that is not trained by them -> flat (M,)."""
    hidden, tokens = predictors(lm, ids, mask)
    return token_logprob(hidden, lm.get_output_embeddings().weight, tokens, temperature)[0]


def microbatches(rows: list[int], lengths: list[int], budget: int, group: int = 1) -> list[list[int]]:
    """Split rows so that rows x longest <= budget (a single row may exceed it): by length, but the rows of a
    group, which share a prompt, side by side."""
    longest: dict[int, int] = {}
    for row in rows:
        longest[row // group] = max(longest.get(row // group, 0), lengths[row])
    batches: list[list[int]] = []
    width = 0  # of the last one
    for row in sorted(rows, key=lambda r: (longest[r // group], r // group, lengths[r])):
        width = max(width, lengths[row])
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches


def update(state: "State", settings: Settings, batch: Batch, lr: float) -> dict:
    """`updates` optimizer updates, each over its share of the problems. Returns the loss's metrics."""
    group = 1 if settings.method == "sft" else settings.group
    problems = torch.arange(len(batch.lengths)).view(-1, group)
    first, *later = (part.flatten().tolist() for part in problems.tensor_split(settings.updates))
    # Old log-probs belong to the weights that sampled. The first update meets those weights, so its ratio is
    # 1 and needs no pass; the later ones need theirs before the weights move.
    if later:
        sampled_with = state.policy.model if ranks() == 1 else state.sampling
        with state.amp():
            batch = replace(batch, old_logp=all_logprobs(sampled_with, settings, batch, sum(later, [])))
    norms, sums = [], torch.zeros(6, dtype=torch.float64)
    for part in (first, *later):
        each = partial(forward_backward, state, settings, on_policy=part is first)
        rows = [row for row in part if batch.read[row]]
        # Divide by what the update holds, not a micro-batch: the split must not change the gradient. FSDP
        # takes the mean over processes, where the sum is meant.
        count = int(batch.mask[rows].sum()) if settings.loss_mean == "token" else len(rows)
        denominator = max(total(count), 1) / ranks()
        # Rows without an advantage have a gradient through --kl and --entropy-bonus only. (With --kl, until a
        # reward has spoken, AdamW makes full-size updates of the KL's rounding.)
        if settings.kl == 0 and settings.entropy_bonus == 0:
            rows = [row for row in rows if batch.advantages[row].any()]
        passes = microbatches(rows, batch.lengths, settings.microbatch_tokens, group)
        # Each process runs as many passes as the busiest: those beyond its own, of a short row, count 0.
        idle = max(gather(len(passes))) - len(passes)  # before the passes, in which processes meet, too
        for rows in passes:
            sums += each(batch.pick(rows), denominator)
        for _ in range(idle):
            each(batch.pick([int(np.argmin(batch.lengths))]), math.inf)
        norms.append(optimizer_step(state, settings, lr))
    tokens, *sums = sum(gather(sums)).tolist()
    # of the rows that had a gradient; without any there is nothing to report
    metrics = {name: value / tokens if tokens else None
               for name, value in zip(("entropy", "kl", "ratio_gap", "clip_share", "nll"), sums)}
    if settings.method == "sft":
        metrics["ratio_gap"] = None  # nobody sampled these tokens
    else:
        del metrics["nll"]
    finite = [norm for norm in norms if math.isfinite(norm)]
    return metrics | {"grad_norm": mean(finite), "skipped_updates": len(norms) - len(finite)}


def forward_backward(state: "State", settings: Settings, micro: Batch, denominator: float,
                     on_policy: bool) -> torch.Tensor:
    """Adds a micro-batch's gradient; sums over its tokens of 1, entropy, k3, |ratio - 1|, clipped, -log-prob.
    """
    temperature = 1.0 if settings.method == "sft" else settings.temperature  # what sampled is what is trained
    old_logp = None if on_policy else micro.old_logp[micro.mask]
    if micro.teacher:
        head = partial(distillation_head, state, settings, micro, denominator)
    else:
        ref_logp = logprobs(state.reference, micro.ids, micro.mask, temperature) if settings.kl > 0 else None
        head = partial(policy_head, advantages=micro.advantages[micro.mask], old_logp=old_logp,
                       ref_logp=ref_logp, temperature=temperature, denominator=denominator,
                       clip_low=settings.clip_low, clip_high=settings.clip_high,
                       dual_clip=settings.dual_clip, kl=settings.kl, entropy_weight=settings.entropy_bonus)
    with state.amp():
        out = state.trainee(micro.ids, micro.mask, head)
    out.loss.backward()
    gap = ((out.logp if old_logp is None else old_logp) - micro.sampled_logp[micro.mask]).exp() - 1
    return torch.stack([micro.mask.sum(), out.entropy.sum(), out.kl.sum(), gap.abs().sum(), out.clipped.sum(),
                        -out.logp.sum()]).double().cpu()


def distillation_head(state, settings, micro: Batch, denominator, hidden, weight, tokens) -> HeadLoss:
    """policy_head's place under --distill-kl full: reverse KL to the teacher over the vocabulary."""
    with torch.no_grad():
        hinted, _ = predictors(state.reference, micro.teacher.ids, micro.teacher.mask)
        logp, entropy = token_logprob(hidden, weight, tokens, settings.temperature)
    loss = reverse_kl(hidden, weight, hinted, state.reference.get_output_embeddings().weight,
                      settings.temperature)
    none = torch.zeros_like(logp)
    return HeadLoss((loss * micro.advantages[micro.mask]).sum() / denominator, logp, entropy, none, none)


def all_logprobs(lm: torch.nn.Module, settings: Settings, batch: Batch, rows) -> torch.Tensor:
    """(N,T) log-probs of the tokens of `rows` under lm's present weights, zero elsewhere."""
    out = torch.zeros_like(batch.sampled_logp)
    for part in microbatches(rows, batch.lengths, settings.microbatch_tokens, settings.group):
        micro = batch.pick(part)
        logp = logprobs(lm, micro.ids, micro.mask, settings.temperature)
        out[part, :micro.mask.shape[1]] = out.new_zeros(micro.mask.shape).masked_scatter(micro.mask, logp)
    return out


def learning_rate(settings: Settings, step: int) -> float:
    """Of a step (1-based): a linear rise over the warm-up's share of steps, then constant or cosine to 0."""
    warm = round(settings.warmup * settings.steps)
    if step <= warm:
        return settings.lr * step / warm
    if settings.schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warm) / max(settings.steps - warm, 1)))


@torch.no_grad()
def optimizer_step(state, settings, lr: float) -> float:
    """Clip, step, and copy the masters into the sampling weights. A non-finite gradient skips the step."""
    state.interrupts.defer()  # from here to the log line of this step nothing may come between
    norm = torch.nn.utils.clip_grad_norm_(state.policy.model.parameters(), settings.grad_clip)
    norm = float(whole(norm))
    if math.isfinite(norm):
        state.bad_updates = 0
        state.optimizer.param_groups[0]["lr"] = lr
        state.optimizer.step()
        if state.sampling is not state.policy.model:
            for low, master in zip(state.sampling.parameters(), state.policy.model.parameters()):
                low.copy_(whole(master.to(low.dtype)))  # in place: the storage never moves
    else:
        state.bad_updates += 1
    state.optimizer.zero_grad(set_to_none=True)
    return norm


# ------------------------------------------------------------------------------------------------------------
# State: what a run holds, saves and restores


@dataclass
class State:
    policy: LM  # float32 master weights; with several processes split over them
    trainee: Pass  # their pass from ids to loss
    sampling: torch.nn.Module  # what samples: a persistent copy in the run's dtype, or the masters themselves
    sampler: Sampler
    judge: Judge | None
    reference: torch.nn.Module | None  # the frozen start, for KL and teacher; the judge too if it is the same
    train: list[Problem]
    shown: dict[str, Problem]  # by id, with the reference that the judge is to see
    frozen: dict[str, str]  # fingerprints of what must not change in a run: judge, frozen start
    held_out: list[Problem]
    device: str
    dtype: torch.dtype
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0  # completed steps
    seen: dict = field(default_factory=dict)  # problem id -> solved by any trace so far
    bad_updates: int = 0  # skipped in a row
    phase: str = "loading"  # what runs, for error messages
    entered: float = 0.0  # when it began, see enter()
    took: dict = field(default_factory=dict)  # phase -> seconds, the last time
    interrupts: "Interrupts" = field(default_factory=lambda: Interrupts())
    board: object = None  # --log tensorboard: its SummaryWriter
    lock: object = None  # an open file, see lock()

    def amp(self):
        """Forward passes run in the sampling dtype over float32 masters; FSDP gathers them in it."""
        if self.dtype == torch.float32 or ranks() > 1:
            return nullcontext()
        return torch.autocast(self.device.split(":")[0], dtype=self.dtype)


def build_state(settings: Settings, weights: str | None = None) -> State:
    """weights: the checkpoint folder a resumed policy comes from; judge and reference stay the start's."""
    with together():
        state = load_state(settings, weights)
    if ranks() > 1:
        split(state)
    state.optimizer = torch.optim.AdamW(state.policy.model.parameters(), lr=settings.lr,
                                        weight_decay=settings.weight_decay, betas=(0.9, 0.999), fused=True)
    return state


def load_state(settings: Settings, weights: str | None) -> State:
    """Check the data, then load the models: bad input must not cost a model's loading time."""
    device = own_device("--device", settings.device)
    judge_device = own_device("--judge-device", settings.judge_device) if settings.judge_device else device
    asked = pick_dtype(settings.dtype, device)
    dtype = fast_dtype(asked, device.split(":")[0])
    if dtype != asked:
        print("this CPU has no instructions for bfloat16, which would be many times slower: float32 is taken",
              file=sys.stderr)
    for name in (settings.model, *[settings.judge] * (settings.method in JUDGED)):
        resolve_model(name)  # before the data: a name that is none must not wait for the hub
    train = problems_or_exit(settings.data, "train", skip_bad_rows=settings.skip_bad_rows,
                             need_solution=settings.method != "grpo" and settings.reference != "none")
    domains = sorted({p.domain for p in train})
    for name in sorted(set(settings.outcome_domains).difference(domains)):
        raise SystemExit(f"--outcome-domains {name}: no training problem is of that, only of "
                         f"{', '.join(domains)}")
    held_out = problems_or_exit(settings.eval_data, "test", skip_bad_rows=settings.skip_bad_rows)
    if not held_out:
        print("no --eval-data: nothing is evaluated on held-out problems", file=sys.stderr)
    trained_on = {p.question for p in train}
    if both := sum(p.question in trained_on for p in held_out):
        print(f"WARNING: {both} of {len(held_out)} held-out problems are training problems, too",
              file=sys.stderr)
    # with several processes the masters move to their devices in parts, in split()
    policy = load_lm(weights or settings.model, device if ranks() == 1 else "cpu", torch.float32)
    require_plain_head(policy.model)
    with no_traceback(), tempfile.TemporaryDirectory() as folder:
        policy.save_config(Path(folder))  # what cannot be saved must not be trained first
    train = fitting(policy, train, settings, TRAINING)
    held_out = fitting(policy, some_of_each(held_out, settings.eval_limit), settings, "held-out problems")
    if settings.checkpoint_activations:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers checkpoints only in training mode; these families have no dropout by default
        policy.model.train()
    if covers(policy.model.config):
        policy.model.set_attn_implementation("exprl_packed")
    sampling = policy.model
    if dtype != torch.float32 or ranks() > 1:
        # read again: a copy would hold all in float32 for a while, with several processes in host memory
        sampling = load_lm(policy.name, device, dtype).model.requires_grad_(False)
        sampling.set_attn_implementation(policy.model.config._attn_implementation)
    judge, reference = None, None
    judged = settings.method in JUDGED
    own_judge = judged and (settings.judge_device != ""
                            or resolve_model(settings.judge) != resolve_model(settings.model))
    if settings.kl > 0 or settings.method == "distill" or (judged and not own_judge):
        reference = load_lm(settings.model, device, dtype)
        reference.model.requires_grad_(False)
        reference.model.set_attn_implementation(policy.model.config._attn_implementation)
    grader = load_lm(settings.judge, judge_device, dtype) if own_judge else reference
    room = settings.cache_gb or cache_room(policy.model, device)  # of what all models leave free
    if judged:
        grader.model.requires_grad_(False)
        judge = Judge(grader.model, grader.tokenizer, grader.prompts, settings.readout or None,
                      max_rows=settings.max_rows,
                      cache_gb=room if judge_device == device else settings.cache_gb or None)
        if settings.method == "process" and judge.readout == "likelihood":
            print("WARNING: a likelihood mostly rises along a trace, and steps graded by it taught nothing "
                  "in the miniature (README.md): take a --judge that can follow a rubric, of 4B parameters "
                  "or more, or --method outcome", file=sys.stderr)
        others = sorted({p.domain for p in train if p.domain.partition("/")[0] not in DOMAINS})
        if others and judge.readout != "likelihood" and "user" not in grader.prompts:  # else one for all
            print(f"judge.DOMAINS has no entry for {', '.join(others)}: graded as math", file=sys.stderr)
        whole_ones = domains if settings.method == "outcome" else settings.outcome_domains
        views = {p.id: "outcome" if p.domain in whole_ones else settings.step_view for p in train}
        for view in set(views.values()):
            judge.check_view(view)
    shown = with_reference(train, settings.reference, judge.no_reference if judge else "", settings.seed)
    if judge:
        train = leave_out(train, [p for p in train if not judge.has_room(shown[p.id], views[p.id])],
                          "a question and reference too long for the judge's context",
                          "take another --judge", TRAINING)
    return State(policy, Pass(policy.model), sampling, Sampler(sampling, settings.max_rows, room), judge,
                 reference and reference.model, train, shown, frozen_prints(judge, reference), held_out,
                 device, dtype)


def frozen_prints(judge: Judge | None, reference: LM | None) -> dict[str, str]:
    """Are the judge, its prompts, and the frozen start those of another day? (A folder may be written anew,
    as runs/NAME/model is.) From some 64 numbers of each weight, the same whatever the dtype."""
    def look(model, *asked) -> str:
        some = [p.detach().flatten()[:: p.numel() // 64 + 1].bfloat16().float() for p in model.parameters()]
        seen = torch.cat(some).cpu().numpy().tobytes() + json.dumps(asked).encode()
        return hashlib.sha256(seen).hexdigest()[:16]

    prints = {"frozen start": look(reference.model)} if reference else {}
    return prints | ({"judge": look(judge.model, judge.fixed, judge.conclude, judge.stem)} if judge else {})


def require_sound(state: State) -> None:
    """Before weights are saved or evaluated: do they still give numbers?"""
    ids = torch.tensor([state.policy.chat(state.train[0].question)], device=state.device)
    with state.amp():
        logp = logprobs(state.sampling, ids, torch.ones_like(ids, dtype=torch.bool), 1.0)
    if not logp.isfinite().all():
        raise broken(state)


def cache_room(model, device: str) -> float | None:
    """GB of keys and values for the policy and for the judge, each: on a GPU 30% of what is free, less what
    gradients and moments (and, with several processes, masters) will take. A CPU: the sampler's default."""
    if not device.startswith("cuda"):
        return None
    later = (12 if ranks() == 1 else 16 / ranks()) * sum(p.numel() for p in model.parameters())
    torch.cuda.empty_cache()  # what PyTorch keeps of freed tensors counts as used below
    free = torch.cuda.mem_get_info(device)[0]
    if free <= later:
        raise SystemExit(f"{device} has {free / 2**30:.1f} GB free, and gradients and optimizer will take "
                         f"{later / 2**30:.1f}: take a smaller --model, another --judge-device, or more GPUs")
    return 0.3 * (free - later) / 2**30


def fitting(policy: LM, problems: list[Problem], settings: Settings, kind: str) -> list[Problem]:
    """The problems that have room in the policy's context; others are reported."""
    room = settings.max_new_tokens
    problems, _ = with_room([policy], problems, room, settings.max_prompt_tokens, kind)
    if settings.method == "distill" and kind == TRAINING:  # the teacher's prompt holds the reference, too
        problems, _ = with_room([policy], problems, room, kind=f"{kind} (as the teacher sees them)",
                                asked=partial(hinted_question, policy))
    if settings.method == "sft" and kind == TRAINING:  # cut off, it would teach to stop in the middle
        long = [p for p in problems if len(reference_ids(policy, p)) > room]
        problems = leave_out(problems, long, f"a reference of more than {room} tokens",
                             "raise --max-new-tokens", kind)
    return problems


def some_of_each(problems: list[Problem], count: int) -> list[Problem]:
    """The first so many, of each domain in turn."""
    domains: dict[str, list[Problem]] = {}
    for p in problems:
        domains.setdefault(p.domain, []).append(p)
    return [p for row in zip_longest(*domains.values()) for p in row if p is not None][:count]


def save_checkpoint(state: State, run: Path, settings: Settings) -> None:
    """checkpoints/step_N: a Hugging Face folder with float32 weights plus the trainer's state.

    Each process gathers and writes its part of the tensors, whole ones, so that any number of processes can
    go on from them. Written beside its final name, flushed, then renamed: a kill at any time leaves the older
    ones usable."""
    target = run / "checkpoints" / f"step_{state.step}"
    if gather(target.exists())[0]:  # as one process sees the disk
        return
    state.phase = "saving"
    state.interrupts.defer()  # a signal waits for the save it asks for
    tmp = target.with_name(target.name + ".tmp")
    part = f"-{rank() + 1:05d}-of-{ranks():05d}.safetensors" if ranks() > 1 else ".safetensors"
    weights, moments = {}, {}
    for i, (name, parameter) in enumerate(state.policy.model.named_parameters()):
        weight = whole(parameter).detach()  # all take part in gathering, one keeps the result
        own = {f"{name}:{key}": whole(value) for key, value in state.optimizer.state[parameter].items()}
        if i % ranks() == rank():
            weights[name] = weight if ranks() == 1 else weight.cpu()  # a copy: a GPU may have no room for all
            moments |= own if ranks() == 1 else {key: value.cpu() for key, value in own.items()}
    if rank() == 0:  # what a save left that failed must not be taken for this one's
        shutil.rmtree(tmp, ignore_errors=True)
    files = {name: "model" + part for part, names in gather((part, list(weights))) for name in names}
    with together(phase="saving"):
        tmp.mkdir(parents=True, exist_ok=True)
        save_file(weights, tmp / ("model" + part), {"format": "pt"})
        save_file(moments, tmp / ("optimizer" + part))
        sums = {name + part: sha256(tmp / (name + part)) for name in ("model", "optimizer")}
    sums = {name: digest for own in gather(sums) for name, digest in own.items()}  # each of what it wrote
    with together(phase="saving"):
        if rank() == 0:  # all parts stand: until then their writers have files of other names there
            state.policy.save_config(tmp)
            if ranks() > 1:  # as Hugging Face names parts and finds them
                (tmp / "model.safetensors.index.json").write_text(
                    json.dumps({"metadata": {}, "weight_map": files}))
            (tmp / "trainer.json").write_text(json.dumps(
                {"step": state.step, "seen": state.seen, "bad_updates": state.bad_updates}))
            small = [p for p in tmp.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
            sums |= {str(p.relative_to(tmp)): sha256(p) for p in small}
            (tmp / "sha256.json").write_text(json.dumps(sums))
            publish(tmp, target)
            for old in complete_checkpoints(run)[: -settings.keep]:
                shutil.rmtree(old)
    state.interrupts.settle()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(tmp: Path, target: Path) -> None:
    for path in [*tmp.rglob("*"), tmp]:
        fsync(path)
    tmp.rename(target)
    fsync(target.parent)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete_checkpoints(run: Path) -> list[Path]:
    """Oldest first. A folder has its final name only once it is complete."""
    found = [p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def intact(checkpoint: Path) -> bool:
    """Is each of its files as it was written? If not, says which is not."""
    try:
        sums = json.loads((checkpoint / "sha256.json").read_text())
        bad = ", ".join(name for name, digest in sums.items() if sha256(checkpoint / name) != digest)
    except (OSError, ValueError) as error:  # a file is gone, or the sums are damaged themselves
        bad = str(error)
    if bad:
        print(f"cannot use {checkpoint}, damaged or missing: {bad}", file=sys.stderr)
    return not bad


def restore(state: State, checkpoint: Path) -> None:
    """The optimizer's and the trainer's state; build_state has loaded the weights."""
    parameters = dict(state.policy.model.named_parameters())
    with together():
        for path in sorted(checkpoint.glob("optimizer*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    name, moment = key.rsplit(":", 1)
                    parameter, value = parameters[name], file.get_tensor(key).to(state.device)
                    if isinstance(parameter, DTensor) and value.dim():
                        value = distribute_tensor(value, parameter.device_mesh, parameter.placements,
                                                  src_data_rank=None)  # each process cuts out its own part
                    state.optimizer.state[parameter][moment] = value
        trainer = json.loads((checkpoint / "trainer.json").read_text())
    state.step, state.seen, state.bad_updates = trainer["step"], trainer["seen"], trainer["bad_updates"]


def save_model(state: State, run: Path) -> None:
    """model/: the weights in the run's dtype, for transformers, vLLM, sample.py and Stage II."""
    tmp, target = run / "model.tmp", run / "model"
    state.phase = "saving"
    with together(phase="saving"):
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
            replace(state.policy, model=state.sampling).save(tmp)  # the masters, rounded to the dtype
            shutil.rmtree(target, ignore_errors=True)  # after a kill here --resume writes it again
            publish(tmp, target)


# ------------------------------------------------------------------------------------------------------------
# Processes: one per GPU, started by torchrun
#
# Each samples and judges its share of a step's problems alone, with its own full copy of the weights; updates
# are joint (FSDP2); process 0 writes the run. Between joint calls all meet in `together`.


def join() -> None:
    """Under torchrun, meet the other processes: NCCL moves tensors of GPUs, gloo all else."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if (local := int(os.environ["LOCAL_RANK"])) < torch.cuda.device_count():
        torch.cuda.set_device(local)  # else a CPU is asked for, or own_device() says what is missing
    # One may wait for the other's longest traces; one that dies is noticed at once, by torchrun and gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=timedelta(hours=6))
    if rank():  # one voice; only what nobody expected is shown by the process it happened to
        sys.excepthook = lambda *error: traceback.print_exception(*error, file=sys.__stderr__)
        sys.stdout = sys.stderr = open(os.devnull, "w")


def leave(code: int = 0) -> None:
    """The processes end at once, and unless one has failed together: a teardown while another still works was
    seen to abort."""
    if ranks() > 1:
        if code == 0:
            gather(None)
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            stream.flush()
        os._exit(code)


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value) -> list:
    """The values of all processes, by rank."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    dist.all_gather_object(values, value)
    return values


def total(number: float) -> float:
    return sum(gather(number))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is split over the processes, gathered from them; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def together(state: "State | None" = None, phase: str = "loading"):
    """Around what a process does alone: afterwards all learn whether one of them failed or, given a state,
    was told to stop, and all raise Stop. So none waits for others that do not come. phase: what runs, if no
    state says it."""
    if ranks() == 1:
        yield
        return
    said = None
    try:
        try:
            if state:
                state.interrupts.allow()
            yield
        finally:
            if state:
                state.interrupts.defer()
    except (Exception, SystemExit) as error:
        said = Stop(explain(error, state.phase if state else phase), by=getattr(error, "by", None),
                    broken=getattr(error, "broken", False), refused=isinstance(error, Refused))
    for stop in gather(said):
        if stop:
            raise stop


REMEDIES = {
    "sampling": "lower --max-rows, --group or --max-new-tokens",
    "evaluating": "lower --max-rows or --max-new-tokens",
    "judging": "lower --max-rows, or take a smaller --judge",
    "training": "lower --microbatch-tokens, add --checkpoint-activations, or on a GPU lower --cache-gb",
}


def explain(error: BaseException, phase: str = "loading") -> str:
    """An error in a user's words; a traceback for one that nobody expected."""
    if isinstance(error, (Stop, SystemExit, Refused)):
        return str(error)
    if (isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or re.search("allocate memory|out of memory|ALLOC_FAILED", str(error))):
        return (f"out of memory while {phase}: {REMEDIES.get(phase, 'take a smaller model')}\n"
                f"({(str(error).splitlines() or [type(error).__name__])[0]})")
    if isinstance(error, (OSError, SafetensorError)):
        return (f"reading or writing failed while {phase}: {error}\n"
                "make room on the disk, or allow reading and writing there")
    return f"process {rank()} failed while {phase}:\n{''.join(traceback.format_exception(error))}"


def share(count: int, updates: int = 1) -> list[int]:
    """Which of `count` problems this process takes: of each update's, one part."""
    parts = np.array_split(np.arange(count), updates)
    return np.concatenate([np.array_split(part, ranks())[rank()] for part in parts]).tolist()


def in_order(places: list[int], items: list) -> list:
    """All processes' items, as one process would have them. Each has as many for each of its places."""
    groups = {}
    for at, own in gather((places, items)):
        size = len(own) // max(len(at), 1)
        groups |= {place: own[i * size : (i + 1) * size] for i, place in enumerate(at)}
    return [item for place in sorted(groups) for item in groups[place]]


def own_device(name: str, asked: str) -> str:
    """What the flag of this name asks for, for this process."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(f"cuda:{local + int(asked)}" if asked.startswith("+") else asked, f"{name} {asked}")
    return pick_device(f"cuda:{local}", f"{name} {asked}, process {local}") if device == "cuda" else device


def split(state: "State") -> None:
    """FSDP2: weights, gradients and moments are split over the processes and gathered layer by layer.
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html"""
    mesh = dist.init_device_mesh(state.device.split(":")[0], (ranks(),))
    low = None if state.dtype == torch.float32 else state.dtype
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in state.policy.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(state.trainee, mesh=mesh, mp_policy=precision)


# ------------------------------------------------------------------------------------------------------------
# The loop


class Interrupts:
    """SIGTERM, Ctrl-C and a terminal that goes away end the run in order: at once while the weights stand
    still (the step is dropped), and once the step is logged while they move."""

    def __init__(self):
        self.deferred, self.waiting = ranks() > 1, None  # several processes stop in `together` only

    def __enter__(self):
        more = (s for s in (signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(s) != signal.SIG_IGN)  # nohup
        self.before = {s: signal.signal(s, self.handle) for s in (signal.SIGINT, signal.SIGTERM, *more)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            # torchrun ends all when one has died: that must not cut off what the others have to say
            signal.signal(number, handler if ranks() == 1 else signal.SIG_IGN)

    def handle(self, number, frame):
        self.waiting = number
        if not self.deferred:
            self.allow()

    def defer(self):
        """From here on a signal waits."""
        self.deferred = True

    def settle(self):
        """The weights stand still again: as allow(), but several processes stop in `together` only."""
        if ranks() == 1:
            self.allow()

    def allow(self):
        """From here on a signal acts at once, and one that has waited does now."""
        self.deferred = False
        if self.waiting:
            number, self.waiting = self.waiting, None
            self.deferred = ranks() > 1  # one is enough: a second must not keep this process from the others
            raise Stop(f"stopped by {signal.Signals(number).name}", by=number)


def run_training(state: State, settings: Settings, run: Path) -> None:
    """Steps until settings.steps, each logged before the next begins, with evaluations and checkpoints."""
    metrics_file, rollouts_file = run / "metrics.jsonl", run / "rollouts.jsonl"
    with together():
        if rank() == 0:  # what a kill left: torn saves, and lines of steps that will be done again
            for torn in run.glob("checkpoints/*.tmp"):
                shutil.rmtree(torn)
            for path in (metrics_file, rollouts_file):
                write_atomically(path, (jsonl([r]) for r in each_record(path) if r["step"] <= state.step))
    logged = read_jsonl(metrics_file)
    done = evaluated(logged)
    history = [m for m in logged if "accuracy" in m]
    if settings.log == "tensorboard" and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter
        # what a killed run logged after its checkpoint is about to be done, and logged, again
        state.board = SummaryWriter(run / "tensorboard", purge_step=state.step + 1)
    terminal = sys.stdout.isatty() and sys.stderr.isatty()  # else, with `| tee log` too, plain lines
    with Interrupts() as state.interrupts, tqdm(
            total=settings.steps, initial=state.step, disable=not terminal, dynamic_ncols=True,
            bar_format="step {n_fmt}/{total_fmt} {bar:6} {desc}") as bar:
        try:
            if (state.step == 0 and state.judge and settings.check_judge and settings.reference == "right"
                    and "outcome" in state.judge.fixed):  # a judge of its own prompt may know steps only
                check_judge(state, settings, bar)
            while True:
                last = state.step == settings.steps
                start = state.step == 0
                save = not start and (last or settings.save_every and state.step % settings.save_every == 0)
                due = start or last or settings.eval_every and state.step % settings.eval_every == 0
                evaluate = state.held_out and due and state.step not in done
                if save or evaluate:
                    with together(state):
                        require_sound(state)
                if save:  # first: a kill while evaluating costs no step
                    save_checkpoint(state, run, settings)
                if evaluate:
                    evaluation(state, settings, run, bar)
                if last:
                    break
                metrics, records = train_step(state, settings, state.step + 1)
                append(rollouts_file, records)
                log(state, metrics_file, metrics)
                state.step += 1
                state.interrupts.settle()
                history.append(metrics)
                with together(phase="logging"):  # one process prints, perhaps to a pipe that is gone
                    report(bar, history, records, settings)
                    if gamed(history) and not gamed(history[:-1]):
                        bar.write(f"ALARM, step {state.step}: over the last 20 steps the judge's score rose "
                                  "while accuracy fell. The policy may be gaming the judge: read its "
                                  "best-graded wrong traces in rollouts.jsonl")
                if state.bad_updates >= 3:
                    raise Stop("the gradient was not finite in three updates in a row, which were skipped: "
                               "lower --lr, or check the model in --dtype float32")
            save_model(state, run)
        except BaseException as error:
            if isinstance(error, Stop) and error.records:
                append(rollouts_file, error.records)
            # Are the weights those of the last completed step? All processes raise a Stop, and only that.
            still = not state.interrupts.deferred if ranks() == 1 else isinstance(error, Stop)
            if state.step and still and not (isinstance(error, Stop) and error.broken):
                save_checkpoint(state, run, settings)
            raise


def check_judge(state: State, settings: Settings, bar) -> None:
    """--check-judge: sampled traces and their problems' references, graded before anything is trained."""
    state.phase = "judging"
    with together(state):
        if rank() == 0:
            problems = some_of_each(state.train, settings.check_judge)
            records = traces_of(state.policy, problems, 4, settings.max_new_tokens, settings.temperature,
                                settings.seed, state.sampler)
            word, reason = short_calibration(state.judge, problems, records, settings.seed)
            bar.write(f"judge, on {len(problems)} problems: {word}; {reason}")
            if word != "usable":
                bar.write("  WARNING: calibrate it with `python judge.py` before you trust this run "
                          "(--check-judge 0 skips this check)")


def evaluation(state: State, settings: Settings, run: Path, bar) -> None:
    """pass@k on the held-out problems -> a line of metrics.jsonl, the traces into evaluations/."""
    state.phase = "evaluating"
    # Always the same noise: before and after differ by the weights alone.
    places, start = share(len(state.held_out)), time.perf_counter()
    with together(state), tqdm(desc=f"evaluating, step {state.step}", total=len(places) * settings.eval_n,
                               unit="trace", leave=False, disable=bar.disable) as inner:
        records = traces_of(state.policy, [state.held_out[place] for place in places], settings.eval_n,
                            settings.max_new_tokens, settings.temperature, settings.seed << 32,
                            state.sampler, places, on_record=lambda *_: inner.update())
    records = in_order(places, records)
    metrics = summary(records, settings.eval_n, settings.eval_k)
    metrics["tokens_per_second"] = sum(r["tokens"] for r in records) / (time.perf_counter() - start)
    of = (f"{len(state.held_out)} problems ({fingerprint(state.held_out)}) x {settings.eval_n} traces, "
          f"at most {settings.max_new_tokens} tokens, temperature {settings.temperature}")
    with together(phase="evaluating"):
        if rank() == 0:
            (run / "evaluations").mkdir(exist_ok=True)
            write_atomically(run / "evaluations" / f"step_{state.step}.jsonl", jsonl(records))
        log(state, run / "metrics.jsonl", {"step": state.step, "held_out": of, **metrics})
        bar.write(f"step {state.step}: held out, " + ", ".join(
            f"pass@{k} {metrics[f'pass@{k}']:.1%}" for k in sorted(set(settings.eval_k))))


def evaluated(logged: list[dict]) -> set[int]:
    """The steps whose evaluation stands among the lines of metrics.jsonl."""
    return {m["step"] for m in logged if "accuracy" not in m}


def log(state: State, path: Path, metrics: dict) -> None:
    append(path, [metrics])
    if state.board:
        part = "training" if "accuracy" in metrics else "held-out"
        by_domain = {f"{name}/{domain}": value for domain, values in metrics.get("domains", {}).items()
                     for name, value in values.items()}
        for name, value in (metrics | by_domain).items():
            if isinstance(value, (int, float)):
                state.board.add_scalar(f"{part}/{name}", value, metrics["step"])
        state.board.flush()


SHOWN = dict(score=".3f", accuracy=".1%", nll=".3f", teacher_kl=".3f", length=".0f", unread=".0%")


def report(bar, history: list[dict], records: list[dict], settings: Settings) -> None:
    """The terminal: a live line, or without a terminal a plain line per step; and a trace now and then."""
    metrics = history[-1]
    facts = [f"{name} {metrics[name]:{form}}" for name, form in SHOWN.items()
             if metrics.get(name) is not None]
    facts.append(f"{metrics['sample_tok_s'] or metrics['train_tok_s']:,.0f} tok/s")
    left = (settings.steps - metrics["step"]) * mean(m["seconds"] for m in history[-20:])  # and evaluations
    line = "  ".join([duration(left) + " left"] * (left > 0) + facts)
    if bar.disable:
        print(f"step {metrics['step']}/{settings.steps}  {line}  {metrics['seconds']:.1f} s", flush=True)
    bar.n = metrics["step"]
    bar.set_description_str(line)
    if records and settings.show_every and metrics["step"] % settings.show_every == 0:
        record = records[metrics["step"] % len(records)]
        given = record["grades"] if settings.method in JUDGED else ()
        grades = " ".join("unread" if g is None else f"{1 + 4 * g:.2f}" for g in given)
        bar.write(f"--- step {metrics['step']}, {record['problem']}: {grades and f'grade {grades} of 5, '}"
                  f"{'right' if record['correct'] else 'wrong'}\n{record['text'].strip()}\n---")


def duration(seconds: float) -> str:
    return (f"{seconds:.0f} s" if seconds < 100 else
            f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h")


def closing_table(run: Path, settings: Settings) -> str:
    evaluations = [m for m in read_jsonl(run / "metrics.jsonl") if "accuracy" not in m]
    if not evaluations:
        return ""
    # a resumed run may evaluate on other problems, or for other k, than it began with
    after = evaluations[-1]
    before = next(m for m in evaluations if m.get("held_out") == after.get("held_out"))
    ks = [k for k in sorted(set(settings.eval_k)) if f"pass@{k}" in before.keys() & after.keys()]
    if not ks:
        return ""
    rows = [f"{'held-out problems':20s}" + "".join(f"{f'pass@{k}':>10s}  {'95% interval':16s}" for k in ks)]
    for name, m in (("before", before), ("after", after))[before is after :]:
        cells = (f"{m[f'pass@{k}']:10.1%}  {m[f'pass@{k}_low']:6.1%} ..{m[f'pass@{k}_high']:6.1%} "
                 for k in ks)
        rows.append(f"{name + ', step ' + str(m['step']):20s}" + " ".join(cells))
    if before is not evaluations[0]:
        rows.append(f"step {evaluations[0]['step']} is not shown, it was evaluated on something else: "
                    "see held_out in metrics.jsonl")
    return "\n".join(rows)


def enter(state: "State", phase: str) -> None:
    """Name what runs from here on, for error messages, and note how long the phase before took."""
    if state.device.startswith("cuda"):
        torch.cuda.synchronize(state.device)
    now = time.perf_counter()
    state.took[state.phase] = max(now - state.entered, 1e-9)
    state.phase, state.entered = phase, now


def mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def peak_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_jsonl(path: Path) -> list[dict]:
    return list(each_record(path))


def each_record(path: Path):
    """One at a time: a long run's traces are gigabytes. A line that no newline ends was torn by a kill, and
    is left out."""
    with open(path, "rb") if path.exists() else nullcontext(()) as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise SystemExit(f"{path}:{number}: damaged ({error}): delete that line") from error


def append(path: Path, records: list[dict]) -> None:
    if rank():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.write(jsonl(records))


# ------------------------------------------------------------------------------------------------------------
# Command line


EXAMPLES = """\
from first look to results
    python sample.py --model M --data D --n 4 --out traces.jsonl     what can the model do? (pass@k)
    python judge.py --judge J --data D --traces traces.jsonl         does the judge see it?
    python exprl.py --model M --judge J --data D --steps 10          score, accuracy, minutes a step
    python experiments/report.py runs/NAME                           curves, and every trace with its grades
    python exprl.py --resume runs/NAME --steps 200                   the rest
    python exprl.py --method grpo --model runs/NAME/checkpoints/step_200 --data D                    Stage II

memory is short while sampling or judging: lower --max-rows, then --max-new-tokens; while training: lower
--microbatch-tokens, then --checkpoint-activations. README.md explains every metric.
"""


CHOICES = dict(method=METHODS, overlong=("zero", "last", "judge", "drop"), norm=("std", "mean"),
               process_norm=("delta", "end", "step-mean"), step_view=("prefix", "segment"),
               step_credit=("zero", "score"), reference=("right", "none", "wrong"),
               distill_kl=("token", "full"), loss_mean=("token", "trace"), schedule=("constant", "cosine"),
               readout=READOUTS, log=("files", "tensorboard"), dtype=("auto", "float32", "bfloat16"))
# Flags that change what is compared in an ablation: elsewhere they would be ignored, and nobody would notice.
IGNORED_BY = dict(reference=("grpo", "sft", "distill"), distill_kl=(*JUDGED, "grpo", "sft"),
                  norm=("sft", "distill"), overlong=("sft", "distill"), loss_mean=("distill",),
                  **dict.fromkeys(("process_norm", "step_credit", "step_view", "outcome_domains"),
                                  ("outcome", "grpo", "sft", "distill")))


def command_line() -> argparse.ArgumentParser:
    """A flag per line of Settings, the comment there is its help. What is not given is not in the result."""
    parser = argparse.ArgumentParser(usage="python exprl.py [flags]", epilog=EXAMPLES,
                                     description=__doc__[: __doc__.index("Departures")],
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--preset", choices=PRESETS,
                      help="a set of defaults, which flags still change; miniature without --preset and "
                           "--model; paper and paper-stage2 are the authors' data and settings, their "
                           "judge's habits aside (see The paper's own runs in README.md)")
    base.add_argument("--resume", type=Path, metavar="RUN",
                      help="go on from the newest checkpoint of this run's folder, with its settings")
    source = Path(__file__).read_text().split("class Settings:")[1].split("\n\n\n")[0]
    for title, name, text in re.findall(r"^    (?:# (.+)|(\w+): [^#\n]+# (.+))$", source, re.MULTILINE):
        if title:
            group = parser.add_argument_group(title)
            continue
        default = getattr(Settings, name)
        several = isinstance(default, tuple)
        if default is False:
            options = dict(action="store_true")
        else:
            options = dict(nargs="+" if several else None, choices=CHOICES.get(name),
                           type=int if name == "eval_k" else str if several else type(default),
                           metavar=None if name in CHOICES else name.split("_")[-1].upper())
            shown = " ".join(map(str, default)) if several else str(default)
            text += f" (default: {shown})" if shown else ""
        group.add_argument(flag(name), help=text.replace("%", "%%"), **options)
    return parser


def parse(argv=None) -> tuple[Settings, Path | None]:
    """Flags -> (settings, run folder to resume). Defaults < preset or resumed run's config < flags given."""
    parser = command_line()
    given = vars(parser.parse_args(argv))
    preset, resume = given.pop("preset", None), given.pop("resume", None)
    if resume:
        try:
            base = json.loads((resume / "config.json").read_text())["settings"]  # a model's has none
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--resume {resume}: no config.json of a run there ({type(error).__name__}); name a "
                         "run's folder")
        known = {setting.name: setting.default for setting in dataclasses.fields(Settings)}
        if unknown := base.keys() - known.keys():
            parser.error(f"--resume {resume}: begun by other code, whose settings this does not have: "
                         f"{', '.join(sorted(unknown))}")
        base = known | base
        # what the run never heard, of a time when that was no error
        base |= {name: known[name] for name, methods in IGNORED_BY.items() if base["method"] in methods}
        base, given = from_anywhere(base), from_anywhere(given)
        for name in ("model", "data", "seed", "questions", "group", "out", "method",
                     *IGNORED_BY.keys() - {"overlong", "loss_mean"}):
            if given.get(name, base[name]) != base[name]:
                parser.error(f"--resume continues the same run: {flag(name)} cannot change")
        for name, value in given.items():
            if value != base[name]:
                print(f"from here on {flag(name)} {value}, it was {base[name]}", file=sys.stderr)
    else:
        named = preset or ("miniature" if "model" not in given else "")
        values = PRESETS.get(named, {"": {}})
        method = given.get("method", values[""].get("method", Settings.method))
        base = METHOD_DEFAULTS.get(method, {}) | values[""] | values.get(method, {})
        base = {name: v for name, v in base.items() if method not in IGNORED_BY.get(name, ())}
        if method == "process" and "outcome_domains" not in given:
            base.pop("norm", None)
        if preset:
            shown = ", ".join(f"{name} {value}" for name, value in base.items())
            print(f"preset {preset}, {method}: {shown}", file=sys.stderr)
        if named == "miniature" and "data" in given:
            base = base | {"eval_data": ()}
    values = from_anywhere(base | given).items()  # JSON and argparse make lists
    settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in values})
    if not settings.model:
        parser.error("--model is missing: this preset needs one")
    if not settings.eval_data and settings.data == Settings.data:
        settings = replace(settings, eval_data=settings.data)  # the same data set's test split
    for wrong, message in complaints(settings):
        if wrong:
            parser.error(message)
    for name in sorted({"clip_low", "clip_high", "dual_clip"} & given.keys()) * (settings.updates == 1):
        print(f"{flag(name)} has no effect with one update per step, whose ratio is 1: see --updates",
              file=sys.stderr)
    return replace(settings, judge=settings.judge or settings.model), resume


def from_anywhere(values: dict) -> dict:
    """With absolute paths of the models and data that lie here: --resume may be called from elsewhere."""
    def model(name):
        path = Path(name).expanduser()
        found = any((path / place / "config.json").exists() for place in ("", "model"))
        return str(path.absolute()) if name and found else name

    def data(spec):  # [DOMAIN=]FILE, or FOLDER[:CONFIG[:SPLIT]]
        domain, rest = split_domain(spec)
        source, colon, more = rest.partition(":")
        path = Path(source).expanduser()
        found = f"{domain and domain + '='}{path.absolute()}{colon}{more}"
        return found if source and path.exists() else spec

    names = {name: model(values[name]) for name in ("model", "judge") if name in values}
    return values | names | {name: list(map(data, values[name])) for name in ("data", "eval_data")
                             if name in values}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def complaints(s: Settings) -> list[tuple[bool, str]]:
    """What may be wrong with settings, before any long work starts: (is it so, message)."""
    least = dict.fromkeys(("steps", "questions", "group", "max_new_tokens", "max_prompt_tokens", "updates",
                           "microbatch_tokens", "max_rows", "eval_n", "keep"), 1)
    least |= dict.fromkeys(("seed", "check_judge", "max_unread", "weight_decay", "cache_gb", "eval_every",
                            "eval_limit", "save_every", "show_every"), 0)
    return [
        *((getattr(s, name) < low, f"{flag(name)} must be at least {low}") for name, low in least.items()),
        *((value != value, f"{flag(name)} must be a number") for name, value in vars(s).items()),
        *((s.method in methods and getattr(s, name) != getattr(Settings, name),
           f"{flag(name)} has no effect under --method {s.method}") for name, methods in IGNORED_BY.items()),
        (not 1e-4 <= s.temperature < math.inf,
         "--temperature must be at least 0.0001: greedy traces of a problem are all the same"),
        (s.method == "process" and s.norm != Settings.norm and not s.outcome_domains,
         "--norm has no effect under --method process without --outcome-domains: see --process-norm"),
        (s.step_credit != Settings.step_credit and s.process_norm != "delta",
         f"--step-credit has no effect under --process-norm {s.process_norm}"),
        (s.log == "tensorboard" and not importlib.util.find_spec("tensorboard"),
         "--log tensorboard needs a package that is not installed: pip install tensorboard"),
        (s.group < 2 and s.method not in ("sft", "distill") and not (
            s.method == "process" and s.process_norm in ("delta", "end") and not s.outcome_domains),
         "--group must be at least 2: a trace is compared with the others of its problem"),
        (s.updates > 1 and s.method in ("sft", "distill"),
         f"--method {s.method} has no ratio to clip: --updates must be 1"),
        (s.method == "distill" and s.distill_kl == "full" and (s.kl != 0 or s.entropy_bonus != 0),
         "--distill-kl full is a loss of its own: --kl and --entropy-bonus must be 0"),
        (s.updates * ranks() > s.questions,
         "--questions must be at least --updates x processes: in each update each needs a problem"),
        (ranks() > 1 and s.device not in ("auto", "cpu", "cuda"),
         "under torchrun each process takes the GPU of its number: --device auto"),
        (ranks() > 1 and s.judge_device.startswith("cuda"),
         "under torchrun --judge-device is +N: the judge of each process on a GPU of its own"),
        (s.judge_device[:1] == "+" and s.judge_device[1:].isdigit()
         and 0 < int(s.judge_device) < int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
         "--judge-device +N: N must be at least the number of processes, whose own GPUs train"),
        (s.seed >= 2**32, "--seed must be below 2^32: beside it a step's number has room in 64 bits"),
        (not 0 <= s.warmup <= 1, "--warmup is a share of the steps: it must lie between 0 and 1"),
        (s.judge_device.startswith("+") and not s.judge_device[1:].isdigit(),
         "--judge-device +N needs a number: the judge's GPU is the Nth after the process's own"),
        (max(s.eval_k) > s.eval_n or min(s.eval_k) < 1,
         f"--eval-k must lie between 1 and --eval-n {s.eval_n}"),
        (not 0 < s.lr < math.inf or s.kl < 0 or s.grad_clip <= 0,
         "need --lr > 0, --kl >= 0, --grad-clip > 0"),
        (not 0 <= s.clip_low <= 1 or s.clip_high < 0 or s.dual_clip <= 1,
         "need 0 <= --clip-low <= 1, --clip-high >= 0, --dual-clip > 1"),
    ]


def start_run(settings: Settings) -> tuple[Path, State]:
    """Build everything that can fail first, then the run's folder: a bad start leaves no folder behind."""
    # with the process's number: a loop over seeds starts several runs in the same second
    name = f"{Path(settings.model).name}-{settings.method}-{time.strftime('%m%d-%H%M%S')}-{os.getpid()}"
    run = Path(gather(settings.out or Path("runs") / name)[0])  # the clocks of processes differ
    with together():
        found = next(path for path in (run, *run.absolute().parents) if path.exists())
        if not found.is_dir() or not os.access(found, os.W_OK):
            raise SystemExit(f"{run} cannot be written: {found} is no folder to write in; choose another "
                             "--out")
        refuse_used(run)
    state = build_state(settings)
    with together():
        run.mkdir(parents=True, exist_ok=True)
        refuse_used(run)  # by now another may have begun in it
        state.lock = lock(run)
    return run, state


def refuse_used(run: Path) -> None:
    # a kill before config.json stands leaves these two, with which nothing can go on
    if rank() == 0 and run.exists() and {path.name for path in run.iterdir()} - {"lock", "config.json.tmp"}:
        raise SystemExit(f"{run} is not empty: --resume {run} goes on with it, or choose another --out")


def lock(run: Path):
    """Two programs must not write one run. Held while the file returned is open: a kill ends it, too."""
    if rank():
        return None
    file = open(run / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{run} is being trained by another program: wait for its end, or start a run of "
                         "your own, with another --out") from None
    except OSError:
        pass  # some network file systems have no locks
    return file


def resume_run(run: Path, settings: Settings) -> State:
    """The state of the newest checkpoint that is as it was written."""
    with together():
        held = lock(run)
    saved = gather(complete_checkpoints(run))[0]  # as one process sees the disk
    if saved and int(saved[-1].name[5:]) > settings.steps:
        raise SystemExit(f"{run} has already reached {saved[-1].name}, and --steps is {settings.steps}: "
                         "ask for more, or start a new run from one of its checkpoints: --model CHECKPOINT")
    # one process reads them, for all
    checkpoint = next((c for c in reversed(saved) if gather(rank() == 0 and intact(c))[0]), None)
    if saved and not checkpoint:
        raise SystemExit(f"no checkpoint of {run} can be used, see above: repair that, or start a new run, "
                         "with the weights of one of them if they load: --model CHECKPOINT")
    with together():
        if rank() == 0 and checkpoint:
            for damaged in saved[saved.index(checkpoint) + 1 :]:  # its step will be saved again
                aside = damaged.with_name(damaged.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
    state = build_state(settings, checkpoint and str(checkpoint))
    state.lock = held
    if checkpoint:
        restore(state, checkpoint)
    config = json.loads((run / "config.json").read_text())
    for name, digest in config.get("frozen", {}).items():
        if state.frozen.setdefault(name, digest) != digest:
            print(f"WARNING: the {name} is not what it was when {run} stopped (its weights or prompts): from "
                  "here on this is another run", file=sys.stderr)
    if fingerprint(state.train) != config["train_fingerprint"]:
        raise SystemExit(f"the training data is not the one {run} was started with: restore it (and "
                         "--max-prompt-tokens, --max-new-tokens, --judge and --readout, by which problems "
                         "are left out), or start a new run")
    print(f"resuming {run} after step {state.step} of {settings.steps}")
    if state.step == settings.steps and state.step in evaluated(read_jsonl(run / "metrics.jsonl")):
        print(f"nothing is left to do: --steps for more, and `python sample.py --model {run / 'model'} ...` "
              "evaluates it on other data or with other flags")
    return state


def dry_run(settings: Settings) -> None:
    """The memory of a step on this device: computed, then measured at full length. Writes nothing.

    Full length: the longest prompts (SFT: the longest with their references), no end token, and a gradient
    for every trace; AdamW has its moments."""
    state = build_state(settings)
    sft, shape = settings.method == "sft", settings
    lengths = {p.id: (len(state.policy.chat(p.question)), len(reference_ids(state.policy, p)) if sft else 0)
               for p in state.train}
    state.train = sorted(state.train, key=lambda p: -sum(lengths[p.id]))[: settings.questions]
    prompt, reference = lengths[state.train[0].id]
    if sft:  # nothing is sampled: the references are as long as they are
        shape = replace(settings, group=1, max_new_tokens=reference)
    judge = None if state.judge is None or state.judge.model is state.reference else state.judge.model.config
    from experiments.memory import memory, table
    parts = memory(state.policy.model.config, shape, ranks(), state.dtype, state.device.split(":")[0],
                   prompt, judge)
    print(f"computed, a process, prompts of {prompt} tokens and traces of {shape.max_new_tokens}:\n"
          f"{table(parts)}", flush=True)
    state.sampling.generation_config.eos_token_id = -1
    for parameter in state.policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    forced = replace(settings, overlong="judge", max_unread=1.0, entropy_bonus=settings.entropy_bonus or 1e-9)
    try:
        optimizer_step(state, settings, 0.0)
        metrics, _ = train_step(state, forced, 1)
    except Stop:
        raise
    except Exception as error:
        give_up(error, explain(error, state.phase))
    print(f"measured{'' if state.device.startswith('cuda') else ', libraries included'}: "
          f"{metrics['peak_gb']:.2f} GB, {metrics['seconds']:.0f} s")


def give_up(error: Exception, message: str) -> None:
    if ranks() > 1:  # others may wait for this one in an update: say it here, and end at once
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)
    raise SystemExit(message) from error


def leave_nothing(state: State, run: Path, resume: Path | None) -> bool:
    """After a refusal: delete the folder of a run in which nothing was done. Was it one?"""
    if resume or rank() or read_jsonl(run / "metrics.jsonl"):
        return False
    state.lock.close()
    shutil.rmtree(run, ignore_errors=True)
    return True


def main(argv=None) -> None:
    join()
    settings, resume = parse(argv)
    torch.manual_seed(settings.seed)  # nothing below draws from it; a fork that does stays reproducible
    try:
        if settings.dry_run:
            return dry_run(settings)
        run, state = (resume, resume_run(resume, settings)) if resume else start_run(settings)
    except Stop as stop:
        raise SystemExit(str(stop) if rank() == 0 else 1) from stop
    except Exception as error:
        give_up(error, explain(error))
    config = {"settings": dataclasses.asdict(settings), "train_fingerprint": fingerprint(state.train),
              "frozen": state.frozen,
              "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}}
    size = sum(p.numel() for p in state.policy.model.parameters()) / 1e6
    judge = ("no judge" + " (exact match)" * (settings.method == "grpo") if state.judge is None
             else f"judge {settings.judge}, {state.judge.about}")
    print(f"ExpRL {settings.method}: {settings.model} ({size:.1f}M parameters), {judge}, "
          f"{len(state.train)} problems, {settings.questions} "
          + ("references" if settings.method == "sft" else f"x {settings.group} traces") + " a step, "
          + (f"{ranks()} processes, " if ranks() > 1 else "")
          + f"{state.device} {str(state.dtype)[6:]}; run {run}")
    go_on = (f"to go on: {'torchrun ... ' if ranks() > 1 else 'python '}exprl.py --resume "
             f"{shlex.quote(str(run))}")
    try:
        if rank() == 0 and state.step < settings.steps:  # else nothing will be done with these settings
            write_atomically(run / "config.json", json.dumps(config, indent=1) + "\n")
        run_training(state, settings, run)
    except Stop as stop:
        if stop.refused and leave_nothing(state, run, resume):
            go_on = "nothing was begun"
        print(f"\n{stop}; {go_on}", file=sys.stderr)
        # a signal's own exit status, so that a script does not go on with what comes next
        raise SystemExit(1 if stop.by is None else 128 + stop.by) from stop
    except Exception as error:
        begun = (run / "config.json").exists()
        if (isinstance(error, Refused) or not begun) and leave_nothing(state, run, resume):
            go_on = "nothing was begun"
        give_up(error, f"{explain(error, state.phase)}\n{go_on}")
    finally:
        if state.lock:
            state.lock.close()
    print(closing_table(run, settings))
    print(f"run: {run}   (metrics.jsonl, rollouts.jsonl, model/)")
    if settings.model == PRESETS["miniature"][""]["model"]:
        if settings.method != "grpo":
            print("next: the same with sparse rewards, to compare:  python exprl.py --method grpo")
        print("next: on a real model:                           "
              "python exprl.py --model Qwen2.5-0.5B-Instruct")
    else:
        print(f"next: python sample.py --model {shlex.quote(str(run / 'model'))} --data YOUR_TEST_SET --n 16 "
              f"--temperature {settings.temperature} --max-new-tokens {settings.max_new_tokens} "
              f"--max-prompt-tokens {settings.max_prompt_tokens}")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if ranks() == 1:
            raise
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        leave(end.code if isinstance(end.code, int) else bool(end.code))
    leave()
