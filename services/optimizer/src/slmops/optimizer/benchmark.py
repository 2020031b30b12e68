"""Speed and memory of a genai folder, measured in a process of its own so that the memory is the variant's."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from slmops.contracts.errors import OptimizationFailed

PROMPT = "The keeper of the lighthouse wrote in his book every evening: the wind, the ships and the birds. One night"
NEW_TOKENS = 64
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Benchmark:
    """One greedy sequence of `NEW_TOKENS` after `PROMPT`, second run in its process."""

    tokens_per_s: float
    ttft_s: float
    peak_rss_bytes: int


def benchmark(folder: Path) -> Benchmark:
    """Raises `OptimizationFailed` if the variant does not load or generate."""
    command = [sys.executable, "-m", "slmops.optimizer.benchmark", str(folder)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except subprocess.SubprocessError as error:
        tail = str(getattr(error, "stderr", None) or error)[-500:]
        raise OptimizationFailed(f"the variant does not generate: {tail}", where=str(folder)) from error
    return Benchmark(**json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path) -> Benchmark:
    """Generate in this process."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    prompt = og.Tokenizer(model).encode(PROMPT)
    _generate(model, prompt, 2)  # the first run pays for lazy set-up, as a gateway's probe does
    ttft_s, rest_s = _generate(model, prompt, NEW_TOKENS)
    return Benchmark((NEW_TOKENS - 1) / rest_s, ttft_s, peak_rss_bytes())


def _generate(model: object, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and for the rest. `min_length` keeps an early end of text from shortening the run."""
    import onnxruntime_genai as og

    params = og.GeneratorParams(model)
    length = len(prompt) + new_tokens
    params.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        generator.generate_next_token()
    return first - start, time.perf_counter() - first


def peak_rss_bytes() -> int:
    """Of this program. Linux's `ru_maxrss` survives exec and would report the process that started us."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1])))))
