"""Sampling and judging beside transformers, in one run: what `python sample.py --bench` calls.

    python sample.py --bench Qwen2.5-0.5B-Instruct --model SmolLM2-135M-Instruct --data openai/gsm8k:main:test
    python experiments/bench_sampler.py --model M --judge J --data gsm8k.jsonl --tokens 256 --rows 64 16
                                     # on a GPU also: rows, context, ragged rollouts (Qwen2.5-1.5B's shape)

Per line of results/sampler_bench.csv: what was done, by whom, dtype, rows, new tokens at most, useful tokens
(up to a row's end token), wall seconds, CPU seconds of the process (what another load on the machine does not
change), and useful tokens per second of each. Peers get the same prompts, weights and temperature. Peers
alternate within a round; the fastest round counts.
"""

import argparse
import csv
import datetime
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from data import load_problems  # noqa: E402
from judge import Judge  # noqa: E402
from sample import Sampler, load_lm  # noqa: E402

OUT = ROOT / "experiments" / "results" / "sampler_bench.csv"


def clock(run):
    """(result, wall seconds, CPU seconds)"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def padded(model, prompts):
    """Left-padded ids and mask, as generate wants them."""
    width, pad = max(map(len, prompts)), model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    return ids, mask


@torch.inference_mode()
def generate(model, prompts, n, tokens, temperature):
    """transformers' generate on all rows at once -> useful tokens of each row."""
    ids, mask = padded(model, [p for p in prompts for _ in range(n)])
    options = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else (
        dict(do_sample=False))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **options)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    new = out[:, ids.shape[1]:].tolist()
    return [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new]


def race(ways: dict, rounds: int) -> dict:
    """Each way once a round, in turn -> label: (result, wall, cpu) of its fastest round."""
    best = {}
    for _ in range(rounds):
        for label, run in ways.items():
            took = clock(run)
            if label not in best or took[2] < best[label][2]:
                best[label] = took
            print(f"  {label}: {took[1]:.1f} s, CPU {took[2]:.1f} s", flush=True)
    return best


def sampling(lm, problems, rows_list, tokens, rounds):
    """Questions x 8 traces at temperature 0.8, refilled only by what the rows allow."""
    for rows in rows_list:
        prompts = [lm.chat(p.question) for p in problems[: rows // 8]]
        sampler = Sampler(lm.model, rows)
        best = race({
            "sample.py": lambda: [len(r.token_ids) for r in sampler.sample(prompts, 8, tokens, 0.8)],
            "transformers generate": lambda: generate(lm.model, prompts, 8, tokens, 0.8)}, rounds)
        for label, (lengths, wall, cpu) in best.items():
            yield dict(what="sampling", by=label, rows=rows, tokens=tokens, useful=sum(lengths), wall=wall,
                       cpu=cpu)


def whole_prompt(judge, problem, trace):
    before, after = judge.prompt(problem)
    return before + judge.quote(trace) + after


@torch.inference_mode()
def padded_grades(judge, problems, traces, batch=8):
    """The expected grade with each prompt alone, in padded batches through transformers' own attention."""
    prompts = [whole_prompt(judge, p, t) + judge.stem for p, t in zip(problems, traces)]
    order, out = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [0.0] * len(prompts)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        ids, mask = padded(judge.model, [prompts[i] for i in some])
        logits = judge.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                             logits_to_keep=1).logits[:, -1, judge.digit_ids].float()
        for i, p in zip(some, logits.softmax(-1).cpu()):
            out[i] = float(p @ torch.arange(1.0, 6.0) - 1) / 4
    return out


def prefix_grades(judge, problems, traces, steps=6):
    """The grades of `steps` prefixes of each trace, as --method process asks for them."""
    cut = [[t[len(t) * k // steps : len(t) * (k + 1) // steps] for k in range(steps)] for t in traces]
    return judge.grade(problems, cut, "prefix")


def judging(lm, problems, texts, rounds, reply):
    """4 problems x 8 traces, and 6 prefixes of each."""
    group = [p for p in problems[: len(texts) // 8] for _ in range(8)]
    judge = Judge(lm.model, lm.tokenizer, readout="expected")
    free = Judge(lm.model, lm.tokenizer, readout="generate", reply_tokens=reply)
    asked = [whole_prompt(free, p, t) for p, t in zip(group, texts)]
    best = race({
        "sample.py, shared pages": lambda: [v.grades[0] for v in judge.grade(group, texts)],
        "each prompt alone, padded batches": lambda: padded_grades(judge, group, texts),
        "sample.py, 6 prefixes of each trace": lambda: prefix_grades(judge, group, texts)}, rounds)
    gap = max(abs(a - b) for a, b in zip(best["sample.py, shared pages"][0],
                                         best["each prompt alone, padded batches"][0]))
    print(f"  largest difference of a grade between shared pages and alone: {gap:.2g}")
    best |= race({f"transformers generate, at most {reply} tokens":
                  lambda: generate(lm.model, asked, 1, reply, 0.0)}, 1)
    for label, (_, wall, cpu) in best.items():
        yield dict(what="judging", by=label, rows=len(texts), tokens="", useful=len(texts), wall=wall,
                   cpu=cpu)


def sweep(rounds=3):
    """CUDA only: tokens/s of Qwen2.5-1.5B's shape, random weights, by rows and by context."""
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768,
        tie_word_embeddings=True, eos_token_id=0)
    with torch.device("cuda"):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    cases = [(rows, 1024) for rows in (1, 4, 16, 64, 256, 512, 1024)] + [(64, c) for c in (256, 4096, 16384)]
    for rows, context in cases:
        prompts = [[(7 * i + r) % 1000 + 1 for i in range(context - 64)] for r in range(rows)]
        sampler = Sampler(model, rows)
        took = {}
        for tokens in (8, 136):  # the difference leaves prefill and capture out
            sampler.sample(prompts, 1, tokens, 1.0, end_ids=[])
            took[tokens] = min(clock(lambda: sampler.sample(prompts, 1, tokens, 1.0, end_ids=[]))[1]
                               for _ in range(rounds))
        wall = took[136] - took[8]
        print(f"  {rows} rows, context {context}: {128 * rows / wall:.0f} tokens/s", flush=True)
        yield dict(what=f"decode at context {context}", by="sample.py", rows=rows, tokens=128,
                   useful=128 * rows, wall=wall, cpu="")
        del sampler
        torch.cuda.empty_cache()
    # ragged: 1,024 rollouts, end tokens at random, beside generate and continuous batching
    prompts = [[(7 * i + r) % 1000 + 1 for i in range(64 + r % 448)] for r in range(128)]
    limits = dict(max_new_tokens=512, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    sampler = Sampler(model, 1024)
    ends = list(range(0, 151936, 300))  # a random model ends after about 300 tokens
    model.generation_config.eos_token_id = ends

    def ours():
        return sum(len(r.token_ids) for r in sampler.sample(prompts, 8, 512, 1.0, end_ids=ends))

    def continuous():
        done = model.generate_batch(
            [p for p in prompts for _ in range(8)],
            generation_config=transformers.GenerationConfig(**limits, eos_token_id=ends))
        return sum(len(output.generated_tokens) for output in done.values())

    ways = {"sample.py": ours, "transformers generate": lambda: sum(generate(model, prompts, 8, 512, 1.0)),
            "transformers continuous batching": continuous}
    for label, way in ways.items():
        try:
            way()
            useful, wall, _ = clock(way)
        except Exception as error:  # a peer that does not run here must not cost the others' numbers
            print(f"  {label}: {error!r}")
            continue
        print(f"  {label}: {useful / wall:.0f} tokens/s", flush=True)
        yield dict(what="ragged rollouts", by=label, rows=1024, tokens=512, useful=useful, wall=wall, cpu="")


def main(model, judge="", data="openai/gsm8k:main:test", device="cpu",
         dtypes=("bfloat16", "float32"), rows=(64, 16), tokens=256, rounds=2, judge_problems=4,
         out=OUT):
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    about = dict(machine=machine, torch=torch.__version__, transformers=transformers.__version__,
                 date=datetime.date.today().isoformat(),
                 command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    print(", ".join(map(str, about.values())))
    problems = load_problems([data], split="test")
    lines = []

    def add(dtype, found):
        for line in found:
            lines.append(dict(what=line.pop("what"), by=line.pop("by"), dtype=dtype) | line)

    for dtype in dtypes if rows else ():
        print(f"sampling, {model}, {dtype}")
        add(dtype, sampling(load_lm(model, device, getattr(torch, dtype)), problems, rows, tokens, rounds))
    if judge:
        print(f"judging, {judge}, bfloat16")
        # stand-ins for traces, of about a trace's length: the reference twice, cut at eight places
        texts = [2 * f"{p.solution}\n\n" for p in problems[:judge_problems]]
        texts = [text[: len(text) * (8 + k) // 15] for text in texts for k in range(8)]
        add("bfloat16", judging(load_lm(judge, device, torch.bfloat16), problems, texts, rounds,
                                tokens))
    if device.startswith("cuda"):
        add("bfloat16", sweep())
    for line in lines:
        for kind in ("wall", "cpu"):
            line[f"per_{kind}_second"] = f"{line['useful'] / line[kind]:.4g}" if line[kind] else ""
            line[kind] = line[kind] and f"{line[kind]:.4g}"
        print(f"{line['what']:10} {line['dtype']:9} {line['rows']:5} rows  {line['by']:44} "
              f"{line['per_wall_second']:>8} /s  {line['per_cpu_second']:>8} /CPU s")
    out.parent.mkdir(exist_ok=True)
    with open(out, "a", newline="") as file:
        table = csv.DictWriter(file, [*lines[0], *about])
        if not file.tell():
            table.writeheader()
        table.writerows(line | about for line in lines)
    print(f"appended to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--judge", default="", help="also time judging with this model")
    parser.add_argument("--data", default="openai/gsm8k:main:test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--rows", nargs="*", type=int, default=[64, 16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--judge-problems", type=int, default=4, help="of 8 traces each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    main(**vars(parser.parse_args()))
