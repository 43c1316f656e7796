"""What hours rest on. Every number here is a guess, or measured where it says so; ``ptl plan`` prints those it used."""

from dataclasses import dataclass

KNOWN_ROWS = {
    "HuggingFaceH4/MATH-500": 500,
    "openai/gsm8k": 1319,
    "google-research-datasets/mbpp": 500,
}
"""Of test splits."""
UNKNOWN_ROWS = 1000


@dataclass(frozen=True)
class Assumptions:
    """Seconds, shares and speeds; those of a GPU unless they say otherwise."""

    mfu: float = 0.35
    """Share of a GPU's peak that training reaches, recomputation not counted."""
    reading_share: float = 0.5
    """Share of the peak of passes without gradients: 0.58 was measured on one H200 (docs/results/cost.md)."""
    bandwidth_share: float = 0.6
    """Share of a GPU's memory bandwidth that decoding reaches."""
    decoding_step_seconds: float = 0.004
    """Of scheduling and sampling, in every step of vLLM."""
    mean_response_share: float = 0.3
    """Mean length of a response as a share of the longest."""
    mean_prompt_tokens: int = 200
    """At most the longest."""
    mean_document_share: float = 0.4
    """Mean length of what continued pre-training and scoring read, as a share of the longest."""
    disk_gb_per_second: float = 1.0
    start_seconds: float = 60.0
    """Of a stage's process, its Ray workers and their imports."""
    engine_start_seconds: float = 90.0
    """Of vLLM: loading, compiling, capturing graphs."""
    step_seconds: float = 10.0
    """Of an RL step beside its passes: rewards, data, offloading, vLLM's going to sleep and waking."""
    scoring_overhead: float = 1.35
    """Of hooks and sums, over the bare pass: 1.28 to 1.37 measured on one H200."""
    moments_overhead: float = 3.2
    """The same with second moments for obs: 3.16 measured."""
    order_seconds: float = 2.1
    """Of the order of removal in a block of 18944 channels, a quarter of them: measured on one H200."""
    solve_seconds: float = 0.75
    """Of such a block's new weights: what is left of 25.3 s for 28 blocks once their passes are taken off."""

    def lines(self, is_cpu: bool) -> list[str]:
        """For the reader."""
        peak = "of 90 GFLOP/s a core" if is_cpu else "of the GPU's bfloat16 peak"
        return [
            f"responses of {self.mean_response_share:.0%} of the longest on average, prompts of "
            f"{self.mean_prompt_tokens} tokens at most, documents of {self.mean_document_share:.0%} of theirs",
            f"training at {self.mfu:.0%} {peak}, reading at {self.reading_share:.0%}, decoding at "
            f"{self.bandwidth_share:.0%} of memory bandwidth",
            f"{self.start_seconds:.0f} s to start a stage, {self.engine_start_seconds:.0f} s a vLLM engine, "
            f"{self.step_seconds:g} s in an RL step beside its passes; disk {self.disk_gb_per_second:g} GB/s",
        ]


CPU = Assumptions(
    mfu=0.6,
    reading_share=0.6,
    bandwidth_share=0.6,
    decoding_step_seconds=0.015,
    mean_response_share=0.5,
    mean_document_share=0.5,
    start_seconds=12.0,
    engine_start_seconds=8.0,
    step_seconds=2.0,
)
"""Of two CPU cores; stages' starts are the demo's (docs/results/demo.md)."""
