"""How much of an update do bfloat16 passes see?

    python experiments/seen.py MODEL runs/NAME/checkpoints/step_20     # a run's start and a checkpoint, or two

Masters are float32, but sampling and forward passes read them rounded to bfloat16, whose neighbours lie 0.4%
to 0.8% apart. Of the weights v and then w of all Linear layers but the head, with r(w) what the passes read:

    moved      mean of |w - v|
    changed    share of weights with r(w) != r(v)
    seen       (w - v) . (r(w) - r(v)) / |w - v|^2: 1 if nothing is lost on the whole, 0 if all is

Most models come in bfloat16, so at the start every weight lies in the middle of what rounds to it: at a rate
of 1e-6 one of size 0.02 is as before to every pass until some 60 steps have moved it the same way. (PULSE,
arXiv 2602.03839, gives |w| / 256 against Adam's step as the reason why RL changes few weights.)
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sample import load_lm  # noqa: E402


def seen(pairs) -> tuple[float, float, float]:
    """pairs: (v, w), float32 -> moved, changed, seen."""
    count = moved = changed = both = square = 0.0
    for v, w in pairs:
        change, shown = w - v, w.bfloat16().float() - v.bfloat16().float()
        count += w.numel()
        moved += change.abs().sum(dtype=torch.float64).item()
        changed += shown.ne(0).sum().item()
        both += (change * shown).sum(dtype=torch.float64).item()
        square += change.square().sum(dtype=torch.float64).item()
    return moved / count, changed / count, both / square if square else 1.0


def layers(folder: str) -> dict[str, torch.Tensor]:
    model = load_lm(folder).model
    return {name: module.weight.detach() for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", help="folder or hub id")
    parser.add_argument("after", help="a later checkpoint of it")
    args = parser.parse_args()
    before, after = layers(args.before), layers(args.after)
    if {name: w.shape for name, w in before.items()} != {name: w.shape for name, w in after.items()}:
        raise SystemExit(f"{args.after} has other layers than {args.before}: name two states of one model")
    moved, changed, share = seen((before[name], after[name]) for name in before)
    print(f"moved {moved:.2e}, changed {changed:.1%}, seen {share:.1%}")


if __name__ == "__main__":
    main()
