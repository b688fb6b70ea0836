"""Sampling: token ids in, sampled token ids and their log-probs out; batched and KV-cached.

    python sample.py --model Qwen2.5-1.5B-Instruct --data openai/gsm8k:main:test --n 8 --k 1 8 --limit 100

One engine serves rollouts, evaluation and the judge:

    prompts ──► waiting ──► prefill: packed, unpadded, ──► pages of PAGE tokens (keys, values)
                   ▲        in passes; prompts that start     │ a prompt's full pages are shared by its n
                   │        alike share pages                 │ traces, its partly filled last one is copied
                   │                                          ▼
                   └── paused: pages ran short ◄── rows, each with a list of pages ◄────────┐
                       (tokens are kept)                      │                             │
       Rollout ◄── ended: pages freed, ◄──────── step: feed one token a row, attend over ───┘
                   the next trace enters         pages, draw token and log-prob

The models are the ones of transformers, and so are weights and rotary angles; the layers of the covered
families are gone through here (class Network), so that tokens of rows of any length share a batch unpadded.
Temperature is the only sampling knob: with top-k or top-p the sampled distribution is not the trained one.
A token's noise depends on (seed, trace, position) alone: a trace does not depend on who shares its batch.
Other architectures (sliding window, linear attention) take transformers' own cache: slower, said on stderr.

Left out: several GPUs, speculation, pages kept between calls. It knows nothing of judges and rewards.
"""

import argparse
import datetime
import heapq
import json
import math
import os
import platform
import re
import signal
import sys
import time
import weakref
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

# Where Hugging Face's optional package `kernels` is installed, too, transformers would import ours for it.
_ours = sys.modules.pop("kernels", None)
sys.modules["kernels"] = None
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

del sys.modules["kernels"]
if _ours is not None:
    sys.modules["kernels"] = _ours

from data import (  # noqa: E402
    MINIATURE, Problem, bootstrap_interval, fingerprint, is_correct, load_problems, pass_at_k, split_domain)
from kernels import (  # noqa: E402
    choose_token, paged_attention, plan_pages, plan_prefill, prefill_attention, rotate_, swiglu,
    token_logprob, upload)
from kernels.choose_token import triton, triton_choose  # noqa: E402
from kernels.token_logprob import product_dtype  # noqa: E402

transformers_logging.disable_progress_bar()  # its bars for loading and saving would tear ours
# On Hopper torch takes cuDNN's attention first, which builds (tens of ms) and keeps a plan for every new
# shape: here every prompt and every micro-batch has its own.
torch.backends.cuda.enable_cudnn_sdp(False)

# One constant for training, Stage II and evaluation: a model must not meet a new prompt when it is measured.
SYSTEM_PROMPT = (
    "Solve the problem step by step. Open every step with a line that starts with ### and says what the step "
    "does, then carry it out below. When you are done, state the final answer inside \\boxed{}."
)
TEMPLATE_OPTIONS = {"enable_thinking": False}  # read by some chat templates, Qwen3's: it would think first
DAY = datetime.date(2024, 7, 26)  # what templates are told that ask for today's date
FAMILIES = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama-": "meta-llama", "meta-llama-": "meta-llama"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # full attention in every layer, plain linear head
PAGE = 32  # tokens. On a CPU 32 to 128 cost the same, 16 a third more; small pages waste less and share more
TOKEN, LENGTH, TRACE, POSITION, PLACE, FIRST_PAGE = range(6)  # columns of a step's input; then a row's pages


class Refused(ValueError):
    """What was asked for cannot be done; the message names the flag to change."""


@dataclass(frozen=True)
class Rollout:
    """One sampled trace. `token_ids` holds the end token if one was sampled; `logprobs[i]` belongs to
    `token_ids[i]`, at the sampling temperature. `finished=False`: cut by the length limit."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool


# ------------------------------------------------------------------------------------------------------------
# Models: find them, load them, prompt them


@dataclass
class LM:
    """A language model with its tokenizer and, if its folder holds a prompts.json, prompts of its own."""

    name: str  # what load_lm resolved: a folder or a hub id
    model: torch.nn.Module
    tokenizer: object
    prompts: dict = field(default_factory=dict)

    def chat(self, question: str) -> list[int]:
        """The prompt of a problem, as token ids: system prompt, question, and the start of the answer."""
        own = {} if "user" in self.prompts else self.prompts  # a judge's prompts.json is not a policy's
        messages = [{"role": "system", "content": own.get("system", SYSTEM_PROMPT)},
                    {"role": "user", "content": question}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                       return_dict=False, **TEMPLATE_OPTIONS))

    @cached_property
    def turn_end(self) -> int | None:
        """The token that closes the answer in the chat template; the tokenizer's end token if none does."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the answer"}]
        try:
            shown = self.tokenizer.apply_chat_template(turns, tokenize=False, **TEMPLATE_OPTIONS)
        except Exception:  # whatever a template raises that knows no answers
            shown = ""
        _, found, behind = shown.rpartition("the answer")
        added = self.tokenizer.added_tokens_decoder
        for token in self.tokenizer.encode(behind, add_special_tokens=False)[:1] if found else []:
            if token in added and added[token].special:
                return token
        return self.tokenizer.eos_token_id

    def text(self, token_ids) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def quote(self, text: str) -> list[int]:
        """Text of others: what looks like a special token is spelled out."""
        # not verbose: that a text exceeds the context is said, and heeded, elsewhere
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that AutoModelForCausalLM, vLLM and this project load."""
        own = {}  # tied ones once. On a GPU transformers would copy there what side_by_side() has moved
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            own.setdefault(id(tensor), (name, tensor))
        self.model.save_pretrained(folder, state_dict={name: t.detach().cpu() for name, t in own.values()})
        self.save_config(folder)

    def save_config(self, folder: Path) -> None:
        """All of it but the weights; what transformers 4 knows by older names, by these, too."""
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for name in ("config.json", "tokenizer_config.json"):
            path = Path(folder) / name
            path.write_text(json.dumps(with_older_names(json.loads(path.read_bytes())), indent=2) + "\n")
        if self.prompts:
            (Path(folder) / "prompts.json").write_text(json.dumps(self.prompts, indent=1) + "\n")


def with_older_names(config: dict) -> dict:
    """config.json or tokenizer_config.json so that transformers 4, on which many servers and trainers stand,
    reads the same from it: by the newer names alone it fails, or takes 10,000 for the angles' base and says
    nothing."""
    config, rope = dict(config), config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "tokenizer_class" in config:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # what load_lm reads it with, in either version
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def resolve_model(name: str) -> str:
    """A folder, a hub id (owner/name), or a well-known family's bare name -> what from_pretrained takes."""
    folder = Path(name).expanduser()
    if (folder / "model" / "config.json").exists():  # a run's folder
        folder = folder / "model"
    if (folder / "config.json").exists():
        return str(folder)
    if name.count("/") == 1 and not folder.is_dir() and not name.startswith((".", "/", "~")):
        return name
    for prefix, owner in FAMILIES.items():
        if name.lower().startswith(prefix) and "/" not in name:
            return f"{owner}/{name}"
    raise SystemExit(f"no model {name!r}: give a folder with a config.json, a hub id (owner/name), or a bare "
                     "name of the Qwen, SmolLM or Llama families such as Qwen2.5-1.5B")


def load_lm(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """Model and tokenizer from a folder, the local hub cache or the hub; safetensors only, no remote code.
    Device "meta": without reading its weights."""
    path = resolve_model(name)
    if path != name:
        print(f"model {name} -> {path}", file=sys.stderr)
    try:
        # tokenizer.json as it stands: AutoTokenizer rebuilds every Qwen2 tokenizer with Qwen's own word split
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if device == "meta":
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(
                    path, trust_remote_code=False))
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True,
                                                         trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:  # damaged; or missing, offline, gated
        hub = ("\n  - no network? download the repository elsewhere and give its folder: --model /the/folder"
               "\n  - already in a cache? set HF_HOME to it (and HF_HUB_OFFLINE=1)"
               "\n  - a gated model? accept its licence on the hub and log in with `hf auth login`")
        raise SystemExit(
            f"cannot load {path}: {str(error).strip().splitlines()[0]}{'' if Path(path).is_dir() else hub}\n"
            "  - only .bin weights? convert them to safetensors first; pickled weights are never loaded"
        ) from error
    if tokenizer.chat_template is None:
        raise SystemExit(f"{path} has no chat template: ExpRL prompts a model as a chat; "
                         "take its instruct version")
    # Llama 3, SmolLM3, Granite: a run resumed tomorrow would go on with other prompts, and so would its model
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = re.sub(r"""strftime_now\(\s*(["'])(.+?)\1\s*\)""",
                                         lambda m: repr(DAY.strftime(m[2])), tokenizer.chat_template)
    asked = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "question"}]
    try:
        tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **TEMPLATE_OPTIONS)
    except Exception as error:  # whatever a template raises
        raise SystemExit(f"{path}: its chat template takes no system prompt with a question ({error}): "
                         "choose another model, or mend the template in a copy of its folder") from error
    lm = LM(path, model.to(device).eval(), tokenizer, read_prompts(Path(path) / "prompts.json"))
    # A base model (Qwen2.5-1.5B) names the end of a document only. Prompted as a chat it closes its turn with
    # another token, and would go on with the user's next turn, and answer that.
    ends = end_tokens(model)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature without do_sample: transformers loads that, and refuses to save it
        model.generation_config.do_sample = True
    if lm.turn_end not in (None, *ends):
        model.generation_config.eos_token_id = [*ends, lm.turn_end]
    return lm


def read_prompts(path: Path) -> dict:
    """A model's own prompts, {} without a file. A policy's are `system` and `distill` (see LM.chat and
    exprl.py's hinted_question); a judge's have `user`, and `system` by view (see judge.Judge)."""
    if not path.exists():
        return {}
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(prompts, dict):
            raise ValueError("it is no object")
        kinds = {"system": str, "distill": str}
        if "user" in prompts:
            kinds = dict.fromkeys(("user", "readout", "stem", "no_reference"), str) | {
                "system": dict, "critique_tokens": int}
        for name, value in prompts.items():
            empty = name in ("stem", "critique_tokens") and not value
            if not isinstance(value, kinds.get(name, ())) or empty:
                raise ValueError(f"{name}: a {'judge' if 'user' in prompts else 'policy'} has " + ", ".join(
                    f"{known} ({kind.__name__})" for known, kind in kinds.items()) + ", not empty or 0")
            if isinstance(value, dict) and not all(isinstance(text, str) for text in value.values()):
                raise ValueError("system: a text for each view of a trace")
    except ValueError as error:
        raise SystemExit(f"{path}: {error}: correct or delete it") from error
    return prompts


def layer_kinds(config) -> list[str]:
    return sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))


def context_of(model) -> float:
    """How many tokens it can read; infinite if its config names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def covers(config) -> bool:
    """Can the paged cache serve this architecture? Not where a row's angles depend on other rows' lengths."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return (config.model_type in ARCHITECTURES and layer_kinds(config) == ["full_attention"]
            and config.hidden_act == "silu" and rope not in ("dynamic", "longrope"))


@torch.no_grad()
def require_plain_head(model) -> None:
    """Training and judging take logits as hidden states times the head's weights. Refuse a model that scales
    them, caps them or adds to them (Granite, Cohere, Gemma 2, Phi)."""
    if covers(model.config):
        return
    ids, weight = torch.arange(1, 9, device=model.device)[None], model.get_output_embeddings().weight
    logits = model(input_ids=ids).logits
    gap = (model.base_model(input_ids=ids).last_hidden_state @ weight.T - logits).norm() / logits.norm()
    if not gap < 0.02 or getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise SystemExit(f"{model.config.model_type}: its logits are not hidden states times the head's "
                         "weights, as training and judging take them to be: choose another model, or for a "
                         "judge --readout generate")


# ------------------------------------------------------------------------------------------------------------
# Pages: who holds which


@dataclass(eq=False, slots=True)
class Page:
    """PAGE consecutive tokens of one sequence, in every layer. Traces and waiting prompts hold it."""

    index: int  # where it lies in the pool; compact() may move it
    users: int = 1
    key: tuple | None = None  # what it is known by, if others may share it


class Cache:
    """Free and taken pages of pool (layers, key or value, pages, kv heads, PAGE, head size).

    A full page is known by (the page before it, its tokens), so that a prompt finds the pages of any live
    prompt that starts alike. A page is free again when its last user drops it."""

    def __init__(self, pool: torch.Tensor):
        self.pool = pool
        self.clear()

    def clear(self) -> None:
        self.pages: list[Page | None] = [None] * self.pool.shape[2]
        self.free = list(range(len(self.pages)))  # a heap: the lowest first, so that pages in use lie densely
        self.known: dict[tuple, Page] = {}

    def take(self, count: int) -> list[Page]:
        pages = [Page(heapq.heappop(self.free)) for _ in range(count)]
        for page in pages:
            self.pages[page.index] = page
        if pages and not (self.pool.is_cuda and triton is not None):
            # The PyTorch attention reads whole pages: nothing of a former row, NaN or infinite, may be there.
            self.pool[:, :, [page.index for page in pages]] = 0
        return pages

    def share(self, pages: list[Page]) -> list[Page]:
        for page in pages:
            page.users += 1
        return list(pages)

    def drop(self, pages: list[Page]) -> None:
        for page in pages:
            page.users -= 1
            if page.users == 0:
                self.pages[page.index] = None
                heapq.heappush(self.free, page.index)
                if page.key:
                    del self.known[page.key]

    def place(self, ids: list[int], reuse: int, spare: int = 0) -> tuple[list[Page], int] | None:
        """Pages for `ids`, and how many of its first tokens, at most `reuse`, lie in them already: full pages
        known from others. None, and nothing is taken, if fewer than `spare` pages would stay free."""
        full = [tuple(ids[i : i + PAGE]) for i in range(0, len(ids) - PAGE + 1, PAGE)]
        found, before = [], None
        for tokens in full[: reuse // PAGE]:
            if (before, tokens) not in self.known:
                break
            before = self.known[before, tokens]
            found.append(before)
        missing = pages_of(len(ids)) - len(found)
        if missing + spare > len(self.free):
            return None
        pages = self.share(found) + self.take(missing)
        for page, tokens in zip(pages[len(found) :], full[len(found) :]):
            if (before, tokens) in self.known:
                break  # by another's page, beyond `reuse`: what follows would not be found behind ours
            page.key = before, tokens
            self.known[page.key] = before = page
        return pages, len(found) * PAGE

    def copy(self, sources: list[int], targets: list[int]) -> None:
        if sources:
            sources, targets = upload(torch.tensor([sources, targets]), self.pool.device).unbind()
            self.pool[:, :, targets] = self.pool[:, :, sources]

    def compact(self) -> None:
        """Move the last pages into holes: attention on a CPU reads the pool's front up to the last page in
        use. (Without it 1.25 to 2.8 times as many pages; simulated, 64 rows of 512 traces to 256 of 256.)"""
        used = len(self.pages) - len(self.free)
        moving = [page for page in self.pages[used:] if page]
        holes = sorted(index for index in self.free if index < used)
        self.copy([page.index for page in moving], holes)
        for page, hole in zip(moving, holes, strict=True):
            self.pages[page.index], self.pages[hole], page.index = None, page, hole
        self.free = list(range(used, len(self.pages)))

    def holes(self) -> int:
        """Free pages before the last one in use: what attention over the front of the pool reads in vain."""
        top = max((page.index + 1 for page in self.pages if page), default=0)
        return top + len(self.free) - len(self.pages)


def pages_of(tokens: int) -> int:
    """How many pages they fill."""
    return -(-tokens // PAGE)


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ------------------------------------------------------------------------------------------------------------
# One forward pass, for prefill and decode


PACKS = {torch.float32, torch.bfloat16} if platform.machine() in ("x86_64", "AMD64") else set()


class Linear:
    """Linear layers that read the same input, side by side: x W^T + b, then "swish", or "add" or "mul" with
    another tensor, which may be overwritten. dtype: of the products, see Network.

    On an x86 CPU the weights are a copy in oneDNN's own layout, 1.2 (64 rows, bfloat16) to 1.7 times (16)
    faster, and what follows the product is done before the result is rounded. On a GPU one product serves all
    layers, and the sum is the product's own."""

    def __init__(self, dtype: torch.dtype, *modules):
        self.modules, weight = modules, modules[0].weight
        plain = all(type(m) is torch.nn.Linear for m in modules)
        self.packed = (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
                       and dtype in PACKS and plain)
        self.joined = weight.is_cuda and plain and weight.dtype == dtype
        biases = [m.bias for m in modules if m.bias is not None]
        if self.packed:
            weight = (torch.cat([m.weight for m in modules]) if modules[1:] else weight).detach().to(dtype)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64)  # for some 64 rows
            self.bias = torch.cat([bias.detach().to(dtype) for bias in biases]) if biases else None
        elif self.joined:
            self.weight = side_by_side([m.weight for m in modules])
            self.bias = side_by_side(biases) if biases else None

    def __call__(self, x, then="none", other=None):
        if self.packed and other is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, then)
        if self.joined and then == "add" and self.bias is None:
            return other.addmm_(x, self.weight.T)
        if self.joined:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = [m(x.to(m.weight.dtype)) for m in self.modules]
            y = (torch.cat(y, -1) if y[1:] else y[0]).to(x.dtype)
        if other is None:
            return F.silu(y) if then == "swish" else y
        return y.add_(other) if then == "add" else y.mul_(other)


@torch.inference_mode(False)
@torch.no_grad()
def side_by_side(parameters):
    """One tensor whose rows are those of the parameters, one after the other: not a copy, but where they lie
    from now on, so that it follows when they change in place."""
    first, at = parameters[0], parameters[0].data_ptr()
    for p in parameters:
        if p.data_ptr() != at or p.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            joined = torch.cat([p.data for p in parameters])
            for p, part in zip(parameters, joined.split([len(p) for p in parameters])):
                p.data = part
            return joined
        at += p.nbytes
    return first.detach().as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


class Network:
    """The decoder of the covered families over the modules of a transformers model: embedding, layers, norm.

    The same as transformers' own forward in fewer and larger operations. It computes in the model's dtype,
    but bfloat16 in float32 on a CPU that has no instructions for it (product_dtype). Made anew for each
    call of the sampler, since weights change in place (0.2 s for 135M weights in bfloat16)."""

    def __init__(self, model):
        self.base, self.output, config = model.base_model, model.get_output_embeddings(), model.config
        self.dtype = product_dtype(self.output.weight)  # of products, activations, keys and values
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        linear = partial(Linear, self.dtype)
        self.layers = []
        for layer in self.base.layers:
            a, m = layer.self_attn, layer.mlp
            gate_up = linear(m.gate_proj, m.up_proj) if m.gate_proj.weight.is_cuda else None
            gate, up = (None, None) if gate_up else (linear(m.gate_proj), linear(m.up_proj))
            norms = None
            if hasattr(a, "q_norm"):  # Qwen3
                norms = a.q_norm.weight, a.k_norm.weight, a.q_norm.variance_epsilon
            self.layers.append((layer, norms, linear(a.q_proj, a.k_proj, a.v_proj), linear(a.o_proj), gate_up,
                                gate, up, linear(m.down_proj)))

    @cached_property
    def head(self) -> Linear:
        return Linear(self.dtype, self.output)

    def __call__(self, ids, positions, kv):
        """ids, positions (T,): tokens of any rows -> hidden states (T,d).

        kv.pages(layer) says where keys and values go at once, if anywhere, kv.attend(layer, query (T,H,D),
        key, value (T,KVH,D)) -> (T,H,D)."""
        x, heads = self.base.embed_tokens(ids).to(self.dtype), [self.heads, self.kv_heads, self.kv_heads]
        # the angles in float32: transformers rounds them to the model's type
        cos, sin = (t[0].contiguous() for t in self.base.rotary_emb(x[:1].float(), positions[None]))
        for i, (layer, norms, qkv, out, gate_up, gate, up, down) in enumerate(self.layers):
            qkv = qkv(rms_norm(layer.input_layernorm, x)).view(len(x), sum(heads), -1)
            rotate_(qkv, self.heads, cos, sin, norms, kv.pages(i))
            x = out(kv.attend(i, *qkv.split(heads, 1)).flatten(1), "add", x)
            h = rms_norm(layer.post_attention_layernorm, x)
            h = swiglu(gate_up(h)) if gate_up else up(h, "mul", gate(h, "swish"))
            x = down(h, "add", x)
        return rms_norm(self.base.norm, x)


def rms_norm(module, x):
    return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), module.variance_epsilon)


@dataclass
class Piece:
    """A run of a sequence for one prefill pass: ids behind `start` tokens that lie in `pages`. The first
    `keep` are written there. reads: (index in ids, result row)."""

    ids: list[int]
    positions: list[int] | range
    start: int
    keep: int
    pages: list[Page]
    reads: list[tuple[int, int]]

    def __post_init__(self):
        # who sees what, see prefill_attention.py; and of the suffix added last the cut, tokens, places in ids
        self.spans = [(self.start, range(len(self.ids)), len(self.ids))]
        self.last = 0, [], []

    def add(self, cut: int, suffix: list[int], rows: list[int]) -> None:
        """Let a suffix ride behind the run: it sees the sequence's first `cut` tokens and itself, and what
        follows its last tokens goes to the result rows. What it has in common with the one before, at the
        same cut, it shares."""
        before, other, where = self.last
        shared = len(os.path.commonprefix([other, suffix])) if cut == before else 0
        where = where[:shared] + list(range(len(self.ids), len(self.ids) + len(suffix) - shared))
        self.ids += suffix[shared:]
        self.positions += range(cut + shared, cut + len(suffix))
        self.spans.append((cut, where, len(suffix) - shared))
        self.reads += zip(where[-len(rows):], rows)
        self.last = cut, suffix, where


def cut_pieces(ids, start: int, pages: list[Page], forks=(), chunk: int = 2048) -> list[Piece]:
    """ids[start:] in runs of `chunk`. forks: (cut, suffix, result rows): what follows ids[:cut] + suffix?
    With several rows: what follows each of its last tokens? Suffixes ride behind the last run, and beyond
    `chunk` tokens of them behind empty ones."""
    pieces, riding = [], 0
    for a in range(start, len(ids), chunk):
        run = list(ids[a : a + chunk])
        reads = [(cut - 1 - a, rows[0]) for cut, suffix, rows in forks if not suffix and a < cut <= a + chunk]
        pieces.append(Piece(run, list(range(a, a + len(run))), a, len(run), pages, reads))
    for cut, suffix, rows in (fork for fork in forks if fork[1]):
        riding += len(suffix)
        if riding > chunk:
            pieces.append(Piece([], [], len(ids), 0, pages, []))
            riding = len(suffix)
        pieces[-1].add(cut, suffix, rows)
    return pieces


class Prefill:
    """Pieces in one packed sequence (1, sum of T). Keys and values go to their pages first, so that a piece
    may stand behind pages that are filled in the same pass."""

    def __init__(self, cache: Cache, pieces: list[Piece], heads: int):
        self.pool = cache.pool
        source, page, offset, at = [], [], [], 0
        for p in pieces:
            source += range(at, at + p.keep)
            page += [p.pages[t // PAGE].index for t in range(p.start, p.start + p.keep)]
            offset += [t % PAGE for t in range(p.start, p.start + p.keep)]
            at += len(p.ids)
        where = upload(torch.tensor([source, page, offset], dtype=torch.long), self.pool.device)
        self.source, self.page, self.offset = where.unbind()
        self.plan = plan_prefill([(p.spans, [page.index for page in p.pages]) for p in pieces],
                                 heads // self.pool.shape[3], self.pool.shape[5], self.pool.dtype,
                                 self.pool.device)

    def pages(self, layer) -> None:
        """Some keys are not kept: written below."""

    def attend(self, layer, query, key, value):
        keys, values = self.pool[layer]
        keys[self.page, :, self.offset] = key[self.source]
        values[self.page, :, self.offset] = value[self.source]
        return prefill_attention(query, key, value, keys, values, self.plan, query.shape[-1] ** -0.5)


class Decode:
    """One new token for each row. state (R, FIRST_PAGE + pages) int32 says where."""

    def __init__(self, cache: Cache, state: torch.Tensor):
        self.pool, self.table, length = cache.pool, state[:, FIRST_PAGE:], state[:, LENGTH]
        self.page = self.table.gather(1, (length // PAGE)[:, None].long())[:, 0].long()
        self.offset, self.lengths = (length % PAGE).long(), length + 1
        self.plan = None
        if not state.is_cuda:
            self.plan = plan_pages(self.table.cpu().numpy(), self.lengths.cpu().numpy(),
                                   *self.pool.shape[3:5], state.device)

    def pages(self, layer):
        return *self.pool[layer], self.page, self.offset

    def attend(self, layer, query, key, value):
        return paged_attention(query, *self.pool[layer], self.table, self.lengths, query.shape[-1] ** -0.5,
                               self.plan)


# ------------------------------------------------------------------------------------------------------------
# The sampler


@dataclass(eq=False)
class Trace:
    """One trace on its way: waiting, in a row of the batch, or paused."""

    prompt: list[int]
    place: int  # in the results
    number: int  # what its noise is made of, beside the seed
    count: int = 0  # of tokens drawn, known while it is in no row
    finished: bool = False  # by an end token
    pages: list[Page] = field(default_factory=list)  # while it is in a row


@dataclass
class Work:
    """Traces of one prompt that wait to start, or a paused one. `pages`: of the prompt once it is prefilled;
    only the first in the queue has some."""

    traces: deque[Trace]
    pages: list[Page] = field(default_factory=list)


class Rows:
    """The traces being decoded, in the order of their admission; how their tokens are drawn; and, by place,
    all that was drawn: arrays, since a loop over 1,024 rows would keep a GPU waiting at every step."""

    def __init__(self, most: int, width: int, places: int, max_new_tokens: int, temperature: float, seed: int,
                 ends):
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.ends = np.array(ends, np.int32)
        self.traces: list[Trace] = []
        self.buffer = np.zeros((most, FIRST_PAGE + width), np.int32)
        self.tokens = np.empty((places, max_new_tokens), np.int32)  # memory is used as it is written
        self.logprobs, self.noise = np.empty((2, places, max_new_tokens), np.float32)

    @property
    def state(self) -> np.ndarray:
        """(R, FIRST_PAGE + pages) int32: all that a step on the device is told."""
        return self.buffer[: len(self.traces)]

    def drawn(self, trace: Trace) -> list[int]:
        return self.tokens[trace.place, : trace.count].tolist()

    def rollout(self, trace: Trace) -> Rollout:
        return Rollout(tuple(trace.prompt), tuple(self.drawn(trace)),
                       tuple(self.logprobs[trace.place, : trace.count].tolist()), trace.finished)

    def add(self, trace: Trace) -> None:
        self.traces.append(trace)
        ids = trace.prompt + self.drawn(trace)
        self.state[-1, :FIRST_PAGE] = ids[-1], len(ids) - 1, trace.number, trace.count, trace.place
        self.address(len(self.traces) - 1)

    def address(self, row: int) -> None:
        """Write the places of the row's pages into its state."""
        pages = self.traces[row].pages
        self.state[row, FIRST_PAGE : FIRST_PAGE + len(pages)] = [page.index for page in pages]

    def append(self, token: np.ndarray, logprob: np.ndarray) -> None:
        place, position = self.state[:, PLACE], self.state[:, POSITION]
        self.tokens[place, position], self.logprobs[place, position] = token, np.minimum(logprob, 0)
        self.state[:, TOKEN] = token
        self.state[:, [LENGTH, POSITION]] += 1

    def remove(self, row: int) -> Trace:
        self.traces[row].count = int(self.state[row, POSITION])
        self.buffer[row : len(self.traces) - 1] = self.buffer[row + 1 : len(self.traces)]
        return self.traces.pop(row)


class Sampler:
    """Samples from a transformers causal LM. `max_rows` bounds the traces decoded at once, `cache_gb` the
    memory of their keys and values (default: 4 GB on a CPU, 60% of what is free on a GPU)."""

    def __init__(self, model, max_rows: int = 256, cache_gb: float | None = None, prefill_tokens: int = 8192,
                 graphs: bool = True):
        self.model, self.max_rows, self.cache_gb = model, max_rows, cache_gb
        self.prefill_tokens = prefill_tokens
        self.graphs = graphs and model.device.type == "cuda" and triton is not None
        self.covered = covers(model.config)
        if not self.covered:
            print(f"{model.config.model_type} with {', '.join(layer_kinds(model.config))} layers: sample.py "
                  "has no paged cache for it and takes transformers' own, prompt by prompt: slower",
                  file=sys.stderr)
        self.cache: Cache | None = None
        self.network: Network | None = None
        self.replay: Graphs | None = None
        self.wanted = 0  # pages asked for when the cache was made
        self.pauses = 0  # traces paused so far for want of memory
        self.tokens = 0  # that went through the model so far

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        n: int = 1,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        seed: int = 0,
        end_ids: list[int] | None = None,  # default: the end tokens of the model's generation config
        places: list[int] | None = None,  # of these prompts in a larger batch: their noise is as in that one
        on_trace=None,  # called with (place in the results, Rollout) of each trace as it ends
        at_end=None,  # called with (cache, rows, traces that ended) while their pages are still there
    ) -> list[Rollout]:
        """n traces for each prompt, prompt-major: the traces of prompt i are [i*n : (i+1)*n].

        Raises Refused when prompt + max_new_tokens exceeds the model's context or the cache's memory."""
        self.check(prompts, n, temperature, [len(p) + max_new_tokens for p in prompts])
        if max_new_tokens < 1:
            raise Refused(f"max_new_tokens is {max_new_tokens}, no room for a token: raise "
                          "--max-new-tokens or drop the longest prompts")
        if not prompts or not n:
            return []
        ends = end_tokens(self.model) if end_ids is None else end_ids
        if not ends and end_ids is None:
            raise Refused("the model's generation_config.json names no eos_token_id: add it, or give "
                          "end_ids")
        longest = pages_of(max(map(len, prompts)) + max_new_tokens)
        results: list[Rollout | None] = [None] * (n * len(prompts))
        rows = Rows(min(self.max_rows, len(results)), longest, len(results), max_new_tokens, temperature,
                    seed, ends)
        waiting = deque(
            Work(deque(Trace(prompt, i * n + j, place * n + j) for j in range(n)))
            for i, (place, prompt) in enumerate(zip(places or range(len(prompts)), map(list, prompts))))

        def hand_over(traces):
            for trace in traces:
                results[trace.place] = rows.rollout(trace)
                if on_trace:
                    on_trace(trace.place, results[trace.place])

        if not self.covered:
            training = self.model.training  # transformers has no cache then, if activations are checkpointed
            try:
                self.model.eval()
                for work in waiting:
                    traces = list(work.traces)
                    for i in range(0, n, self.max_rows):
                        self.sample_slowly(traces[i : i + self.max_rows], rows)
                    hand_over(traces)
            finally:
                self.model.train(training)
            return results
        with self.open(len(rows.buffer) + 2, longest) as cache:
            if self.replay:
                rows.buffer = self.replay.host.numpy()[: len(rows.buffer)]
            ended: list[Trace] = []  # they hold their pages
            while waiting or rows.traces:
                self.admit(cache, rows, waiting)
                self.grow(cache, rows, waiting)
                self.step(cache, rows)
                ended += self.end(rows)
                # What is read behind traces is read of several at once, while rows go on and pages suffice.
                if ended and (not at_end or not rows.traces or 8 * len(ended) >= len(rows.buffer)
                              or len(cache.free) < len(rows.traces)):
                    if at_end:
                        at_end(cache, rows, ended)
                    self.release(cache, rows, ended)
                    hand_over(ended)
                    ended = []
        return results

    def admit(self, cache: Cache, rows: Rows, waiting: deque[Work]) -> None:
        """Start waiting traces while rows and pages last. Traces of a prompt share its full pages; each has
        its own copy of the partly filled one, and the last to start takes over the original."""
        pieces, sources, targets = [], [], []
        while waiting and len(rows.traces) < len(rows.buffer):
            work = waiting[0]
            trace, spare = work.traces[0], len(rows.traces) // 2  # pages that the rows will soon ask for
            ids = (trace.prompt + rows.drawn(trace))[:-1]  # the first step feeds the last, draws the next
            if not work.pages:
                placed = cache.place(ids, len(ids), spare + bool(rows.traces))
                if placed is None:
                    break
                work.pages = placed[0]
                pieces += cut_pieces(ids, placed[1], work.pages)
            whole = len(ids) // PAGE
            if len(work.traces) == 1:
                trace.pages = work.pages
                waiting.popleft()
            elif rows.traces and len(work.pages) - whole + spare > len(cache.free):
                break
            else:
                tail = cache.take(len(work.pages) - whole)
                sources += [page.index for page in work.pages[whole:]]
                targets += [page.index for page in tail]
                trace.pages = cache.share(work.pages[:whole]) + tail
            work.traces.popleft()
            if not trace.count and not self.replay:
                rows.noise[trace.place] = trace_noise(rows.seed, trace.number, rows.max_new_tokens)
            rows.add(trace)
        self.prefill(cache, pieces)
        cache.copy(sources, targets)

    def grow(self, cache: Cache, rows: Rows, waiting: deque[Work]) -> None:
        """Rows whose last page is full take another. When pages run short, the prompt whose traces wait gives
        its own back, then the youngest row is paused; the oldest always fits, see make_cache()."""
        def growing():
            ends = np.flatnonzero(rows.state[:, LENGTH] % PAGE == 0).tolist()  # of a page: few rows a step
            return [row for row in ends if rows.state[row, LENGTH] == PAGE * len(rows.traces[row].pages)]

        while len(full := growing()) > len(cache.free):
            if waiting and waiting[0].pages:
                work = waiting[0]
            else:
                trace = rows.remove(len(rows.traces) - 1)
                work = Work(deque([trace]), trace.pages)
                waiting.appendleft(work)
                trace.pages = []
                self.pauses += 1
            cache.drop(work.pages)
            work.pages = []
        for row in full:
            rows.traces[row].pages += cache.take(1)
            rows.address(row)

    def step(self, cache: Cache, rows: Rows) -> None:
        """Feed each row's last token and draw the next."""
        self.tokens += len(rows.traces)
        if self.replay:
            token, logprob = self.replay(rows)
        else:
            noise = rows.noise[rows.state[:, PLACE], rows.state[:, POSITION]]
            noise, state = (torch.from_numpy(x).to(self.model.device) for x in (noise, rows.state))
            drawn = choose_token(self.decode(cache, state), rows.temperature, noise)
            token, logprob = (x.cpu().numpy() for x in drawn)
        rows.append(token, logprob)

    def decode(self, cache: Cache, state: torch.Tensor) -> torch.Tensor:
        """state (R, FIRST_PAGE + pages) on the device -> logits (R,V)."""
        hidden = self.network(state[:, TOKEN].long(), state[:, LENGTH].long(), Decode(cache, state))
        return self.network.head(hidden)

    def end(self, rows: Rows) -> list[Trace]:
        """Take the traces that are done out of their rows."""
        finished = np.isin(rows.state[:, TOKEN], rows.ends)
        done = np.flatnonzero(finished | (rows.state[:, POSITION] == rows.max_new_tokens)).tolist()
        traces = [rows.remove(row) for row in reversed(done)]
        for trace, row in zip(traces, reversed(done)):
            trace.finished = bool(finished[row])
        return traces

    def release(self, cache: Cache, rows: Rows, traces: list[Trace]) -> None:
        """Free the pages of traces that ended."""
        for trace in traces:
            cache.drop(trace.pages)
        if not self.replay and cache.holes() > 16:
            cache.compact()
            for row in range(len(rows.traces)):
                rows.address(row)

    def sample_slowly(self, traces: list[Trace], rows: Rows) -> None:
        """With transformers' own cache, for layers that pages do not cover: traces of one prompt as a batch
        of equal lengths, so that nothing is padded."""
        device, past = self.model.device, None
        ids = torch.tensor([trace.prompt for trace in traces], device=device)
        noise = torch.from_numpy(np.stack(
            [trace_noise(rows.seed, trace.number, rows.max_new_tokens) for trace in traces])).to(device)
        for position in range(rows.max_new_tokens):
            out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            self.tokens += ids.numel()
            past = getattr(out, "past_key_values", None)
            if past is None:
                raise Refused(f"{self.model.config.model_type} hands back no cache to go on from: choose "
                              "another model")
            token, logprob = choose_token(out.logits[:, -1], rows.temperature, noise[:, position])
            for trace, t, logp in zip(traces, token.tolist(), logprob.tolist()):
                if not trace.finished:
                    rows.tokens[trace.place, position] = t
                    rows.logprobs[trace.place, position] = min(logp, 0.0)
                    trace.count, trace.finished = position + 1, t in rows.ends
            if all(trace.finished for trace in traces):
                break
            ids = token[:, None]

    def prefill(self, cache: Cache, pieces: list[Piece], store=None) -> None:
        """Fill pages in passes of about `prefill_tokens`; then store(hidden (reads,d), rows): tensors.
        Nothing here waits for a GPU, which computes a pass while the host lays out the next."""
        device = self.model.device
        while pieces:
            sizes = np.cumsum([len(piece.ids) for piece in pieces])
            count = max(1, int(np.searchsorted(sizes, self.prefill_tokens, side="right")))
            some, pieces = pieces[:count], pieces[count:]
            ids, positions = upload(torch.tensor([[t for piece in some for t in piece.ids],
                                                  [t for piece in some for t in piece.positions]]), device)
            hidden = self.network(ids, positions, Prefill(cache, some, self.network.heads))
            self.tokens += len(ids)
            reads = [(end - len(piece.ids) + index, row) for end, piece in zip(sizes.tolist(), some)
                     for index, row in piece.reads]
            if reads:
                where, rows = upload(torch.tensor(reads).T.contiguous(), device)
                store(hidden[where], rows)

    # ---- reading logits: the judge -------------------------------------------------------------------------

    @torch.inference_mode()
    def reply_logits(self, prompts: list[list[int]], stem: list[int], token_ids: list[int],
                     max_new_tokens: int,
                     end_ids: list[int] | None = None) -> tuple[list[Rollout], torch.Tensor]:
        """A greedy reply a prompt, then logits (N, len(token_ids)) f32 after prompt + reply + `stem`.

        The reply's end token is left out. The stem is read over the reply's own cache. No stem: zeros."""
        self.check(prompts, 1, 0.0, [len(p) + max_new_tokens + len(stem) for p in prompts])
        out = torch.zeros(len(prompts), len(token_ids), device=self.model.device)
        store = self.into(out, token_ids)

        def read_stem(cache, rows, traces):
            pieces = []
            for trace in traces:  # its last token was drawn, but not fed
                ids = rows.drawn(trace)[trace.count - (not trace.finished) :] + list(stem)
                start = len(trace.prompt) + trace.count - 1
                pieces.append(Piece(ids, range(start, start + len(ids)), start, 0, trace.pages,
                                    reads=[(len(ids) - 1, trace.place)]))
            self.prefill(cache, pieces, store)

        rollouts = self.sample(prompts, 1, max_new_tokens, 0.0, end_ids=end_ids, at_end=stem and read_stem)
        if stem and not self.covered:
            replies = [list(r.token_ids[: len(r.token_ids) - r.finished]) for r in rollouts]
            out = self.next_logits([p + reply + stem for p, reply in zip(prompts, replies)], token_ids)
        return rollouts, out.cpu()

    @torch.inference_mode()
    def next_logits(self, prompts: list[list[int]], token_ids: list[int],
                    forks: list[list[tuple[int, list[int]]]] | None = None) -> torch.Tensor:
        """Logits (N, len(token_ids)) f32 of the token that follows each prompt, for `token_ids` only.

        forks: per prompt a list of (cut, suffix): read what follows prompt[:cut] + suffix instead, for all
        cuts in one pass over the prompt; N counts them in order. Full pages of tokens that a prompt shares
        with the one before (rubric, question, reference) are computed once: let such prompts stand together.
        """
        forks = forks or [[(len(prompt), [])] for prompt in prompts]
        out = torch.zeros(sum(map(len, forks)), len(token_ids), device=self.model.device)
        rows = iter(range(len(out)))
        self.read(prompts, [[(cut, list(suffix), [next(rows)]) for cut, suffix in some] for some in forks],
                  self.into(out, token_ids))
        return out.cpu()

    @torch.inference_mode()
    def target_logprobs(self, prompts: list[list[int]],
                        forks: list[list[tuple[int, list[int], list[int]]]]) -> list[torch.Tensor]:
        """How likely is `target` after prompt[:cut] + suffix, for forks of (cut, suffix, target), none empty?
        One tensor a fork, in order: the log-prob f32 of each of the target's tokens. Shares what
        `next_logits` shares."""
        if not all(suffix and target for some in forks for _, suffix, target in some):
            raise Refused("a fork has an empty suffix or target")
        targets = [target for some in forks for _, _, target in some]
        ids = torch.tensor([t for target in targets for t in target], dtype=torch.long,
                           device=self.model.device)
        weight, out = self.model.get_output_embeddings().weight, torch.zeros(len(ids), device=ids.device)
        rows = iter(range(len(ids)))

        def store(hidden, rows):
            out[rows] = token_logprob(hidden, weight, ids[rows], 1.0)[0]

        self.read(prompts, [[(cut, suffix + target[:-1], [next(rows) for _ in target])
                             for cut, suffix, target in some] for some in forks], store)
        return list(out.cpu().split([len(target) for target in targets]))

    def into(self, out, token_ids):
        """A `store` for prefill(): writes the logits of `token_ids` into rows of `out`."""
        weight = self.model.get_output_embeddings().weight
        weight = weight[torch.tensor(token_ids, device=weight.device)]

        def store(hidden, rows):
            out[rows] = (hidden @ weight.T.to(hidden.dtype)).float()

        return store

    def read(self, prompts, forks, store) -> None:
        """forks: per prompt (cut, suffix, result rows), see cut_pieces; store(hidden (reads,d), rows)."""
        longest = [max([cut + len(suffix) for cut, suffix, _ in some], default=0) for some in forks]
        self.check(prompts, 0, 1.0, longest)
        for i, (prompt, some) in enumerate(zip(prompts, forks, strict=True)):
            cuts = [cut for cut, _, _ in some]
            if not all(0 < cut <= len(prompt) for cut in cuts):
                raise Refused(f"prompt {i} of {len(prompt)} tokens cannot be cut at {cuts}")
        if not self.covered:
            for prompt, some in zip(prompts, forks):
                for cut, suffix, rows in some:
                    ids = torch.tensor([prompt[:cut] + suffix], device=self.model.device)
                    self.tokens += ids.numel()
                    store(self.model.base_model(ids, use_cache=False).last_hidden_state[0, -len(rows):],
                          torch.tensor(rows, device=ids.device))
            return
        longest = pages_of(max(map(len, prompts), default=1))
        with self.open(2, longest) as cache:
            pieces, held = [], []  # pages of the prompts to come, and of the last one before
            for prompt, some in zip(map(list, prompts), forks):
                # what is read must be computed: at least the token before the first cut
                reuse = min((cut for cut, _, _ in some), default=len(prompt)) - 1
                while (placed := cache.place(prompt, reuse)) is None:
                    self.prefill(cache, pieces, store)
                    pieces, done, held = [], held[:-1] or held, held[1:] and held[-1:]
                    for pages in done:
                        cache.drop(pages)
                held.append(placed[0])
                pieces += cut_pieces(prompt, placed[1], placed[0], some)
            self.prefill(cache, pieces, store)
            for pages in held:
                cache.drop(pages)

    # ---- memory and limits ---------------------------------------------------------------------------------

    @contextmanager
    def open(self, rows: int, longest: int):
        """A cache for `rows` of `longest` pages and a pass of prefill, or as much of it as memory allows;
        whatever happens inside, no page stays taken.

        On a GPU it stays for the next call, which may replay the CUDA graphs that know its address."""
        cuda = self.model.device.type == "cuda"
        if self.network:
            raise RuntimeError("this Sampler is at work: another thread, or a callback, takes one of its own")
        pages, width = longest, longest
        if self.graphs:  # rounded up: somewhat longer prompts shall need neither pages nor graphs anew
            pages, width = bucket(longest), 2 ** (longest - 1).bit_length()
        wanted = rows * pages + self.prefill_tokens // PAGE
        try:
            self.network = Network(self.model)  # before the addresses are read: it may move weights
            addresses = [p.data_ptr() for p in self.model.parameters()] if cuda else []
            if self.cache is None or wanted > self.wanted or longest + 2 > len(self.cache.pages) or (
                    self.replay and self.replay.outdated(addresses, longest)):
                self.cache = self.replay = None  # freed before the successor is made
                if cuda:
                    torch.cuda.empty_cache()
                self.cache, self.wanted = self.make_cache(wanted, longest), wanted
                if self.graphs:
                    self.replay = Graphs(self, self.cache, self.max_rows, width, addresses)
            reserved = self.cache.take(1) if self.replay else []  # page 0 takes what padding rows write
            yield self.cache
            self.cache.drop(reserved)
            assert len(self.cache.free) == len(self.cache.pages), "a page is still held"
        finally:
            self.network = None
            if self.cache:
                self.cache.clear()
            if not cuda:
                self.cache = None

    def make_cache(self, wanted: int, longest: int) -> Cache:
        """At most `wanted` pages, as memory lasts; refuses here what could never fit."""
        model, config = self.model, self.model.config
        shape = [config.num_hidden_layers, 2, 1, config.num_key_value_heads, PAGE, head_size(config)]
        dtype = self.network.dtype
        page = math.prod(shape) * dtype.itemsize
        if self.cache_gb is not None:
            if not 0 < self.cache_gb < math.inf:
                raise Refused(f"--cache-gb must be a number of gigabytes, got {self.cache_gb}")
            budget = self.cache_gb * 2**30
        elif model.device.type == "cuda":
            budget = 0.6 * torch.cuda.mem_get_info(model.device)[0]
        else:
            budget = 4 * 2**30
        least = page * (longest + 2)  # and a copy of a prompt's last page, and the page of padding rows
        if least > budget:
            raise Refused(
                f"one trace of {longest * PAGE} tokens needs {least / 2**30:.3g} GB of cache, "
                f"{budget / 2**30:.3g} GB are there: lower --max-new-tokens or raise --cache-gb")
        shape[2] = min(wanted, int(budget // page))
        return Cache(torch.empty(shape, dtype=dtype, device=model.device))

    def check(self, prompts, n, temperature, needed) -> None:
        """needed: tokens of each prompt with all that is to follow it."""
        if not (temperature == 0 or 1e-4 <= temperature < math.inf) or n < 0:
            raise Refused("temperature must be 0 or at least 0.0001, and n not negative, got "
                          f"{temperature} and {n}")
        limit = context_of(self.model)
        for i, (prompt, length) in enumerate(zip(prompts, needed, strict=True)):
            if not prompt:
                raise Refused(f"prompt {i} has no token")
            if length > limit:
                raise Refused(f"prompt {i} has {len(prompt)} tokens; with {length - len(prompt)} new ones it "
                              f"exceeds the model's context of {limit}: lower --max-new-tokens or drop the "
                              "problem")


class Graphs:
    """A decode step on CUDA, captured once per bucket of rows and replayed: one small copy to the device (the
    rows' state, which Rows writes into `host`), one launch, one small copy back (token and log-prob)."""

    def __init__(self, sampler: Sampler, cache: Cache, rows: int, width: int, addresses: list[int]):
        device = sampler.model.device
        # A proxy, since a cycle would keep cache and graphs until a collection, perhaps one inside a capture.
        self.sampler, self.cache, self.addresses = weakref.proxy(sampler), cache, addresses
        self.graphs, self.memory = {}, None
        self.stream = torch.cuda.Stream(device)  # torch.cuda.graph's own lies on the device of its first use
        self.host = torch.zeros(bucket(rows), FIRST_PAGE + width, dtype=torch.int32, pin_memory=True)
        self.state = self.host.to(device)
        self.temperature, self.knobs = torch.ones(1, device=device), None
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)

    def outdated(self, addresses, width) -> bool:
        """The weights moved, or a trace may need more pages than a row of the state holds."""
        return addresses != self.addresses or width > self.state.shape[1] - FIRST_PAGE

    def __call__(self, rows: Rows):
        count, size = len(rows.traces), bucket(len(rows.traces))
        self.host[count:size] = 0  # padding rows: one token, written to page 0, which no trace owns
        self.state[:size].copy_(self.host[:size], non_blocking=True)
        if self.knobs != (rows.temperature, rows.seed):
            self.knobs = rows.temperature, rows.seed
            self.temperature.fill_(rows.temperature)
            self.seed.fill_((rows.seed + 2**63) % 2**64 - 2**63)  # all 64 bits, as a signed number
        if size not in self.graphs:
            self.capture(size)
        graph, drawn = self.graphs[size]
        graph.replay()
        drawn = drawn.cpu().numpy()  # waits for the step: from here on the host buffer may be written again
        return drawn[:count, 0].astype(np.int32), drawn[:count, 1]

    def compute(self, state):
        logits = self.sampler.decode(self.cache, state)
        return triton_choose(logits, self.temperature, self.seed, state[:, TRACE], state[:, POSITION])

    def capture(self, size: int) -> None:
        with torch.cuda.device(self.state.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(2):  # compiles kernels and allocates workspaces outside the capture
                    self.compute(self.state[:size])
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: what other threads do meanwhile (NCCL's) does not concern the capture
            with torch.cuda.graph(graph, self.memory, self.stream, "thread_local"):
                drawn = self.compute(self.state[:size])
        self.memory = self.memory or graph.pool()
        self.graphs[size] = graph, drawn


def bucket(rows: int) -> int:
    """Rounded up to 1, 2, 4, 8, and from there on four sizes per doubling: at most 25% padding."""
    power = 2 ** (rows - 1).bit_length()
    step = power // 8 if rows > 8 else power
    return -(-rows // step) * step


def trace_noise(seed: int, trace: int, tokens: int) -> np.ndarray:
    """Uniform numbers (tokens,) for one trace: a function of (seed, trace, position) alone."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, trace], np.uint64)))
    return generator.random(tokens, dtype=np.float32)


def end_tokens(model) -> list[int]:
    """What the model's generation_config.json names, none perhaps."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


# ------------------------------------------------------------------------------------------------------------
# Evaluation, and the program


def traces_of(lm: LM, problems: list[Problem], n: int, max_new_tokens: int, temperature: float, seed: int = 0,
              sampler: Sampler | None = None, places: list[int] | None = None, on_record=None) -> list[dict]:
    """Records of n traces a problem, those of a problem side by side: problem id, text, exact match.

    places: see Sampler.sample. on_record: called with (place in the records, record) as a trace ends."""
    records: list[dict | None] = [None] * (n * len(problems))

    def add(i, r):
        text, problem = lm.text(r.token_ids), problems[i // n]
        records[i] = {"problem": problem.id, "text": text,
                      "correct": is_correct(text, problem.answer, r.finished),
                      "finished": r.finished, "tokens": len(r.token_ids)}
        if on_record:
            on_record(i, records[i])

    (sampler or Sampler(lm.model)).sample([lm.chat(p.question) for p in problems], n, max_new_tokens,
                                          temperature, seed, places=places, on_trace=add)
    return records


def traces_into(out: Path | None, lm: LM, problems: list[Problem], n: int, max_new_tokens: int,
                temperature: float, seed: int = 0, sampler: Sampler | None = None) -> tuple[list[dict], int]:
    """`traces_of`, written to `out` -> the records, and how many of them an interrupted program had left.

    Those that ended stand in partial_of(out) at once. The same call goes on from there, with the traces it
    would have had, since a trace's noise depends on its place alone; the caller deletes it when all is done.
    """
    weights = Path(lm.name).glob("*.safetensors")  # of a hub id none
    job = {"model": lm.name, "written": sorted(path.stat().st_mtime for path in weights),
           "dtype": str(lm.model.dtype), "problems": fingerprint(problems), "n": n,
           "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    partial = out and partial_of(out)
    done = read_partial(partial, job) if out else {}
    # of a problem with traces yet to come all are sampled anew: they enter side by side
    places = [p for p in range(len(problems)) if not done.keys() >= {*range(p * n, p * n + n)}]
    left = len(problems) - len(places)
    with (no_traceback(), open(partial, "a") if out else nullcontext() as file,
          tqdm(total=len(problems) * n, initial=left * n, unit="trace", disable=None) as bar):
        def keep(i, record):
            place = places[i // n] * n + i % n
            done[place] = record
            if file:
                file.write(json.dumps([place, record]) + "\n")
                file.flush()
            bar.update()

        try:
            traces_of(lm, [problems[p] for p in places], n, max_new_tokens, temperature, seed, sampler,
                      places, keep)
        except KeyboardInterrupt:
            if out:
                print(f"\n{len(done)} of {len(problems) * n} traces are in {partial}: the same command goes "
                      "on with the others", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
    records = [done[i] for i in range(len(problems) * n)]
    if out:
        write_atomically(out, jsonl(records))
    return records, left * n


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def read_partial(path: Path, job: dict) -> dict[int, dict]:
    """The traces that an interrupted program has left of this very job, by place; or the file begun."""
    first, *lines = path.read_text().split("\n") if path.exists() else [json.dumps(job), ""]
    if first != json.dumps(job):
        raise SystemExit(f"{path} holds traces of an interrupted program with another model, data or flags: "
                         "repeat its command to go on with it, delete it, or choose another --out")
    whole = lines[:-1]  # behind the last newline there is nothing, or what a kill tore
    try:
        done = dict(map(json.loads, whole))
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path} is damaged ({error}): delete it, or choose another --out") from error
    write_atomically(path, "".join(line + "\n" for line in [first, *whole]))
    return done


def summary(records: list[dict], n: int, ks) -> dict:
    """{"pass@k": mean, "pass@k_low", "pass@k_high": 95% bootstrap interval over problems} for each k, and
    length (tokens), cut_off (share)."""
    counts = [sum(r["correct"] for r in records[i : i + n]) for i in range(0, len(records), n)]
    metrics = {}
    for k in sorted(set(ks)):
        values = [pass_at_k(n, c, k) for c in counts]
        low, high = bootstrap_interval(values)
        metrics |= {f"pass@{k}": float(np.mean(values)), f"pass@{k}_low": low, f"pass@{k}_high": high}
    return metrics | {"length": float(np.mean([r["tokens"] for r in records])),
                      "cut_off": float(np.mean([not r["finished"] for r in records]))}


@contextmanager
def no_traceback():
    """For a program: the errors of what stands inside name what is wrong and the remedy, or the file."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def problems_or_exit(specs, split: str, **options) -> list[Problem]:
    with no_traceback():
        return load_problems(list(specs), split=split, **options)


def pick_device(device: str, said: str = "") -> str:
    """said: the flag as it was given, for the message; default: --device."""
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device not in ("cpu", *["cuda"] * min(gpus, 1), *(f"cuda:{i}" for i in range(gpus))):
        raise SystemExit(f"{said or f'--device {device}'}: torch sees {gpus or 'no'} GPUs here: take cpu or "
                         "auto, or look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    return device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":  # before Ampere bfloat16 is emulated, and our kernels for it do not fit
        fast = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if fast else "float32"
    return getattr(torch, dtype)


def room_for(lms: list[LM], max_new_tokens: int | None) -> tuple[float, int]:
    """How long may a prompt be in the shortest context, and a trace (default: 1024, or half of that)?"""
    context = min(context_of(lm.model) for lm in lms)
    max_new_tokens = max_new_tokens or int(min(1024, context / 2))
    return context - max_new_tokens, max_new_tokens


def with_room(lms: list[LM], problems: list[Problem], max_new_tokens: int | None,
              max_prompt_tokens: float = math.inf, kind: str = "problems",
              asked=lambda problem: problem.question) -> tuple[list[Problem], int]:
    """The problems whose prompts, of what is `asked`, have room in all contexts, and max_new_tokens. A longer
    one is left out, never cut, and it does not cut all traces short."""
    room, max_new_tokens = room_for(lms, max_new_tokens)
    if room < 1:
        raise SystemExit(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's "
                         "context: lower it")
    limit, long = min(room, max_prompt_tokens), []
    sure = limit - max(len(lm.chat("")) for lm in lms)
    for p in problems:  # a token has at least one byte: most questions need no tokenizing
        text = asked(p)
        if len(text.encode()) > sure and any(len(lm.chat(text)) > limit for lm in lms):
            long.append(p)
    remedy = f"lower --max-new-tokens {max_new_tokens}" if limit == room else "raise --max-prompt-tokens"
    return leave_out(problems, long, f"more than {limit} prompt tokens", remedy, kind), max_new_tokens


def leave_out(problems: list[Problem], long: list[Problem], what: str, remedy: str,
              kind: str = "problems") -> list[Problem]:
    """`problems` less those that are too `long`, which are reported. Raises SystemExit if none is left."""
    if long and len(long) == len(problems):
        raise SystemExit(f"none of the {len(problems)} {kind} is left, for each has {what}: {remedy}")
    if long:
        print(f"left out {len(long)} of {len(problems)} {kind} with {what}; to keep them {remedy}: "
              f"{', '.join(p.id for p in long[:3])}{' ...' * (len(long) > 3)}", file=sys.stderr)
    gone = {p.id for p in long}
    return [p for p in problems if p.id not in gone]


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write_atomically(path: Path, text) -> None:
    """text: a str, or several to be written one by one."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)


def at_least(least: int):
    """The type of a flag: a whole number, refused before anything is loaded."""
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)
    return number


def new_file(text: str) -> Path:
    """The type of --out, so that it is looked at before the work: it is written at the end."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is no plain file: name one, or leave out --out")
    path = path.resolve()  # it is renamed into its place: not into that of a link
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist: create it")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"the folder {path.parent} cannot be written: choose another")
    return path


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples as they stand; defaults behind each flag that has one and does not name it."""

    def _get_help_string(self, action):
        if action.default in (None, False, [None]) or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


EXAMPLES = """\
examples
    python sample.py                                               the embedded policy, pass@1 to pass@16
    python sample.py --model M --data openai/gsm8k:main:test --limit 100 --n 8
    python sample.py --model runs/NAME/model --against M --data D  after beside before: paired difference
    python sample.py --model M --data D --n 4 --out traces.jsonl   traces for judge.py to grade
    python sample.py --model M --data D --unsolved hard.jsonl      the problems worth an exprl.py --data
    python sample.py --model M --bench                             tokens per second beside transformers
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample a data set and print pass@k with 95% intervals.",
                                     epilog=EXAMPLES, usage="python sample.py [flags]", formatter_class=Help)
    add = parser.add_argument_group("models and data").add_argument
    add("--model", default=str(MINIATURE / "policy"), help="folder, hub id, or bare well-known name")
    add("--against", metavar="MODEL", help="sample a second model, too, and print the paired difference")
    add("--data", nargs="+", default=[str(MINIATURE / "eval.jsonl")], help="files or hub data set ids")
    add("--limit", type=at_least(1), help="only the first so many problems")
    add("--max-prompt-tokens", type=at_least(1), default=2048,
        help="longer questions are reported and left out")
    add("--skip-bad-rows", action="store_true", help="count and drop bad rows instead of stopping")
    add("--out", type=new_file,
        help="write every trace to this JSONL file; after an interrupt the same command goes on")
    add("--unsolved", type=new_file,
        help="write the problems without a right trace to this JSONL file: hard ones, for exprl.py --data "
             "(where --data has splits: of the training split, otherwise test is taken)")
    add = parser.add_argument_group("sampling").add_argument
    add("--n", type=at_least(1), default=16, help="traces per problem")
    add("--k", type=at_least(1), nargs="+", help="pass@k for these k (default: 1, 2, 4, ... up to n)")
    add("--max-new-tokens", type=at_least(1),
        help="where a trace is cut off (default: 1024, or half the context)")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--seed", type=at_least(0), default=0, help="the noise is a function of seed, trace and position")
    add = parser.add_argument_group("engine").add_argument
    add("--max-rows", type=at_least(1), default=256, help="traces decoded at the same time")
    add("--cache-gb", type=float,
        help="memory for keys and values (default: 4 on a CPU, 60%% of the free on a GPU)")
    add("--bench", nargs="?", const="", metavar="JUDGE",
        help="time sampling, and judging with JUDGE, beside transformers (a table and a CSV, see "
             "experiments/bench_sampler.py)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    if args.bench is not None:
        from experiments import bench_sampler
        given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        if unheard := given - {"bench", "model", "data", "device", "out"}:
            parser.error(f"--bench does not heed --{unheard.pop().replace('_', '-')}: call "
                         "experiments/bench_sampler.py, which has flags of its own")
        return bench_sampler.main(args.model, args.bench, args.data[0], pick_device(args.device),
                                  **{"out": args.out} if args.out else {})
    ks = sorted(set(args.k or [2**i for i in range(args.n.bit_length()) if 2**i <= args.n]))
    if ks[-1] > args.n:
        parser.error(f"--k must lie between 1 and --n {args.n}, got {ks}")
    outs = [args.out, args.out and args.against and args.out.with_suffix(".against.jsonl")]
    written = [path for path in (*outs, args.unsolved) if path]
    sources = [Path(split_domain(spec)[1]).expanduser().resolve() for spec in args.data]
    if len({*written}) < len(written) or any(path in sources or path.parent in sources for path in written):
        parser.error("--out, its .against.jsonl, --unsolved and --data must be different files, and none may "
                     "lie in a folder that is --data")
    problems = problems_or_exit(args.data, "train" if args.unsolved else "test",
                                skip_bad_rows=args.skip_bad_rows)[: args.limit]
    device = pick_device(args.device)
    lm = load_lm(args.model, device, pick_dtype(args.dtype, device))
    other = load_lm(args.against, "meta") if args.against else lm  # one model in memory at a time
    problems, args.max_new_tokens = with_room([lm, other], problems, args.max_new_tokens,
                                              args.max_prompt_tokens)
    print(f"{len(problems)} problems x {args.n} traces of at most {args.max_new_tokens} tokens, "
          f"temperature {args.temperature}")
    solved = [sample_and_print(args, lm, problems, ks, outs[0])]
    if args.unsolved:
        hard = [p for p, count in zip(problems, solved[0], strict=True) if count == 0]
        if hard:
            write_atomically(args.unsolved, jsonl([asdict(p) for p in hard]))
        print(f"  no trace is right of {len(hard)} of {len(problems)} problems"
              f"{f', now in {args.unsolved}' if hard else ': there is nothing to write'}")
    if args.against:
        del lm
        other = load_lm(other.name, device, pick_dtype(args.dtype, device))
        solved.append(sample_and_print(args, other, problems, ks, outs[1]))
        print("difference, the same problems in both (95% interval)")
        for k in ks:
            ours, theirs = ([pass_at_k(args.n, c, k) for c in counts] for counts in solved)
            difference = np.subtract(ours, theirs)
            low, high = bootstrap_interval(difference)
            print(f"  pass@{k:<4d} {difference.mean():+7.2%}   {low:+.2%} .. {high:+.2%}")
    for out in filter(None, outs):
        partial_of(out).unlink(missing_ok=True)


def sample_and_print(args, lm: LM, problems: list[Problem], ks, out: Path | None) -> list[int]:
    """One model's table and traces -> how many traces of each problem are right."""
    start = time.perf_counter()
    records, left = traces_into(out, lm, problems, args.n, args.max_new_tokens, args.temperature, args.seed,
                                Sampler(lm.model, args.max_rows, args.cache_gb))
    seconds, metrics = time.perf_counter() - start, summary(records, args.n, ks)
    print(lm.name)
    for k in ks:
        low, high = metrics[f"pass@{k}_low"], metrics[f"pass@{k}_high"]
        print(f"  pass@{k:<4d} {metrics[f'pass@{k}']:7.2%}   95% interval {low:.2%} .. {high:.2%}")
    speed = f"{left} of the traces were there before the interrupt" if left else (
        f"{sum(r['tokens'] for r in records) / seconds:.0f} tokens/s")
    print(f"  length {metrics['length']:.0f} tokens, cut off {metrics['cut_off']:.1%}, {speed}"
          + (f", traces in {out}" if out else ""))
    return [sum(r["correct"] for r in records[i : i + args.n]) for i in range(0, len(records), args.n)]


if __name__ == "__main__":
    main()
