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
import heapq
import json
import os
import platform
import sys
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# transformers looks for Hugging Face's optional package `kernels`, which is not ours: hide ours meanwhile.
_ours = sys.modules.pop("kernels", None)
sys.modules["kernels"] = None
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

del sys.modules["kernels"]
if _ours is not None:
    sys.modules["kernels"] = _ours

from data import Problem, bootstrap_interval, is_correct, load_problems, pass_at_k  # noqa: E402
from kernels import choose_token, paged_attention, plan_pages, token_logprob  # noqa: E402
from kernels.choose_token import triton, triton_choose  # noqa: E402

transformers_logging.disable_progress_bar()  # its bars for loading and saving would tear ours

# One constant for training, Stage II and evaluation: a model must not meet a new prompt when it is measured.
SYSTEM_PROMPT = (
    "Solve the problem step by step. Open every step with a line that starts with ### and says what the step "
    "does, then carry it out below. When you are done, state the final answer inside \\boxed{}."
)
FAMILIES = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama-": "meta-llama", "meta-llama-": "meta-llama"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # full attention in every layer, plain linear head
PAGE = 32  # tokens. On a CPU 32 to 128 cost the same, 16 a third more; small pages waste less and share more
TOKEN, LENGTH, TRACE, POSITION, FIRST_PAGE = range(5)  # columns of a step's input; then the row's pages


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
        messages = [
            {"role": "system", "content": self.prompts.get("system", SYSTEM_PROMPT)},
            {"role": "user", "content": question},
        ]
        return chat_ids(self.tokenizer, messages)

    def text(self, token_ids) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write a Hugging Face folder that AutoModelForCausalLM, vLLM and this project load."""
        self.save_config(folder)
        self.model.save_pretrained(folder)

    def save_config(self, folder: Path) -> None:
        """All of it but the weights."""
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.prompts:
            (Path(folder) / "prompts.json").write_text(json.dumps(self.prompts, indent=1) + "\n")


def chat_ids(tokenizer, messages: list[dict]) -> list[int]:
    # enable_thinking is read by Qwen3's template and ignored by the others.
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False,
                                        return_dict=False)
    return list(ids)


def resolve_model(name: str) -> str:
    """A folder, a hub id (owner/name), or a well-known family's bare name -> what from_pretrained takes."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise SystemExit(f"{folder} is a folder without config.json: name a Hugging Face model folder")
        return str(folder)
    if "/" in name:
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise SystemExit(f"no folder {name}: check the path, or give a hub id like "
                             "Qwen/Qwen2.5-1.5B-Instruct")
        return name
    for prefix, owner in FAMILIES.items():
        if name.lower().startswith(prefix):
            return f"{owner}/{name}"
    raise SystemExit(f"cannot resolve the model name {name!r}: give a folder, a hub id (owner/name), or a "
                     "bare name of the Qwen, SmolLM or Llama families such as Qwen2.5-1.5B")


def load_lm(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LM:
    """Model and tokenizer from a folder, the local hub cache or the hub; safetensors only, no remote code."""
    path = resolve_model(name)
    if path != name:
        print(f"model {name} -> {path}", file=sys.stderr)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # tokenizer.json as it stands: AutoTokenizer rebuilds every Qwen2 tokenizer with Qwen's own word split
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError) as error:  # raised for a missing, offline or gated repository
        raise SystemExit(
            f"cannot load {path}: {str(error).strip().splitlines()[0]}\n"
            "  - no network? download the repository elsewhere and give its folder: --model /path/to/folder\n"
            "  - already in a cache? set HF_HOME to it (and HF_HUB_OFFLINE=1)\n"
            "  - a gated model? accept its licence on the hub and log in with `hf auth login`\n"
            "  - only .bin weights? convert them to safetensors first; pickled weights are never loaded"
        ) from error
    if tokenizer.chat_template is None:
        raise SystemExit(f"{path} has no chat template: ExpRL prompts a model as a chat; "
                         "take its instruct version")
    prompts_file = Path(path) / "prompts.json"
    prompts = json.loads(prompts_file.read_text()) if prompts_file.exists() else {}
    return LM(path, model.to(device).eval(), tokenizer, prompts)


def layer_kinds(config) -> list[str]:
    return sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))


def covers(config) -> bool:
    """Can the paged cache serve this architecture?"""
    return (config.model_type in ARCHITECTURES and layer_kinds(config) == ["full_attention"]
            and config.hidden_act == "silu")


# ------------------------------------------------------------------------------------------------------------
# Pages: who holds which (host only, no tensors)


@dataclass(eq=False, slots=True)
class Page:
    """PAGE consecutive tokens of one sequence, in every layer. Rows and waiting prompts hold it together."""

    index: int  # where it lies in the pool; compact() may move it
    serial: int
    users: int = 1
    key: tuple | None = None  # what it is known by, if others may share it


class PageTable:
    """Free and taken pages. A full page is known by (serial of the page before it, its tokens), so that a
    prompt finds the pages of any live prompt that starts alike. Freed with its last user."""

    def __init__(self, count: int):
        self.pages: list[Page | None] = [None] * count
        self.free = list(range(count))  # a heap: the lowest first, so that pages in use lie densely
        self.known: dict[tuple, Page] = {}
        self.serials = 0

    def take(self) -> Page:
        self.serials += 1
        page = Page(heapq.heappop(self.free), self.serials)
        self.pages[page.index] = page
        return page

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

    def match(self, ids) -> list[Page]:
        """The known pages that hold the first tokens of `ids`, shared with the caller."""
        pages, before = [], 0
        for start in range(0, len(ids) - PAGE + 1, PAGE):
            page = self.known.get((before, tuple(ids[start : start + PAGE])))
            if page is None:
                break
            pages.append(page)
            before = page.serial
        return self.share(pages)

    def publish(self, pages: list[Page], ids) -> None:
        """Make the full pages of `ids` known."""
        before = 0
        for i in range(len(ids) // PAGE):
            key = (before, tuple(ids[i * PAGE : (i + 1) * PAGE]))
            if key not in self.known and pages[i].key is None:
                self.known[key], pages[i].key = pages[i], key
            before = pages[i].serial

    def compact(self) -> tuple[list[int], list[int]]:
        """Move the last pages into holes: (from, to), for the caller to move the tensors too."""
        used = len(self.pages) - len(self.free)
        moving = [page for page in self.pages[used:] if page is not None]
        sources, targets = [page.index for page in moving], sorted(i for i in self.free if i < used)
        for page, index in zip(moving, targets, strict=True):
            self.pages[page.index], self.pages[index], page.index = None, page, index
        self.free = list(range(used, len(self.pages)))
        return sources, targets

    def top(self) -> int:
        """One more than the highest index in use."""
        return max((page.index + 1 for page in self.pages if page is not None), default=0)


class Cache:
    """The tensors behind a PageTable: pool (layers, key or value, pages, kv heads, PAGE, head size)."""

    def __init__(self, model, pages: int):
        config, device = model.config, model.device
        shape = (config.num_hidden_layers, 2, pages, config.num_key_value_heads, PAGE, head_size(config))
        if device.type == "cpu":  # numpy's zeros take memory only when a page is first written
            raw = np.zeros(int(np.prod(shape)) * model.dtype.itemsize, np.uint8)
            self.pool = torch.from_numpy(raw).view(model.dtype).view(shape)
        else:
            self.pool = torch.zeros(shape, dtype=model.dtype, device=device)
        self.table, self.clean = PageTable(pages), 0

    def take(self, count: int) -> list[Page]:
        pages = [self.table.take() for _ in range(count)]
        if self.pool.device.type == "cpu":
            # The PyTorch attention reads whole pages: nothing of a former row, NaN or infinite, may be there.
            used = [page.index for page in pages if page.index < self.clean]
            if used:
                self.pool[:, :, used] = 0
            self.clean = max([self.clean, *(page.index + 1 for page in pages)])
        return pages

    def copy(self, sources: list[int], targets: list[int]) -> None:
        if sources:
            self.pool[:, :, targets] = self.pool[:, :, sources]


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ------------------------------------------------------------------------------------------------------------
# One forward pass, for prefill and decode


PACKS = {torch.float32} if platform.machine() in ("x86_64", "AMD64") else set()
if PACKS and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PACKS.add(torch.bfloat16)


class Linear:
    """Linear layers that read the same input, side by side: x W^T + b, then "swish", or "add" or "mul" with
    another tensor.

    On an x86 CPU the weights are a copy in oneDNN's own layout, 1.2 (64 rows, bfloat16) to 1.7 times (16)
    faster, and what follows the product is done before the result is rounded."""

    def __init__(self, *modules):
        self.modules, weight = modules, modules[0].weight
        self.packed = (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
                       and weight.dtype in PACKS and all(type(m) is torch.nn.Linear for m in modules))
        if self.packed:
            weight = torch.cat([m.weight.detach() for m in modules]) if modules[1:] else weight.detach()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 64)  # for some 64 rows
            self.bias = None if modules[0].bias is None else torch.cat([m.bias.detach() for m in modules])

    def __call__(self, x, then="none", other=None):
        if self.packed and other is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, then)
        y = self.modules[0](x) if len(self.modules) == 1 else torch.cat([m(x) for m in self.modules], -1)
        if other is None:
            return F.silu(y) if then == "swish" else y
        return y.add_(other) if then == "add" else y.mul_(other)


class Network:
    """The decoder of the covered families over the modules of a transformers model: embedding, layers, norm.

    The same as transformers' own forward in fewer and larger operations. Made anew for each call of the
    sampler, since weights change in place (0.2 s for 135M weights in bfloat16)."""

    def __init__(self, model):
        self.base, config = model.base_model, model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layers = [(layer, Linear(a.q_proj, a.k_proj, a.v_proj), Linear(a.o_proj), Linear(m.gate_proj),
                        Linear(m.up_proj), Linear(m.down_proj))
                       for layer in self.base.layers for a, m in [(layer.self_attn, layer.mlp)]]
        self.output = model.get_output_embeddings()

    @cached_property
    def head(self) -> Linear:
        return Linear(self.output)

    def __call__(self, ids, positions, kv):
        """ids, positions (T,): tokens of any rows -> hidden states (T,d).

        kv.attend(layer, query (T,H,D), key, value (T,KVH,D)) -> (T,H,D) stores keys and values."""
        x, H = self.base.embed_tokens(ids), self.heads
        # the angles in float32: transformers rounds them to the model's type
        cos, sin = (t[0, :, None] for t in self.base.rotary_emb(x[:1].float(), positions[None]))
        for i, (layer, qkv, out, gate, up, down) in enumerate(self.layers):
            qkv = qkv(rms_norm(layer.input_layernorm, x)).view(len(x), H + 2 * self.kv_heads, -1)
            query_key, value = qkv.split([H + self.kv_heads, self.kv_heads], 1)
            if hasattr(layer.self_attn, "q_norm"):  # Qwen3
                query_key = torch.cat([rms_norm(layer.self_attn.q_norm, query_key[:, :H]),
                                       rms_norm(layer.self_attn.k_norm, query_key[:, H:])], 1)
            query_key = rotate(query_key, cos, sin)
            attended = kv.attend(i, query_key[:, :H], query_key[:, H:], value)
            x = out(attended.flatten(1), "add", x)
            h = rms_norm(layer.post_attention_layernorm, x)
            x = down(up(h, "mul", gate(h, "swish")), "add", x)
        return rms_norm(self.base.norm, x)


def rms_norm(module, x):
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def rotate(x, cos, sin):
    """x (T,H,D): number pairs (i, i + D/2) turned by a token's angles, cos and sin (T,1,D); rounded once."""
    y = x.float()
    (a, b), (_, sin), y = y.chunk(2, -1), sin.chunk(2, -1), y * cos
    y[..., : a.shape[-1]].addcmul_(b, sin, value=-1)
    y[..., a.shape[-1] :].addcmul_(a, sin)
    return y.to(x.dtype)


@dataclass
class Piece:
    """A run of a sequence for one prefill pass: ids behind `start` tokens that lie in `pages`. The first
    `keep` are written there. mask (T, start + T): what each sees, None for plain causal. reads: (index in
    ids, result row)."""

    ids: list[int]
    positions: list[int]
    start: int
    keep: int
    pages: list[Page]
    mask: torch.Tensor | None
    reads: list[tuple[int, int]]


def cut_pieces(ids, start: int, pages: list[Page], forks=(), chunk: int = 2048) -> list[Piece]:
    """ids[start:] in runs of `chunk`. forks: (cut, suffix, result rows): what follows ids[:cut] + suffix?
    With several rows: what follows each of its last tokens?

    All suffixes ride behind the last run; the mask lets each see ids[:cut] and itself."""
    pieces = []
    for a in range(start, len(ids), chunk):
        b = min(a + chunk, len(ids))
        own, positions = list(ids[a:b]), list(range(a, b))
        reads = [(cut - 1 - a, rows[0]) for cut, suffix, rows in forks if not suffix and a < cut <= b]
        tails = [fork for fork in forks if fork[1]] if b == len(ids) else []
        for cut, suffix, rows in tails:
            own += suffix
            positions += range(cut, cut + len(suffix))
            reads += zip(range(len(own) - len(rows), len(own)), rows)
        mask, T = None, len(own)
        if a or tails:
            mask = torch.ones(T, a + T, dtype=torch.bool).tril_(a)
            at = b - a
            for cut, suffix, _ in tails:
                mask[at : at + len(suffix), cut : a + at] = False
                at += len(suffix)
        pieces.append(Piece(own, positions, a, b - a, pages, mask, reads))
    return pieces


class Prefill:
    """Pieces in one packed sequence (1, sum of T). Keys and values go to their pages first, so that a piece
    may stand behind pages that are filled in the same pass."""

    def __init__(self, cache: Cache, pieces: list[Piece]):
        self.pool, self.pieces = cache.pool, pieces
        device, dtype = self.pool.device, self.pool.dtype
        source, page, offset, at = [], [], [], 0
        for p in pieces:
            source += range(at, at + p.keep)
            page += [p.pages[t // PAGE].index for t in range(p.start, p.start + p.keep)]
            offset += [t % PAGE for t in range(p.start, p.start + p.keep)]
            at += len(p.ids)
        self.source, self.page, self.offset = torch.tensor([source, page, offset], device=device).unbind()
        self.context = [torch.tensor([x.index for x in p.pages[: -(-p.start // PAGE)]], device=device)
                        for p in pieces]
        # float once, since 0 / -inf is what attention adds; a bool mask would be converted in every layer
        self.masks = [p.mask if p.mask is None else torch.zeros(p.mask.shape, dtype=dtype, device=device)
                      .masked_fill_(~p.mask.to(device), -torch.inf) for p in pieces]

    def attend(self, layer, query, key, value):
        keys, values = self.pool[layer]
        keys[self.page, :, self.offset] = key[self.source]
        values[self.page, :, self.offset] = value[self.source]
        out, at = query.new_empty(query.shape), 0
        groups = query.shape[1] // key.shape[1]
        for piece, context, mask in zip(self.pieces, self.context, self.masks):
            part = slice(at, at := at + len(piece.ids))
            q, k, v = (x[part].transpose(0, 1) for x in (query, key, value))  # (H,T,D), (KVH,T,D)
            if piece.start:
                k, v = (torch.cat([pages[context].transpose(0, 1).flatten(1, 2)[:, : piece.start], own], 1)
                        for pages, own in ((keys, k), (values, v)))
            # kv heads as the batch, a kv head's query heads beside it: no head is repeated
            k, v = (x[:, None].expand(-1, groups, -1, -1) for x in (k, v))
            done = F.scaled_dot_product_attention(q.unflatten(0, (-1, groups)), k, v, attn_mask=mask,
                                                  is_causal=mask is None)
            out[part] = done.flatten(0, 1).transpose(0, 1)
        return out


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

    def attend(self, layer, query, key, value):
        keys, values = self.pool[layer]
        keys[self.page, :, self.offset] = key
        values[self.page, :, self.offset] = value
        return paged_attention(query.contiguous(), keys, values, self.table, self.lengths,
                               query.shape[-1] ** -0.5, self.plan)


# ------------------------------------------------------------------------------------------------------------
# The sampler


@dataclass
class Work:
    """A prompt that waits for memory, or a paused trace: ids are read up to the last one, which is fed."""

    ids: list[int]
    traces: deque  # trace numbers still to start from here
    tokens: list[int] = field(default_factory=list)  # of a paused trace
    logprobs: list[float] = field(default_factory=list)
    forced: list[int] | None = None
    pages: list[Page] = field(default_factory=list)  # while prefilled


class Rows:
    """The traces being decoded, as arrays; live rows are 0..count-1. `state` is all that a step is told."""

    def __init__(self, rows: int, width: int, max_new_tokens: int):
        self.count, self.admitted = 0, 0
        self.state = np.zeros((rows, FIRST_PAGE + width), np.int32)
        self.tokens = np.zeros((rows, max_new_tokens), np.int32)
        self.logprobs = np.zeros((rows, max_new_tokens), np.float32)
        self.noise = np.zeros((rows, max_new_tokens), np.float32)
        self.age = np.zeros(rows, np.int64)
        self.sampling = np.ones(rows, bool)  # False: forced tokens follow, then the logits are read
        self.pages: list[list[Page]] = [[] for _ in range(rows)]
        self.forced: list[list[int] | None] = [None] * rows

    def add(self, work: Work, trace: int, pages: list[Page], noise) -> None:
        row, self.count, self.admitted = self.count, self.count + 1, self.admitted + 1
        self.state[row, :FIRST_PAGE] = work.ids[-1], len(work.ids) - 1, trace, len(work.tokens)
        self.tokens[row, : len(work.tokens)] = work.tokens
        self.logprobs[row, : len(work.tokens)] = work.logprobs
        self.noise[row], self.age[row], self.sampling[row] = noise, self.admitted, work.forced is None
        self.pages[row], self.forced[row] = pages, work.forced
        self.address(row)

    def address(self, row: int) -> None:
        """Write the places of the row's pages into its state."""
        self.state[row, FIRST_PAGE : FIRST_PAGE + len(self.pages[row])] = [p.index for p in self.pages[row]]

    def remove(self, row: int) -> list[Page]:
        """The last row moves into the hole. Returns the row's pages, for the caller to drop."""
        pages, self.count = self.pages[row], self.count - 1
        for array in (self.state, self.tokens, self.logprobs, self.noise, self.age, self.sampling, self.pages,
                      self.forced):
            array[row] = array[self.count]
        self.pages[self.count] = []
        return pages


class Sampler:
    """Samples from a transformers causal LM. `max_rows` bounds the traces decoded at once, `cache_gb` the
    memory of their keys and values (default: 4 GB on a CPU, 60% of what is free on a GPU)."""

    def __init__(self, model, max_rows: int = 256, cache_gb: float | None = None, prefill_tokens: int = 8192,
                 graphs: bool = True):
        self.model, self.max_rows, self.cache_gb = model, max_rows, cache_gb
        self.prefill_tokens, self.graphs = prefill_tokens, graphs
        self.covered = covers(model.config)
        if not self.covered:
            kinds = ", ".join(layer_kinds(model.config))
            print(f"{model.config.model_type} with {kinds} layers: sample.py has "
                  "no paged cache for it and takes transformers' own, prompt by prompt: slower",
                  file=sys.stderr)
        self.cache: Cache | None = None
        self.network: Network | None = None
        self.wanted = 0  # pages asked for when the cache was made
        self.replay: Graphs | None = None
        self.pauses = 0  # traces paused so far for want of memory

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        n: int = 1,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        seed: int = 0,
        end_ids: list[int] | None = None,  # default: the end tokens of the model's generation config
        progress=None,  # called with the number of traces that ended, as they end
        places: list[int] | None = None,  # of these prompts in a larger batch: their noise is as in that one
    ) -> list[Rollout]:
        """n traces for each prompt, prompt-major: the traces of prompt i are [i*n : (i+1)*n].

        Raises ValueError when prompt + max_new_tokens exceeds the model's context or the cache's memory."""
        return self.run(prompts, n, max_new_tokens, temperature, seed, end_ids, progress, places)[0]

    @torch.inference_mode()
    def reply_logits(self, prompts: list[list[int]], stem: list[int], token_ids: list[int],
                     max_new_tokens: int, temperature: float = 0.0, seed: int = 0,
                     end_ids: list[int] | None = None) -> tuple[list[Rollout], torch.Tensor]:
        """One reply a prompt, then logits (N, len(token_ids)) f32 of what follows prompt + reply + `stem`.

        The reply's end token is left out. The stem is fed over the reply's own cache, among other rows."""
        return self.run(prompts, 1, max_new_tokens, temperature, seed, end_ids, stem=list(stem),
                        token_ids=list(token_ids))

    @torch.inference_mode()
    def next_logits(self, prompts: list[list[int]], token_ids: list[int],
                    forks: list[list[tuple[int, list[int]]]] | None = None) -> torch.Tensor:
        """Logits (N, len(token_ids)) f32 of the token that follows each prompt, for `token_ids` only.

        forks: per prompt a list of (cut, suffix): read what follows prompt[:cut] + suffix instead, for all
        cuts in one pass over the prompt; N counts them in order. Full pages of tokens that a prompt shares
        with the one before (rubric, question, reference) are computed once: let such prompts stand together.
        """
        forks = forks or [[(len(prompt), [])] for prompt in prompts]
        weight = self.model.get_output_embeddings().weight
        weight = weight[torch.tensor(token_ids, device=weight.device)]
        rows = iter(range(sum(map(len, forks))))
        asked = [[(cut, list(suffix), [next(rows)]) for cut, suffix in some] for some in forks]
        out = torch.zeros(sum(map(len, forks)), len(token_ids))
        for hidden, reads in self.read(prompts, asked):
            out[reads] = (hidden @ weight.T).float().cpu()
        return out

    @torch.inference_mode()
    def target_logprobs(self, prompts: list[list[int]],
                        forks: list[list[tuple[int, list[int], list[int]]]]) -> list[torch.Tensor]:
        """How likely is `target` after prompt[:cut] + suffix, for forks of (cut, suffix, target), none empty?
        One tensor a fork, in order: the log-prob f32 of each of the target's tokens. Shares what
        `next_logits` shares."""
        targets = [target for some in forks for _, _, target in some]
        ids = torch.tensor([t for target in targets for t in target], dtype=torch.long)
        rows = iter(range(len(ids)))
        asked = [[(cut, suffix + target[:-1], [next(rows) for _ in target]) for cut, suffix, target in some]
                 for some in forks]
        weight, out = self.model.get_output_embeddings().weight, torch.zeros(len(ids))
        for hidden, reads in self.read(prompts, asked):
            out[reads] = token_logprob(hidden, weight, ids[reads].to(hidden.device), 1.0)[0].cpu()
        return list(out.split([len(target) for target in targets]))

    def read(self, prompts, forks):
        """forks: per prompt (cut, suffix, result rows), see cut_pieces. Yields hidden (reads,d), the rows."""
        longest = [max([cut + len(suffix) for cut, suffix, _ in some], default=0) for some in forks]
        self.check(prompts, 0, 1.0, longest)
        for i, (prompt, some) in enumerate(zip(prompts, forks, strict=True)):
            if any(not 0 < cut <= len(prompt) for cut, _, _ in some):
                raise ValueError(f"prompt {i} of {len(prompt)} tokens cannot be cut at "
                                 f"{[cut for cut, _, _ in some]}")
        if not self.covered:
            for prompt, some in zip(prompts, forks):
                for cut, suffix, rows in some:
                    ids = torch.tensor([prompt[:cut] + suffix], device=self.model.device)
                    yield self.model.base_model(ids, use_cache=False).last_hidden_state[0, -len(rows):], rows
            return
        waiting = deque((list(prompt), some) for prompt, some in zip(prompts, forks))
        pages = -(-max(map(len, prompts), default=1) // PAGE)
        with self.open(2 * pages + self.prefill_tokens // PAGE, pages) as cache:
            kept: list[Page] = []  # those of the last prompt: its neighbour may start alike
            while waiting:
                batch, held, tokens = [], [], 0
                while waiting and (not batch or tokens < self.prefill_tokens):
                    ids, some = waiting[0]
                    # what is read must be computed: at least the token before the first cut
                    found = cache.table.match(ids[: min((cut for cut, _, _ in some), default=len(ids)) - 1])
                    if batch and -(-len(ids) // PAGE) - len(found) > len(cache.table.free):
                        cache.table.drop(found)
                        break
                    if -(-len(ids) // PAGE) - len(found) > len(cache.table.free):
                        cache.table.drop(kept + found)
                        kept, found = [], []
                    waiting.popleft()
                    start = len(found) * PAGE
                    own = found + cache.take(-(-len(ids) // PAGE) - len(found))
                    cache.table.publish(own, ids)
                    held.append(own)
                    batch += cut_pieces(ids, start, own, some)
                    tokens += len(ids) - start + sum(len(suffix) for _, suffix, _ in some)
                yield from self.prefill(cache, batch)
                cache.table.drop(kept)
                kept = held.pop()
                for own in held:
                    cache.table.drop(own)
            cache.table.drop(kept)

    def prefill(self, cache: Cache, pieces: list[Piece]) -> list[tuple[torch.Tensor, list[int]]]:
        """Fill pages, in passes of about `prefill_tokens`. Yields (hidden (reads, d), their result rows)."""
        found, device = [], self.model.device
        while pieces:
            sizes = np.cumsum([len(piece.ids) for piece in pieces])
            count = max(1, int(np.searchsorted(sizes, self.prefill_tokens, side="right")))
            batch, pieces = pieces[:count], pieces[count:]
            ids = torch.tensor([t for piece in batch for t in piece.ids], device=device)
            positions = torch.tensor([t for piece in batch for t in piece.positions], device=device)
            hidden = self.network(ids, positions, Prefill(cache, batch))
            starts = [0, *sizes[: count - 1].tolist()]
            reads = [(at + index, row) for at, piece in zip(starts, batch) for index, row in piece.reads]
            if reads:
                where, rows = zip(*reads)
                found.append((hidden[torch.tensor(where, device=device)], list(rows)))
        return found

    # ---- the loop: admit, grow, step, end ------------------------------------------------------------------

    def run(self, prompts, n, max_new_tokens, temperature, seed, end_ids, progress=None, places=None, stem=(),
            token_ids=()):
        room = max_new_tokens + len(stem)
        self.check(prompts, n, temperature, [len(p) + room for p in prompts])
        results: list[Rollout | None] = [None] * (len(prompts) * n)
        # A trace is known by its number in the larger batch; index says where it lies in this one.
        index = {place * n + j: i * n + j for i, place in enumerate(places or range(len(prompts)))
                 for j in range(n)}
        read = torch.zeros(len(results) if stem else 0, len(token_ids))
        if not results:
            return results, read
        ends = np.array(end_tokens(self.model) if end_ids is None else end_ids, np.int32)
        if not self.covered:
            return self.run_slowly(prompts, n, max_new_tokens, temperature, seed, ends, progress, list(index),
                                   stem, token_ids)
        most = -(-(max(map(len, prompts)) + room) // PAGE)  # pages of the longest trace
        rows = Rows(min(self.max_rows, len(results)), most, max(max_new_tokens, 1))
        numbers = iter(index)
        waiting = deque(Work(list(p), deque(islice(numbers, n))) for p in prompts)
        wanted = (len(rows.pages) + 2) * most + self.prefill_tokens // PAGE
        with self.open(wanted, most) as cache:
            ready, kept = deque(), []

            def retreat(row):
                """Pause a row: free what is its own, and queue it with its tokens so far."""
                trace, position = rows.state[row, [TRACE, POSITION]].tolist()
                tokens, prompt = rows.tokens[row, :position].tolist(), list(prompts[index[trace] // n])
                ids, forced = prompt + tokens, rows.forced[row]
                if forced is not None:
                    ids = ids[: len(ids) - (tokens[-1] in ends)] + list(stem[: len(stem) - len(forced)])
                waiting.appendleft(Work(ids, deque([trace]), tokens, rows.logprobs[row, :position].tolist(),
                                        forced))
                cache.table.drop(rows.remove(row))
                self.pauses += 1

            while True:
                kept = self.admit(cache, rows, waiting, ready, kept, seed)
                if not rows.count:
                    break
                # Each row that starts a page takes one. When they run short, prompts not started yet give
                # theirs back, then the youngest row is paused; the oldest always fits, see fitting_pages().
                while True:
                    lengths = rows.state[: rows.count, LENGTH]
                    growing = [r for r in np.flatnonzero(lengths % PAGE == 0).tolist()
                               if lengths[r] == PAGE * len(rows.pages[r])]
                    if len(growing) <= len(cache.table.free):
                        break
                    if kept:
                        cache.table.drop(kept)
                        kept = []
                    elif ready:
                        work = ready.pop()
                        cache.table.drop(work.pages)
                        work.pages = []
                        waiting.appendleft(work)
                    else:
                        retreat(int(rows.age[: rows.count].argmax()))
                for row, page in zip(growing, cache.take(len(growing))):
                    rows.pages[row].append(page)
                    rows.address(row)

                token, logprob, logits = self.step(cache, rows, temperature, seed)
                live = np.arange(rows.count)
                state = rows.state[: rows.count]
                state[:, LENGTH] += 1
                drawn = live[rows.sampling[: rows.count]]
                position = state[drawn, POSITION]
                rows.tokens[drawn, position] = state[drawn, TOKEN] = token[drawn]
                rows.logprobs[drawn, position] = np.minimum(logprob[drawn], 0.0)
                state[drawn, POSITION] += 1
                finished = np.isin(token, ends)
                done = []
                for row in live[~rows.sampling[: rows.count]].tolist():  # a forced continuation
                    if rows.forced[row]:
                        state[row, TOKEN] = rows.forced[row].pop(0)
                    else:
                        read[index[int(state[row, TRACE])]] = logits[row, list(token_ids)].float().cpu()
                        done.append(row)
                ended = drawn[finished[drawn] | (state[drawn, POSITION] == max_new_tokens)].tolist()
                for row in ended:
                    trace, count = state[row, [TRACE, POSITION]].tolist()
                    results[index[trace]] = Rollout(
                        tuple(prompts[index[trace] // n]), tuple(rows.tokens[row, :count].tolist()),
                        tuple(rows.logprobs[row, :count].tolist()), bool(finished[row]))
                    if not stem:
                        done.append(row)
                        continue
                    rows.sampling[row], rows.forced[row] = False, list(stem)
                    if finished[row]:  # the end token is not fed
                        state[row, TOKEN] = rows.forced[row].pop(0)
                for row in sorted(done, reverse=True):
                    cache.table.drop(rows.remove(row))
                if done and cache.pool.device.type == "cpu":
                    used = len(cache.table.pages) - len(cache.table.free)
                    if cache.table.top() > 1.1 * used + 8:
                        cache.copy(*cache.table.compact())
                        for row in range(rows.count):
                            rows.address(row)
                if progress and ended:
                    progress(len(ended))
        return results, read

    def admit(self, cache, rows, waiting, ready, kept, seed) -> list[Page]:
        """Start waiting traces while rows and pages last. Returns the pages kept for a prompt's neighbour."""
        table, copies = cache.table, ([], [])
        while rows.count < len(rows.pages) and (ready or waiting):
            spare = rows.count // 2 if rows.count else 0  # pages that the live rows will soon ask for
            if not ready:
                pieces, free, tokens = [], len(rows.pages) - rows.count, 0
                while waiting and free > 0 and tokens < self.prefill_tokens:
                    work = waiting[0]
                    ids = work.ids[:-1]  # the last token is fed by the first step, which draws the next one
                    found = table.match(ids)
                    missing = -(-len(ids) // PAGE) - len(found)
                    if missing + 1 + spare > len(table.free) and (rows.count or ready):
                        table.drop(found)
                        break
                    table.drop(kept)
                    work.pages = found + cache.take(missing)
                    table.publish(work.pages, ids)
                    kept = table.share(work.pages[: len(ids) // PAGE])
                    pieces += cut_pieces(ids, len(found) * PAGE, work.pages)
                    ready.append(waiting.popleft())
                    free, tokens = free - len(work.traces), tokens + len(ids) - len(found) * PAGE
                self.prefill(cache, pieces)
                if not ready:
                    break
            work = ready[0]
            full = (len(work.ids) - 1) // PAGE
            tail, last = work.pages[full:], len(work.traces) == 1
            if not last and len(table.free) < len(tail) + spare and rows.count:
                break
            if last:  # takes over the prompt's pages
                pages, work.pages = work.pages, []
                ready.popleft()
            else:
                pages = table.share(work.pages[:full]) + cache.take(len(tail))
                copies[0].extend(page.index for page in tail)
                copies[1].extend(page.index for page in pages[full:])
            trace = work.traces.popleft()
            rows.add(work, trace, pages, trace_noise(seed, trace, rows.noise.shape[1]))
        cache.copy(*copies)
        if not waiting and not ready:
            table.drop(kept)
            kept = []
        return kept

    def step(self, cache, rows, temperature, seed):
        """Feed each row's token; draw the next: token (R,) and logprob (R,) on the host, logits (R,V)."""
        state = rows.state[: rows.count]
        if self.replay:
            return self.replay(state, temperature, seed)
        state = torch.from_numpy(state).to(self.model.device)
        position = np.minimum(state[:, POSITION].cpu().numpy(), rows.noise.shape[1] - 1)
        noise = torch.from_numpy(rows.noise[np.arange(rows.count), position]).to(self.model.device)
        logits = self.decode(cache, state)
        token, logprob = choose_token(logits, temperature, noise)
        return token.cpu().numpy(), logprob.cpu().numpy(), logits

    def decode(self, cache, state):
        return self.network.head(self.network(state[:, TOKEN].long(), state[:, LENGTH].long(),
                                              Decode(cache, state)))

    # ---- memory --------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, wanted: int, longest: int):
        """A cache of at most `wanted` pages; whatever happens inside, no page stays taken.

        On a GPU it stays for the next call, which may replay the CUDA graphs that know its address."""
        cuda = self.model.device.type == "cuda"
        addresses = [p.data_ptr() for p in self.model.parameters()] if cuda else []
        if self.cache is None or wanted > self.wanted or longest + 2 > len(self.cache.table.pages) or (
                self.replay and self.replay.outdated(addresses, longest)):
            self.cache = self.replay = None  # freed before the successor is made
            if cuda:
                torch.cuda.empty_cache()
            self.cache, self.wanted = Cache(self.model, min(wanted, self.fitting_pages(longest))), wanted
            if cuda and self.graphs and triton is not None:
                self.replay = Graphs(self, self.cache, self.max_rows, longest, addresses)
        reserved = self.cache.take(1) if self.replay else []  # page 0 takes what padding rows write
        self.network = Network(self.model)
        try:
            yield self.cache
            self.cache.table.drop(reserved)
            assert len(self.cache.table.free) == len(self.cache.table.pages), "a page is still held"
        finally:
            self.cache.table = PageTable(len(self.cache.table.pages))
            self.network = None
            if not cuda:
                self.cache = None

    def fitting_pages(self, longest: int) -> int:
        """How many pages the cache may hold; refuses here what could never fit."""
        config = self.model.config
        page = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * PAGE
        page *= self.model.dtype.itemsize
        if self.cache_gb is not None:
            budget = self.cache_gb * 2**30
        elif self.model.device.type == "cuda":
            budget = 0.6 * torch.cuda.mem_get_info(self.model.device)[0]
        else:
            budget = 4 * 2**30
        least = page * (longest + 2)  # and a copy of a prompt's last page, and the page of padding rows
        if least > budget:
            raise ValueError(
                f"one trace of {longest * PAGE} tokens needs {least / 2**30:.3g} GB of cache, "
                f"{budget / 2**30:.3g} GB are there: lower --max-new-tokens or raise --cache-gb")
        return int(budget // page)

    def check(self, prompts, n, temperature, needed) -> None:
        if temperature < 0 or n < 0:
            raise ValueError(f"temperature and n must not be negative, got {temperature} and {n}")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for i, (prompt, length) in enumerate(zip(prompts, needed, strict=True)):
            if not prompt:
                raise ValueError(f"prompt {i} has no token")
            if limit and length > limit:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; with {length - len(prompt)} new ones "
                                 f"it exceeds the model's context of {limit}: "
                                 "lower --max-new-tokens or drop the problem")

    # ---- other families ------------------------------------------------------------------------------------

    def run_slowly(self, prompts, n, max_new_tokens, temperature, seed, ends, progress, numbers, stem,
                   token_ids):
        """The same with transformers' own cache, for layers that pages do not cover: one prompt at a time,
        its n traces as a batch of equal lengths, so that nothing is padded."""
        results, device = [], self.model.device
        read = torch.zeros(len(prompts) * n if stem else 0, len(token_ids))
        for i, prompt in enumerate(prompts):
            noise = torch.stack([trace_noise(seed, t, max_new_tokens) for t in numbers[i * n :][:n]])
            noise = noise.to(device)
            ids, past = torch.tensor([prompt] * n, device=device), None
            tokens, logprobs = [], []
            over = torch.zeros(n, dtype=torch.bool, device=device)
            for position in range(max_new_tokens):
                out = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = out.past_key_values
                token, logprob = choose_token(out.logits[:, -1], temperature, noise[:, position])
                tokens.append(token)
                logprobs.append(logprob)
                over |= torch.isin(token, torch.from_numpy(ends).to(device))
                ids = token[:, None]
                if over.all():
                    break
            for j in range(n):
                row, lps = ([x[j].item() for x in column] for column in (tokens, logprobs))
                end = next((k + 1 for k, t in enumerate(row) if t in ends), len(row))
                finished = row[end - 1] in ends
                lps = tuple(min(x, 0.0) for x in lps[:end])
                results.append(Rollout(tuple(prompt), tuple(row[:end]), lps, bool(finished)))
                if stem:
                    asked = list(prompt) + row[: end - finished] + list(stem)
                    logits = self.model(torch.tensor([asked], device=device), logits_to_keep=1).logits
                    read[len(results) - 1] = logits[0, -1, list(token_ids)].float().cpu()
            if progress:
                progress(n)
        return results, read


class Graphs:
    """A decode step on CUDA, captured once per bucket of rows and replayed: one small copy to the device (the
    rows' state), one launch, one small copy back (token and log-prob). Not yet run on a GPU."""

    def __init__(self, sampler: Sampler, cache: Cache, rows: int, width: int, addresses: list[int]):
        device = sampler.model.device
        self.sampler, self.cache, self.addresses = sampler, cache, addresses
        self.graphs, self.memory = {}, None
        self.host = torch.zeros(bucket(rows), FIRST_PAGE + width, dtype=torch.int32, pin_memory=True)
        self.state = self.host.to(device)
        self.temperature = torch.ones(1, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)

    def outdated(self, addresses, width) -> bool:
        """The weights moved, or a trace may need more pages than a row of the state holds."""
        return addresses != self.addresses or width > self.state.shape[1] - FIRST_PAGE

    def __call__(self, state: np.ndarray, temperature: float, seed: int):
        count, size = len(state), bucket(len(state))
        self.host[:size] = 0  # padding rows: one token, written to page 0, which no trace owns
        self.host[:count, : state.shape[1]] = torch.from_numpy(state)
        self.state[:size].copy_(self.host[:size], non_blocking=True)
        self.temperature.fill_(temperature)
        self.seed.fill_(seed % 2**63)
        if size not in self.graphs:
            self.capture(size)
        graph, drawn, logits = self.graphs[size]
        graph.replay()
        drawn = drawn.cpu().numpy()  # waits for the step: from here on the host buffer may be written again
        return drawn[:count, 0].astype(np.int32), drawn[:count, 1], logits

    def compute(self, state):
        logits = self.sampler.decode(self.cache, state)
        token, logprob = triton_choose(logits, self.temperature, self.seed, state[:, TRACE],
                                       state[:, POSITION])
        return torch.stack([token.float(), logprob], 1), logits  # a float32 holds every id below 2^24

    def capture(self, size: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and allocates workspaces outside the capture
                self.compute(self.state[:size])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            drawn, logits = self.compute(self.state[:size])
        self.memory = self.memory or graph.pool()
        self.graphs[size] = graph, drawn, logits


def bucket(rows: int) -> int:
    """Rows rounded up to 1, 2, 4, 8, and from there on four sizes per doubling: at most 25% padding."""
    step = max(1, 2 ** (rows - 1).bit_length() // 8) if rows > 8 else 1
    return -(-rows // step) * step if rows > 8 else 2 ** (rows - 1).bit_length()


def trace_noise(seed: int, trace: int, tokens: int) -> torch.Tensor:
    """Uniform numbers (tokens,) for one trace: a function of (seed, trace, position) alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, trace]))
    return torch.from_numpy(generator.random(tokens, dtype=np.float32))


def end_tokens(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ValueError("the model's generation_config.json names no eos_token_id: add it, or give end_ids")
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


# ------------------------------------------------------------------------------------------------------------
# Evaluation, and the program


def evaluate(lm: LM, problems: list[Problem], n: int, ks, *settings, **options) -> tuple[dict, list[dict]]:
    """Sample n traces a problem (see `traces_of`) -> metrics (see `summary`) and one record per trace."""
    start = time.perf_counter()
    records = traces_of(lm, problems, n, *settings, **options)
    return summary(records, n, ks, time.perf_counter() - start), records


def traces_of(lm: LM, problems: list[Problem], n: int, max_new_tokens: int, temperature: float, seed: int = 0,
              max_rows: int = 256, progress=None, cache_gb: float | None = None, places=None,
              sampler: Sampler | None = None) -> list[dict]:
    """Records of n traces a problem, those of a problem side by side: problem id, text, exact match."""
    rollouts = (sampler or Sampler(lm.model, max_rows, cache_gb)).sample(
        [lm.chat(p.question) for p in problems], n, max_new_tokens, temperature, seed, progress=progress,
        places=places)
    records = []
    for problem, r in zip((p for p in problems for _ in range(n)), rollouts):
        text = lm.text(r.token_ids)
        records.append({"problem": problem.id, "text": text, "correct": is_correct(text, problem.answer),
                        "finished": r.finished, "tokens": len(r.token_ids)})
    return records


def summary(records: list[dict], n: int, ks, seconds: float) -> dict:
    """{"pass@k": mean, "pass@k_low", "pass@k_high": 95% bootstrap interval over problems} for each k, and
    length (tokens), cut_off (share), tokens_per_second."""
    counts = [sum(r["correct"] for r in records[i : i + n]) for i in range(0, len(records), n)]
    metrics = {}
    for k in sorted(set(ks)):
        values = [pass_at_k(n, c, k) for c in counts]
        low, high = bootstrap_interval(values)
        metrics |= {f"pass@{k}": float(np.mean(values)), f"pass@{k}_low": low, f"pass@{k}_high": high}
    tokens = [r["tokens"] for r in records]
    return metrics | {"length": float(np.mean(tokens)),
                      "cut_off": float(np.mean([not r["finished"] for r in records])),
                      "tokens_per_second": sum(tokens) / seconds}


def problems_or_exit(specs, split: str, **options) -> list[Problem]:
    """load_problems for a program: its errors name file, row and remedy, and need no traceback."""
    try:
        return load_problems(list(specs), split=split, **options)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def pick_device(device: str) -> str:
    found = torch.cuda.is_available()
    if device not in ("auto", "cpu") and not (found and device.startswith("cuda")):
        raise SystemExit(f"--device {device}: not a device that torch sees here: take cpu or auto, or "
                         "look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    return ("cuda" if found else "cpu") if device == "auto" else device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return getattr(torch, dtype)


def too_long(lm: LM, problems: list[Problem], limit: int) -> list[Problem]:
    """Problems whose prompt has more than `limit` tokens: reported by the caller, never cut."""
    room = limit - len(lm.chat(""))  # a token has at least one byte: most questions need no tokenizing
    return [p for p in problems if len(p.question.encode()) > room and len(lm.chat(p.question)) > limit]


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


def write_atomically(path: Path, text: str) -> None:
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)


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
    python sample.py --model M --bench                             tokens per second beside transformers
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample a data set and print pass@k with 95% intervals.",
                                     epilog=EXAMPLES, usage="python sample.py [flags]", formatter_class=Help)
    group = parser.add_argument_group("models and data")
    group.add_argument("--model", default="data/miniature/policy",
                       help="folder, hub id, or bare well-known name")
    group.add_argument("--against", metavar="MODEL", default=None,
                       help="sample a second model, too, and print the paired difference to it")
    group.add_argument("--data", nargs="+", default=["data/miniature/eval.jsonl"],
                       help="files or hub data set ids")
    group.add_argument("--limit", type=int, default=None, help="only the first so many problems")
    group.add_argument("--max-prompt-tokens", type=int, default=2048,
                       help="longer questions are reported and left out")
    group.add_argument("--skip-bad-rows", action="store_true",
                       help="count and drop bad rows instead of stopping")
    group.add_argument("--out", type=Path, default=None, help="write every trace to this JSONL file")
    group = parser.add_argument_group("sampling")
    group.add_argument("--n", type=int, default=16, help="traces per problem")
    group.add_argument("--k", type=int, nargs="+", default=None,
                       help="pass@k for these k (default: 1, 2, 4, ... n)")
    group.add_argument("--max-new-tokens", type=int, default=None,
                       help="default: 1024, or what fits the context")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    group.add_argument("--seed", type=int, default=0,
                       help="the noise is a function of seed, trace and position")
    group = parser.add_argument_group("engine")
    group.add_argument("--max-rows", type=int, default=256, help="traces decoded at the same time")
    group.add_argument("--cache-gb", type=float, default=None,
                       help="memory for keys and values (default: 4 on a CPU, 60%% of the free on a GPU)")
    group.add_argument("--bench", nargs="?", const="", default=None, metavar="JUDGE",
                       help="time sampling, and judging with JUDGE, beside transformers (a table and a CSV, "
                            "see experiments/bench_sampler.py)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    if args.bench is not None:
        sys.path.append(str(Path(__file__).parent / "experiments"))
        import bench_sampler
        return bench_sampler.main(args.model, args.bench, args.data[0], pick_device(args.device))
    ks = args.k or [2**i for i in range(args.n.bit_length()) if 2**i <= args.n]
    if args.n < 1 or max(ks) > args.n or min(ks) < 1:
        parser.error(f"--k must lie between 1 and --n {args.n}, got {ks}")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: the folder {args.out.parent} does not exist: create it")
    problems = problems_or_exit(args.data, "test", skip_bad_rows=args.skip_bad_rows)[: args.limit]
    device = pick_device(args.device)
    lm = load_lm(args.model, device, pick_dtype(args.dtype, device))
    long = {p.id for p in too_long(lm, problems, args.max_prompt_tokens)}
    if long:
        print(f"left out {len(long)} of {len(problems)} problems with more than {args.max_prompt_tokens} "
              "prompt tokens", file=sys.stderr)
        problems = [p for p in problems if p.id not in long]
    if not problems:
        parser.error("no problem is left to sample: raise --max-prompt-tokens")
    if args.max_new_tokens is None:
        room = lm.model.config.max_position_embeddings - max(len(lm.chat(p.question)) for p in problems)
        args.max_new_tokens = min(1024, room)
    print(f"{len(problems)} problems x {args.n} traces, temperature {args.temperature}")
    solved = [sample_and_print(args, lm, problems, ks, args.out)]
    if args.against:
        del lm  # one model in memory at a time
        other = load_lm(args.against, device, pick_dtype(args.dtype, device))
        out = args.out and args.out.with_suffix(".against.jsonl")
        solved.append(sample_and_print(args, other, problems, ks, out))
        print("difference, the same problems in both (95% interval)")
        for k in sorted(set(ks)):
            ours, theirs = ([pass_at_k(args.n, c, k) for c in counts] for counts in solved)
            difference = np.subtract(ours, theirs)
            low, high = bootstrap_interval(difference)
            print(f"  pass@{k:<4d} {difference.mean():+7.2%}   {low:+.2%} .. {high:+.2%}")


def sample_and_print(args, lm: LM, problems: list[Problem], ks, out: Path | None) -> list[int]:
    """One model's table and traces -> how many traces of each problem are right."""
    with tqdm(total=len(problems) * args.n, unit="trace", disable=None) as bar:
        metrics, records = evaluate(lm, problems, args.n, ks, args.max_new_tokens, args.temperature,
                                    args.seed, args.max_rows, bar.update, args.cache_gb)
    if out:
        write_atomically(out, jsonl(records))
    print(lm.name)
    for k in sorted(set(ks)):
        low, high = metrics[f"pass@{k}_low"], metrics[f"pass@{k}_high"]
        print(f"  pass@{k:<4d} {metrics[f'pass@{k}']:7.2%}   95% interval {low:.2%} .. {high:.2%}")
    print(f"  length {metrics['length']:.0f} tokens, cut off {metrics['cut_off']:.1%}, "
          f"{metrics['tokens_per_second']:.0f} tokens/s" + (f", traces in {out}" if out else ""))
    return [sum(r["correct"] for r in records[i : i + args.n]) for i in range(0, len(records), args.n)]


if __name__ == "__main__":
    main()
