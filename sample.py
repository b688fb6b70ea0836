"""Sampling: token ids in, sampled token ids and their log-probs out; batched and KV-cached.

    python sample.py --model Qwen2.5-1.5B-Instruct --data openai/gsm8k:main:test --n 8 --k 1 8 --limit 100

One loop serves rollouts, evaluation and the judge's critiques:

    prompts -> packed prefill (no padding; a shared prefix is computed once) -> rows -> decode step by step,
    a finished row is replaced at once by the next waiting trace -> list[Rollout], in the prompts' order.

The models are the ones of transformers. Only their attention is replaced, through its AttentionInterface: our
function writes keys and values where this file wants them, so rows of any length share a batch unpadded.
Temperature is the only sampling knob: with top-k or top-p the sampled distribution is not the trained one.
The noise of a token depends on (seed, row, position) alone: a trace does not depend on who shares its batch.

Left out: paging, CUDA graphs, sliding-window attention. It knows nothing of judges, rewards or training.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# transformers looks for Hugging Face's optional package `kernels`, which is not ours: hide ours meanwhile.
_ours = sys.modules.pop("kernels", None)
sys.modules["kernels"] = None
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

del sys.modules["kernels"]
if _ours is not None:
    sys.modules["kernels"] = _ours

from data import Problem, bootstrap_interval, is_correct, load_problems, pass_at_k  # noqa: E402

transformers_logging.disable_progress_bar()  # its bars for loading and saving would tear ours

# One constant for training, Stage II and evaluation: a model must not meet a new prompt when it is measured.
SYSTEM_PROMPT = (
    "Solve the problem step by step. Open every step with a line that starts with ### and says what the step "
    "does, then carry it out below. When you are done, state the final answer inside \\boxed{}."
)
FAMILIES = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama-": "meta-llama", "meta-llama-": "meta-llama"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # full attention in every layer, plain linear head


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

    def save(self, folder: Path, dtype=None) -> None:
        """Write a Hugging Face folder that AutoModelForCausalLM, vLLM and this project load."""
        state = {name: t.to(dtype) if dtype and t.is_floating_point() else t
                 for name, t in self.model.state_dict().items()}
        before = self.model.config.dtype
        self.model.config.dtype = dtype or before
        try:
            self.model.save_pretrained(folder, state_dict=state)
        finally:
            self.model.config.dtype = before
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
        check_architecture(path, config)
        # tokenizer.json as it stands: AutoTokenizer would rebuild every Qwen2 tokenizer with Qwen's own word split
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


def check_architecture(path: str, config) -> None:
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type not in ARCHITECTURES or layers != {"full_attention"}:
        raise SystemExit(f"{path} is a {config.model_type} model with {', '.join(sorted(layers))} layers; "
                         f"sample.py covers full attention in {', '.join(ARCHITECTURES)} (SmolLM is a llama)")


# ------------------------------------------------------------------------------------------------------------
# Attention over our own cache


def cached_attention(module, query, key, value, attention_mask, scaling=None, kv=None, **_):
    """What transformers' layers call: query (B,H,T,D), key and value (B,KVH,T,D) -> (B,T,H,D)."""
    return kv.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


# The name has no mask function registered with it, so transformers builds no (B,1,T,S) mask.
AttentionInterface.register("exprl_cached", cached_attention)


@contextmanager
def attention_of(model):
    """Use our attention inside, and put the model's own back: training and `generate` must not notice."""
    own = model.config._attn_implementation
    model.set_attn_implementation("exprl_cached")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class Segment:
    """A run of tokens behind an optional prefix. After a prefill it holds the keys and values of both."""

    def __init__(self, ids, prefix=None, keep=True):
        self.ids, self.prefix, self.keep = ids, prefix, keep
        self.length = len(ids) + (prefix.length if prefix else 0)
        self.keys, self.values = [], []  # per layer (KVH, length, D)
        self.hidden = None  # (d,) of the last token


class Prefill:
    """Segments in one packed sequence (1, sum of T): each attends to its prefix and, causally, to itself."""

    def __init__(self, segments):
        self.segments = segments
        self.masks = [self.mask(s) for s in segments]

    @staticmethod
    def mask(segment):
        if segment.prefix is None:
            return None  # plain causal
        return torch.ones(len(segment.ids), segment.length, dtype=torch.bool).tril(segment.prefix.length)

    def attend(self, layer, query, key, value, scaling):
        out, start = torch.empty_like(query), 0
        groups = query.shape[1] // key.shape[1]
        for segment, mask in zip(self.segments, self.masks):
            part = slice(start, start + len(segment.ids))
            start = part.stop
            keys, values = key[:, :, part], value[:, :, part]
            if segment.prefix is not None:
                keys = torch.cat([segment.prefix.keys[layer][None], keys], dim=2)
                values = torch.cat([segment.prefix.values[layer][None], values], dim=2)
                mask = mask.to(query.device)
            if segment.keep:
                segment.keys.append(keys[0])
                segment.values.append(values[0])
            # Heads are repeated: torch's fast CPU attention knows no grouped heads; prefill is compute-bound.
            out[:, :, part] = F.scaled_dot_product_attention(
                query[:, :, part], keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1),
                attn_mask=mask, is_causal=mask is None, scale=scaling,
            )
        return out


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Rows:
    """The rows being decoded: keys and values (rows, KVH, capacity, D) per layer, written in place.

    Live rows are always 0..count-1, so that a step works on views and copies nothing."""

    def __init__(self, model, rows: int, capacity: int):
        config = model.config
        # zeros, not empty: masked entries get weight 0, and 0 * NaN would still be NaN
        shape = (rows, config.num_key_value_heads, capacity, head_size(config))
        like = dict(dtype=model.dtype, device=model.device)
        self.keys = [torch.zeros(shape, **like) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, **like) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.host_lengths = [0] * rows  # the same on the host: sizes must not cost a device synchronisation
        self.count = 0

    def fill(self, row: int, segment: Segment) -> None:
        for own, given in zip(self.keys + self.values, segment.keys + segment.values):
            own[row, :, : segment.length] = given
        self.lengths[row] = self.host_lengths[row] = segment.length

    def move(self, source: int, target: int) -> None:
        length = self.host_lengths[source]
        for own in self.keys + self.values:
            own[target, :, :length] = own[source, :, :length]
        self.lengths[target] = self.host_lengths[target] = length

    def begin_step(self) -> torch.Tensor:
        """The positions (R,1) of the tokens that this step adds."""
        self.longest = max(self.host_lengths[: self.count]) + 1
        lengths = self.lengths[: self.count]
        self.index = torch.arange(self.count, device=lengths.device)
        outside = torch.arange(self.longest, device=lengths.device) > lengths[:, None]
        self.bias = torch.zeros_like(outside, dtype=self.keys[0].dtype).masked_fill_(outside, float("-inf"))
        return lengths[:, None]

    def end_step(self) -> None:
        self.lengths[: self.count] += 1
        for row in range(self.count):
            self.host_lengths[row] += 1

    def attend(self, layer, query, key, value, scaling):
        keys, values = self.keys[layer], self.values[layer]
        count, heads, _, dim = query.shape
        kv_heads = keys.shape[1]
        keys[self.index, :, self.lengths[: self.count]] = key[:, :, 0]
        values[self.index, :, self.lengths[: self.count]] = value[:, :, 0]
        # One batched product over (row, kv head); a kv head's g query heads are its g rows. Views, no copies.
        keys = keys[:count, :, : self.longest].flatten(0, 1)
        values = values[:count, :, : self.longest].flatten(0, 1)
        scores = torch.bmm(query.reshape(count * kv_heads, -1, dim) * scaling, keys.transpose(1, 2))
        scores = scores.view(count, kv_heads, -1, self.longest) + self.bias[:, None, None]
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights.flatten(0, 1), values).view(count, heads, 1, dim)


# ------------------------------------------------------------------------------------------------------------
# The sampler


def choose(logits: torch.Tensor, temperature: float,
           uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (R,V) f32, uniform (R,) in [0,1) -> token (R,), its log-prob (R,) at `temperature` (greedy: 1).

    The inverse of the cumulative distribution: one random number a row instead of one per entry of V."""
    scaled = logits / temperature if temperature > 0 else logits
    scaled = scaled - scaled.amax(-1, keepdim=True)
    weights = scaled.exp()
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cumulative = weights.cumsum(-1)
        # uniform <= 1 - 2^-23 keeps the target strictly below the total: an entry of weight 0 is never taken
        target = uniform.clamp(max=1 - 2**-23)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    logprob = scaled.gather(1, token[:, None])[:, 0] - weights.sum(-1).log()
    return token, logprob


class Sampler:
    """Samples from a transformers causal LM. `max_rows` and `cache_gb` bound the rows decoded at once."""

    def __init__(self, model, max_rows: int = 256, cache_gb: float | None = None, prefill_tokens: int = 8192):
        check_architecture(getattr(model, "name_or_path", "") or "this model", model.config)
        self.model, self.max_rows = model, max_rows
        self.cache_gb, self.prefill_tokens = cache_gb, prefill_tokens

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        n: int = 1,
        max_new_tokens: int = 1024,
        temperature: float = 1.0,
        seed: int = 0,
        end_ids: list[int] | None = None,  # default: the end tokens of the model's generation config
        shared: list[int] | None = None,  # per prompt: how many leading tokens neighbouring prompts share
        progress=None,  # called with the number of traces that ended, as they end
    ) -> list[Rollout]:
        """n traces for each prompt, prompt-major: the traces of prompt i are [i*n : (i+1)*n].

        Raises ValueError when prompt + max_new_tokens exceeds the model's context or the cache's memory."""
        shared = shared or [0] * len(prompts)
        self.check(prompts, n, max_new_tokens, temperature, shared)
        if not prompts or n == 0:
            return []
        ends = set(end_tokens(self.model) if end_ids is None else end_ids)
        capacity = max(map(len, prompts)) + max_new_tokens
        rows = Rows(self.model, min(self.fitting_rows(capacity), len(prompts) * n), capacity)
        noise = torch.zeros(len(rows.host_lengths), max_new_tokens, device=self.model.device)
        ready = deque()  # prefilled: (prompt index, segment, traces still to start)
        prefills = self.prefill_in_order(prompts, shared, lambda: len(rows.host_lengths) - rows.count)
        results: list[Rollout | None] = [None] * (len(prompts) * n)
        live: list[list] = []  # per row: [trace index, token ids, log-probs]
        first = torch.zeros(len(rows.host_lengths), self.model.config.hidden_size,
                            dtype=self.model.dtype, device=self.model.device)
        admitted: list[int] = []  # rows whose first token comes from their prompt's last hidden state

        with attention_of(self.model):
            while True:
                while rows.count < len(rows.host_lengths):  # a free row takes the next waiting trace at once
                    if not ready:
                        ready.extend([i, segment, n] for i, segment in next(prefills, []))
                        if not ready:
                            break
                    item = ready[0]
                    index, segment, left = item
                    trace = index * n + n - left
                    row, rows.count = rows.count, rows.count + 1
                    rows.fill(row, segment)
                    first[row] = segment.hidden
                    admitted.append(row)
                    noise[row] = trace_noise(seed, trace, max_new_tokens).to(noise.device)
                    live.append([trace, [], []])
                    item[2] -= 1
                    if item[2] == 0:
                        ready.popleft()  # the last trace has its copy: the prompt's cache is freed
                if not live:
                    break
                # Rows just admitted have no new token yet: their first choice needs the prompt's logits only.
                if admitted:
                    which = torch.tensor(admitted, device=noise.device)
                    hidden, admitted = first[which], []
                else:
                    which = torch.arange(rows.count, device=noise.device)
                    last = torch.tensor([[tokens[-1]] for _, tokens, _ in live], device=noise.device)
                    hidden = self.hidden(last, rows.begin_step(), rows)[:, 0]
                    rows.end_step()
                chosen = which.tolist()
                position = torch.tensor([len(live[row][1]) for row in chosen], device=noise.device)
                token, logprob = choose(self.logits(hidden), temperature, noise[which, position])
                token, logprob = torch.stack([token.double(), logprob.double()]).tolist()  # one host copy
                ended = []
                for row, t, lp in zip(chosen, token, logprob):
                    trace, tokens, logprobs = live[row]
                    tokens.append(int(t))
                    logprobs.append(min(lp, 0.0))
                    finished = tokens[-1] in ends
                    if finished or len(tokens) == max_new_tokens:
                        prompt = prompts[trace // n]
                        results[trace] = Rollout(tuple(prompt), tuple(tokens), tuple(logprobs), finished)
                        ended.append(row)
                for row in sorted(ended, reverse=True):  # the last live row moves into the hole
                    rows.count -= 1
                    if row != rows.count:
                        rows.move(rows.count, row)
                        noise[row] = noise[rows.count]
                        live[row] = live[rows.count]
                    live.pop()
                if progress and ended:
                    progress(len(ended))
        return results

    @torch.inference_mode()
    def next_logits(self, prompts: list[list[int]], token_ids: list[int], shared: list[int] | None = None):
        """Logits (N, len(token_ids)) f32 of the token that follows each prompt, for `token_ids` only.

        One forward pass; leading tokens that neighbours share (`shared` per prompt) are computed once."""
        shared = shared or [0] * len(prompts)
        self.check(prompts, 1, 0, 0.0, shared)
        out = torch.zeros(len(prompts), len(token_ids))
        weight = self.model.get_output_embeddings().weight[torch.tensor(token_ids, device=self.model.device)]
        with attention_of(self.model):
            for batch in self.prefill_in_order(prompts, shared, lambda: len(prompts), keep=False):
                hidden = torch.stack([segment.hidden for _, segment in batch])
                out[[i for i, _ in batch]] = (hidden @ weight.T).float().cpu()
        return out

    def prefill_in_order(self, prompts, shared, wanted, keep=True):
        """Yield lists of (prompt index, segment): up to `wanted()` prompts, about `prefill_tokens` tokens."""
        users = Counter(tuple(p[:s]) for p, s in zip(prompts, shared) if s)
        prefixes: dict[tuple, Segment] = {}
        i = 0
        while i < len(prompts):
            batch, missing, tokens = [], {}, 0
            while i < len(prompts) and (
                    not batch or (len(batch) < wanted() and tokens < self.prefill_tokens)):
                prefix = tuple(prompts[i][: shared[i]])
                if prefix and prefix not in prefixes and prefix not in missing:
                    missing[prefix] = Segment(prefix)
                    tokens += len(prefix)
                batch.append((i, prefix))
                tokens += len(prompts[i]) - shared[i]
                i += 1
            if missing:
                self.prefill(list(missing.values()))
                prefixes.update(missing)
            batch = [(j, Segment(prompts[j][shared[j]:], prefixes.get(prefix), keep), prefix)
                     for j, prefix in batch]
            self.prefill([segment for _, segment, _ in batch])
            for _, segment, prefix in batch:
                segment.prefix = None
                users[prefix] -= 1
                if prefix and users[prefix] == 0:
                    del prefixes[prefix]  # freed with its last user
            yield [(j, segment) for j, segment, _ in batch]

    def prefill(self, segments: list[Segment]) -> None:
        """Fill each segment's keys, values and last hidden state by one packed, unpadded forward pass."""
        device = self.model.device
        ids = torch.tensor([[t for s in segments for t in s.ids]], device=device)
        positions = torch.cat([torch.arange(s.length - len(s.ids), s.length) for s in segments]).to(device)
        hidden = self.hidden(ids, positions[None], Prefill(segments))[0]
        ends = np.cumsum([len(s.ids) for s in segments]) - 1
        for segment, last in zip(segments, hidden[torch.as_tensor(ends, device=device)]):
            segment.hidden = last

    def hidden(self, ids, positions, kv):
        return self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False,
                                     kv=kv).last_hidden_state

    def logits(self, hidden):
        return self.model.get_output_embeddings()(hidden).float()

    def fitting_rows(self, capacity: int) -> int:
        """How many rows of `capacity` tokens the cache may hold."""
        config = self.model.config
        row = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * capacity
        row *= torch.finfo(self.model.dtype).bits // 8
        if self.cache_gb is not None:
            budget = self.cache_gb * 2**30
        elif self.model.device.type == "cuda":
            budget = 0.6 * torch.cuda.mem_get_info(self.model.device)[0]
        else:
            budget = 4 * 2**30
        if row > budget:
            raise ValueError(f"one trace of {capacity} tokens needs {row / 2**30:.2f} GB of cache, "
                             f"{budget / 2**30:.2f} GB are there: lower --max-new-tokens or raise --cache-gb")
        return min(self.max_rows, int(budget // row))

    def check(self, prompts, n, max_new_tokens, temperature, shared) -> None:
        if temperature < 0 or n < 0:
            raise ValueError(f"temperature and n must not be negative, got {temperature} and {n}")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for i, (prompt, s) in enumerate(zip(prompts, shared, strict=True)):
            if not 0 <= s < max(len(prompt), 1) or not prompt:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens, {s} of them shared: "
                                 "at least one must be its own")
            if limit and len(prompt) + max_new_tokens > limit:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it "
                                 f"exceeds the model's context of {limit}: "
                                 "lower --max-new-tokens or drop the problem")


def trace_noise(seed: int, trace: int, tokens: int) -> torch.Tensor:
    """Uniform numbers (tokens,) for one trace: a function of (seed, trace, position) alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, trace]))
    return torch.from_numpy(generator.random(tokens, dtype=np.float32))


def end_tokens(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        raise ValueError("the model's generation config names no end token: give end_ids")
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


# ------------------------------------------------------------------------------------------------------------
# Evaluation, and the program


def evaluate(lm: LM, problems: list[Problem], n: int, ks, max_new_tokens: int, temperature: float,
             seed: int = 0, max_rows: int = 256, progress=None) -> tuple[dict, list[dict]]:
    """Sample n traces a problem -> metrics and one record per trace.

    metrics: {"pass@k": mean, "pass@k_low", "pass@k_high": 95% bootstrap interval over problems} for each k,
    and length (tokens), cut_off (share), tokens_per_second."""
    start = time.perf_counter()
    rollouts = Sampler(lm.model, max_rows).sample(
        [lm.chat(p.question) for p in problems], n, max_new_tokens, temperature, seed, progress=progress
    )
    seconds = time.perf_counter() - start
    records, counts = [], []
    for i, problem in enumerate(problems):
        group = rollouts[i * n : (i + 1) * n]
        texts = [lm.text(r.token_ids) for r in group]
        correct = [is_correct(text, problem.answer) for text in texts]
        counts.append(sum(correct))
        records += [
            {"problem": problem.id, "text": text, "correct": right, "finished": r.finished,
             "tokens": len(r.token_ids)}
            for r, text, right in zip(group, texts, correct)
        ]
    metrics = {}
    for k in sorted(set(ks)):
        values = [pass_at_k(n, c, k) for c in counts]
        low, high = bootstrap_interval(values)
        metrics |= {f"pass@{k}": float(np.mean(values)), f"pass@{k}_low": low, f"pass@{k}_high": high}
    lengths = [len(r.token_ids) for r in rollouts]
    metrics |= {"length": float(np.mean(lengths)),
                "cut_off": float(np.mean([not r.finished for r in rollouts])),
                "tokens_per_second": sum(lengths) / seconds}
    return metrics, records


def problems_or_exit(specs, split: str, **options) -> list[Problem]:
    """load_problems for a program: its errors name file, row and remedy, and need no traceback."""
    try:
        return load_problems(list(specs), split=split, **options)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def pick_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return getattr(torch, dtype)


def too_long(lm: LM, problems: list[Problem], limit: int) -> list[Problem]:
    """Problems whose prompt has more than `limit` tokens: reported by the caller, never cut."""
    room = limit - len(lm.chat(""))  # a token has at least one byte: most questions need no tokenizing
    return [p for p in problems if len(p.question.encode()) > room and len(lm.chat(p.question)) > limit]


def write_atomically(path: Path, text: str) -> None:
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    tmp.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample a data set and print pass@k with 95% intervals.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="data/miniature/policy",
                        help="folder, hub id, or bare well-known name")
    parser.add_argument("--data", nargs="+", default=["data/miniature/eval.jsonl"],
                        help="files or hub data set ids")
    parser.add_argument("--n", type=int, default=16, help="traces per problem")
    parser.add_argument("--k", type=int, nargs="+", default=None,
                        help="pass@k for these k (default: 1, 2, 4, ... n)")
    parser.add_argument("--max-new-tokens", type=int, default=None,
                        help="default: 1024, or what fits the context")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many problems")
    parser.add_argument("--seed", type=int, default=0,
                        help="the noise is a function of seed, trace and position")
    parser.add_argument("--out", type=Path, default=None, help="write every trace to this JSONL file")
    parser.add_argument("--max-prompt-tokens", type=int, default=2048,
                        help="longer questions are reported and left out")
    parser.add_argument("--max-rows", type=int, default=256, help="traces decoded at the same time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--skip-bad-rows", action="store_true",
                        help="count and drop bad rows instead of stopping")
    args = parser.parse_args()
    ks = args.k or [2**i for i in range(args.n.bit_length()) if 2**i <= args.n]
    if args.n < 1 or max(ks) > args.n or min(ks) < 1:
        parser.error(f"--k must lie between 1 and --n {args.n}, got {ks}")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out: the folder {args.out.parent} does not exist")
    problems = problems_or_exit(args.data, "test", skip_bad_rows=args.skip_bad_rows)[: args.limit]
    device = pick_device(args.device)
    lm = load_lm(args.model, device, pick_dtype(args.dtype, device))
    long = {p.id for p in too_long(lm, problems, args.max_prompt_tokens)}
    if long:
        print(f"left out {len(long)} of {len(problems)} problems with more than {args.max_prompt_tokens} "
              "prompt tokens", file=sys.stderr)
        problems = [p for p in problems if p.id not in long]
    if not problems:
        parser.error("no problem is left to sample")
    if args.max_new_tokens is None:
        room = lm.model.config.max_position_embeddings - max(len(lm.chat(p.question)) for p in problems)
        args.max_new_tokens = min(1024, room)
    with tqdm(total=len(problems) * args.n, unit="trace", disable=None) as bar:
        metrics, records = evaluate(lm, problems, args.n, ks, args.max_new_tokens, args.temperature,
                                    args.seed, args.max_rows, bar.update)
    if args.out:
        write_atomically(args.out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    print(f"{lm.name} on {len(problems)} problems x {args.n} traces, temperature {args.temperature}")
    for k in sorted(set(ks)):
        low, high = metrics[f"pass@{k}_low"], metrics[f"pass@{k}_high"]
        print(f"  pass@{k:<4d} {metrics[f'pass@{k}']:7.2%}   95% interval {low:.2%} .. {high:.2%}")
    print(f"  length {metrics['length']:.0f} tokens, cut off {metrics['cut_off']:.1%}, "
          f"{metrics['tokens_per_second']:.0f} tokens/s" + (f", traces in {args.out}" if args.out else ""))


if __name__ == "__main__":
    main()
