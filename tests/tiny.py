"""Tiny random checkpoints for tests: a byte-level tokenizer (digits are single tokens) and 2-layer models."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import sample  # first of all: see the note on the name `kernels` in sample.py
import exprl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent.parent
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    out = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", pad_token="<|end|>",
                                  additional_special_tokens=special[1:])
    out.chat_template = TEMPLATE
    return out


def model(family: str = "qwen2", seed: int = 0, spread: float = 0.2, context: int = 4096, **config):
    torch.manual_seed(seed)
    make_config, make_model = FAMILIES[family]
    defaults = dict(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=context,
                    initializer_range=spread, eos_token_id=256, pad_token_id=256, tie_word_embeddings=True)
    net = make_model(make_config(**(defaults | config))).eval()
    net.generation_config.eos_token_id = 256
    return net


def save(folder: Path, **arguments) -> Path:
    model(**arguments).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def assert_distributed(counts, p, draws: int) -> None:
    """Chi-square of counts against p, both (V,): what is expected less than 20 times goes into one bin."""
    big = p * draws >= 20
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([p[big], p[~big].sum()[None]]) * draws
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(observed) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 standard deviations


def matrix_products(profile) -> int:
    """How many a torch.profiler.profile has seen."""
    names = ("aten::mm", "aten::addmm", "aten::addmm_")
    return sum(event.count for event in profile.key_averages() if event.key in names)


def problems_file(path: Path, rows: int = 12) -> Path:
    lines = [{"question": f"What is {i} + {i}?", "solution": f"REF{i}: twice {i} is \\boxed{{{2 * i}}}",
              "answer": str(2 * i), "domain": "math"} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def training_world(home: Path) -> tuple[Path, list[str]]:
    """A policy, a judge and data on disk, with the flags of exprl.py that use them. Readout expected: to a
    random judge few traces raise any likelihood: so small a judge's default grades most of them 0."""
    save(home / "policy", seed=1)
    save(home / "judge", seed=2, spread=0.5)
    problems_file(home / "train.jsonl", 7)
    problems_file(home / "eval.jsonl", 3)
    flags = ["--model", home / "policy", "--judge", home / "judge", "--data", home / "train.jsonl",
             "--questions", 3, "--group", 4, "--max-new-tokens", 12, "--lr", 1e-3, "--kl", 0.01,
             "--show-every", 2, "--eval-every", 0, "--temperature", 1.0, "--microbatch-tokens", 4000,
             "--check-judge", 0, "--readout", "expected", "--device", "cpu"]
    return home, [str(f) for f in flags]


def real_model(name, dtype=torch.float32) -> sample.LM:
    """For tests marked real: EXPRL_REAL_MODELS is a folder with `smollm` (SmolLM2-135M) and `qwen` (0.5B)."""
    home = os.environ.get("EXPRL_REAL_MODELS")
    if not home or not (Path(home) / name).is_dir():
        pytest.skip("EXPRL_REAL_MODELS names no folder with real models")
    return sample.load_lm(str(Path(home) / name), dtype=dtype)


def as_asked(dtype, device):
    """In the place of exprl.fast_dtype: bfloat16 stays bfloat16 on any CPU, so that its paths are tested."""
    return dtype


def gradient(state, settings, batch):
    """What exprl.update would hand to the optimizer, in float64, and its metrics."""
    grads = []
    state.policy.model.zero_grad()

    def capture(*_):
        grads.append([p.grad.double().clone() if p.grad is not None else torch.zeros_like(p).double()
                      for p in state.policy.model.parameters()])
        return 1.0

    original, exprl.optimizer_step = exprl.optimizer_step, capture
    try:
        metrics = exprl.update(state, settings, batch, settings.lr)
    finally:
        exprl.optimizer_step = original
    state.policy.model.zero_grad()
    return grads[0], metrics


# One thread: on another number of threads sums are rounded differently, and resuming is not bit for bit.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
for name in [*os.environ]:  # the user's own cache, mirror or offline mode must not show through
    if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_")):
        del os.environ[name]


def start(*command, **kwargs) -> subprocess.Popen:
    """The same without waiting for its end."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | ENVIRONMENT,
                            **kwargs)


def run(*command, check=True, env=None, cwd=ROOT, **kwargs) -> subprocess.CompletedProcess:
    """A program of the project as a real subprocess, from the repository's root, on one thread, offline."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | ENVIRONMENT | (env or {}), **kwargs)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def inside(*arguments, check=True) -> subprocess.CompletedProcess:
    """exprl.py in this process: what needs no process of its own need not import PyTorch once more."""
    out, err, failed = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            exprl.main([str(argument) for argument in arguments])
        except SystemExit as end:
            failed = int(end.code not in (None, 0))
            if not isinstance(end.code, int):
                print(end.code, file=err)
    if check:
        assert not failed, err.getvalue()[-4000:]
    return subprocess.CompletedProcess(arguments, failed, out.getvalue(), err.getvalue())
