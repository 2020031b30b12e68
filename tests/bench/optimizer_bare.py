"""The baseline without the optimizer: transformers, the builder and the runtime, each used directly."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

from bench.comparison import Place

# The steps of the model cards and of the runtime's guide.
_DEQUANTIZE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
source, target = Path(sys.argv[1]), sys.argv[2]
where = {"gguf_file": source.name, "local_files_only": True}
AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(target)
config = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, quantization_config=config, **where)
model.save_pretrained(target)
"""
_ASK = """
import sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
question = '[{"role": "user", "content": "What is the capital of France?"}]'
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
params = og.GeneratorParams(model)
tokens = tokenizer.encode(prompt)
params.set_search_options(do_sample=False, max_length=len(tokens) + 24)
generator = og.Generator(model, params)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(tokens):]).strip().splitlines()[0])
assert not [name for name in sys.modules if name.startswith("slmops")]
"""


async def dequantize_and_build(source: Path, place: Place) -> dict[str, float]:
    """Returns the seconds of `dequantize` and of `builder` making its int4, each in a separate process."""
    full = place.scratch / "full"
    dequantize, _ = await _timed(place, "dequantize", "-c", _DEQUANTIZE, source, full)
    builder = ("-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu")
    places = ("-i", full, "-o", place.scratch / "int4", "-c", place.scratch / "int4-cache")
    options = ("--extra_options", "accuracy_level=4", "block_size=32")
    build, _ = await _timed(place, "the builder's int4", *builder, *places, *options)
    return {"dequantize": dequantize, "builder": build}


async def ask(variant: Path, place: Place) -> str:
    """Returns the answer of a process that uses only onnxruntime-genai and the unchanged folder."""
    return (await _timed(place, "the runtime alone", "-c", _ASK, variant))[1].splitlines()[-1]


async def _timed(place: Place, name: str, *arguments: str | Path) -> tuple[float, str]:
    place.step.progress(f"bare tools: {name}")
    start = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        said, _ = await process.communicate()
    finally:
        if process.returncode is None:  # interrupted
            process.kill()
            await process.wait()
    text = said.decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{text[-2000:]}")
    return round(time.perf_counter() - start, 2), text
