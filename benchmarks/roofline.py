"""What an H100 allows by its arithmetic and its memory: FLOPs, bytes and time of each phase, for docs/kernels.md.

    python benchmarks/roofline.py

No phase can be faster than its FLOPs over the peak, or than its bytes over the bandwidth; the larger of the two is the
time here. Nothing is measured. One teacher of the student's own width, 16-bit operands, reverse KL.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_kernels.aot import SIZES
from opd_kernels.triton_backend import DETERMINISTIC_CHUNK_TOKENS, default_chunk_tokens

# H100 SXM: dense bfloat16, HBM3.
PEAK_FLOPS = 989e12
BYTES_PER_S = 3.35e12
TOKENS = 4096


@dataclass(frozen=True)
class Phase:
    """One kernel or GEMM, in all launches of it."""

    name: str
    flops: float
    bytes: float
    seconds: float

    @classmethod
    def once(cls, name: str, flops: float, bytes: float) -> Phase:
        return cls(name, flops, bytes, max(flops / PEAK_FLOPS, bytes / BYTES_PER_S))

    @property
    def bound(self) -> str:
        return "memory" if self.bytes / BYTES_PER_S > self.flops / PEAK_FLOPS else "FLOPs"


def phases(C: int, V: int, D: int) -> list[Phase]:
    """Of a chunk of C rows. Logits are float32, the gradient to them 16 bits wide, the gradient to the head float32.

    The elementwise work is counted as 0 FLOPs: it is some tens of operations for every 8 bytes.
    """
    gemm, head, hidden, logits = 2.0 * C * V * D, 2.0 * V * D, 2.0 * C * D, 4.0 * C * V
    return [
        Phase.once("project the student", gemm, head + hidden + logits),
        Phase.once("project the teacher", gemm, head + hidden + logits),
        Phase.once("statistics", 0.0, 2 * logits),
        Phase.once("gradient to the logits", 0.0, 2 * logits + logits / 2),
        Phase.once("gradient to the hidden states", gemm, logits / 2 + head + 2 * hidden),
        Phase.once("gradient to the head", gemm, logits / 2 + hidden + 2 * (4.0 * V * D)),
    ]


def chunked(tokens: int, C: int, V: int, D: int) -> list[Phase]:
    """The same, summed over the chunks of ``tokens``."""
    sizes = [C] * (tokens // C) + [tokens % C] * (tokens % C > 0)
    by_chunk = [phases(size, V, D) for size in sizes]
    return [
        Phase(
            same[0].name,
            sum(phase.flops for phase in same),
            sum(phase.bytes for phase in same),
            sum(phase.seconds for phase in same),
        )
        for same in zip(*by_chunk, strict=True)
    ]


def seconds(tokens: int, C: int, V: int, D: int) -> float:
    return sum(phase.seconds for phase in chunked(tokens, C, V, D))


def fully_fused_seconds(tokens: int, V: int, D: int) -> float:
    """Logits never leave the chip: all are projected for the normalisers and again for the gradient, six GEMMs in all.

    At its best: no memory traffic at all, every GEMM at the peak.
    """
    return 6 * 2.0 * tokens * V * D / PEAK_FLOPS


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown, the first row being the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def by_phase() -> str:
    rows = [("phase", *(f"{name}, C = {default_chunk_tokens(V):,}" for name, (V, _) in SIZES.items()))]
    columns = [chunked(TOKENS, default_chunk_tokens(V), V, D) for V, D in SIZES.values()]
    for same in zip(*columns, strict=True):
        cells = [
            f"{phase.flops / 1e12:.1f} TFLOP, {phase.bytes / 1e9:.1f} GB: {1e3 * phase.seconds:.2f} ms ({phase.bound})"
            for phase in same
        ]
        rows.append((same[0].name, *cells))
    rows.append(("sum", *(f"{1e3 * sum(phase.seconds for phase in column):.1f} ms" for column in columns)))
    return table(rows)


def by_chunk() -> str:
    chunks = (128, 256, 512, 896, 1024, 2048, 4096)
    rows = [("ms for 4,096 tokens", *(f"C = {C:,}" for C in chunks), "buffers at C = 1,024")]
    for name, (V, D) in SIZES.items():
        times = [f"{1e3 * seconds(TOKENS, C, V, D):.1f}" for C in chunks]
        rows.append((name, *times, f"{10 * 1024 * V / 1e9:.1f} GB"))
    return table(rows)


def by_design() -> str:
    """Designs, at their best."""
    names = ("as it is", "projected again in backward", "logits never written", "batch-invariant")
    rows = [("ms for 4,096 tokens", *names)]
    for name, (V, D) in SIZES.items():
        C = default_chunk_tokens(V)
        now, projections = seconds(TOKENS, C, V, D), chunked(TOKENS, C, V, D)[:2]
        again = now + sum(phase.seconds for phase in projections)
        times = (now, again, fully_fused_seconds(TOKENS, V, D), seconds(TOKENS, DETERMINISTIC_CHUNK_TOKENS, V, D))
        rows.append((name, *(f"{1e3 * time:.1f}" for time in times)))
    return table(rows)


def main() -> None:
    for name, (V, D) in SIZES.items():
        print(f"{name}: V = {V:,}, D = {D:,}")
    print(f"\n{by_phase()}\n\n{by_chunk()}\n\n{by_design()}")


if __name__ == "__main__":
    main()
