"""Text to tokens: a frozen T5 through transformers, each prompt encoded once and kept on disk, so most runs never load the encoder.

The paper conditions every stage on T5-XXL (App. A.1). At 11 billion weights it is larger than the cascade and is needed for one sentence,
so it is loaded only when the cache lacks a prompt, and freed with `release()`. T5 never runs in float16: its activations overflow there
(a known fault of the v1.1 weights), hence bf16, or bitsandbytes' int8 and nf4 for the large matrices.
A cache file that cannot be used counts as absent, and a cache that cannot be written is done without.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import re
import tempfile
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.errors import NumericError, WeightsError

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
SMALL_BYTES, EDGE_BYTES = 64 << 20, 1 << 20


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """What the networks read. tokens [B, L, D] float32 or bf16, zero where mask [B, L] bool is False; no True at all: no text."""

    tokens: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 3 or self.mask.shape != self.tokens.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(f"TextEmbedding: want tokens [B, L, D] and mask [B, L] bool, got {[*self.tokens.shape]} and "
                             f"{[*self.mask.shape]} {self.mask.dtype}")

    def __getitem__(self, at) -> "TextEmbedding":
        """The prompts at an int (a batch of one), a slice, or a list or tensor of indices."""
        at = [at] if isinstance(at, int) else at         # a list, so that the batch stays and a wrong index raises
        return TextEmbedding(self.tokens[at], self.mask[at])

    def to(self, device=None, dtype: torch.dtype | None = None) -> "TextEmbedding":
        return TextEmbedding(self.tokens.to(device=device, dtype=dtype), self.mask.to(device=device))

    def null_like(self) -> "TextEmbedding":
        """No text, in this shape: what classifier-free guidance leads away from.   Source: Imagen, arXiv 2205.11487, zeroed embeddings."""
        return TextEmbedding(torch.zeros_like(self.tokens), torch.zeros_like(self.mask))

    @staticmethod
    def cat(embeddings: "list[TextEmbedding]") -> "TextEmbedding":
        """One batch of all, filled up to the longest."""
        if not embeddings:
            raise ValueError("embeddings: want at least one TextEmbedding, got none")
        lengths = [e.tokens.shape[1] for e in embeddings]
        gaps = [max(lengths) - length for length in lengths]
        return TextEmbedding(torch.cat([F.pad(e.tokens, (0, 0, 0, gap)) for e, gap in zip(embeddings, gaps)]),
                             torch.cat([F.pad(e.mask, (0, gap)) for e, gap in zip(embeddings, gaps)]))


class TextEncoder:
    """A T5 encoder with its disk cache. Nothing is loaded before a prompt is missing from the cache.

    source: a folder with `text_encoder/` and `tokenizer/` (a cascade), a plain transformers folder, or a hub id, `name/model` or
    `name/model@revision`; a folder wins over a hub id of the same name. Only safetensors are read.
    precision: fp32, bf16, int8 or nf4. max_tokens: longer prompts are cut, and `notes` says so.
    cache_dir: None is $XDG_CACHE_HOME/dreamix/text.
    Raises: ValueError for wrong arguments, WeightsError if the encoder is missing or unusable.
    """

    def __init__(self, source: str | Path, precision: str = "bf16", max_tokens: int = 256, device: str | torch.device = "cpu",
                 cache_dir: str | Path | None = None):
        if precision not in PRECISIONS:
            raise ValueError(f"precision: want one of {' '.join(PRECISIONS)} (T5 overflows in fp16), got {precision!r}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: want at least 1, got {max_tokens}")
        self.source, self.precision, self.max_tokens, self.device = source, precision, max_tokens, torch.device(device)
        self.cache_dir = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dreamix", "text")).expanduser()
        self.notes: list[str] = []
        self._folders = _local_folders(source)           # (encoder, tokenizer), or None: on the hub
        self._model = self._tokenizer = None

    def encode(self, prompts: list[str], batch_size: int = 1, cache: bool = True) -> TextEmbedding:
        """Embed prompts -> tokens [B, L, D] float32 and mask [B, L] on the encoder's device; L is the longest of these prompts.

        The empty prompt is allowed: one token that says the text has ended. batch_size is how many missing prompts run at once: at 1 the
        last bits of an embedding never depend on its neighbours; many short captions are faster at 256, best with cache=False (no files).
        Raises: ValueError unless prompts is a list of at least one str; WeightsError; NumericError if the encoder's output is not finite.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts: want a list of at least one str, got {repr(prompts)[:80]}")
        if batch_size < 1:
            raise ValueError(f"batch_size: want at least 1, got {batch_size}")
        texts = [_clean(prompt) for prompt in prompts]
        found = {text: self._read(text) if cache else None for text in dict.fromkeys(texts)}
        missing = sorted((text for text in found if found[text] is None), key=len)           # like lengths together: less padding
        for i in range(0, len(missing), batch_size):
            part = missing[i: i + batch_size]
            found.update(zip(part, self._run(part)))
            for text in part if cache else ():
                self._write(text, *found[text])
        for text, (_, length) in found.items():
            if length > self.max_tokens:
                self.notes.append(f"the prompt has {length} tokens; only the first {self.max_tokens} were used: {text[:60]!r}...")
        rows = [found[text][0].to(self.device, torch.float32)[None] for text in texts]
        return TextEmbedding.cat([TextEmbedding(row, torch.ones(row.shape[:2], dtype=torch.bool, device=self.device)) for row in rows])

    def release(self) -> None:
        """Free the encoder. The next missing prompt loads it again."""
        self._model = self._tokenizer = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[tuple[Tensor, int]]:
        """Per text its tokens [L, D] on the CPU in the encoder's dtype, and how many tokens it had before cutting."""
        if self._model is None:
            self._load()
        with quiet_transformers():
            lengths = [len(ids) for ids in self._tokenizer(texts)["input_ids"]]
            batch = self._tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(self.device)
            out = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        if not out.isfinite().all():
            raise NumericError(f"text encoder {self.source} in {self.precision}: its output is not finite for {texts[0][:60]!r}")
        return [(row[mask.bool()].cpu().contiguous(), length) for row, mask, length in zip(out, batch["attention_mask"], lengths)]

    def _load(self) -> None:
        folders = self._folders or _download(self.source)
        try:
            self._tokenizer, self._model = _load_t5(*folders, self.precision, self.device)
        except (torch.OutOfMemoryError, WeightsError):
            raise
        except Exception as error:                       # transformers raises anything at all for a damaged folder
            raise WeightsError(f"text encoder {self.source} in {self.precision}: {_one_line(error)}") from error

    @functools.cached_property
    def _identity(self) -> str:
        """What tells this encoder from another. A hub id stands for its content, so that the cache works without the weights."""
        return json.dumps([[_fingerprint(folder) for folder in self._folders] if self._folders else str(self.source),
                           self.precision, self.max_tokens])

    def cache_file(self, prompt: str) -> Path:
        """Where this prompt's embedding is kept."""
        return self.cache_dir / f"{hashlib.sha256((self._identity + chr(0) + _clean(prompt)).encode()).hexdigest()}.safetensors"

    def _read(self, text: str) -> tuple[Tensor, int] | None:
        path = self.cache_file(text)                     # outside: a missing encoder is an error, a missing file is not
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata, tokens = file.metadata(), file.get_tensor("tokens")
            return (tokens, int(metadata["length"])) if metadata["sha256"] == _digest(tokens) else None
        except Exception:                                # absent, cut short, not ours: encode again
            return None

    def _write(self, text: str, tokens: Tensor, length: int) -> None:
        with contextlib.suppress(OSError, safetensors.SafetensorError):      # a full disk or a read-only home costs time, not the run
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.cache_dir) as folder:
                save_file({"tokens": tokens}, Path(folder, "part"), {"sha256": _digest(tokens), "length": str(length)})
                os.replace(Path(folder, "part"), self.cache_file(text))      # readers see the whole file or none


def _load_t5(encoder: Path, tokenizer: Path, precision: str, device: torch.device):
    """(tokenizer, model) from local folders. The only place that loads an encoder."""
    kind = json.loads((encoder / "config.json").read_text()).get("model_type")
    if kind != "t5":                                     # relatives load with a warning and compute something else
        raise WeightsError(f"text encoder {encoder}: want model_type t5 in config.json, got {kind}")
    with quiet_transformers():
        from transformers import AutoTokenizer, T5EncoderModel

        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        model, report = T5EncoderModel.from_pretrained(encoder, dtype=dtype, local_files_only=True, use_safetensors=True,
                                                       output_loading_info=True)
        absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if absent:                                       # transformers would go on with random numbers there
            raise WeightsError(f"text encoder {encoder}: {len(absent)} weights are missing or of another shape, the first is {absent[0]}")
        if precision in ("int8", "nf4"):
            _quantize(model, precision, device)
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), model.to(device).eval().requires_grad_(False)


def _quantize(model: nn.Module, precision: str, device: torch.device) -> None:
    """Replace every Linear but `wo` by bitsandbytes' own, which quantizes as it moves to the device.

    Not through transformers' BitsAndBytesConfig, which refuses without a further package, accelerate. `wo` stays in bf16, as there:
    activations before it pass float16's range, in which int8 multiplies, and T5 casts them to the stored dtype, which for nf4 is uint8.
    """
    try:
        import bitsandbytes as bnb
    except Exception as error:                           # a wheel without this machine's libraries raises RuntimeError, not ImportError
        raise WeightsError(f"{precision} needs bitsandbytes, which does not import here: {_one_line(error)}") from error
    for name, old in list(model.named_modules()):
        if not isinstance(old, nn.Linear) or name.endswith("wo"):
            continue
        width = old.in_features, old.out_features
        if precision == "int8":
            new = bnb.nn.Linear8bitLt(*width, bias=False, has_fp16_weights=False, device="meta")
            new.weight = bnb.nn.Int8Params(old.weight.data, has_fp16_weights=False, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(*width, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        model.set_submodule(name, new.to(device))


@contextlib.contextmanager
def quiet_transformers():
    """No warnings, log lines or bars from transformers and bitsandbytes inside; their settings are restored after."""
    # sys.stderr is left alone: a log handler made while it points elsewhere would write there for ever
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        from transformers.utils import logging as bars  # sets its logger's level on import, so it comes first

        for logger in map(logging.getLogger, ("transformers", "bitsandbytes")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if bars.is_progress_bar_enabled():
            stack.callback(bars.enable_progress_bar)
            bars.disable_progress_bar()
        yield


def _download(source: str) -> tuple[Path, Path]:
    """The local snapshot (encoder, tokenizer) of a hub id, fetched unless HF_HUB_OFFLINE says not to."""
    from huggingface_hub import snapshot_download

    name, _, revision = str(source).partition("@")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    wanted = ["*.json", "model*.safetensors", "spiece.model"]
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, local_files_only=offline))
    except Exception as error:                           # no such name, no network, no permission, disk full
        raise WeightsError(f"text encoder {source}: neither a local folder nor to be had from the hub: {_one_line(error)}") from error
    return _check_folders(source, folder, folder)


def _local_folders(source: str | Path) -> tuple[Path, Path] | None:
    """The folders of encoder and tokenizer, checked; None for a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        parts = (folder / "text_encoder", folder / "tokenizer") if (folder / "text_encoder").is_dir() else (folder, folder)
        return _check_folders(source, *parts)
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?", str(source)):
        raise WeightsError(f"text encoder: want a folder or a hub id, got {str(source)!r}, which is neither")
    return None


def _check_folders(source, encoder: Path, tokenizer: Path) -> tuple[Path, Path]:
    if not (encoder / "config.json").is_file():
        raise WeightsError(f"text encoder {source}: no config.json in {encoder}")
    if not any(encoder.glob("*.safetensors")):
        raise WeightsError(f"text encoder {source}: no .safetensors in {encoder}; pickled weights (.bin) are not read, convert them first")
    if not any((tokenizer / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise WeightsError(f"text encoder {source}: want tokenizer.json or spiece.model in {tokenizer}, found neither")
    return encoder, tokenizer


def _fingerprint(folder: Path) -> str:
    """A hash of a folder's settings, weights and vocabulary.

    Files above 64 MiB count by size, time of change, and their first and last MiB: T5-XXL has up to 40 GB, and reading them for every
    command would cost more than the cache saves.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".model")):
            about = path.stat()
            digest.update(f"{path.name} {about.st_size} ".encode())
            with path.open("rb") as file:
                if about.st_size <= SMALL_BYTES:
                    digest.update(file.read())
                else:
                    first, _, last = file.read(EDGE_BYTES), file.seek(-EDGE_BYTES, os.SEEK_END), file.read(EDGE_BYTES)
                    digest.update(f"{about.st_mtime_ns} ".encode() + first + last)
    except OSError as error:
        raise WeightsError(f"text encoder {folder}: {_one_line(error)}") from error
    return digest.hexdigest()


def _clean(prompt: str) -> str:
    """Control characters out, white space to single blanks. Lone surrogates (undecodable bytes in argv) too: no tokenizer takes them."""
    return " ".join("".join(c for c in prompt if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")).split())


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
