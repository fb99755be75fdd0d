"""Train the bundled cascade's own text encoder: a small T5 that reads the sprite world's captions, and its tokenizer, from nothing.

    python -m engine.training.text_encoder --out configs/cascade/sprites --seed 0

takes under two minutes on one thread and writes `text_encoder/` and `tokenizer/` in transformers' layout, so that the cascade runs offline.
The paper's encoder is T5-XXL (App. A.1), frozen. What a U-Net needs of it is that attributes can be read off linearly, both from the mean
of the tokens (which modulates every layer) and from each token (which cross-attention sees). So that is the training task: one linear
head per attribute, on both, thrown away afterwards. Two paraphrases of one scene are drawn together, features are held near mean 0 and
variance 1, and a head for each token's own word keeps words apart, the rare token too: it has to mean something to a finetuning.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.text import quiet_transformers
from engine.sprites.captions import RARE_TOKEN, all_words, captions, parse
from engine.sprites.world import ATTRIBUTES, sample_scenes

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"             # ids 0, 1, 2, as in T5
MAX_TOKENS = 256
UNNAMED = "unnamed"                                      # a value of every attribute: the text says nothing of it
INSERTED = (RARE_TOKEN, "xxx", "the", "a", "photo", "picture", "video", "and")          # "xxx": stands for any word not known
VALUES = {name: (UNNAMED, *values) for name, values in ATTRIBUTES.items()}


def build_tokenizer(folder: Path) -> None:
    """Write a word-level tokenizer of every word a caption can contain. Case, accents and punctuation make no difference."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = [PAD, EOS, UNKNOWN, *(word for word in all_words() if word.isalpha())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
    ])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, vocabulary.index(EOS))])
    tokenizer.add_special_tokens([PAD, EOS, UNKNOWN])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "eos_token": EOS, "unk_token": UNKNOWN,
                "model_max_length": MAX_TOKENS, "padding_side": "right", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class Task:
    """Endless batches of captions with their labels."""

    def __init__(self, tokenizer, seed: int, split: str):
        self.tokenizer, self.split = tokenizer, split
        self.generator, self.random = torch.Generator().manual_seed(seed), random.Random(seed)

    def batch(self, scenes: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Ids [B, L], mask [B, L], labels [attributes, B], and P: texts i and i + P of the first 2 P are paraphrases of each other."""
        drawn = sample_scenes(scenes, self.generator, self.split)
        still_pictures = scenes // 4                     # captions without motion
        texts = []
        for _ in range(2):
            texts += captions(drawn[:still_pictures], self.random.randrange(1 << 30), motion=False)
            texts += captions(drawn[still_pictures:], self.random.randrange(1 << 30))
        texts += [self._damaged(text) for text in texts[scenes // 2: scenes // 2 + scenes]]
        return *self.encode(texts), self.labels(texts), scenes

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        out = self.tokenizer(texts, padding=True, return_tensors="pt")
        return out["input_ids"], out["attention_mask"]

    @staticmethod
    def labels(texts: list[str]) -> Tensor:
        found = [parse(text) for text in texts]
        return torch.tensor([[values.index(f.get(name, UNNAMED)) for f in found] for name, values in VALUES.items()])

    def _damaged(self, text: str) -> str:
        """Words left out, foreign and rare words put in: users write other things than captions do."""
        words = [word for word in text.split() if self.random.random() > 0.2]
        for _ in range(self.random.randrange(4)):
            words.insert(self.random.randint(0, len(words)), self.random.choice(INSERTED))
        return " ".join(words)


class Heads(nn.Module):
    """What the features must be good for. Only training has it."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.pooled = nn.ModuleList(nn.Linear(width, len(values)) for values in VALUES.values())
        self.tokens = nn.ModuleList(nn.Linear(width, len(values)) for values in VALUES.values())
        self.word = nn.Linear(width, vocabulary)

    def loss(self, ids: Tensor, mask: Tensor, features: Tensor, labels: Tensor, pairs: int) -> Tensor:
        mean, inside = masked_mean(features, mask), mask.bool()
        flat, row = features[inside], inside.nonzero()[:, 0]
        loss = sum(F.cross_entropy(head(mean), label) for head, label in zip(self.pooled, labels))
        loss = loss + sum(F.cross_entropy(head(flat), label[row]) for head, label in zip(self.tokens, labels))
        loss = loss + F.cross_entropy(self.word(flat), ids[inside])
        paraphrases = (mean[:pairs] - mean[pairs: 2 * pairs]).square().mean() / mean.var(0).mean()
        unit = flat.mean(0).square().mean() + (flat.std(0) - 1).square().mean()
        return loss + paraphrases + unit


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """[B, L, D], [B, L] -> [B, D]"""
    mask = mask.to(features)[..., None]
    return (features * mask).sum(1) / mask.sum(1).clamp(min=1)


def train(out: Path, seed: int, steps: int, scenes: int, lr: float = 3e-3, judged: int = 1000) -> None:
    """Build the tokenizer, train the encoder, write both under `out`, and print how well the written weights read unseen combinations."""
    with quiet_transformers():
        from transformers import AutoTokenizer, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    build_tokenizer(out / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer", local_files_only=True)
    config = T5Config(vocab_size=len(tokenizer), d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=2, feed_forward_proj="gated-gelu",
                      dropout_rate=0.0, pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False)
    model = T5EncoderModel(config)
    heads = Heads(config.d_model, config.vocab_size)
    task = Task(tokenizer, seed, "train")
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * min(1, i / steps))))
    started = time.perf_counter()
    for step in range(steps):
        ids, mask, labels, pairs = task.batch(scenes)
        loss = heads.loss(ids, mask, model(input_ids=ids, attention_mask=mask).last_hidden_state, labels, pairs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(out / "text_encoder")
    for dtype in (torch.float32, torch.bfloat16):
        with quiet_transformers():
            written = T5EncoderModel.from_pretrained(out / "text_encoder", dtype=dtype, local_files_only=True, use_safetensors=True).eval()
        print(f"{str(dtype):15s}", report(written, heads, Task(tokenizer, seed + 1, "held_out"), judged))


@torch.no_grad()
def report(model, heads: Heads, task: Task, scenes: int) -> str:
    """Share of right attributes on captions of combinations never trained on, from the mean and from single tokens; and the geometry."""
    drawn = sample_scenes(scenes, task.generator, task.split)
    one, other, edited = (captions(s, task.random.randrange(1 << 30)) for s in (drawn, drawn, one_attribute_changed(drawn, task.random)))
    texts = one + other + edited + [task._damaged(text) for text in one]
    ids, mask = task.encode(texts)
    features = torch.cat([model(input_ids=i, attention_mask=m).last_hidden_state.float() for i, m in zip(ids.split(500), mask.split(500))])
    labels, mean, inside = task.labels(texts), masked_mean(features, mask), mask.bool()
    right = torch.stack([head(mean).argmax(-1) == label for head, label in zip(heads.pooled, labels)])
    flat, row = features[inside], inside.nonzero()[:, 0]
    right_tokens = torch.stack([head(flat).argmax(-1) == label[row] for head, label in zip(heads.tokens, labels)])
    right_words = heads.word(flat).argmax(-1) == ids[inside]
    a, b, c = mean[: 3 * scenes].split(scenes)
    near, far = (a - b).norm(dim=-1), (a - c).norm(dim=-1)
    captioned, damaged = right.float().split([3 * scenes, scenes], 1)
    return (f"attributes from the mean {captioned.mean():.5f} (worst {captioned.mean(1).min():.5f}; damaged texts {damaged.mean():.5f}), "
            f"from single tokens {right_tokens.float().mean():.5f}; words {right_words.float().mean():.5f}; "
            f"features' mean up to {flat.mean(0).abs().max():.2f}, std {flat.std(0).min():.2f} to {flat.std(0).max():.2f}; "
            f"distance of paraphrases {near.mean():.2f} (99 %: {near.quantile(.99):.2f}), "
            f"of one changed attribute {far.mean():.2f} (1 %: {far.quantile(.01):.2f})")


def one_attribute_changed(scenes, rng: random.Random):
    """The same scenes, each with one attribute moved to another of its values."""
    names = list(ATTRIBUTES)
    chosen = torch.tensor([rng.randrange(len(names)) for _ in range(len(scenes))])
    changed = {}
    for k, name in enumerate(names):
        by = torch.tensor([rng.randrange(1, len(ATTRIBUTES[name])) for _ in range(len(scenes))])
        changed[name] = (getattr(scenes, name) + by * (chosen == k)) % len(ATTRIBUTES[name])
    return scenes.replace(**changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the cascade's folder; text_encoder/ and tokenizer/ are written in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=96, help="per step; each gives three texts")
    args = parser.parse_args()
    train(args.out, args.seed, args.steps, args.scenes)


if __name__ == "__main__":
    main()
