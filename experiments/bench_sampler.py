"""Sampling and judging beside transformers, in one run: what `python sample.py --bench` calls.

    python sample.py --bench Qwen2.5-0.5B-Instruct --model SmolLM2-135M-Instruct --data openai/gsm8k:main:test
    python experiments/bench_sampler.py --model M --judge J --data gsm8k.jsonl --tokens 256 --rows 64 16
                                     # on a GPU also: rows, context, ragged rollouts (Qwen2.5-1.5B's shape)

Per line of sampler_bench.csv (here, or where --out says): what was done, by whom, dtype, rows, new tokens at
most, useful tokens (up to a row's end token), wall seconds, CPU seconds of the process (what another load on
the machine does not change), and useful tokens per second of each. Peers get the same prompts, weights and
temperature. Peers alternate within a round; the fastest round counts.
"""

import argparse
import csv
import datetime
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import transformers  # noqa: E402

from data import load_problems  # noqa: E402
from experiments.bench_head import cpu_name  # noqa: E402
from judge import Judge  # noqa: E402
from kernels.token_logprob import fast_dtype  # noqa: E402
from sample import PAGE, Linear, Network, Rows, Sampler, Trace, load_lm, trace_noise  # noqa: E402

OUT = Path("sampler_bench.csv")
PARTS = "sampling", "judging", "steps", "ragged"
COLORS = ("#1b6ca8", "#c8553d", "#7fb2d9", "#e3a899")


def clock(run):
    """(result, wall seconds, CPU seconds)"""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def fastest(run, rounds):
    """(wall, CPU) seconds, each of its fastest round, after one that does not count."""
    times = [clock(run)[1:] for _ in range(rounds + 1)]
    return tuple(map(min, zip(*times[1:])))


def padded(model, prompts):
    """Left-padded ids and mask, as generate wants them."""
    width, pad = max(map(len, prompts)), model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    return ids, mask


@torch.inference_mode()
def generate(model, prompts, n, tokens, temperature, least=0):
    """transformers' generate on all rows at once, none shorter than `least` -> useful tokens of each row."""
    ids, mask = padded(model, [p for p in prompts for _ in range(n)])
    options = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0) if temperature else (
        dict(do_sample=False))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=least,
                         pad_token_id=0, repetition_penalty=1.0, **options)  # many models' own is 1.1
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
    if 8 * len(problems) < max(rows_list):
        raise SystemExit(f"--data has {len(problems)} problems, {max(rows_list)} rows take "
                         f"{max(rows_list) // 8}")
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


def judging(policy, lm, problems, rounds, tokens):
    """8 traces a problem by the policy, at most `tokens` long, and 6 prefixes of each. `generate` is asked as
    by the readout of that name. What it costs depends on what the judge has to say, a small one often no more
    than a grade: so its own replies until every row has ended, and replies of a given length. (The paper's
    judge writes some 500 to 700 tokens.)"""
    rollouts = Sampler(policy.model).sample([policy.chat(p.question) for p in problems], 8, tokens, 0.8)
    texts, group = [policy.text(r.token_ids) for r in rollouts], [p for p in problems for _ in range(8)]
    judge = Judge(lm.model, lm.tokenizer, readout="expected")
    free = Judge(lm.model, lm.tokenizer, readout="generate")
    asked = [whole_prompt(free, p, t) for p, t in zip(group, texts)]
    best = race({
        "sample.py, shared pages": lambda: [v.grades[0] for v in judge.grade(group, texts)],
        "each prompt alone, padded batches": lambda: padded_grades(judge, group, texts),
        "sample.py, 6 prefixes of each trace": lambda: prefix_grades(judge, group, texts)}, rounds)
    gap = float(np.abs(np.subtract(best["sample.py, shared pages"][0],
                                   best["each prompt alone, padded batches"][0])).max())  # NaN if one is
    print(f"  largest difference of a grade between shared pages and alone: {gap:.2g}")
    if not math.isfinite(gap):
        print("  no numbers: some grade could not be read, perhaps a prompt exceeds the judge's context")
        return
    replies = race({f"transformers generate, replies of {length} tokens":
                    lambda length=length: generate(lm.model, asked, 1, length, 0.0, least=length)
                    for length in (256, 512)}
                   | {"own": lambda: generate(lm.model, asked, 1, free.reply_tokens, 0.0)}, 1)
    own = replies.pop("own")
    best |= replies | {f"transformers generate, own replies of {min(own[0])} to {max(own[0])} tokens": own}
    for label, (_, wall, cpu) in best.items():
        yield dict(what="judging", by=label, rows=len(texts), tokens="", useful=len(texts), wall=wall,
                   cpu=cpu)


@torch.inference_mode()
def decode_step(model, rows, context, rounds=4):
    """(wall, CPU) seconds of the fastest step: `rows` rows with `context` tokens each, no page shared."""
    width = context // PAGE + 1
    sampler, live = Sampler(model, rows, cache_gb=64), Rows(rows, width, rows, rounds + 1, 1.0, 0, [])
    with sampler.open(rows + 2, width) as cache:
        if sampler.replay:
            live.buffer = sampler.replay.host.numpy()
        for r in range(rows):
            live.noise[r] = trace_noise(0, r, rounds + 1)
            live.add(Trace([0] * (context + 1), r, r, pages=cache.take(width)))
        cache.pool.fill_(0.01)  # memory that was never written would all be read from one place
        took = fastest(lambda: sampler.step(cache, live), rounds)
        for trace in live.traces:
            cache.drop(trace.pages)
    return took


@torch.inference_mode()
def products(model, rows, rounds=4):
    """The same for a step's matrix products alone, that is, for reading all weights once."""
    network = Network(model)
    linears = [x for layer in network.layers for x in layer if isinstance(x, Linear)] + [network.head]
    widths = {linear.modules[0].in_features for linear in linears}
    x = {d: torch.randn(rows, d, device=model.device).to(network.dtype) for d in widths}
    return fastest(lambda: [linear(x[linear.modules[0].in_features]) for linear in linears], rounds)


@torch.inference_mode()
def prefill(model, prompts=64, tokens=300, rounds=4):
    """(wall, CPU) seconds of the fastest prefill of different prompts."""
    ids = [[(i * t) % 997 for t in range(tokens)] for i in range(1, prompts + 1)]
    sampler = Sampler(model)
    return fastest(lambda: sampler.next_logits(ids, [0]), rounds)


def steps(model):
    """What a decode step costs, by rows and by context, and on a GPU 64 prompts of 300 tokens."""
    cuda = model.device.type == "cuda"
    if cuda:
        wall, cpu = prefill(model)
        yield dict(what="prefill", by="sample.py", rows=64, tokens=300, useful=64 * 300, wall=wall, cpu=cpu)
    rows, context = ((1, 4, 16, 64, 256, 512, 1024), 1024) if cuda else ((1, 4, 16, 64), 256)
    few, contexts = (64, (256, 4096, 16384)) if cuda else (16, (64, 1024, 4096))
    for r, c in [(r, context) for r in rows] + [(few, c) for c in contexts]:
        wall, cpu = decode_step(model, r, c)
        yield dict(what=f"decode step, context {c}", by="sample.py", rows=r, tokens=1, useful=r, wall=wall,
                   cpu=cpu)
    for r in rows:
        wall, cpu = products(model, r)
        yield dict(what="decode step", by="its matrix products alone", rows=r, tokens=1, useful=r, wall=wall,
                   cpu=cpu)


def figure(lines, clock) -> str:
    """Milliseconds of a decode step by rows and by context, both axes logarithmic, as SVG."""
    curves: dict = {}  # (panel, label): [(rows or context, ms)]
    context = {line["what"].rsplit(" ", 1)[-1] for line in lines if line["rows"] == 1 and "," in line["what"]}
    few = {line["rows"] for line in lines if line["what"].rsplit(" ", 1)[-1] not in context | {"step"}}
    for line in lines:
        at, ms = line["what"].rsplit(" ", 1)[-1], 1000 * float(line[clock])
        label = f"{line['by']}, {line['dtype']}"
        if at in context or at == "step":
            curves.setdefault((0, label), []).append((line["rows"], ms))
        if line["rows"] in few and at != "step":
            curves.setdefault((1, label), []).append((int(at), ms))
    labels, parts, width, height = sorted({label for _, label in curves}), [], 360, 240
    low, high = (f(ms for curve in curves.values() for _, ms in curve) for f in (min, max))
    for panel in (0, 1):
        found = {label: sorted(curve) for (where, label), curve in curves.items() if where == panel}
        ticks = sorted({x for curve in found.values() for x, _ in curve})
        left = 60 + panel * (width + 70)

        def place(x, ms):
            return (left + width * math.log(x / ticks[0]) / math.log(ticks[-1] / ticks[0]),
                    40 + height * (1 - math.log(ms / low) / math.log(high / low)))

        name = f"rows (context {min(context)})" if panel == 0 else f"tokens of context ({min(few)} rows)"
        parts.append(f'<text x="{left}" y="20">ms a decode step ({clock}), by {name}</text>')
        for x in ticks:
            at = place(x, low)[0]
            parts.append(f'<text x="{at:.0f}" y="{height + 60}" text-anchor="middle">{x}</text>')
        for ms in (10**e * k for e in range(-2, 5) for k in (1, 2, 5)):
            if low <= ms <= high:
                y = place(ticks[0], ms)[1]
                parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#ddd"/><text x="{left - 8}" '
                             f'y="{y + 4:.1f}" text-anchor="end">{ms:g}</text>')
        for label, curve in found.items():
            points = " ".join("{:.1f},{:.1f}".format(*place(x, ms)) for x, ms in curve)
            parts.append(f'<polyline points="{points}" fill="none" stroke-width="2" '
                         f'stroke="{COLORS[labels.index(label)]}"/>')
    for i, label in enumerate(labels):
        parts.append(f'<text x="{60 + 400 * (i % 2)}" y="{height + 90 + 18 * (i // 2)}" '
                     f'fill="{COLORS[i]}">{label}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + 160} {height + 130}" '
            f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
            f"{''.join(parts)}</svg>\n")


def big_model():
    """Qwen2.5-1.5B's shape, random weights: CUDA only."""
    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=32768,
        tie_word_embeddings=True, eos_token_id=0)
    with torch.device("cuda"):
        return transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


def ragged(model, deadline=30):
    """1,024 rollouts that end at random, beside generate and continuous batching. The latter is timed from
    when it has its cache and graphs, and left after `deadline` seconds, with what it has finished by then."""
    prompts = [[(7 * i + r) % 1000 + 1 for i in range(64 + r % 448)] for r in range(128)]
    sampler = Sampler(model, 1024)
    ends = list(range(0, 151936, 300))  # a random model ends after about 300 tokens
    model.generation_config.eos_token_id = ends

    # Each way: the lengths of its rollouts, and wall seconds.
    def ours(prompts, tokens):
        rollouts, wall, _ = clock(lambda: sampler.sample(prompts, 8, tokens, 1.0, end_ids=ends))
        return [len(r.token_ids) for r in rollouts], wall

    def plain(prompts, tokens):
        return clock(lambda: generate(model, prompts, 8, tokens, 1.0))[:2]

    def continuous(prompts, tokens):
        config = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=ends)
        lengths = []
        with model.continuous_batching_context_manager(generation_config=config) as manager:
            start = time.perf_counter()
            manager.add_requests([p for p in prompts for _ in range(8)], max_new_tokens=tokens)
            while (len(lengths) < 8 * len(prompts) and time.perf_counter() < start + deadline
                   and manager.is_running()):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    lengths.append(len(output.generated_tokens))
            seconds = time.perf_counter() - start
            manager.stop(hard_stop=True)
        if not lengths or len(lengths) < 8 * len(prompts) and seconds < deadline:
            raise RuntimeError(f"it stopped after {len(lengths)} rollouts")
        return lengths, seconds

    ways = {"sample.py": ours,
            "transformers generate": plain,
            "transformers continuous batching": continuous}
    for label, way in ways.items():
        try:
            way(*((prompts, 512) if way is ours else (prompts[:2], 8)))  # captures, compiles
            lengths, wall = way(prompts, 512)
        except Exception as error:  # a peer that does not run here must not cost the others' numbers
            print(f"  {label}: {error!r}")
            continue
        rows, useful = len(lengths), sum(lengths)
        print(f"  {label}: {useful / wall:.0f} tokens/s, {rows} rollouts in {wall:.1f} s", flush=True)
        yield dict(what="ragged rollouts", by=label, rows=rows, tokens=512, useful=useful, wall=wall, cpu="")


def main(model, judge="", data="openai/gsm8k:main:test", device="cpu", what=PARTS, dtypes=None, rows=(64, 16),
         tokens=256, rounds=2, judge_problems=4, out=OUT):
    if any(r < 8 or r % 8 for r in rows):
        raise SystemExit(f"--rows {rows}: a question has 8 traces, so take multiples of 8")
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else (
        f"{cpu_name()}, {torch.get_num_threads()} threads")
    about = dict(machine=machine, torch=torch.__version__, transformers=transformers.__version__,
                 date=datetime.date.today().isoformat(),
                 command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    print(", ".join(map(str, about.values())))
    problems = load_problems([data], split="test")
    # first what the machine computes fast: judging is timed in that one
    fast = fast_dtype(torch.bfloat16, device.split(":")[0]) == torch.bfloat16
    dtypes = dtypes or (("bfloat16", "float32") if fast else ("float32", "bfloat16"))
    lines = []
    out.parent.mkdir(parents=True, exist_ok=True)

    def add(dtype, found):
        """Each line goes into the file at once: a bench that is stopped keeps what it has measured."""
        for line in found:
            line = dict(what=line.pop("what"), by=line.pop("by"), dtype=dtype) | line
            lines.append(line)
            row = line | {kind: line[kind] and f"{line[kind]:.4g}" for kind in ("wall", "cpu")} | {
                f"per_{kind}_second": f"{line['useful'] / line[kind]:.4g}" if line[kind] else ""
                for kind in ("wall", "cpu")}
            print(f"{row['what']:26} {row['dtype']:9} {row['rows']:5} rows  {row['by']:44} "
                  f"{row['per_wall_second']:>8} /s  {row['per_cpu_second']:>8} /CPU s", flush=True)
            with open(out, "a", newline="") as file:
                table = csv.DictWriter(file, [*row, *about], lineterminator="\n")
                if not file.tell():
                    table.writeheader()
                table.writerow(row | about)

    for dtype in dtypes if {"sampling", "judging"} & set(what) or not device.startswith("cuda") else ():
        lm = load_lm(model, device, getattr(torch, dtype))
        if "sampling" in what:
            print(f"sampling, {model}, {dtype}")
            add(dtype, sampling(lm, problems, rows, tokens, rounds))
        if "judging" in what and judge and dtype == dtypes[0]:
            print(f"judging, {judge}, {dtype}")
            add(dtype, judging(lm, load_lm(judge, device, lm.model.dtype), problems[:judge_problems], rounds,
                               tokens))
        if "steps" in what and not device.startswith("cuda"):
            add(dtype, steps(lm.model))
    if device.startswith("cuda"):
        net = big_model()
        if "steps" in what:
            add("bfloat16", steps(net))
        if "ragged" in what:
            add("bfloat16", ragged(net))
    if not lines:
        raise SystemExit("nothing was measured: judging wants --judge, ragged a GPU")
    step_lines = [line for line in lines if line["what"].startswith("decode step")]
    if step_lines:
        kind = "wall" if device.startswith("cuda") else "cpu"
        out.with_name(out.stem + "_steps.svg").write_text(figure(step_lines, kind))
    print(f"appended to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--judge", default="", help="also time judging with this model")
    parser.add_argument("--data", default="openai/gsm8k:main:test")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="*", help="default: both, first the machine's faster one")
    parser.add_argument("--rows", nargs="*", type=int, default=[64, 16])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--judge-problems", type=int, default=4, help="of 8 traces each")
    parser.add_argument("--what", nargs="*", choices=PARTS, default=PARTS, help="ragged: on a GPU only")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    main(**vars(parser.parse_args()))
