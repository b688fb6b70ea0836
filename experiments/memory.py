"""What a training step holds in memory, by part, computed from the model's shape: which card suffices?

    python experiments/memory.py                # the table of README.md
    python exprl.py --dry-run --model M ...     # the same for your flags, then one full-length step, measured

Counts what grows with the model, the traces and the settings: tensors, not the libraries' own memory (about
1 GB with CUDA). The layers are those of Llama, Qwen2 and Qwen3. d hidden size, f MLP, q and kv widths of
queries and keys, V vocabulary.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kernels.token_logprob import chunk_rows, fast_dtype  # noqa: E402
from sample import PAGE, bucket, head_size, pages_of  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402  behind sample: see the note there


def parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def memory(config, settings, ranks=1, dtype=torch.bfloat16, device="cuda", prompt=512, judge=None) -> dict:
    """Bytes by part for one of `ranks` processes at full length: prompts of `prompt` tokens, traces of
    --max-new-tokens. config: the model's; judge: the judge's, if it is another model than the frozen start.
    A judge that is asked for replies (--readout) has a cache like the policy's.

    "peak" is what is held at once: on a GPU the cache stays while training, on a CPU it does not."""
    P, low, b = parameters(config), dtype != torch.float32, dtype.itemsize
    d, f, V, layers = (config.hidden_size, config.intermediate_size, config.vocab_size,
                       config.num_hidden_layers)
    q, kv = (heads * head_size(config) for heads in (config.num_attention_heads, config.num_key_value_heads))
    judged = settings.method in ("outcome", "process")
    start = settings.kl > 0 or settings.method == "distill" or (judged and judge is None)
    length = prompt + settings.max_new_tokens

    product = fast_dtype(dtype, device)  # of sampling and of the head

    # sampling: rows in pages, a prompt's shared by its traces, and a step's logits
    traces = settings.questions * settings.group // ranks
    rows = min(settings.max_rows, traces)
    cached = rows * settings.max_new_tokens + -(-rows // settings.group) * prompt  # tokens
    if device == "cuda":  # made for all rows at full length, rounded up (Sampler.open)
        cached = PAGE * ((rows + 2) * bucket(pages_of(length)) + 8192 // PAGE)
    cache = 2 * layers * kv * product.itemsize * cached
    if settings.readout in ("critique", "generate"):
        cache *= 2
    if device == "cpu":
        cache = min(cache, 4 * 2**30)

    # training: a micro-batch's rows share their prompts in L tokens; on a GPU attention holds each row whole
    rows_at_once = min(traces, max(1, settings.microbatch_tokens // length))
    L = rows_at_once * settings.max_new_tokens + -(-rows_at_once // settings.group) * prompt
    # Saved for the backward, bytes a token: two norms keep their float32 input and result, and autocast one
    # copy of the output for each of 5 products (float32: one for all); attention q, k and v (on a GPU of each
    # row, and k and v repeated) and its output; the MLP four tensors.
    qk_norm = (8 + b) * (q + kv) if config.model_type == "qwen3" else 0
    layer = L * (16 * d + (10 if low else 8) * d + b * q + 4 * b * f + qk_norm)
    layer += L * b * (q + 2 * kv) if device == "cpu" else rows_at_once * length * 4 * b * q
    if settings.checkpoint_activations:
        activations = layers * 4 * L * d + layer  # one at a time is made again
    else:
        activations = layers * layer + layer // 2
    tokens = rows_at_once * settings.max_new_tokens
    head = V * product.itemsize * chunk_rows(tokens, V, product.itemsize, device)
    head += V * d * (4 + (b if product != torch.float32 else 0)) + 2 * tokens * d * b
    # autocast keeps low-precision weights for the backward; FSDP gathers embedding, head, a layer at a time
    gathered = 0
    if ranks > 1:
        gathered = b * (V * d * (1 if config.tie_word_embeddings else 2) + 2 * (P - V * d) // layers)
    elif low:
        gathered = 2 * (P - V * d)
    parts = {
        "weights, gradients, AdamW": 16 * P // ranks,
        "sampling copy": b * P if low or ranks > 1 else 0,
        "frozen start": b * P if start else 0,
        "judge": b * parameters(judge) if judge else 0,
        "cache, logits": cache + rows * V * (product.itemsize + 4),
        "activations": activations + gathered,
        "head": head,
    }
    training = parts["activations"] + parts["head"]
    spare = min(parts["cache, logits"], training) if device == "cpu" else 0
    parts["peak"] = sum(parts.values()) - spare
    return parts


def table(parts: dict) -> str:
    return "\n".join(f"  {name:28}{size / 2**30:8.2f} GB" for name, size in parts.items())


# hidden, MLP, layers, heads, kv heads, vocabulary, tied embeddings: from the models' config.json
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
}


def main():
    from exprl import Settings
    print("| model | traces of | 1 GPU | each of 8 GPUs | cache, 64 rows |\n|---|---|---|---|---|")
    for name, (d, f, layers, heads, kv, V, tied) in SHAPES.items():
        family = name.partition(".")[0].partition("-")[0].lower()
        config = AutoConfig.for_model(  # Qwen3's head size, 128, is the default
            family, hidden_size=d, intermediate_size=f, vocab_size=V, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=tied)
        for length in (1024, 16384):
            settings = Settings(max_new_tokens=length, max_rows=64, checkpoint_activations=True)
            one, eight = (memory(config, settings, ranks) for ranks in (1, 8))
            cells = [parts["peak"] - parts["cache, logits"] for parts in (one, eight)]
            cells.append(one["cache, logits"])
            print(f"| {name} | {length:,} | " + " | ".join(f"{size / 2**30:.1f} GB" for size in cells) + " |")


if __name__ == "__main__":
    main()
