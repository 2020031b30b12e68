"""Typical pairs of versions: a fine-tuned model, a merged adapter, a removed layer. They are made once and kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.comparison import Place

from slmops.contracts.descriptor import digest_of
from slmops.contracts.recipe import PassSpec, Recipe
from slmops.optimizer.intake import materialize
from slmops.optimizer.measure.evaluate import Fidelity, fidelity, reference
from slmops.optimizer.recipes.library import recipe_named
from slmops.optimizer.recipes.pipeline import Pipeline
from slmops.optimizer.recipes.spec import JobSpec

STEPS, RATE, ADAPTER_RATE = 30, 2e-5, 2e-4
_BATCH, _TOKENS = 4, 256


@dataclass(frozen=True)
class Pair:
    """Two onnxruntime-genai folders. `of` is the float model of which the target is a variant."""

    name: str
    base: Path
    target: Path
    of: Path


class Pairs:
    """The float models and their variants below `place.cache`."""

    def __init__(self, source: Path, place: Place) -> None:
        self._source, self._place = source, place
        self._folder = place.cache / "delta"

    def made(self, only: str | None = None) -> Iterator[Pair]:
        """Yields all pairs, or those whose names begin with a letter of `only`. Each is made when needed."""
        stock, int8, ours = recipe_named("stock-int4"), recipe_named("int8"), recipe_named("int4")
        pruned = Recipe(name="pruned", passes=(PassSpec(pass_="prune-depth", params={"layers": 1}), *stock.passes))
        plain, variant = self._reference, self._variant
        kinds: dict[str, Callable[[], tuple[Path, Path, Path]]] = {
            "a fine-tuned, stock int4": lambda: (variant(plain(), stock), variant(self._tuned(), stock), self._tuned()),
            "b the same, anchored": lambda: self._anchored(variant(plain(), stock)),
            "c adapter merged, stock int4": lambda: (variant(plain(), stock), variant(self._adapted(), stock), plain()),
            "d fine-tuned, int8": lambda: (variant(plain(), int8), variant(self._tuned(), int8), self._tuned()),
            "e a layer pruned, stock int4": lambda: (variant(plain(), stock), variant(plain(), pruned), plain()),
            "f unrelated, stock int4": lambda: (variant(plain(), stock), variant(self._unrelated(), stock), plain()),
            "g fine-tuned, our int4": lambda: (variant(plain(), ours), variant(self._tuned(), ours), self._tuned()),
            "h our int4, anchored": lambda: self._anchored(variant(plain(), ours)),
        }
        for name, make in kinds.items():
            if not only or name[0] in only:
                yield Pair(name, *make())

    def fidelity(self, pair: Pair) -> Fidelity:
        """Measures the target against its float model on the bundled text."""
        self._place.step.progress(f"{pair.name}: measuring against its own float32")
        return fidelity(pair.target, reference(pair.of))

    def _reference(self) -> Path:
        return self._model("reference", partial(materialize, self._source))

    def _tuned(self) -> Path:
        self._reference()
        return self._model("tuned", self._tune)

    def _adapted(self) -> Path:
        self._reference()
        return self._model("adapted", self._adapt)

    def _unrelated(self) -> Path:
        self._reference()
        return self._model("unrelated", _unrelated)

    def _model(self, name: str, make: Callable[[Path], object]) -> Path:
        out = self._folder / "models" / name
        if not out.exists():
            self._place.step.progress(f"making the model {name!r}")
            part = out.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.parent.mkdir(parents=True, exist_ok=True)
            make(part)
            os.replace(part, out)
        return out

    def _variant(self, model: Path, recipe: Recipe, predecessor: Path | None = None) -> Path:
        self._place.step.progress(f"{model.name}: {recipe.name}")
        work = self._folder / "work" / model.name
        pipeline = Pipeline(model, work, JobSpec(recipes=(recipe,), predecessor=predecessor), lambda *_: None)
        return pipeline.variant(recipe, lambda _: None)

    def _anchored(self, predecessor: Path) -> tuple[Path, Path, Path]:
        params = {"predecessor": digest_of(str(predecessor.name).encode())}
        recipe = Recipe(name="anchored", passes=(PassSpec(pass_="anchor", params=params),))
        model = self._tuned()
        return predecessor, self._variant(model, recipe, predecessor), model

    def _tune(self, out: Path) -> None:
        model = _loaded(self._folder / "models" / "reference")
        _train(model, self._tokens(), RATE)
        self._save(model, out)

    def _adapt(self, out: Path) -> None:
        from peft import LoraConfig, get_peft_model

        model: Any = _loaded(self._folder / "models" / "reference")
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
        adapted: Any = get_peft_model(model, config)
        _train(adapted, self._tokens(), ADAPTER_RATE)
        self._save(adapted.merge_and_unload(), out)

    def _save(self, model: Any, out: Path) -> None:
        shutil.copytree(self._folder / "models" / "reference", out, ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(out)

    def _tokens(self) -> Any:
        """Returns tokens [batches, sequences, positions] of Python's language reference."""
        from pydoc_data.topics import topics

        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._folder / "models" / "reference", local_files_only=True)
        text = "\n\n".join(topics[name] for name in sorted(topics))[: STEPS * _BATCH * _TOKENS * 5]
        found = tokenizer(text, return_tensors="pt").input_ids[0]
        return torch.as_tensor(found[: STEPS * _BATCH * _TOKENS]).reshape(STEPS, _BATCH, _TOKENS)


def _loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def _train(model: Any, batches: Any, rate: float) -> None:
    import torch

    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
        adam.zero_grad()


def _unrelated(out: Path) -> None:
    """Makes an unrelated model of about the same size with random weights, for which no base helps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**shape, num_hidden_layers=28, vocab_size=49152, tie_word_embeddings=True)
    reference_folder = out.parent / "reference"
    shutil.copytree(reference_folder, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    LlamaForCausalLM(config).save_pretrained(out)
