"""Drafts that the model checks: those it rejects leave nothing behind, since their positions are written again.

In a file of its own, which must run last: the drafter imports numba, and with it in the process vLLM 0.32 cannot start another
engine (its search for kernels meets a module of numba's that it cannot look into).
"""

from conftest import Checkpoint, engine, metric, random_checkpoint, tokens


def test_rejected_drafts(tmp_path):
    checkpoint = Checkpoint(random_checkpoint(tmp_path / "c", plt_num_loops=3))
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(checkpoint.folder, speculative_config=drafts) as llm:
        prompt = checkpoint.prompt(20) * 5
        (output,) = llm.generate(tokens(prompt), checkpoint.greedy(40), use_tqdm=False)
        checkpoint.check_by_reference(prompt, output.outputs[0])
        drafted, accepted = (metric(llm, f"vllm:spec_decode_num_{what}_tokens") for what in ("draft", "accepted"))
        assert drafted > accepted
