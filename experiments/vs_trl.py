"""A whole training step beside TRL's GRPOTrainer: the same job, in turns, each run in a process of its own.

    pip install trl                       # into the environment of the project
    python experiments/vs_trl.py --model SmolLM2-135M-Instruct --data gsm8k_train.jsonl --out FILE.csv

The job: 8 problems x 8 traces of at most 128 tokens a step, sampling included; float32 master weights,
compute in --dtype (on a CPU without instructions for bfloat16 exprl.py takes float32, TRL what it is told);
GRPO with the same reward function (the share of digits in a trace: it differs within every group, so that no
row can be skipped), one update, no KL, AdamW. Both get the same prompts and about the same number of traces
per micro-batch. What TRL offers for speed here is on: no activation checkpointing (its default is on: less
memory, slower; `--ways trl-default` takes it), fused AdamW, its fused head. `trl-bf16` also holds its master
weights in bfloat16, which is a different, less exact job. vLLM needs a GPU.

Per line of the CSV: way, round, step, wall seconds, CPU seconds of the process (what another load on the
machine changes little), sampled tokens, and the peak memory of the process until then, loading included.
"""

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import exprl  # noqa: E402  before trl: see the note on the name `kernels` in sample.py
import torch  # noqa: E402
from experiments.bench_head import cpu_name  # noqa: E402

TEMPERATURE, LR, CLIP_LOW, CLIP_HIGH = 0.8, 1e-6, 0.2, 0.28
WAYS = ("exprl", "trl", "trl-default", "trl-bf16")


def share_of_digits(completions, **_) -> list[float]:
    """The reward of both: TRL calls it as it stands, exprl.py through `method` below."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def method(state, settings, traces):
    """An own reward in exprl.py: a function from traces to a batch with advantages, and a line in METHODS."""
    verdicts = {i: exprl.Verdict((reward,)) for i, reward in enumerate(share_of_digits(traces.texts))}
    return exprl.credit(settings, exprl.collate(traces.rollouts, state.device), verdicts)


class Laps:
    """Seconds of each step, as a line of JSON on stdout."""

    def __init__(self, device: str):
        self.device, self.out = device, sys.stdout
        self.start()

    def start(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self, step: int, tokens: float):
        wall, cpu = self.wall, self.cpu
        self.start()
        print(json.dumps(dict(step=step, wall=self.wall - wall, cpu=self.cpu - cpu, tokens=round(tokens),
                              peak_gb=exprl.peak_gb(self.device))), file=self.out, flush=True)


def settings_of(args) -> exprl.Settings:
    exprl.METHODS["digits"] = method
    flags = dict(method="digits", model=args.model, data=args.data, questions=args.questions,
                 group=args.group, steps=args.steps, max_new_tokens=args.tokens, temperature=TEMPERATURE,
                 lr=LR, kl=0, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, overlong="judge", device=args.device,
                 dtype=args.dtype, microbatch_tokens=args.microbatch * (args.tokens + args.prompt),
                 seed=args.seed)
    return exprl.parse([x for name, value in flags.items()
                        for x in ("--" + name.replace("_", "-"), str(value))])[0]


def run_exprl(args) -> None:
    settings = settings_of(args)
    state = exprl.build_state(settings)
    laps = Laps(state.device)
    for step in range(1, args.steps + 1):
        metrics, _ = exprl.train_step(state, settings, step)
        laps.lap(step, metrics["length"] * args.questions * args.group)


def run_trl(args) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    settings = settings_of(args)
    lm = exprl.load_lm(settings.model)
    problems = exprl.problems_or_exit(settings.data, "train")
    ids = [lm.chat(problem.question)
           for step in range(1, args.steps + 1) for problem in exprl.batch_for(problems, settings, step)]
    prompts = [lm.tokenizer.decode(prompt) for prompt in ids]
    assert lm.tokenizer(prompts)["input_ids"] == ids
    cuda = args.device.startswith("cuda")
    rows = args.questions * args.group
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=args.steps, per_device_train_batch_size=args.microbatch,
        gradient_accumulation_steps=rows // args.microbatch, num_generations=args.group,
        max_completion_length=args.tokens, temperature=TEMPERATURE, beta=0.0, num_iterations=1,
        loss_type="bnpo", epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH, learning_rate=LR, weight_decay=0.01,
        lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused",
        bf16=args.dtype == "bfloat16",
        gradient_checkpointing=args.way == "trl-default", disable_dropout=True, shuffle_dataset=False,
        use_cpu=not cuda, dataloader_pin_memory=cuda, seed=args.seed, report_to="none", save_strategy="no",
        logging_steps=1, disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if args.way == "trl-bf16" else "float32"})
    laps = Laps(args.device)

    class Lap(TrainerCallback):
        def on_train_begin(self, *_, **__):
            laps.start()

        def on_log(self, _, state, __, logs, **___):  # once a step, after its update
            if "completions/mean_length" in logs:
                laps.lap(state.global_step, logs["completions/mean_length"] * rows)

    sys.stdout = sys.stderr  # TRL prints its metrics; ours are written below
    trainer = GRPOTrainer(model=lm.name, reward_funcs=share_of_digits, args=config, callbacks=[Lap()],
                          train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=lm.tokenizer)
    del lm
    trainer.train()


def append(path: Path | None, line: dict) -> None:
    if path:
        with open(path, "a", newline="") as file:
            table = csv.DictWriter(file, line)
            if not file.tell():
                table.writeheader()
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="openai/gsm8k")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["exprl", "trl"])
    parser.add_argument("--rounds", type=int, default=2, help="each way runs once a round, in turn")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of a trace, at most")
    parser.add_argument("--microbatch", type=int, default=8, help="traces per forward and backward pass")
    parser.add_argument("--prompt", type=int, default=128, help="expected prompt tokens, for exprl's budget")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                        help="of both's passes; float32 on a CPU without bfloat16 instructions, where it is "
                             "faster for both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append a line per step to this file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # a run of its own
    args = parser.parse_args()
    if {*args.ways} - {"exprl"} and not all(map(importlib.util.find_spec, ("trl", "datasets"))):
        parser.error("TRL is not installed: pip install trl datasets, or --ways exprl")
    if args.questions * args.group % args.microbatch:  # TRL would leave some traces of a step out
        parser.error(f"--microbatch must divide --questions x --group, {args.questions * args.group}")
    if args.way:
        return run_exprl(args) if args.way == "exprl" else run_trl(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    about = dict(
        machine=torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name(),
        threads=torch.get_num_threads(), dtype=args.dtype, questions=args.questions, group=args.group,
        max_tokens=args.tokens, microbatch=args.microbatch, date=str(datetime.date.today()),
        versions=" ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "trl")
                          if importlib.util.find_spec(p)))
    lines = []
    for number in range(1, args.rounds + 1):
        for way in args.ways:
            command = [sys.executable, __file__, "--way", way, *sys.argv[1:]]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                for line in map(json.loads, process.stdout):
                    line = dict(way=way, round=number) | line
                    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                    for k, v in line.items()), flush=True)
                    lines.append(line | about)
                    append(args.out, lines[-1])
            if process.returncode:
                raise SystemExit(f"{way} ended with {process.returncode}; its message stands above")
    print(f"\n{'way':12}{'wall s a step':>16}{'CPU s a step':>16}{'tokens a step':>16}{'peak GB':>10}")
    for way in args.ways:
        own = [line for line in lines if line["way"] == way]
        mean = {k: sum(line[k] for line in own) / len(own) for k in ("wall", "cpu", "tokens")}
        print(f"{way:12}{mean['wall']:16.1f}{mean['cpu']:16.1f}{mean['tokens']:16.0f}"
              f"{max(line['peak_gb'] for line in own):10.2f}")


if __name__ == "__main__":
    main()
